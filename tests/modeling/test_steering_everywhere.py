"""Steering wherever a model computes: caches, TRL's trainers, compiled graphs, every mode."""

from dataclasses import replace

import pytest
import torch
from tiny_models import TINY, tiny_image, tiny_inputs, tiny_llava, tiny_processor

from firsthand.modeling.families import steered_modules
from firsthand.modeling.steering import MODES, SteeringVector, attach_steering

QUESTIONS = ["What?", "Is there a dog in the image?"]
LENGTH = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def _vector(**kwargs):
    generator = torch.Generator().manual_seed(0)
    return SteeringVector({i: torch.randn(32, generator=generator) for i in (0, 1)}, **kwargs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", sorted(TINY))
def test_every_family_generates_steered_in_batches_with_and_without_cache(family, mode):
    model, inputs = TINY[family](), tiny_inputs(tiny_processor(family), QUESTIONS)
    keys, plain = list(model.state_dict()), model.generate(**inputs, **LENGTH)
    with attach_steering(model, _vector(mode=mode), strength=1.5) as steering:
        steered = model.generate(**inputs, **LENGTH)
        assert not torch.equal(steered, plain)
        assert torch.equal(model.generate(**inputs, use_cache=False, **LENGTH), steered)
        alone = tiny_inputs(tiny_processor(family), QUESTIONS[:1])
        assert torch.equal(model.generate(**alone, **LENGTH)[0, -5:], steered[0, -5:])
        steering.strength = 0
        assert torch.equal(model.generate(**inputs, **LENGTH), plain)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("beams", [1, 3])
def test_every_cache_gives_the_same_steered_answer(cache, beams):
    model, inputs = tiny_llava(), tiny_inputs(tiny_processor(), QUESTIONS)
    with attach_steering(model, _vector(mode="norm")):
        expected = model.generate(**inputs, use_cache=False, num_beams=beams, **LENGTH)
        found = model.generate(**inputs, cache_implementation=cache, num_beams=beams, **LENGTH)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_module_follows_the_strength_without_recompiling(mode):
    model, hidden = tiny_llava(), torch.randn(2, 4, 32)
    module = steered_modules(model)[0]
    with torch.no_grad(), attach_steering(model, _vector(mode=mode), strength=0.25) as steering:
        torch._dynamo.reset()
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        compiled(hidden)
        with torch.compiler.set_stance("fail_on_recompile"):
            for strength in (0.0, 1.0, -0.5):
                steering.strength = strength
                torch.testing.assert_close(compiled(hidden), module(hidden))


def test_trls_own_trainer_computes_the_steered_loss(tmp_path):
    """Its fused loss calls the backbone and the head, not the model's forward."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    words = (
        [{"role": "user", "content": "What is it?"}],
        [{"role": "assistant", "content": "a cup."}],
    )
    rows = {"images": [[tiny_image()]], "prompt": [words[0]], "completion": [words[1]]}
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            **{
                name: datasets.List(
                    {"role": datasets.Value("string"), "content": datasets.Value("string")}
                )
                for name in ("prompt", "completion")
            },
        }
    )
    model = tiny_llava().requires_grad_(True)
    settings = trl.SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=None,
        gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model,
        args=settings,
        train_dataset=datasets.Dataset.from_dict(rows, features=features),
        processing_class=tiny_processor(),
    )
    batch = next(iter(trainer.get_train_dataloader()))

    def loss():
        with torch.no_grad():
            return trainer.compute_loss(trainer.model, dict(batch)).item()

    plain = loss()
    with attach_steering(model, _vector()) as steering:
        assert abs(loss() - plain) > 1e-3
        steering.strength = 0
        assert loss() == plain
    with attach_steering(model, replace(_vector(), gate=2.0)):
        gated = loss()
    with attach_steering(model, _vector()):
        assert loss() == pytest.approx(gated)
