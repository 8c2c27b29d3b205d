"""Fitting: against a slow, unbatched computation, and on pairs whose direction is known."""

from collections.abc import Sequence

import pytest
import torch
from tiny_models import (
    PARTIAL,
    TINY,
    tiny_image,
    tiny_inputs,
    tiny_llava,
    tiny_processor,
    tiny_prompt,
)

from firsthand.modeling.families import decoder_layers, steered_modules, vision_layers
from firsthand.modeling.steering import attach_steering
from firsthand.modeling.steering_fit import (
    METHODS,
    contrast_differences,
    fit_steering,
    fit_vista,
)
from firsthand.modeling.steering_vision import fit_vti_vision, masked_patches

BUILDERS = TINY
ANSWERS = ["a dog top left.", "a cat.", "a car bottom left, a tree bottom right.", "Yes.", "a cup"]


def _row(seed, answer, question="What?"):
    return {"image": tiny_image(seed), "question": question, "answer": answer}


def _pairs(count=5):
    """Contrast in the text: same image, answers of different lengths."""
    return [
        {"positive": _row(i, ANSWERS[i]), "negative": _row(i, ANSWERS[(i + 2) % 5])}
        for i in range(count)
    ]


@pytest.fixture(params=sorted(BUILDERS))
def setup(request):
    return BUILDERS[request.param](), tiny_processor(request.param)


@torch.no_grad()
def _slow_mean(model, processor, row, layer):
    """The module's outputs at the answer's tokens of one unpadded row."""
    prompt = tiny_prompt(processor, row["question"])
    inputs = processor(images=[row["image"]], text=[prompt + row["answer"]], return_tensors="pt")
    length = processor(images=[row["image"]], text=[prompt], return_tensors="pt").input_ids.shape[1]
    kept = []
    handle = steered_modules(model)[layer].register_forward_hook(lambda m, a, o: kept.append(o))
    model(**inputs)
    handle.remove()
    return kept[0][0, length:].mean(0)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_mean_equals_the_slow_computation(setup, batch_size):
    model, processor = setup
    pairs = _pairs()
    vector = fit_steering(model, processor, pairs, batch_size=batch_size, progress=False)
    assert vector.layers == [0, 1] and vector.pairs == 5 and vector.method == "mean"
    for layer in vector.layers:
        differences = [
            _slow_mean(model, processor, pair["positive"], layer)
            - _slow_mean(model, processor, pair["negative"], layer)
            for pair in pairs
        ]
        expected = torch.stack(differences).mean(0)
        torch.testing.assert_close(vector.directions[layer], expected, atol=1e-4, rtol=1e-4)


def test_contrast_in_the_image_gives_a_direction(setup):
    model, processor = setup
    pairs = [{"positive": _row(i, "a dog."), "negative": _row(i + 50, "a dog.")} for i in range(3)]
    vector = fit_steering(model, processor, pairs, layers=[1], progress=False)
    assert vector.layers == [1] and vector.directions[1].norm() > 0.01


@pytest.mark.parametrize("method", ["mean", "svd", "pca"])
def test_every_method_points_to_the_mean_and_is_as_long(method):
    model, processor = tiny_llava(), tiny_processor()
    mean = fit_steering(model, processor, _pairs(), progress=False)
    vector = fit_steering(model, processor, _pairs(), method=method, progress=False)
    for layer in vector.layers:
        torch.testing.assert_close(
            vector.directions[layer].norm(), mean.directions[layer].norm(), atol=1e-4, rtol=1e-4
        )
        assert vector.directions[layer] @ mean.directions[layer] > 0


@pytest.mark.parametrize("method", ["mean", "svd", "pca"])
def test_swapping_the_sides_flips_the_direction(method):
    model, processor = tiny_llava(), tiny_processor()
    swapped = [{"positive": p["negative"], "negative": p["positive"]} for p in _pairs()]
    forth = fit_steering(model, processor, _pairs(), method=method, progress=False)
    back = fit_steering(model, processor, swapped, method=method, progress=False)
    for layer in forth.layers:
        torch.testing.assert_close(
            forth.directions[layer], -back.directions[layer], atol=1e-4, rtol=1e-4
        )


def test_methods_on_differences_with_a_known_direction():
    """A constant shift is the mean and first singular vector; a varying one the component."""
    generator = torch.Generator().manual_seed(0)
    shift, axis = torch.zeros(16), torch.zeros(16)
    shift[0], axis[1] = 3.0, 1.0
    amounts = torch.randn(200, 1, generator=generator)
    noise = 0.01 * torch.randn(200, 16, generator=generator)
    differences = (shift + noise + (amounts - amounts.mean() + 0.05) * axis)[:, None]
    assert _cosine(METHODS["mean"].estimate(differences)[0], shift) > 0.99
    assert _cosine(METHODS["svd"].estimate(differences)[0], shift) > 0.99
    assert _cosine(METHODS["pca"].estimate(differences)[0], axis) > 0.99


def _cosine(a, b):
    return torch.nn.functional.cosine_similarity(a, b, dim=0)


def test_the_model_is_left_as_it_was(setup):
    model, processor = setup
    model.train()
    fit_steering(model, processor, _pairs(2), progress=False)
    assert model.training
    assert not any(module._forward_hooks for module in steered_modules(model))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_pairs_may_be_a_generator():
    vector = fit_steering(tiny_llava(), tiny_processor(), iter(_pairs(3)), progress=False)
    assert vector.pairs == 3


@pytest.mark.parametrize(
    ("pairs", "kwargs", "message"),
    [
        ([], {}, "at least 1 pairs, got 0"),
        (_pairs(1), {"method": "pca"}, "at least 2 pairs, got 1"),
        (_pairs(1), {"method": "lda"}, "method is 'lda'"),
        (_pairs(1), {"layers": [7]}, r"layers 0 to 1, not \[7\]"),
        (_pairs(1), {"layers": []}, "layers is empty"),
        (_pairs(1), {"batch_size": 0}, "batch_size is 0"),
        ([{"positive": _row(0, "a")}], {}, "Pair 0 lacks 'negative'"),
        ([{"positive": _row(0, "a"), "negative": _row(0, " ")}], {}, "empty negative answer"),
    ],
)
def test_what_cannot_be_fitted_is_refused(pairs, kwargs, message):
    with pytest.raises(ValueError, match=message):
        fit_steering(tiny_llava(), tiny_processor(), pairs, progress=False, **kwargs)


def test_a_processor_without_template_is_refused():
    processor = tiny_processor()
    processor.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        fit_steering(tiny_llava(), processor, _pairs(1), progress=False)


# methods of their own


def test_vti_turns_every_layer_by_one_angle_towards_mean_and_component():
    model, processor = tiny_llava(), tiny_processor()
    differences = contrast_differences(
        model, processor, _pairs(), [0, 1], site="layer", position="last", progress=False
    )
    flat = differences.flatten(1)
    component = torch.linalg.svd(flat - flat.mean(0), full_matrices=False).Vh[0]
    component = component * (component @ flat.mean(0)).sign()
    expected = (flat.mean(0) + component).view(2, -1)
    vector = fit_steering(model, processor, _pairs(), method="vti", progress=False)
    assert vector.mode == "turn"
    for layer in (0, 1):
        assert vector.directions[layer].norm().item() == pytest.approx(0.1)
        assert _cosine(vector.directions[layer], expected[layer]) > 0.9999


@torch.no_grad()
def _layer_outputs(model, inputs, layer):
    kept = []
    handle = decoder_layers(model)[layer].register_forward_hook(lambda m, a, o: kept.append(o))
    model(**inputs)
    handle.remove()
    return kept[0][0] if isinstance(kept[0], tuple) else kept[0]


def test_last_and_all_positions_are_what_they_say(setup):
    model, processor = setup
    pair = _pairs(1)[0]
    ends, means = [], []
    for side in ("positive", "negative"):
        text = tiny_prompt(processor, pair[side]["question"]) + pair[side]["answer"]
        inputs = processor(images=[pair[side]["image"]], text=[text], return_tensors="pt")
        states = _layer_outputs(model, inputs, 1)[0]
        ends.append(states[-1]), means.append(states.mean(0))
    for position, sides in (("last", ends), ("all", means)):
        found = contrast_differences(
            model, processor, [pair], [1], site="layer", position=position, progress=False
        )
        torch.testing.assert_close(found[0, 0], sides[0] - sides[1], atol=1e-4, rtol=1e-4)


def test_cas_takes_early_middle_layers_and_its_sign_is_free():
    model, processor = tiny_llava(layers=8), tiny_processor()
    vector = fit_steering(model, processor, _pairs(2), method="cas", progress=False)
    assert vector.layers == [2, 3]
    inputs = tiny_inputs(processor)
    with torch.no_grad(), attach_steering(model, vector, strength=-2.0):
        back = model(**inputs).logits
        with attach_steering(model, vector, strength=2.0):
            there = model(**inputs).logits
    torch.testing.assert_close(there, model(**inputs).logits, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(back, there, atol=1e-2)


def test_vista_is_the_prompt_with_its_image_minus_without(setup):
    model, processor = setup
    vector = fit_vista(model, processor, tiny_image(3), "What?")
    with_image = processor(
        images=[tiny_image(3)], text=[tiny_prompt(processor, "What?")], return_tensors="pt"
    )
    message = [{"role": "user", "content": [{"type": "text", "text": "What?"}]}]
    text = processor.apply_chat_template(message, add_generation_prompt=True)
    without = processor(text=[text], return_tensors="pt")
    for layer in (0, 1):
        seen, unseen = (_layer_outputs(model, i, layer)[0, -1] for i in (with_image, without))
        assert vector.directions[layer].norm().item() == pytest.approx(1)
        assert _cosine(vector.directions[layer], seen - unseen) > 0.9999
    assert vector.mode == "vista"


@pytest.mark.parametrize("family", sorted(TINY))
def test_vti_vision_is_the_mean_over_maskings(family):
    model, processor = TINY[family](), tiny_processor(family)
    images = [tiny_image(i) for i in range(2)]
    vector = fit_vti_vision(model, processor, images, 0.5, trials=3, batch_size=2, progress=False)
    assert not vector.directions and len(vector.vision) == 3 and vector.mode == "turn"
    slow = 0
    for index, image in enumerate(images):
        generator = torch.Generator().manual_seed(index)
        inputs = processor(images=[image], text=[tiny_prompt(processor)], return_tensors="pt")
        states = _vision_states(model, inputs, inputs["pixel_values"])
        masked = [masked_patches(inputs["pixel_values"], 14, 0.5, generator) for _ in range(3)]
        slow = slow + sum(_vision_states(model, inputs, one) for one in masked) / 3 - states
    assert _cosine(vector.vision[1].flatten(), _unit(slow / 2).flatten()) > 0.9999
    assert vector.vision[1].norm(dim=-1).mean().item() == pytest.approx(0.1)


def _unit(states):
    return torch.nn.functional.normalize(states, dim=-1)


@torch.no_grad()
def _vision_states(model, inputs, pixels):
    kept = []
    handle = vision_layers(model)[1].register_forward_hook(lambda m, a, o: kept.append(o))
    model(**{**inputs, "pixel_values": pixels})
    handle.remove()
    states = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
    return states.mean(0) if states.ndim == 2 else states[0]


@pytest.mark.parametrize("shape", [(2, 3, 28, 42), (6, 3 * 14 * 14)])
def test_masking_fills_the_share_with_the_channels_mean(shape):
    pixels = torch.randn(shape)
    masked = masked_patches(pixels, 14, 0.5, torch.Generator().manual_seed(0))
    changed = (masked != pixels).float().mean().item()
    assert changed == pytest.approx(0.5, abs=0.01)
    channels = pixels.view(shape[0], 3, -1)
    means = channels.mean((-1,)) if len(shape) == 4 else channels.mean((0, 2)).expand(6, 3)
    filled = masked.view(shape[0], 3, -1)
    for item in range(shape[0]):
        for channel in range(3):
            new = filled[item, channel][filled[item, channel] != channels[item, channel]]
            torch.testing.assert_close(new, means[item, channel].expand_as(new))


# what was fitted is kept


class _Counting(Sequence):
    """Pairs that say how often they were read; `stop` ends the process that reads one."""

    def __init__(self, pairs, stop=None):
        self.pairs, self.stop, self.read = pairs, stop, []

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        if index == self.stop:
            raise KeyboardInterrupt
        self.read.append(index)
        return self.pairs[index]


def test_a_stopped_fit_goes_on_where_it_was(tmp_path):
    model, processor = tiny_llava(), tiny_processor()
    whole = fit_steering(model, processor, _pairs(), batch_size=2, progress=False)
    settings = {"batch_size": 2, "progress": False, "folder": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        fit_steering(model, processor, _Counting(_pairs(), stop=4), **settings)
    rest = _Counting(_pairs())
    vector = fit_steering(model, processor, rest, **settings)
    assert rest.read == [4]
    assert all(torch.equal(vector.directions[i], whole.directions[i]) for i in whole.layers)
    with pytest.raises(ValueError, match="another fit"):
        fit_steering(model, processor, _pairs(), layers=[0], **settings)


def test_a_pair_that_could_not_be_made_is_left_out():
    model, processor = tiny_llava(), tiny_processor()
    pairs = [*_pairs(2), None, *_pairs(3)[2:]]
    vector = fit_steering(model, processor, pairs, batch_size=1, progress=False)
    expected = fit_steering(model, processor, _pairs(3), batch_size=1, progress=False)
    assert vector.pairs == 3 and torch.equal(vector.directions[0], expected.directions[0])


@pytest.mark.parametrize("family", sorted(TINY | PARTIAL))
def test_prompts_of_unequal_length_are_averaged_as_they_would_be_alone(family):
    """Marks of token types and a Q-Former's own question are padded with their rows."""
    model, processor = (TINY | PARTIAL)[family](), tiny_processor(family)
    questions = ["What?", "Is there a dog in the image, or a cup?"]
    found = [
        {
            "positive": {"image": tiny_image(i), "question": q, "answer": "a dog top left."},
            "negative": {"image": tiny_image(i + 2), "question": q, "answer": "a cup."},
        }
        for i, q in enumerate(questions)
    ]
    together = fit_steering(model, processor, found, batch_size=2, progress=False)
    alone = fit_steering(model, processor, found, batch_size=1, progress=False)
    for layer, direction in together.directions.items():
        torch.testing.assert_close(direction, alone.directions[layer], atol=1e-4, rtol=1e-3)
