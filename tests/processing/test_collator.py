"""Vision labels lie where masks lie, and only answers are learnt; FiVL's own loop is the oracle."""

import numpy as np
import pytest
from tiny_models import (
    PARTIAL,
    TINY,
    tiny_image,
    tiny_llava_config,
    tiny_processor,
    tiny_tokenizer,
)
from transformers import LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from firsthand.modeling.families import image_grids, image_token_id
from firsthand.processing.collator import IGNORE, VisionLabelCollator, word_token
from firsthand.processing.masks import decode, encode, frame_of, patch_coverage

SIZE = (80, 60)
GRID = (4, 4)  # of the tiny LLaVA


def expression(noun: str, x0: int, y0: int, x1: int, y1: int) -> dict:
    """A noun and the rectangle that it covers, in pixels of an 80 x 60 image."""
    mask = np.zeros(SIZE[::-1], bool)
    mask[y0:y1, x0:x1] = True
    return {"text": f"the {noun}", "nouns": [noun], "mask": encode(mask)}


def sample_of(*expressions: dict, answer: str = "a dog top left.", name: str = "s") -> dict:
    turns = [
        {"question": "What is in the image?", "answer": answer, "expressions": list(expressions)}
    ]
    return {"id": name, "image": tiny_image(), "turns": turns}


@pytest.fixture(scope="module", params=sorted(TINY))
def parts(request):
    return tiny_processor(request.param), TINY[request.param]().config


def token(word: str) -> int:
    return word_token(tiny_tokenizer(), word)


def test_a_word_starts_with_its_space():
    tokenizer = tiny_tokenizer()
    for word in ("dog", "cup"):
        assert token(word) == tokenizer(f" {word}", add_special_tokens=False).input_ids[0]
        assert tokenizer.decode([token(word)]).startswith(f" {word[0]}")
    assert tokenizer.decode([token("zebra")]) == "z"  # the space alone would say nothing


def test_labels_lie_where_the_mask_lies(parts):
    processor, config = parts
    collator = VisionLabelCollator(processor, config, max_area=0.5)
    batch = collator([sample_of(expression("dog", 0, 0, 40, 30))])  # the upper left quarter
    ((rows, columns),) = image_grids(config, batch)
    expected = np.full((rows, columns), IGNORE)
    expected[: rows // 2, : (columns + 1) // 2] = token("dog")  # half of a cell is enough
    on_image = batch["input_ids"][0] == image_token_id(config)
    assert batch["vision_labels"][0, on_image].tolist() == expected.ravel().tolist()
    assert (batch["vision_labels"][0, ~on_image] == IGNORE).all()


def test_only_answers_and_their_ends_are_learnt(parts):
    processor, config = parts
    collator = VisionLabelCollator(processor, config)
    long, short = sample_of(answer="a dog top left, a cup center."), sample_of(answer="No.")
    turns = [{"question": "Is there a dog?", "answer": "Yes.", "expressions": None}]
    long["turns"] = long["turns"] + turns
    batch = collator([long, short])
    tokenizer = processor.tokenizer
    for row, answers in enumerate((["a dog top left, a cup center.", "Yes."], ["No."])):
        learnt = batch["labels"][row][batch["labels"][row] != IGNORE]
        assert tokenizer.decode(learnt) == "".join(a + "<|im_end|>" for a in answers)
        kept = batch["labels"][row] != IGNORE
        assert (batch["labels"][row][kept] == batch["input_ids"][row][kept]).all()
        # what is learnt follows the prompt that generation sees
        first = int(kept.nonzero()[0, 0])
        prompt = tokenizer.decode(batch["input_ids"][row, :first])
        assert prompt.endswith("<|im_start|>assistant\n")
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORE).all()
    assert batch["attention_mask"][1, 0] == 1 and batch["attention_mask"][1, -1] == 0


def fivl_labels(expressions, grid, frame="resize") -> np.ndarray:
    """FiVL's loop, written down from its description: any overlap, first come, at most 30 %."""
    labels = np.full(grid, IGNORE)
    for item in expressions:
        touched = patch_coverage(item["_mask"], grid, frame) > 0
        if touched.mean() <= 0.30:
            for cell in zip(*touched.nonzero(), strict=True):
                if labels[cell] == IGNORE:
                    labels[cell] = token(item["nouns"][0])
    return labels


@pytest.mark.parametrize("seed", range(5))
def test_fivl_settings_equal_fivl(seed):
    processor, config = tiny_processor("llava"), tiny_llava_config()
    random, items = np.random.default_rng(seed), []
    for noun in ("dog", "cup", "cat", "tree"):
        x, y = random.integers(0, 60), random.integers(0, 45)
        item = expression(noun, x, y, x + random.integers(5, 30), y + random.integers(5, 30))
        items.append({**item, "_mask": decode(item["mask"])})
    collator = VisionLabelCollator(processor, config, threshold=0, conflict="first")
    labels = collator.vision_labels(sample_of(*items), GRID)
    assert np.array_equal(labels, fivl_labels(items, (4, 4)))
    assert (labels != IGNORE).any()


@pytest.mark.parametrize(
    "conflict, winner", [("first", "dog"), ("smallest", "cup"), ("most_covered", "dog")]
)
def test_conflicts(conflict, winner):
    processor, config = tiny_processor("llava"), tiny_llava_config()  # cells of 20 x 15 pixels
    collator = VisionLabelCollator(processor, config, threshold=0.4, conflict=conflict)
    sample = sample_of(expression("dog", 0, 0, 40, 15), expression("cup", 0, 0, 10, 15))
    labels = collator.vision_labels(sample, GRID)
    assert labels[0, 0] == token(winner) and labels[0, 1] == token("dog")
    if conflict == "most_covered":
        sample["turns"][0]["expressions"].reverse()
        assert collator.vision_labels(sample, GRID)[0, 0] == token("dog")


def test_threshold_and_area_limit():
    processor, config = tiny_processor("llava"), tiny_llava_config()
    half = sample_of(expression("dog", 0, 0, 10, 15))  # half of the first cell
    for threshold, labelled in ((0.5, 1), (0.51, 0)):
        collator = VisionLabelCollator(processor, config, threshold=threshold)
        assert (collator.vision_labels(half, GRID) != IGNORE).sum() == labelled
    third = sample_of(expression("dog", 0, 0, 80, 15), expression("cup", 0, 15, 20, 30))
    for limit, labelled in ((0.25, 5), (0.24, 1)):
        collator = VisionLabelCollator(processor, config, max_area=limit)
        assert (collator.vision_labels(third, GRID) != IGNORE).sum() == labelled


def test_the_frame_decides_what_a_mask_covers():
    processor, config = tiny_processor("llava"), tiny_llava_config()
    sample = sample_of(expression("dog", 0, 0, 10, 60))  # a strip that a central square leaves out
    counts = {}
    for frame in ("resize", "center_crop", "pad"):
        collator = VisionLabelCollator(processor, config, frame=frame, threshold=0)
        counts[frame] = int((collator.vision_labels(sample, GRID) != IGNORE).sum())
    assert counts == {"resize": 4, "center_crop": 0, "pad": 4}


def test_no_nouns_or_no_mask_give_no_label(parts):
    processor, config = parts
    nameless = {**expression("dog", 0, 0, 40, 30), "nouns": []}
    maskless = {"text": "the dog", "nouns": ["dog"], "mask": None}
    labels = VisionLabelCollator(processor, config).vision_labels(
        sample_of(nameless, maskless), GRID
    )
    assert (labels == IGNORE).all()


def test_errors_name_the_sample_and_the_setting(parts):
    processor, config = parts
    collator = VisionLabelCollator(processor, config)
    other = sample_of({**expression("dog", 0, 0, 9, 9), "mask": encode(np.ones((5, 5)))}, name="x")
    with pytest.raises(ValueError, match=r"sample 'x'.*\(5, 5\)"):
        collator([other])
    with pytest.raises(ValueError, match="'empty': it has no turns"):
        collator([{"id": "empty", "image": tiny_image(), "turns": []}])
    for wrong in (
        {"threshold": 2},
        {"max_area": 0},
        {"frame": "crop"},
        {"conflict": "last"},
        {"noun": "all"},
    ):
        with pytest.raises(ValueError, match=str(*wrong.values())):
            VisionLabelCollator(processor, config, **wrong)


def test_another_models_processor_is_refused():
    collator = VisionLabelCollator(tiny_processor("internvl"), tiny_llava_config())
    with pytest.raises(ValueError, match=r"4 image tokens, which are not those of grids.*4, 4"):
        collator([sample_of(expression("dog", 0, 0, 9, 9))])


def test_a_prompt_that_is_read_in_both_directions_is_refused():
    with pytest.raises(ValueError, match="vision modeling does not cover 'paligemma'"):
        VisionLabelCollator(tiny_processor("paligemma"), PARTIAL["paligemma"]().config)


def test_split_images_are_refused():
    processor, config = tiny_processor("idefics3"), TINY["idefics3"]().config
    processor.image_processor.do_image_splitting = True
    with pytest.raises(ValueError, match="sample 's'.*switch image splitting off"):
        VisionLabelCollator(processor, config)([sample_of()])


def test_text_only_samples_learn_their_answers_only(parts):
    processor, config = parts
    collator = VisionLabelCollator(processor, config, max_area=0.5)
    alone = {**sample_of(answer="Yes."), "image": None}
    for samples in ([alone], [sample_of(expression("dog", 0, 0, 40, 30)), alone]):
        batch = collator(samples)
        learnt = batch["labels"][-1][batch["labels"][-1] != IGNORE]
        assert processor.tokenizer.decode(learnt) == "Yes.<|im_end|>"
        assert (batch["vision_labels"][-1] == IGNORE).all()
        assert image_token_id(config) not in batch["input_ids"][-1]
    assert (batch["vision_labels"][0] != IGNORE).any()


def test_nouns_are_chosen_as_told():
    two = {**expression("dog", 0, 0, 40, 30), "nouns": ["cup", "dog"]}
    processor, config = tiny_processor("llava"), tiny_llava_config()
    seen = {}
    for noun in ("first", "last", "random"):
        collator = VisionLabelCollator(processor, config, noun=noun)
        drawn = [collator.vision_labels(sample_of(two), GRID)[0, 0] for _ in range(20)]
        seen[noun] = set(drawn)
    assert seen == {
        "first": {token("cup")},
        "last": {token("dog")},
        "random": {token("cup"), token("dog")},
    }
    same = [VisionLabelCollator(processor, config, noun="random", seed=1) for _ in range(2)]
    labels = [[c.vision_labels(sample_of(two), GRID)[0, 0] for _ in range(9)] for c in same]
    assert labels[0] == labels[1]


def test_the_processor_says_what_it_shows():
    cropping = LlavaProcessor(CLIPImageProcessorPil(), tiny_tokenizer())
    padding = LlavaProcessor(LlavaImageProcessorPil(do_pad=True), tiny_tokenizer())
    assert frame_of(cropping) == "center_crop" and frame_of(padding) == "pad"
    assert {frame_of(tiny_processor(family)) for family in TINY} == {"resize"}
