"""What `explain` promises besides the rule itself (that: test_relevancy_families.py)."""

from dataclasses import fields, replace
from functools import partial

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from tiny_models import (
    TINY,
    tiny_image,
    tiny_internvl,
    tiny_llava,
    tiny_processor,
    tiny_prompt,
)
from transformers import LlavaForConditionalGeneration, SiglipVisionConfig

from firsthand.modeling.explanation import Explanation, WordRelevancy, token_spans
from firsthand.modeling.image_baselines import baseline_image
from firsthand.modeling.relevancy import explain
from firsthand.modeling.relevancy_attention import implementations, relevancy_attention
from firsthand.modeling.relevancy_vision import spread_over_patches
from firsthand.modeling.steering import SteeringVector, attach_steering

QUESTION = "What is in the image?"
ANSWER = "a dog top left, a cup."
FAMILIES = ["llava", "internvl", "qwen2_5_vl", "smolvlm"]


@pytest.fixture(params=FAMILIES, scope="module")
def family(request):
    return request.param


@pytest.fixture(scope="module")
def processor(family):
    return tiny_processor(family)


@pytest.fixture
def model(family):
    return TINY[family]()


@pytest.fixture(scope="module")
def explanation(family, processor):
    return explain(TINY[family](), processor, tiny_image(3), QUESTION, ANSWER)


def test_heads_in_several_pieces_equal_one_piece(model, processor, explanation, monkeypatch):
    monkeypatch.setattr("firsthand.modeling.relevancy_attention.CHUNK_ELEMENTS", {"cpu": 1})
    pieces = explain(model, processor, tiny_image(3), QUESTION, ANSWER)
    assert torch.allclose(pieces.patches, explanation.patches, rtol=1e-5, atol=1e-9)


def test_the_vision_encoder_moves_relevancy(model, processor, explanation, family):
    """The chained map is more than the image tokens' relevancy laid on the patches."""
    merge = explanation.patches.shape[1] // explanation.image.shape[1]
    laid = explanation.image.repeat_interleave(merge, 1).repeat_interleave(merge, 2) / merge**2
    assert bool((explanation.patches >= laid - 1e-9).all())
    assert float((explanation.patches - laid).max()) > 1e-6


def test_a_subset_of_tokens_equals_those_of_all(model, processor, explanation):
    some = explain(model, processor, tiny_image(3), QUESTION, ANSWER, tokens=[4, -1, 1])
    last = len(explanation.tokens) - 1
    assert some.selected == [4, last, 1]
    for name in ("image", "patches", "question_relevancy", "answer_relevancy"):
        expected = getattr(explanation, name)[some.selected]
        assert torch.allclose(getattr(some, name), expected, rtol=1e-4, atol=1e-8), name
    assert torch.equal(some.probability, explanation.probability)


def test_a_token_is_not_contaminated_by_others(model, processor, explanation):
    """Also not by later text: causality."""
    alone = explain(model, processor, tiny_image(3), QUESTION, "a dog", tokens=[1])
    assert torch.allclose(alone.patches[0], explanation.patches[1], rtol=1e-4, atol=1e-8)
    assert torch.allclose(
        alone.question_relevancy[0], explanation.question_relevancy[1], rtol=1e-4, atol=1e-8
    )
    assert float((explanation.patches[1] - explanation.patches[2]).abs().max()) > 1e-5


def test_it_never_looks_ahead(explanation):
    ahead = torch.triu(explanation.answer_relevancy)
    assert torch.equal(ahead, torch.zeros_like(ahead))
    assert bool((explanation.answer_relevancy[1:].sum(1) > 0).all())


def test_probabilities_are_those_of_the_plain_model(model, processor, explanation):
    prompt = tiny_prompt(processor, QUESTION)
    inputs = processor(images=[tiny_image(3)], text=[prompt + ANSWER], return_tensors="pt")
    count = len(explanation.tokens)
    with torch.no_grad():
        logits = model(**inputs).logits[0, -count - 1 : -1]
    expected = logits.softmax(-1)[torch.arange(count), inputs["input_ids"][0, -count:]]
    assert torch.allclose(explanation.probability, expected, atol=1e-6)


def test_the_model_answers_by_itself(model, processor):
    found = explain(model, processor, tiny_image(3), QUESTION, max_new_tokens=5)
    inputs = processor(
        images=[tiny_image(3)], text=[tiny_prompt(processor, QUESTION)], return_tensors="pt"
    )
    expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    expected = expected[0, inputs["input_ids"].shape[1] :].tolist()
    assert found.token_ids == expected[: len(found.token_ids)] and len(found.token_ids) >= 4


def state_of(model):
    return (
        [parameter.requires_grad for parameter in model.parameters()],
        [module.training for module in model.modules()],
        implementations(model.config),
    )


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(model, processor, monkeypatch, fails):
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    model.train()
    model.lm_head.eval()
    model.get_input_embeddings().weight.requires_grad_(False)
    before = state_of(model)
    if fails:
        monkeypatch.setattr("torch.autograd.grad", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            explain(model, processor, tiny_image(3), QUESTION, ANSWER)
    else:
        explain(model, processor, tiny_image(3), QUESTION, ANSWER)
    assert state_of(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bfloat16_gives_nearly_the_same(model, processor, explanation):
    half = explain(model.bfloat16(), processor, tiny_image(3), QUESTION, ANSWER)
    maps = (half.image.flatten(), explanation.image.flatten())
    assert half.image.dtype == torch.float32
    assert float(torch.cosine_similarity(*maps, dim=0)) > 0.98


def test_adapters_count_without_being_merged(model, processor, explanation):
    config = LoraConfig(
        target_modules=r".*(language|text)_model.*\.(q_proj|v_proj)", r=4, init_lora_weights=False
    )
    torch.manual_seed(0)
    wrapped = get_peft_model(model, config)
    adapted = explain(wrapped, processor, tiny_image(3), QUESTION, ANSWER)
    assert any(parameter.requires_grad for parameter in wrapped.parameters())
    assert float((adapted.image - explanation.image).abs().max()) > 1e-4
    merged = explain(wrapped.merge_and_unload(), processor, tiny_image(3), QUESTION, ANSWER)
    assert torch.allclose(adapted.patches, merged.patches, rtol=1e-3, atol=1e-6)


def test_steering_is_in_force(model, processor, explanation):
    vector = SteeringVector({0: torch.linspace(-1, 1, 32)})
    with attach_steering(model, vector, strength=2.0):
        steered = explain(model, processor, tiny_image(3), QUESTION, ANSWER)
    assert float((steered.probability - explanation.probability).abs().max()) > 1e-6
    assert float((steered.image - explanation.image).abs().max()) > 1e-5


def test_visual_contribution_is_the_image_share(explanation):
    seen = explanation.image.sum((1, 2))
    text = explanation.question_relevancy.sum(1) + explanation.answer_relevancy.sum(1)
    assert torch.allclose(explanation.visual_contribution, seen / (seen + text))
    assert bool((explanation.visual_contribution > 0).all())
    assert bool((explanation.visual_contribution < 1).all())


def by_hand(image, text, count, how):
    if how == "mean":
        return image.mean() / (text.sum() / count)
    return getattr(image, how)() / getattr(text, how)()


@pytest.mark.parametrize("how", ["sum", "mean", "max"])
def test_contribution_compares_image_and_text(model, processor, explanation, how):
    layered = explain(model, processor, tiny_image(3), QUESTION, ANSWER, [3, 1], layers=True)
    found = explanation.contribution(how)
    for index in (1, 3):
        question, answer = (
            explanation.question_relevancy[index],
            explanation.answer_relevancy[index],
        )
        text = torch.cat([question, answer[:index]])
        expected = by_hand(explanation.image[index], text, len(text), how)
        torch.testing.assert_close(found[index], expected)
    each = layered.contribution(how)
    assert each.shape == (2, 2)
    torch.testing.assert_close(each[:, -1], found[[3, 1]], rtol=1e-4, atol=1e-8)
    for row, index in enumerate((3, 1)):
        text = torch.cat([layered.question_layers[row, 0], layered.answer_layers[row, 0, :index]])
        expected = by_hand(layered.image_layers[row, 0], text, len(text), how)
        torch.testing.assert_close(each[row, 0], expected)


def test_contribution_without_one_side(explanation):
    blind = replace(explanation, image=torch.zeros_like(explanation.image))
    assert torch.equal(blind.contribution(), torch.zeros(len(blind.tokens)))
    nothing = {"question_relevancy": torch.zeros(8, 3), "answer_relevancy": torch.zeros(8, 8)}
    assert bool(replace(explanation, **nothing).contribution("max").isinf().all())
    with pytest.raises(ValueError, match="'median'.*sum"):
        explanation.contribution("median")


@pytest.mark.parametrize("baseline", ["blank", "blur", "noise"])
def test_the_likelihood_ratio_is_that_of_two_plain_passes(model, processor, baseline):
    image = tiny_image(3)
    found = explain(model, processor, image, QUESTION, ANSWER, [0], baseline=baseline)
    count, chances = len(found.tokens), []
    for shown in (image, Image.fromarray(baseline_image(np.asarray(image), baseline))):
        prompt = tiny_prompt(processor, QUESTION) + ANSWER
        inputs = processor(images=[[shown]], text=[prompt], return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0, -count - 1 : -1]
        chances.append(
            logits.log_softmax(-1).gather(1, inputs["input_ids"][0, -count:, None])[:, 0]
        )
    expected = chances[0] - chances[1]
    assert found.baseline == baseline and float(expected.abs().max()) > 1e-3
    torch.testing.assert_close(found.log_likelihood_ratio, expected, atol=1e-5, rtol=1e-4)
    limit = float(expected.sort().values[2])
    assert found.visual_tokens(limit) == (expected > limit).nonzero()[:, 0].tolist()
    dog = found.span(0, 5)
    assert dog.log_likelihood_ratio == pytest.approx(float(expected[dog.tokens].sum()), abs=1e-4)


def test_without_a_baseline_there_is_no_likelihood_ratio(explanation):
    assert explanation.log_likelihood_ratio is None and explanation.image_layers is None
    with pytest.raises(ValueError, match='baseline="noise"'):
        explanation.visual_tokens()


def test_question_tokens_are_the_question(explanation):
    assert "".join(explanation.question_tokens).strip() == QUESTION
    assert explanation.question_relevancy.shape[1] == len(explanation.question_tokens)
    words = explanation.question_words
    assert [text for text, _ in words] == QUESTION.split()
    assert [i for _, tokens in words for i in tokens] == list(range(len(words[0][1]) + 6 - 1))


def test_a_question_that_the_template_rewrites_is_all_the_prompts_text(model, processor, family):
    shouting = tiny_processor(family)
    shouting.chat_template = processor.chat_template.replace("part['text']", "part['text'] | upper")
    found = explain(model, shouting, tiny_image(3), QUESTION, ANSWER, tokens=[0])
    assert QUESTION.upper() in "".join(found.question_tokens)
    assert "<|im_start|>" not in found.question_tokens


def test_words(explanation):
    assert explanation.words == ["a", "dog", "top", "left", "a", "cup"]
    dog = explanation.word(1)
    assert (dog.text, dog.span) == ("dog", (2, 5))
    assert "".join(explanation.tokens[i] for i in dog.tokens).strip() == "dog"
    assert torch.equal(dog.map, explanation.patches[dog.tokens].mean(0))
    phrase = explanation.span(2, 14)
    assert phrase.text == "dog top left" and len(phrase.tokens) >= 3
    assert torch.allclose(phrase.image, explanation.image[phrase.tokens].mean(0))
    with pytest.raises(IndexError, match="6 words"):
        explanation.word(6)


def test_the_smooth_map_fades_blocks_and_keeps_the_place():
    image = torch.tensor([[4.0, 0.0], [0.0, 0.0]])
    added = torch.zeros(8, 8)
    added[7, 7] = 0.5
    blocks = image.repeat_interleave(4, 0).repeat_interleave(4, 1) / 16
    word = WordRelevancy("dog", (0, 3), [0], image, blocks + added, torch.zeros(1), 0.5, 0.5)
    smooth = word.smooth_map
    assert float(smooth.min()) >= 0 and smooth.shape == (8, 8)
    assert smooth[:4, :4].sum() > 0.7 * (smooth.sum() - 0.5)
    assert smooth[7, 7] == pytest.approx(0.5, abs=0.05)
    jump = (blocks[1, 3] - blocks[1, 4]).abs()
    assert (smooth[1, 3] - smooth[1, 4]).abs() < 0.5 * jump
    plain = replace(word, patches=image)
    assert torch.equal(plain.smooth_map, image)
    assert torch.equal(replace(word, patches=None).smooth_map, image)


def test_a_word_that_was_not_explained_says_how(model, processor):
    found = explain(model, processor, tiny_image(3), QUESTION, ANSWER, tokens=[0])
    with pytest.raises(ValueError, match=r"tokens=\[1\]"):
        found.word(1)


@pytest.mark.parametrize("full", [False, True])
def test_saved_and_loaded_exactly(model, processor, explanation, full, tmp_path):
    if full:
        more = {"layers": True, "baseline": "blur"}
        explanation = explain(model, processor, tiny_image(3), QUESTION, ANSWER, [1], **more)
        assert all(getattr(explanation, field.name) is not None for field in fields(Explanation))
    explanation.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "explanation.json",
        "explanation.safetensors",
    ]
    again = Explanation.load(tmp_path)
    for name in (field.name for field in fields(Explanation)):
        pair = getattr(again, name), getattr(explanation, name)
        tensors = isinstance(pair[0], torch.Tensor)
        assert torch.equal(*pair) if tensors else pair[0] == pair[1], name
    with pytest.raises(FileNotFoundError, match="save"):
        Explanation.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": "  "}, "question is empty"),
        ({"answer": " "}, "answer is empty"),
        ({"tokens": [99]}, r"names \[99\]"),
        ({"tokens": []}, "no token"),
        ({"backend": "fast"}, "streaming"),
        ({"baseline": "grey"}, "blank"),
    ],
)
def test_bad_requests(model, processor, change, message):
    request = {"question": QUESTION, "answer": ANSWER} | change
    with pytest.raises(ValueError, match=message):
        explain(model, processor, tiny_image(3), **request)


def test_a_processor_of_another_model_is_refused():
    with pytest.raises(ValueError, match="4 image tokens, which are not those"):
        explain(tiny_llava(), tiny_processor("internvl"), tiny_image(3), QUESTION, ANSWER)


def test_tiles_are_refused_with_the_remedy():
    tiling = tiny_processor("idefics3")
    tiling.image_processor.do_image_splitting = True
    with pytest.raises(ValueError, match="5 images of one.*do_image_splitting"):
        explain(TINY["idefics3"](), tiling, tiny_image(3), QUESTION, ANSWER)


def test_mixed_vision_layers_have_no_patch_map():
    model = tiny_llava()
    model.config.vision_feature_layer = [-2, -1]
    model.model.multi_modal_projector = type(model.model.multi_modal_projector)(model.config).eval()
    found = explain(model, tiny_processor("llava"), tiny_image(3), QUESTION, ANSWER, tokens=[0])
    assert found.patches is None and float(found.image.max()) > 0
    assert torch.equal(found.word(0).map, found.image[0])


def siglip_llava():
    vision = SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
    )
    config = tiny_llava().config
    config.vision_config, config.vision_feature_select_strategy = vision, "full"
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()


OTHERS = {
    **{text: partial(tiny_llava, text=text) for text in ("mistral", "qwen2", "qwen3")},
    "siglip": siglip_llava,
}


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_other_towers_streaming_equals_autograd(name):
    found, kept = (
        explain(OTHERS[name](), tiny_processor("llava"), tiny_image(3), QUESTION, ANSWER, backend=b)
        for b in ("streaming", "eager")
    )
    assert float(found.patches.max()) > 1e-6
    for field in ("image", "patches", "question_relevancy", "answer_relevancy"):
        pair = getattr(found, field), getattr(kept, field)
        assert torch.allclose(*pair, rtol=1e-4, atol=1e-6 * float(pair[0].max())), field


def test_attention_that_the_rule_does_not_cover_is_refused(monkeypatch):
    def sinking(module, *args, **kwargs):
        return relevancy_attention(module, *args, s_aux=torch.zeros(4), **kwargs)

    monkeypatch.setattr("firsthand.modeling.relevancy_attention.relevancy_attention", sinking)
    with pytest.raises(ValueError, match="s_aux"):
        explain(tiny_llava(), tiny_processor("llava"), tiny_image(3), QUESTION, ANSWER)


def test_every_image_token_shares_equally_among_its_patches():
    row = torch.tensor([9.0, 1.0, 2.0, 3.0, 4.0, 9.0])
    image = torch.tensor([False, True, True, True, True, False])
    patches = spread_over_patches(
        row, image, grid=(2, 2), merge=2, prefix=1, order=torch.arange(16)
    )
    expected = torch.tensor([[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]) / 4
    assert patches[0] == 0 and torch.equal(patches[1:].view(4, 4), expected)


def test_the_merger_joins_the_patches_that_share_its_token():
    """Changing one patch's features changes the one image token that `spread` maps it to."""
    model = tiny_internvl()
    features = torch.zeros(1, 4, 4, 24)
    for patch in range(16):
        changed = features.clone()
        changed[0, patch // 4, patch % 4] = 1
        merged = model.model.pixel_shuffle(changed, scale_factor=0.5).reshape(4, -1)
        token = int(merged.abs().sum(1).argmax())
        assert token == patch // 4 // 2 * 2 + patch % 4 // 2


def test_bytes_of_one_character_share_it():
    tokenizer = tiny_processor("llava").tokenizer
    ids = tokenizer("  é🙂 dog ")["input_ids"]
    text, spans = token_spans(tokenizer, ids)
    assert text == "é🙂 dog"
    covered = {i for start, end in spans for i in range(start, end)}
    assert covered == set(range(len(text)))
    assert all(0 <= start <= end <= len(text) for start, end in spans)
    assert spans.count((1, 2)) == 4


def test_a_subclass_defined_elsewhere_is_explained():
    class Mine(LlavaForConditionalGeneration):
        pass

    found = explain(
        tiny_llava(Mine), tiny_processor("llava"), tiny_image(3), QUESTION, ANSWER, tokens=[1]
    )
    assert float(found.image.max()) > 0
