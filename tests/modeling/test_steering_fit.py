"""Fitting: against a slow, unbatched computation, and on pairs whose direction is known."""

import pytest
import torch
from tiny_models import tiny_image, tiny_internvl, tiny_llava, tiny_processor, tiny_prompt

from firsthand.modeling.families import steered_modules
from firsthand.modeling.steering_fit import METHODS, fit_steering

BUILDERS = {"llava": tiny_llava, "internvl": tiny_internvl}
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
    differences = shift + noise + (amounts - amounts.mean() + 0.05) * axis
    assert _cosine(METHODS["mean"](differences), shift) > 0.99
    assert _cosine(METHODS["svd"](differences), shift) > 0.99
    assert _cosine(METHODS["pca"](differences), axis) > 0.99


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
