"""Vision labels lie where masks lie, and only answers are learnt; FiVL's own loop is the oracle."""

import numpy as np
import pytest
from tiny_models import (
    tiny_image,
    tiny_internvl_config,
    tiny_llava_config,
    tiny_processor,
    tiny_tokenizer,
)

from firsthand.modeling.families import image_grid, image_token_id
from firsthand.processing.collator import IGNORE, VisionLabelCollator, word_token
from firsthand.processing.masks import decode, encode, patch_coverage

CONFIGS = {"llava": tiny_llava_config, "internvl": tiny_internvl_config}
SIZE = (80, 60)


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


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def parts(request):
    return tiny_processor(request.param), CONFIGS[request.param]()


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
    collator = VisionLabelCollator(processor, config)
    batch = collator([sample_of(expression("dog", 0, 0, 40, 30))])  # the upper left quarter
    rows, columns = image_grid(config)
    expected = np.full((rows, columns), IGNORE)
    expected[: rows // 2, : columns // 2] = token("dog")
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
    labels = collator.vision_labels(sample_of(*items))
    assert np.array_equal(labels, fivl_labels(items, (4, 4)))
    assert (labels != IGNORE).any()


@pytest.mark.parametrize(
    "conflict, winner", [("first", "dog"), ("smallest", "cup"), ("most_covered", "dog")]
)
def test_conflicts(conflict, winner):
    processor, config = tiny_processor("llava"), tiny_llava_config()  # cells of 20 x 15 pixels
    collator = VisionLabelCollator(processor, config, threshold=0.4, conflict=conflict)
    sample = sample_of(expression("dog", 0, 0, 40, 15), expression("cup", 0, 0, 10, 15))
    labels = collator.vision_labels(sample)
    assert labels[0, 0] == token(winner) and labels[0, 1] == token("dog")
    if conflict == "most_covered":
        sample["turns"][0]["expressions"].reverse()
        assert collator.vision_labels(sample)[0, 0] == token("dog")


def test_threshold_and_area_limit():
    processor, config = tiny_processor("llava"), tiny_llava_config()
    half = sample_of(expression("dog", 0, 0, 10, 15))  # half of the first cell
    for threshold, labelled in ((0.5, 1), (0.51, 0)):
        collator = VisionLabelCollator(processor, config, threshold=threshold)
        assert (collator.vision_labels(half) != IGNORE).sum() == labelled
    third = sample_of(expression("dog", 0, 0, 80, 15), expression("cup", 0, 15, 20, 30))
    for limit, labelled in ((0.25, 5), (0.24, 1)):
        collator = VisionLabelCollator(processor, config, max_area=limit)
        assert (collator.vision_labels(third) != IGNORE).sum() == labelled


def test_the_frame_decides_what_a_mask_covers():
    processor, config = tiny_processor("llava"), tiny_llava_config()
    sample = sample_of(expression("dog", 0, 0, 10, 60))  # a strip that a central square leaves out
    counts = {}
    for frame in ("resize", "center_crop", "pad"):
        collator = VisionLabelCollator(processor, config, frame=frame, threshold=0)
        counts[frame] = int((collator.vision_labels(sample) != IGNORE).sum())
    assert counts == {"resize": 4, "center_crop": 0, "pad": 4}


def test_no_nouns_or_no_mask_give_no_label(parts):
    processor, config = parts
    nameless = {**expression("dog", 0, 0, 40, 30), "nouns": []}
    maskless = {"text": "the dog", "nouns": ["dog"], "mask": None}
    labels = VisionLabelCollator(processor, config).vision_labels(sample_of(nameless, maskless))
    assert (labels == IGNORE).all()


def test_errors_name_the_sample_and_the_setting(parts):
    processor, config = parts
    collator = VisionLabelCollator(processor, config)
    other = sample_of({**expression("dog", 0, 0, 9, 9), "mask": encode(np.ones((5, 5)))}, name="x")
    with pytest.raises(ValueError, match=r"sample 'x'.*\(5, 5\)"):
        collator([other])
    with pytest.raises(ValueError, match="'empty': it has no turns"):
        collator([{"id": "empty", "image": tiny_image(), "turns": []}])
    for wrong in ({"threshold": 2}, {"max_area": 0}, {"frame": "crop"}, {"conflict": "last"}):
        with pytest.raises(ValueError, match=str(*wrong.values())):
            VisionLabelCollator(processor, config, **wrong)


def test_another_models_processor_is_refused():
    collator = VisionLabelCollator(tiny_processor("internvl"), tiny_llava_config())
    with pytest.raises(ValueError, match="4 image tokens, the model has 4 x 4"):
        collator([sample_of(expression("dog", 0, 0, 9, 9))])
