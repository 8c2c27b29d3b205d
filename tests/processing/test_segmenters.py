"""Every segmenter's real classes at small random size; scripted parts where the answer is known."""

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_models import TINY, tiny_image, tiny_processor

from firsthand.processing import segmenter_grounded as grounded
from firsthand.processing import segmenters
from firsthand.processing.masks import encode
from firsthand.processing.segmenter_vision_logits import VisionLogits, to_pixels
from firsthand.processing.segmenters import Segment, annotated_segment, deduplicate, load_segmenter

sys.path.insert(0, str(Path(__file__).parent))
import tiny_segmenters as tiny  # noqa: E402

IMAGE = tiny_image()  # 80 x 60
PHRASES = ["a dog", "the red cup", "ball"]
BOXES = [(5.0, 5.0, 40.0, 30.0), (10.0, 20.0, 70.0, 55.0)]


def rectangle(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask = np.zeros((60, 80), bool)
    mask[y0:y1, x0:x1] = True
    return mask


@pytest.fixture(params=["grounding-dino", "mm-grounding-dino"])
def detector(request, tmp_path):
    return grounded.GroundingDetector(*tiny.detector(request.param, tmp_path), 0.0)


def test_a_box_has_the_best_score_of_its_phrases_own_tokens(detector):
    found = detector(IMAGE, PHRASES)
    text = "a dog. the red cup. ball."
    inputs = detector.processor(images=IMAGE, text=text, return_tensors="pt")
    with torch.no_grad():
        outputs = detector.model(**inputs)
    words = detector.processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    score = outputs.logits[0].sigmoid()
    for number, own in enumerate((["a", "dog"], ["the", "red", "cup"], ["ball"])):
        tokens = [i for i, word in enumerate(words) if word in own]
        assert len(tokens) == len(own)
        expected = sorted(score[:, tokens].amax(-1).tolist(), reverse=True)
        got = [one.score for one in found if one.phrase == number]
        assert got == pytest.approx(expected, abs=1e-5)
    for one in found:
        assert 0 <= one.box[0] <= one.box[2] <= 80 and 0 <= one.box[1] <= one.box[3] <= 60


def test_boxes_are_those_of_transformers(detector):
    inputs = detector.processor(images=IMAGE, text="a dog.", return_tensors="pt")
    with torch.no_grad():
        outputs = detector.model(**inputs)
    stock = detector.processor.post_process_grounded_object_detection(
        outputs, inputs["input_ids"], threshold=0.0, text_threshold=0.0, target_sizes=[(60, 80)]
    )[0]["boxes"]
    limits = torch.tensor([80.0, 60, 80, 60])
    stock = {tuple(b) for b in stock.clamp(min=0).minimum(limits).mul(100).round().tolist()}
    ours = {tuple(round(x * 100) for x in one.box) for one in detector(IMAGE, ["a dog"])}
    assert ours == stock


def test_long_lists_of_phrases_take_several_texts(detector):
    many = ["a red dog", "the small cup", "two ball", "a woman on a car", "the house", "a tree"]
    many += ["the two small red ball", "a man of the house"]
    texts = detector._texts(many)
    assert len(texts) > 1 and sum(len(spans) for _, _, spans in texts) == len(many)
    for start, text, spans in texts:
        assert len(detector.processor.tokenizer(text).input_ids) <= 32
        assert [text[a:b] for a, b in spans] == many[start : start + len(spans)]
    found = detector(IMAGE, many)
    assert {one.phrase for one in found} == set(range(len(many)))


@pytest.mark.parametrize("build", [lambda: grounded.SamMasks(*tiny.sam()), None])
def test_masks_are_of_the_image_and_drawn_in_one_pass(build):
    masks = build() if build else grounded.Sam2Masks(tiny.sam2())
    passes = []
    encoder = masks.model.vision_encoder
    encoder.register_forward_hook(lambda *_: passes.append(1))
    drawn = masks(IMAGE, BOXES)
    assert [m.shape for m in drawn] == [(60, 80)] * 2 and drawn[0].dtype == bool
    assert len(passes) == 1
    again = masks(IMAGE, BOXES[1:])
    assert np.array_equal(drawn[1], again[0])  # a box's mask does not depend on the others


def test_the_best_hypothesis_is_taken():
    drawn = torch.arange(2 * 3).view(2, 3, 1, 1)
    best = grounded._best(drawn, torch.tensor([[0.1, 0.9, 0.2], [0.5, 0.2, 0.1]]))
    assert [int(m.item()) for m in best] == [1, 3]


def test_sam3_encodes_the_image_once(tmp_path):
    segmenter = grounded.Sam3(tiny.sam3(), tiny.bert_tokenizer(tmp_path), 0.0)
    passes = []
    segmenter.model.vision_encoder.register_forward_hook(lambda *_: passes.append(1))
    found = segmenter.segment(IMAGE, ["a dog", "the red cup"])
    assert len(passes) == 1
    for one in found:
        assert one.mask.shape == (60, 80) and len(one.boxes) == 6 and 0 < one.score < 1
    segmenter.threshold = 1.0
    assert segmenter.segment(IMAGE, ["a dog"]) == [None]


def test_segment_anything_runs_on_its_own_modules(monkeypatch):
    """The package's modules at small size; the four names that it takes from torchvision, which
    does not load beside a CPU build of torch, are not used on this path and stand empty."""
    names = {
        "torchvision": [],
        "torchvision.ops": [],
        "torchvision.ops.boxes": ["batched_nms", "box_area"],
        "torchvision.transforms": [],
        "torchvision.transforms.functional": ["resize", "to_pil_image"],
    }
    for name, attributes in names.items():
        module = ModuleType(name)
        for attribute in attributes:
            setattr(module, attribute, None)
        monkeypatch.setitem(sys.modules, name, module)
    package = pytest.importorskip("segment_anything.modeling")
    torch.manual_seed(0)
    sam = package.Sam(
        package.ImageEncoderViT(
            img_size=64, patch_size=16, embed_dim=16, depth=1, num_heads=2, out_chans=16
        ),
        package.PromptEncoder(16, (4, 4), (64, 64), 16),
        package.MaskDecoder(
            transformer_dim=16,
            transformer=package.TwoWayTransformer(
                depth=1, embedding_dim=16, num_heads=2, mlp_dim=16
            ),
        ),
    )
    drawn = grounded.SegmentAnythingMasks(sam)(IMAGE, BOXES)
    assert [m.shape for m in drawn] == [(60, 80)] * 2 and drawn[0].dtype == bool
    for name in [n for n in sys.modules if n.startswith("segment_anything")]:
        monkeypatch.delitem(sys.modules, name)


def test_segment_anything_says_what_it_needs(monkeypatch):
    with pytest.raises(ValueError, match="vit_h, vit_l or vit_b"):
        grounded.load_segment_anything("weights.pth")
    monkeypatch.setitem(sys.modules, "segment_anything", None)
    with pytest.raises(ImportError, match=r"firsthand\[segment\].*grounding-dino\+sam"):
        grounded.load_segment_anything("sam_vit_b_01ec64.pth")


def test_instances_are_united_and_equal_boxes_drawn_once():
    asked = []

    def find(image, phrases):
        a, b, c = (0.0, 0.0, 20.0, 20.0), (40.0, 0.0, 60.0, 20.0), (0.0, 0.0, 20.0, 20.1)
        return [grounded.Found(0, a, 0.9), grounded.Found(0, b, 0.5), grounded.Found(2, c, 0.4)]

    def draw(image, boxes):
        asked.append(boxes)
        return [rectangle(*(int(x) for x in box)) for box in boxes]

    segmenter = grounded.Detected("x", find, draw)
    dogs, nothing, other = segmenter.segment(IMAGE, PHRASES)
    assert len(asked[0]) == 2 and nothing is None
    assert np.array_equal(dogs.mask, rectangle(0, 0, 20, 20) | rectangle(40, 0, 60, 20))
    assert (dogs.score, other.score) == (0.9, 0.4) and len(dogs.boxes) == 2
    assert np.array_equal(other.mask, rectangle(0, 0, 20, 20))
    assert segmenter.segment(IMAGE, []) == []


box = st.tuples(*[st.integers(0, 30)] * 4).map(
    lambda b: (float(b[0]), float(b[1]), float(b[0] + b[2] + 1), float(b[1] + b[3] + 1))
)


@given(st.lists(box, max_size=8))
def test_unique_boxes_cover_all(boxes):
    kept, place = grounded.unique_boxes(boxes)
    assert len(place) == len(boxes)
    for at, wanted in zip(place, boxes, strict=True):
        assert kept[at] == wanted or grounded.box_iou(kept[at], wanted) > 0.95
    for i, one in enumerate(kept):
        assert all(grounded.box_iou(one, other) <= 0.95 for other in kept[:i])


@given(box, box)
def test_box_iou_is_that_of_pixels(one, other):
    masks = [np.zeros((70, 70), bool) for _ in range(2)]
    for mask, (x0, y0, x1, y1) in zip(masks, (one, other), strict=True):
        mask[int(y0) : int(y1), int(x0) : int(x1)] = True
    assert grounded.box_iou(one, other) == pytest.approx(segmenters.mask_iou(*masks))


def test_equal_masks_are_shared():
    first = Segment(rectangle(0, 0, 40, 40), 0.9, [(0.0, 0.0, 40.0, 40.0)])
    nearly = Segment(rectangle(0, 0, 40, 39), 0.5, [(0.0, 0.0, 40.0, 39.0)])
    other = Segment(rectangle(40, 0, 60, 40), 0.5, [])
    shared = deduplicate([first, None, nearly, other])
    assert shared[2].mask is first.mask and shared[2].score == 0.5 and shared[1] is None
    assert shared[3] is other
    assert deduplicate([first, nearly], iou=0.99)[1] is nearly


def test_annotations_answer_by_name():
    dog, cup = rectangle(0, 0, 20, 20), rectangle(40, 0, 60, 20)
    record = {
        "objects": [
            {"noun": "dog", "mask": encode(dog)},
            {"noun": "dog", "mask": encode(cup)},
            {"noun": "hot dog", "mask": encode(cup)},
            {"noun": "tree", "mask": None},
        ]
    }
    dogs, hot, tree, other = annotated_segment(record, ["The dog", "a hot dog", "tree", "underdog"])
    assert np.array_equal(dogs.mask, dog | cup) and len(dogs.boxes) == 2
    assert np.array_equal(hot.mask, cup) and hot.boxes == [(40.0, 0.0, 60.0, 20.0)]
    assert tree is None and other is None
    turns = {"turns": [{"expressions": [{"text": "the cup", "mask": encode(cup)}]}]}
    assert np.array_equal(annotated_segment(turns, ["the cup"])[0].mask, cup)
    with pytest.raises(ValueError, match="carries no masks"):
        annotated_segment({"objects": []}, ["dog"])


def test_unknown_segmenters_are_refused():
    with pytest.raises(ValueError, match="segmenter is 'sam9'.*annotated, sam3, grounding"):
        load_segmenter("sam9")
    with pytest.raises(ValueError, match="threshold is 3"):
        load_segmenter("vision-logits", model=None, processor=None, threshold=3)


@pytest.mark.parametrize("family", sorted(TINY))
def test_vision_logits_on_every_family(family):
    model, processor = TINY[family](), tiny_processor(family)
    segmenter = VisionLogits(model, processor, floor=0.0)
    maps = segmenter.word_maps(IMAGE)
    assert torch.allclose(maps.sum(-1), torch.ones(maps.shape[:2]), atol=1e-4)
    (found,) = segmenter.segment(IMAGE, ["the red dog"])
    soft = segmenter.soft_map(IMAGE, {"dog"}, maps)
    assert soft.shape == found.mask.shape == (60, 80)
    assert np.array_equal(found.mask, soft >= 0.3 * soft.max())
    assert found.score == pytest.approx(soft[found.mask].mean())
    segmenter.floor = 1.0
    assert segmenter.segment(IMAGE, ["the red dog", "running"]) == [None, None]


def test_saliency_sharpens_vision_logits():
    salient = rectangle(10, 10, 30, 30)
    model, processor = TINY["llava"](), tiny_processor("llava")
    sharp = VisionLogits(model, processor, lambda image: salient * 0.9, floor=0.0, threshold=0.0)
    (found,) = sharp.segment(IMAGE, ["dog"])
    assert np.array_equal(found.mask, salient) and found.boxes == [(10.0, 10.0, 30.0, 30.0)]
    nothing = VisionLogits(model, processor, lambda image: salient * 0.0, floor=0.0)
    assert nothing.segment(IMAGE, ["dog"]) == [None]


@pytest.mark.parametrize("size", [(80, 60), (60, 80), (50, 50)])
def test_pixels_that_the_model_did_not_see_are_zero(size):
    ones = torch.ones(4, 4)
    assert np.allclose(to_pixels(ones, size, "resize"), 1)
    assert np.allclose(to_pixels(ones, size, "pad"), 1)
    seen = to_pixels(ones, size, "center_crop")
    assert seen.shape == size[::-1] and seen.sum() == pytest.approx(min(size) ** 2)


def test_a_corner_stays_in_its_corner():
    grid = torch.zeros(4, 4)
    grid[0, 3] = 1
    there = np.unravel_index(to_pixels(grid, (80, 60), "resize").argmax(), (60, 80))
    assert there[0] < 15 and there[1] >= 60
    assert Image.fromarray(to_pixels(grid, (80, 60), "resize")).size == (80, 60)
