"""Every kind of published checkpoint, from its files to an answer where firsthand is not."""

import pytest
import torch
from hub_fresh import run_fresh
from tiny_models import tiny_image
from tiny_originals import WRITERS, write_lora, write_original

from firsthand.recipes import cli
from firsthand.recipes.convert_checkpoint import CLASSES, KINDS

KIND = sorted(WRITERS)
ENDS = {  # of the prompt: what each model was trained on
    "llava": "USER: <image>\nWhy? ASSISTANT:",
    "llava-projector": "USER: <image>\nWhy? ASSISTANT:",
    "conv-llava": "USER: <image>\nWhy? ASSISTANT:",
    "minigpt4": "###Human: <Img><image></Img> Why?###Assistant: ",
    "mplug-owl": "\nHuman: <image>\nHuman: Why?\nAI: ",
    "mplug-owl2": "USER: <image>Why? ASSISTANT:",
}
STRANGER = """
import torch, transformers
from PIL import Image
image, found = Image.open(IMAGE), {}
talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]}]

def ask(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits, model.generate(**inputs, max_new_tokens=4, do_sample=False)

for kind, folder in FOLDERS.items():
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    prompt = processor.apply_chat_template(talk, add_generation_prompt=True)
    inputs = processor(images=[image], text=[prompt], return_tensors="pt")
    logits, answer = ask(model, inputs)
    found[kind] = {
        "model": type(model).__name__, "prompt": prompt, "inputs": dict(inputs), "logits": logits,
        "answer": answer, "image_token": model.config.image_token_id,
    }
    if kind == "mplug-owl":
        import peft
        tuned = peft.PeftModel.from_pretrained(model, ADAPTER)
        found["lrv-lora"] = ask(tuned, inputs)
        # the whole of what LRV published, merged into one checkpoint
        tuned.merge_and_unload().save_pretrained(MERGED)
torch.save(found, OUT)
"""


def convert(kind, out, options):
    given = [word for name, path in options.items() for word in (f"--{name}", str(path))]
    assert cli.main(["train", "convert", "--kind", kind, *given, "--out", str(out)]) == 0


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The tiny models, what a stranger found in their converted files, and the folder."""
    folder = tmp_path_factory.mktemp("originals")
    models = {}
    for kind in KIND:
        (folder / "from" / kind).mkdir(parents=True)
        models[kind], options = write_original(kind, folder / "from" / kind)
        convert(kind, folder / kind, options)
    models["merged"], options = write_lora(folder / "from")
    convert("lrv-lora", folder / "lrv-lora", {**options, "language": folder / "mplug-owl"})
    tiny_image().save(folder / "image.png")
    known = {
        "FOLDERS": {kind: str(folder / kind) for kind in KIND},
        "IMAGE": str(folder / "image.png"),
        "ADAPTER": str(folder / "lrv-lora"),
        "MERGED": str(folder / "merged"),
        "OUT": str(folder / "found.pt"),
    }
    run_fresh("".join(f"{name} = {value!r}\n" for name, value in known.items()) + STRANGER)
    return models, torch.load(folder / "found.pt"), folder


def test_every_kind_is_converted():
    assert set(WRITERS) == set(KINDS)


@pytest.mark.parametrize("kind", KIND)
def test_every_weight_arrives_and_the_new_token_has_the_mean_row(kind, converted):
    models, _, folder = converted
    again, report = CLASSES[kind].from_pretrained(folder / kind, output_loading_info=True)
    assert not any(report.values())
    found, wanted = again.state_dict(), models[kind].state_dict()
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(found[key][: len(tensor)], tensor), key
        if key.endswith(("lm_head.weight", "embed_tokens.weight")):
            assert len(found[key]) == len(tensor) + 1
            torch.testing.assert_close(found[key][-1], tensor.mean(0))


@torch.no_grad()
@pytest.mark.parametrize("kind", KIND)
def test_a_stranger_gets_the_originals_answer(kind, converted):
    """The same numbers as the model whose weights were written under the published names."""
    models, found, _ = converted
    model, seen = models[kind], found[kind]
    assert seen["model"] == CLASSES[kind].__name__ and seen["prompt"].endswith(ENDS[kind])
    ids, token = seen["inputs"]["input_ids"], seen["image_token"]
    old = model.config.image_token_id
    assert token == model.config.text_config.vocab_size and not (ids == old).any()
    inputs = {**seen["inputs"], "input_ids": torch.where(ids == token, old, ids)}
    expected = model(**inputs).logits
    torch.testing.assert_close(seen["logits"][..., :token], expected, atol=1e-5, rtol=1e-5)
    said = seen["answer"][0, ids.shape[1] :] if len(seen["answer"][0]) > 4 else seen["answer"][0]
    assert 0 < len(said) <= 4 and int(said[0]) == int(expected[0, -1].argmax())
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}
    assert float((model(**other).logits - expected).abs().max()) > 1e-4  # the image decides


@torch.no_grad()
def test_a_stranger_gets_lrvs_answer(converted):
    """The adapter, loaded by PEFT on the converted mPLUG-Owl, is W + (32 / 8) B A."""
    models, found, _ = converted
    model, seen = models["mplug-owl"], found["mplug-owl"]
    ids, token = seen["inputs"]["input_ids"], seen["image_token"]
    inputs = {**seen["inputs"]}
    inputs["input_ids"] = torch.where(ids == token, model.config.image_token_id, ids)
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict({**plain, **models["merged"]})
    expected = model(**inputs).logits
    model.load_state_dict(plain)
    logits, answer = found["lrv-lora"]
    torch.testing.assert_close(logits[..., :token], expected, atol=1e-4, rtol=1e-4)
    assert float((logits - seen["logits"]).abs().max()) > 0.1 and len(answer) == 1


def test_a_merged_adapter_is_saved_with_its_code(converted):
    from firsthand.recipes.inputs import load_model

    models, _, folder = converted
    assert (folder / "merged" / "modeling_mplug_owl.py").is_file()
    model, processor = load_model(str(folder / "mplug-owl"))
    again = type(model).from_pretrained(folder / "merged")
    for name, weight in models["merged"].items():
        torch.testing.assert_close(again.state_dict()[name], weight)
    assert processor.num_image_tokens == 6
