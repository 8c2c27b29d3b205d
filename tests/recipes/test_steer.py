"""`firsthand steer` from the front door, on tiny models saved as checkpoints."""

import json

import pytest
import torch
from tiny_models import tiny_image, tiny_internvl, tiny_processor
from transformers import AutoModelForImageTextToText

from firsthand.modeling import SteeringVector
from firsthand.recipes import cli, demo_data, steer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_internvl(layers=4).save_pretrained(folder)
    tiny_processor("internvl").save_pretrained(folder)
    return folder


@pytest.fixture
def photo(tmp_path):
    tiny_image(3).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def pairs(tmp_path):
    said = [("a dog.", "a cat."), ("a cup.", "a car."), ("a tree.", "Yes.")]
    rows = []
    for i, texts in enumerate(said):
        tiny_image(i).save(tmp_path / f"{i}.png")
        asked = {"image": f"{i}.png", "question": "What?"}
        rows.append({s: {**asked, "answer": t} for s, t in zip(steer.SIDES, texts, strict=True)})
    rows[0]["conflict"] = "prior"
    rows += [{"positive": rows[0]["positive"]}, {**rows[1], "negative": {"image": "gone.png"}}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "pairs.jsonl"


def run(*words):
    return cli.main(["steer", *map(str, words)])


def fitted(checkpoint, out, *words):
    assert run("fit", "--model", checkpoint, "--out", out, *words) == 0
    return SteeringVector.from_pretrained(out)


@pytest.mark.parametrize("method", ["mean", "svd", "pca", "vti", "cas"])
def test_methods_fit_pairs_and_count_bad_rows(method, checkpoint, pairs, tmp_path, capsys):
    out = tmp_path / "vector"
    vector = fitted(checkpoint, out, "--method", method, "--pairs", pairs, "--gate", "0.4")
    assert (vector.method, vector.pairs, vector.gate) == (method, 3, 0.4)
    assert "2 of 5 rows are left out" in capsys.readouterr().out
    reasons = (tmp_path / "vector-work" / "skipped.jsonl").read_text()
    assert "negative has no image, question, answer" in reasons
    again = fitted(checkpoint, tmp_path / "again", "--method", method, "--pairs", pairs)
    assert all(torch.equal(again.directions[i], vector.directions[i]) for i in vector.layers)


def test_layers_and_count_are_chosen(checkpoint, pairs, tmp_path):
    vector = fitted(
        checkpoint, tmp_path / "v", "--pairs", pairs, "--layers", "1-2", "--count", "2"
    )  # fmt: skip
    assert vector.layers == [1, 2] and vector.pairs == 2
    assert steer.layers_of("0,3") == [0, 3]


@pytest.mark.parametrize("sided", [("mean",), ("vti", "--side", "both", "--trials", "1")])
def test_other_pairs_are_measured_anew_and_the_same_ones_are_not(
    sided, checkpoint, pairs, tmp_path, monkeypatch
):
    """Kept batches of another seed, count or file are not taken for these."""
    asked, out = ("--method", *sided, "--pairs", pairs), tmp_path / "v"
    found = [fitted(checkpoint, out, *asked, "--count", "2", "--seed", seed) for seed in (0, 1)]
    apart = fitted(checkpoint, tmp_path / "w", *asked, "--count", "2", "--seed", 1)
    assert not torch.equal(found[0].directions[1], found[1].directions[1])
    assert torch.equal(found[1].directions[1], apart.directions[1])
    for layer, direction in apart.vision.items():
        assert torch.equal(found[1].vision[layer], direction)
    monkeypatch.setattr("firsthand.modeling.steering_fit._encode", None)  # nothing is left to do
    again = fitted(checkpoint, out, *asked, "--count", "2", "--seed", 1)
    assert torch.equal(again.directions[1], apart.directions[1])
    rows = pairs.read_text().splitlines()
    pairs.write_text("\n".join([rows[1], rows[0], *rows[2:]]))
    with pytest.raises(TypeError):  # other pairs are to be measured
        run("fit", "--model", checkpoint, "--out", out, *asked, "--count", "2", "--seed", 1)


def test_valse_asks_the_model_itself(checkpoint, pairs, tmp_path):
    rows = [{"image": f"{i}.png", "question": "What?"} for i in range(2)]
    rows.append({"image": "2.png", "question": "What?", "answer": "a dog."})
    file = tmp_path / "asked.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    vector = fitted(checkpoint, tmp_path / "v", "--method", "valse", "--pairs", file)
    assert vector.method == "valse" and 1 <= vector.pairs <= 3


@pytest.mark.parametrize(("side", "sides"), [("vision", (0, 3)), ("both", (4, 3))])
def test_vti_has_a_vision_side(side, sides, checkpoint, pairs, tmp_path):
    rows = [{"image": f"{i}.png"} for i in range(2)]
    (tmp_path / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = pairs if side == "both" else tmp_path / "images.jsonl"
    vector = fitted(
        checkpoint, tmp_path / "v", "--method", "vti", "--side", side, "--pairs", file, "--trials",
        "2", "--mask-ratio", "0.5",
    )  # fmt: skip
    assert (len(vector.layers), len(vector.vision)) == sides


def test_vista_is_fitted_on_one_prompt_and_applied(checkpoint, photo, tmp_path, capsys):
    fitted(checkpoint, tmp_path / "v", "--method", "vista", "--image", photo)
    asked = ("--model", checkpoint, "--image", photo, "--max-new-tokens", 4)
    assert run("apply", "--vector", tmp_path / "v", "--strength", "-0.1", *asked) == 0
    assert "(strength -0.1)" in capsys.readouterr().out
    assert run("apply", "--vector", tmp_path / "v", "--early", "0.3", *asked) == 0
    assert run("apply", "--vector", tmp_path / "v", "--early", "3", *asked) == 2
    assert "share is 3.0" in capsys.readouterr().err
    assert run("fit", "--method", "vista", "--out", tmp_path / "w") == 2
    assert "fits one prompt" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["vcd", "vcd-blur", "icd", "m3id", "pai"])
def test_contrast_prints_both_answers(method, checkpoint, photo, capsys):
    asked = ("--model", checkpoint, "--image", photo, "--max-new-tokens", 6)
    assert run("contrast", "--method", method, "--alpha", "0", "--beta", "0", *asked) == 0
    plain, contrasted = capsys.readouterr().out.strip().splitlines()[-2:]
    assert plain.removeprefix("plain: ") == contrasted.removeprefix(f"{method}: ")
    assert run("contrast", "--method", method, "--beta", "2", *asked) == 2
    assert "beta is 2.0" in capsys.readouterr().err


def test_fold_writes_a_stock_checkpoint_with_its_processor(checkpoint, pairs, tmp_path):
    vector = fitted(checkpoint, tmp_path / "v", "--pairs", pairs)
    out = tmp_path / "folded"
    assert run("fold", "--model", checkpoint, "--vector", tmp_path / "v", "--out", out) == 0
    loaded = AutoModelForImageTextToText.from_pretrained(out)
    assert type(loaded).__name__ == "InternVLForConditionalGeneration"
    bias = loaded.model.language_model.layers[2].mlp.down_proj.bias
    torch.testing.assert_close(bias, vector.directions[2])
    assert (out / "tokenizer.json").exists() and not list(out.glob("*.py"))


def test_fold_refuses_what_a_bias_cannot_say(checkpoint, pairs, tmp_path, capsys):
    fitted(checkpoint, tmp_path / "v", "--pairs", pairs, "--gate", "0.1")
    asked = ("--model", checkpoint, "--vector", tmp_path / "v", "--out", tmp_path / "folded")
    assert run("fold", *asked) == 2
    assert "it is gated" in capsys.readouterr().err
    assert not (tmp_path / "folded").exists()


def test_cut_writes_an_edited_checkpoint(checkpoint, pairs, tmp_path):
    out = tmp_path / "cut"
    assert run("cut", "--model", checkpoint, "--pairs", pairs, "--rank", "2", "--out", out) == 0
    plain, edited = (AutoModelForImageTextToText.from_pretrained(f) for f in (checkpoint, out))
    changed = [
        not torch.equal(a.mlp.down_proj.weight, b.mlp.down_proj.weight)
        for a, b in zip(
            plain.model.language_model.layers, edited.model.language_model.layers, strict=True
        )
    ]
    assert changed == [False, False, True, True]


def test_scenes_make_conflicts_of_both_kinds():
    rows = demo_data.load_scenes("validation", 4)
    found = steer.conflict_pairs(rows, seed=1)
    assert [pair["conflict"] for pair in found] == ["prior"] * 4 + ["context"] * 4
    for row, prior, context in zip(rows, found[:4], found[4:], strict=True):
        assert prior["positive"]["answer"] == row["caption"] != prior["negative"]["answer"]
        question = context["positive"]["question"]
        assert not any(f" {thing['noun']} " in question for thing in row["objects"])
        assert question.startswith("The image shows a")
    assert [p["negative"]["answer"] for p in steer.conflict_pairs(rows, seed=1)] == [
        p["negative"]["answer"] for p in found
    ]


@pytest.mark.parametrize("action", ["fit", "cut"])
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--layers", "few"), "write a range 4-11"),
        (("--count", "0"), "--count is 0; it must be at least 1"),
        (("--pairs", "gone.jsonl"), "gone.jsonl: no such file of rows"),
    ],
)
def test_what_cannot_work_is_refused_before_a_model_is_loaded(
    action, words, told, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(steer, "load_model", None)
    assert run(action, *words, "--out", tmp_path / "v") == 2
    assert told in capsys.readouterr().err
