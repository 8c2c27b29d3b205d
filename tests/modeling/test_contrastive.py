"""Contrastive decoding: against two slow passes a token, and against plain decoding at weight 0."""

from functools import wraps

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import TINY, tiny_image, tiny_llava, tiny_processor
from transformers import LogitsProcessorList

from firsthand.modeling.contrastive import CONTRASTS, Contrast, ContrastiveLogitsProcessor
from firsthand.processing.contrast_inputs import (
    BRANCHES,
    METHODS,
    both_branches,
    contrast_settings,
    diffused,
)
from firsthand.processing.generation import generate_answers, prepare_inputs

NEW = 6
TYPES = ("mm_token_type_ids", "token_type_ids")
ROWS = [
    {"id": str(i), "image_id": str(i), "image": tiny_image(i), "question": question}
    for i, question in enumerate(["What?", "Is there a dog in the image?"])
]
LENGTH = {"max_new_tokens": NEW, "min_new_tokens": NEW}
STRONG = Contrast(alpha=1.5, beta=0.05, decay=0.1)


@torch.no_grad()
def _slow(model, processor, row, method, contrast):
    """Tokens and mixed logits [NEW, V] of one row: both branches whole, unpadded, without cache."""
    both = both_branches(processor, [row], method=method)
    one = {k: v for k, v in prepare_inputs(processor, [row]).items()}
    kept = both["attention_mask"][1].bool()
    other = {"input_ids": both["input_ids"][1:, kept]}
    half = len(both["pixel_values"]) // 2
    if BRANCHES[method] != "none":
        other["pixel_values"] = both["pixel_values"][half:]
        other |= {k: v[1:] for k, v in both.items() if k == "image_grid_thw"}
    for name in TYPES:
        if name in both:
            other[name] = both[name][1:, kept]
    other["attention_mask"] = torch.ones_like(other["input_ids"])
    tokens, mixed = [], []
    for step in range(NEW):
        lc, lu = (_next(model, inputs, tokens) for inputs in (one, other))
        weight = contrast.alpha + torch.e ** (contrast.decay * step) - 1
        scores = (1 + weight) * lc - weight * lu
        scores[lc < lc.max() + torch.tensor(contrast.beta).log()] = -torch.inf
        scores[processor.tokenizer.eos_token_id] = -torch.inf  # min_new_tokens
        mixed.append(scores)
        tokens.append(int(scores.argmax()))
    return tokens, torch.stack(mixed)


def _next(model, inputs, tokens):
    inputs, new = dict(inputs), torch.tensor([tokens], dtype=torch.long)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], new], 1)
    for name in ("attention_mask", *TYPES):
        if name in inputs:
            value = int(name == "attention_mask")
            inputs[name] = torch.cat([inputs[name], torch.full_like(new, value)], 1)
    return model(**inputs).logits[0, -1].float()


@pytest.mark.parametrize("family", sorted(TINY))
@pytest.mark.parametrize("method", METHODS)
def test_one_batch_equals_two_slow_passes(family, method):
    model, processor = TINY[family](), tiny_processor(family)
    inputs = both_branches(processor, ROWS, method=method)
    assert (inputs["attention_mask"].sum(1) < inputs["input_ids"].shape[1]).any()  # padding
    found = model.generate(
        **inputs, custom_generate=STRONG, output_scores=True, return_dict_in_generate=True, **LENGTH
    )
    new = found.sequences[:, -NEW:]
    assert found.sequences.shape == (2, inputs["input_ids"].shape[1] + NEW)
    for at, row in enumerate(ROWS):
        tokens, mixed = _slow(model, processor, row, method, STRONG)
        assert new[at].tolist() == tokens
        scores = torch.stack([one[at] for one in found.scores])
        assert torch.equal(scores.isinf(), mixed.isinf())
        kept = ~mixed.isinf()
        torch.testing.assert_close(scores[kept], mixed[kept], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("method", ["vcd", "m3id"])
def test_the_logits_processor_says_the_same(family, method):
    model, processor = TINY[family](), tiny_processor(family)
    both = both_branches(processor, ROWS, method=method)
    together = model.generate(**both, custom_generate=STRONG, **LENGTH)
    inputs = prepare_inputs(processor, ROWS)
    half = len(both["pixel_values"]) // 2
    second = {k: v[2:] for k, v in both.items() if k not in ("pixel_values", "image_grid_thw")}
    if method == "vcd":
        second["pixel_values"] = both["pixel_values"][half:]
        second |= {k: v[2:] for k, v in both.items() if k == "image_grid_thw"}
    mix = LogitsProcessorList([ContrastiveLogitsProcessor(model, second, STRONG)])
    for _ in range(2):  # a processor serves one generate after the other
        apart = model.generate(**inputs, logits_processor=mix, do_sample=False, **LENGTH)
        assert torch.equal(apart[:, -NEW:], together[:, -NEW:])
    with pytest.raises(ValueError, match="search no beams"):
        model.generate(**inputs, logits_processor=mix, num_beams=2, **LENGTH)


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("method", METHODS)
def test_weight_zero_is_plain_decoding(method, sampled):
    model, processor = tiny_llava(), tiny_processor()
    drawing = {"do_sample": sampled, **LENGTH}
    torch.manual_seed(3)
    plain = model.generate(**prepare_inputs(processor, ROWS), **drawing)
    torch.manual_seed(3)
    both = both_branches(processor, ROWS, method=method)
    same = model.generate(**both, custom_generate=Contrast(0.0, 0.0), **drawing)
    assert torch.equal(same[:, -NEW:], plain[:, -NEW:])


def test_sampling_draws_from_the_plausible_mix():
    model, processor = tiny_llava(), tiny_processor()
    both = both_branches(processor, ROWS[:1], method="vcd")
    contrast = Contrast(1.0, 0.3)
    first = _slow(model, processor, ROWS[0], "vcd", contrast)[1][0]
    chances = first.softmax(-1)
    torch.manual_seed(0)
    drawn = model.generate(
        **both, custom_generate=contrast, do_sample=True, top_k=0, num_return_sequences=400,
        max_new_tokens=1,
    )[:, -1]  # fmt: skip
    share = torch.bincount(drawn, minlength=len(chances)) / len(drawn)
    assert (share[chances == 0] == 0).all()
    torch.testing.assert_close(share, chances, atol=0.1, rtol=0)


@pytest.mark.parametrize("cache", [{"cache_implementation": "static"}, {"use_cache": False}])
def test_every_cache_serves(cache):
    model, processor = tiny_llava(), tiny_processor()
    both = both_branches(processor, ROWS, method="icd")
    plain = model.generate(**both, custom_generate=STRONG, **LENGTH)
    assert torch.equal(model.generate(**both, custom_generate=STRONG, **cache, **LENGTH), plain)


def test_rows_that_end_early_are_padded_alike():
    model, processor = tiny_llava(), tiny_processor()
    both = both_branches(processor, ROWS, method="vcd")
    first = model.generate(**both, custom_generate=STRONG, **LENGTH)[:, -NEW:]
    end = int(first[0, 2])
    cut = model.generate(
        **both, custom_generate=STRONG, eos_token_id=end, pad_token_id=0, max_new_tokens=NEW
    )
    alone = model.generate(
        **both_branches(processor, ROWS[:1], method="vcd"), custom_generate=STRONG,
        eos_token_id=end, pad_token_id=0, max_new_tokens=NEW,
    )  # fmt: skip
    said = cut[0, both["input_ids"].shape[1] :].tolist()
    assert end in said and set(said[said.index(end) + 1 :]) <= {0}
    assert (
        said[: said.index(end) + 1] == [t for t in alone[0].tolist() if t][-said.index(end) - 1 :]
    )


def test_the_published_weights():
    lc, lu = torch.tensor([[2.0, 1.0, -9.0]]), torch.tensor([[0.0, 3.0, 0.0]])
    expected = torch.tensor([[4.0, -1.0, -torch.inf]])  # (1 + 1) lc - 1 lu, cut below log .1
    assert torch.equal(CONTRASTS["vcd"].combine(lc, lu, 7), expected)
    guided = 1.1 * (lc - lu) + lu
    torch.testing.assert_close(CONTRASTS["pai"].combine(lc, lu, 7)[:, :2], guided[:, :2])
    gamma = torch.tensor(-0.02 * 7).exp()
    forgetting = lc + (1 - gamma) / gamma * (lc - lu)
    torch.testing.assert_close(CONTRASTS["m3id"].combine(lc, lu, 7)[:, :2], forgetting[:, :2])
    assert torch.equal(CONTRASTS["m3id"].combine(lc, lu, 0)[:, :2], lc[:, :2])


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.floats(-3, 3), st.floats(0, 1))
def test_the_most_probable_seen_token_is_never_cut(seed, alpha, beta):
    seen, unseen = torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(seed))
    mixed = Contrast(alpha, beta).combine(seen, unseen, 2)
    kept = ~mixed.isinf()
    assert kept.gather(1, seen.argmax(1, keepdim=True)).all()
    chances = seen.softmax(-1)
    least = beta * chances.amax(-1, keepdim=True)
    assert (chances[kept] >= least.expand_as(chances)[kept] - 1e-6).all()


def test_noise_is_vcds_and_the_same_in_any_batch():
    pixels = torch.ones(2, 3, 40, 40)
    noised = diffused(pixels)
    assert noised.mean().item() == pytest.approx(0.865, abs=0.02)  # sqrt(prod(1 - beta)) of 500
    assert noised.std().item() == pytest.approx(0.5, abs=0.02)
    processor = tiny_processor()
    both = both_branches(processor, ROWS, method="vcd")["pixel_values"]
    alone = both_branches(processor, ROWS[1:], method="vcd")["pixel_values"]
    assert torch.equal(both[3], alone[1]) and torch.equal(both[1], alone[0])
    other = both_branches(processor, ROWS[1:], method="vcd", seed=1)["pixel_values"]
    assert not torch.equal(other[1], alone[1])


def test_the_image_free_branch_differs_by_the_image_only():
    processor = tiny_processor()
    both = both_branches(processor, ROWS, method="m3id")
    image = processor.tokenizer.image_token_id
    assert len(both["pixel_values"]) == 2
    for seen, unseen in zip(both["input_ids"][:2], both["input_ids"][2:], strict=True):
        texts = [processor.decode(ids[ids != image]) for ids in (seen, unseen)]
        assert texts[0].replace("<pad>", "").replace("\n", "") == texts[1].replace(
            "<pad>", ""
        ).replace("\n", "")
        assert (seen == image).sum() == 16 and (unseen == image).sum() == 0


def test_many_rows_in_batches():
    model, processor = tiny_llava(), tiny_processor()
    for method in METHODS:
        made = contrast_settings(method, alpha=0.7, beta=0.2, seed=1)
        rows = generate_answers(model, processor, ROWS, NEW, progress=False, **made)
        alone = generate_answers(model, processor, ROWS, NEW, 1, progress=False, **made)
        assert [r["prediction"] for r in rows] == [r["prediction"] for r in alone]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"beta": 1.5}, "beta is 1.5"),
        ({"decay": -1.0}, "decay is -1.0"),
    ],
)
def test_what_cannot_be_mixed_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Contrast(**kwargs)


def test_what_cannot_be_decoded_is_refused():
    model, processor = tiny_llava(), tiny_processor()
    with pytest.raises(ValueError, match="batch has 1 rows"):
        model.generate(**prepare_inputs(processor, ROWS[:1]), custom_generate=Contrast())
    both = both_branches(processor, ROWS, method="vcd")
    with pytest.raises(ValueError, match="searches no beams"):
        model.generate(**both, custom_generate=Contrast(), num_beams=2)
    with pytest.raises(ValueError, match="method is 'opera'"):
        both_branches(processor, ROWS, method="opera")
    with pytest.raises(ValueError, match="method is 'opera'"):
        contrast_settings("opera")


def test_scores_that_are_not_the_heads_outputs_are_mixed_whole(monkeypatch):
    """As of models that cap or scale their logits after the head."""
    model, processor = tiny_llava(), tiny_processor()
    forward = type(model).forward

    @wraps(forward)
    def capped(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = 3 * (output.logits / 3).tanh()
        return output

    monkeypatch.setattr(type(model), "forward", capped)
    heads = []
    model.lm_head.register_forward_hook(lambda m, args, output: heads.append(len(output)))
    both = both_branches(processor, ROWS, method="vcd")
    new = model.generate(**both, custom_generate=STRONG, **LENGTH)[:, -NEW:]
    assert set(heads) == {4}
    for at, row in enumerate(ROWS):
        assert new[at].tolist() == _slow(model, processor, row, "vcd", STRONG)[0]


def test_the_head_computes_the_second_branch_for_plausible_tokens_only():
    model, processor = tiny_llava(), tiny_processor()
    heads = []
    model.lm_head.register_forward_hook(lambda m, args, output: heads.append(len(output)))
    both = both_branches(processor, ROWS, method="vcd")
    lean = model.generate(**both, custom_generate=STRONG, **LENGTH)
    assert heads == [4] + [2] * (NEW - 1)
    assert len(model.lm_head._forward_hooks) == 1 and not model.lm_head._forward_pre_hooks
    model.generate(**both, custom_generate=Contrast(beta=0.0), **LENGTH)
    assert heads[NEW:] == [4] * NEW
    assert lean.shape[0] == 2
