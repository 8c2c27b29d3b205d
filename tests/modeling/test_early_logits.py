"""Early layers' logits in the last ones: against the formula written out, in every family."""

import pytest
import torch
from tiny_models import PARTIAL, TINY, tiny_inputs, tiny_llava, tiny_processor

from firsthand.modeling.early_logits import early_logits
from firsthand.modeling.families import decoder_layers
from firsthand.modeling.steering import SteeringVector, attach_steering

QUESTIONS = ["What?", "Is there a dog in the image?"]
LENGTH = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
FAMILIES = TINY | {name: PARTIAL[name] for name in ("llava_next", "blip-2", "instructblip")}


@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_logits_are_the_mix_written_out(family):
    model, inputs = FAMILIES[family](layers=8), tiny_inputs(tiny_processor(family), QUESTIONS)
    passed = []
    hooks = [
        layer.register_forward_hook(lambda module, args, out: passed.append(out))
        for layer in decoder_layers(model)
    ]
    plain = model(**inputs).logits
    for hook in hooks:
        hook.remove()
    head = model.get_output_embeddings()
    outputs = [out[0] if isinstance(out, tuple) else out for out in passed]
    early = torch.stack([head(outputs[i]) for i in (5, 6, 7)]).mean(0)  # 6 to 8 of 8 layers
    with early_logits(model, 0.3):
        found = model(**inputs).logits
        last = model(**inputs, logits_to_keep=1).logits
    torch.testing.assert_close(found, 0.7 * plain + 0.3 * early, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(last, found[:, -1:], atol=1e-4, rtol=1e-4)
    assert torch.equal(model(**inputs).logits, plain)  # and nothing is left behind


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_are_those_without_a_cache_and_share_zero_is_plain(beams):
    model, inputs = tiny_llava(layers=4), tiny_inputs(tiny_processor(), QUESTIONS)
    plain = model.generate(**inputs, num_beams=beams, **LENGTH)
    with early_logits(model, 0.0):
        assert torch.equal(model.generate(**inputs, num_beams=beams, **LENGTH), plain)
    vector = SteeringVector({0: torch.linspace(-1, 1, 32)}, mode="vista", strength=0.5)
    with attach_steering(model, vector), early_logits(model, 0.9):
        found = model.generate(**inputs, num_beams=beams, **LENGTH)
        slow = model.generate(**inputs, num_beams=beams, use_cache=False, **LENGTH)
    assert torch.equal(found, slow) and not torch.equal(found, plain)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_another_share_is_refused(share):
    with pytest.raises(ValueError, match="share is"), early_logits(tiny_llava(), share):
        pass
