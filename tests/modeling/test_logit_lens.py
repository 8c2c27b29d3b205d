"""The lens against the model's own head and hidden states, in every family."""

import pytest
import torch
from tiny_models import PALIGEMMA_2, PARTIAL, TINY, tiny_image, tiny_inputs, tiny_processor

from firsthand.modeling.families import decoder_layers
from firsthand.modeling.logit_lens import layer_states, logit_lens
from firsthand.modeling.relevancy import explain

MODELS = TINY | PARTIAL | {"paligemma2": PALIGEMMA_2}


@pytest.mark.parametrize("family", MODELS)
def test_the_last_normed_reading_is_the_models_own(family):
    model, processor = MODELS[family](), tiny_processor(family)
    inputs = tiny_inputs(processor)
    inputs.pop("labels", None)
    length = inputs["input_ids"].shape[1]
    positions = torch.tensor([length - 1, length - 3])
    with torch.no_grad(), layer_states(model, positions) as states:
        said = model(**inputs).logits[0, positions].softmax(-1).max(-1)
    assert len(states) == len(decoder_layers(model)) + 1 == 3
    assert not any(
        layer._forward_hooks or layer._forward_pre_hooks for layer in decoder_layers(model)
    )
    lens = logit_lens(model, states, processor.tokenizer)
    torch.testing.assert_close(lens["lens_normed_probability"][-1], said.values)
    assert lens["lens_normed"][-1] == [
        processor.tokenizer.decode([t]) for t in said.indices.tolist()
    ]
    logits = model.get_output_embeddings()(states[1])
    logits = 5 * torch.tanh(logits / 5) if family == "paligemma2" else logits
    raw = logits.softmax(-1).max(-1)
    torch.testing.assert_close(lens["lens_raw_probability"][1], raw.values)
    assert lens["lens_raw"][1] == [processor.tokenizer.decode([t]) for t in raw.indices.tolist()]


def test_explain_reads_the_positions_that_predict_the_answer():
    model, processor = TINY["llava"](), tiny_processor("llava")
    found = explain(model, processor, tiny_image(), "What?", max_new_tokens=4, layers=True)
    assert len(found.lens_raw) == len(found.lens_normed) == 3
    said = [processor.tokenizer.decode([t]) for t in found.token_ids]
    assert found.lens_normed[-1] == said  # greedy
    torch.testing.assert_close(found.lens_normed_probability[-1], found.probability)
    assert found.lens_raw_probability.shape == (3, len(said))
