"""`explain heads` and `explain head`: the right tokens, the right rows, counted leftovers."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from tiny_models import TINY, tiny_image, tiny_llava, tiny_processor

from firsthand.datasets_scripts.fivl.fivl import features
from firsthand.modeling.families import image_grids, image_mask
from firsthand.processing.answered import forced, generated
from firsthand.processing.figures import grids
from firsthand.processing.generation import one_view
from firsthand.processing.head_statistics import STATISTICS, statistics
from firsthand.processing.masks import decode, encode, patch_coverage
from firsthand.recipes.cli import main
from firsthand.recipes.explain_heads import HeadStudy, best_heads

QUESTION, ANSWER = "Describe the image.", "a dog top left, a cup, a dog center."


def expression(text="dog", start=2, rows=30, **changes):
    """A key expression whose mask is the upper left of an image of 80 x 60."""
    mask = np.zeros((60, 80), bool)
    mask[:rows, :40] = True
    found = {"text": text, "phrase": text, "char_start": start, "char_end": start + len(text)}
    found |= {"nouns": [text], "boxes": [], "score": 1.0, "mask": encode(mask)}
    return found | changes


def sample(name, *expressions, seed=0):
    turn = {"question": QUESTION, "answer": ANSWER, "expressions": list(expressions)}
    row = {"id": name, "record_key": name, "image": tiny_image(seed), "source": "test"}
    return row | {"turns": [turn], "rejected": []}


def samples():
    return [
        sample("0", expression(), expression("cup", 18, rows=15)),
        sample("1", expression("cup", 18, rows=45), seed=1),
    ]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llava().save_pretrained(folder)
    tiny_processor("llava").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "train.parquet"
    Dataset.from_list(samples(), features=features()).to_parquet(path)
    return path


@pytest.mark.parametrize("family", sorted(TINY))
def test_tokens_of_an_answer_are_found_by_their_characters(family):
    processor = tiny_processor(family)
    answered = forced(TINY[family](), processor, tiny_image(), QUESTION, ANSWER)
    ids = answered.inputs["input_ids"][0]
    end = answered.first + len(answered.spans)
    assert processor.decode(ids[answered.first : end]) == ANSWER
    for word, start in (("dog", 2), ("cup", 18), ("center", 29)):
        tokens = answered.tokens(start, start + len(word))
        found = processor.decode([ids[p + 1] for p in answered.producers(tokens)])
        assert found.strip() == word


@pytest.mark.parametrize("family", sorted(TINY))
def test_own_answers_are_read_again_as_they_were_said(family):
    model, processor = TINY[family](), tiny_processor(family)
    answered = generated(model, processor, tiny_image(), QUESTION, max_new_tokens=6)
    with torch.no_grad():
        logits = model(**answered.inputs).logits[0]
    at = answered.producers(range(len(answered.spans)))
    said = answered.inputs["input_ids"][0, answered.first :]
    assert logits[at].argmax(-1).tolist() == said.tolist()


def by_hand(model, processor, row, number, mask):
    """Statistics of one expression from transformers' full eager maps."""
    key = row["turns"][0]["expressions"][number]
    answered = forced(model, processor, row["image"], QUESTION, ANSWER)
    at = answered.producers(answered.tokens(key["char_start"], key["char_end"]))
    model.set_attn_implementation({"text_config": "eager"})
    with torch.no_grad():
        maps = model.base_model(**answered.inputs, output_attentions=True).attentions
    image = image_mask(model, answered.inputs["input_ids"])[0]
    rows = torch.stack(maps)[:, 0][:, :, at][..., image].numpy()
    cover = patch_coverage(mask, image_grids(model.config, answered.inputs)[0])
    return {n: v.mean(-1) for n, v in statistics(rows, cover.ravel()).items()}


@pytest.mark.parametrize("family", sorted(TINY))
def test_grids_are_the_means_of_items_computed_by_hand(family):
    model, processor, rows = TINY[family](), tiny_processor(family), samples()
    study = HeadStudy(model, processor)
    study.read(rows, progress=False)
    masks = [[decode(e["mask"]) for e in row["turns"][0]["expressions"]] for row in rows]
    places = [(0, 0), (0, 1), (1, 0)]
    controls = [masks[1][0], masks[1][0], masks[0][0]]
    for arm, chosen in (("plain", [masks[i][j] for i, j in places]), ("shuffled", controls)):
        items = [
            by_hand(model, processor, rows[i], j, mask)
            for (i, j), mask in zip(places, chosen, strict=True)
        ]
        for name in STATISTICS:
            expected = np.nanmean([item[name] for item in items], axis=0)
            grid = study.grids[arm][name]
            np.testing.assert_allclose(
                grid.mean, expected, atol=2e-2 if name == "spearman" else 1e-4
            )
            assert (grid.count == 3).all() and grid.mean.shape == (2, 4)
    assert study.items == 3 and study.unmatched == 0 and not study.dropped


def test_smallest_mask_takes_one_expression_a_turn():
    study = HeadStudy(tiny_llava(), tiny_processor("llava"), smallest=True)
    study.read(samples(), 1, progress=False)
    assert study.items == 1 and study.ids == ["0"]
    alone = HeadStudy(tiny_llava(), tiny_processor("llava"))
    alone.read([sample("0", expression("cup", 18, rows=15))], progress=False)
    np.testing.assert_array_equal(
        study.grids["plain"]["auroc"].mean, alone.grids["plain"]["auroc"].mean
    )
    assert "shuffled" not in alone.grids, "a sample is no control of itself"


def test_expressions_are_looked_for_in_the_models_own_words(monkeypatch):
    from firsthand.recipes import explain_heads

    def says(model, processor, image, question, max_new_tokens):
        return forced(model, processor, image, question, "a Dog, a dogma, a dog.")

    monkeypatch.setattr(explain_heads, "generated", says)
    seen = []
    read = explain_heads.head_attention
    monkeypatch.setattr(explain_heads, "head_attention", lambda *a: seen.append(a[2]) or read(*a))
    processor = tiny_processor("llava")
    study = HeadStudy(tiny_llava(), processor, own_answer=True)
    study.read(samples(), 1, progress=False)
    answered = says(tiny_llava(), processor, tiny_image(), QUESTION, 0)
    both = answered.tokens(2, 5) + answered.tokens(18, 21)
    assert seen == [answered.producers(both)], "all whole words in either case, no parts of words"
    assert (study.items, study.unmatched) == (1, 1)


def test_bad_rows_are_left_out_with_their_reason():
    other = encode(np.ones((10, 10), bool))
    empty, full = (encode(np.full((60, 80), x)) for x in (False, True))
    bad = [
        expression(mask=None),
        expression(mask=other),
        expression(mask=empty),
        expression(mask=full),
        expression(mask={"size": [60, 80], "counts": None}),
        expression("dog", 3),
    ]
    textless = {**sample("2", expression()), "image": None}
    study = HeadStudy(tiny_llava(), tiny_processor("llava"))
    study.read([sample("0", *bad, expression()), textless], progress=False)
    assert study.items == 1 and (study.grids["plain"]["auroc"].count == 1).all()
    reasons = " | ".join(d["reason"] for d in study.dropped)
    assert len(study.dropped) == 7
    for part in (
        "no mask",
        "its image (60, 80)",
        "empty",
        "all or nothing",
        "are not the",
        "no image",
    ):
        assert part in reasons


def test_heads_through_the_command_line(saved, parquet, tmp_path, capsys):
    arguments = ["explain", "heads", "--data", str(parquet), "--model", str(saved)]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "heads.json").read_text())
    assert found["items"] == 3 and found["protocol"]["n_ids"] == 2 and found["dropped"] == []
    for name in STATISTICS:
        cells = found["grids"]["plain"][name]
        assert np.shape(cells["mean"]) == np.shape(cells["count"]) == (2, 4)
        top = [h["mean"] for h in found["top"][name]]
        assert top == sorted(top, reverse=True) and top[0] == np.max(cells["mean"])
        assert top[0] <= found["ceiling"][name] + 1e-6
    assert Image.open(tmp_path / "heads.png").width > 500
    assert "3 expressions of 2 samples" in capsys.readouterr().out


def test_a_broken_image_does_not_stop_the_others():
    rows = samples()
    broken = {**rows[1], "image": {"bytes": b"no image", "path": None}}
    data = Dataset.from_list([rows[0], broken], features=features())
    study = HeadStudy(tiny_llava(), tiny_processor("llava"))
    study.read(data, progress=False)
    assert study.items == 2 and [d["id"] for d in study.dropped] == ["1"]


def test_head_through_the_command_line(saved, tmp_path, capsys):
    tiny_image().save(tmp_path / "a.png")
    arguments = ["explain", "head", "--model", str(saved), "--image", str(tmp_path / "a.png")]
    chosen = ["--layer", "1", "--head", "2", "--answer", ANSWER, "--out", str(tmp_path)]
    assert main([*arguments, *chosen]) == 0
    found = json.loads((tmp_path / "head.json").read_text())
    assert "".join(found["tokens"]) == ANSWER
    attention = np.array(found["attention"])
    assert attention.shape == (len(found["tokens"]), 4, 4)
    np.testing.assert_allclose(attention.sum((1, 2)), found["image_share"], rtol=1e-5)
    assert Image.open(tmp_path / "tokens.png").width > 240
    assert main([*arguments, "--layer", "9", "--head", "0"]) == 2
    assert "layers 0 to 1 with heads 0 to 3" in capsys.readouterr().err


def test_nothing_to_compare_is_an_error(saved, tmp_path, capsys):
    path = tmp_path / "rows.parquet"
    Dataset.from_list([sample("0", expression(mask=None))], features=features()).to_parquet(path)
    arguments = ["explain", "heads", "--data", str(path), "--model", str(saved)]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert "no mask (1)" in capsys.readouterr().err
    assert main([*arguments, "--samples", "0"]) == 2


def test_best_heads_and_figure_survive_nan():
    means = np.array([[0.1, np.nan], [0.9, 0.1]])
    assert best_heads(means, 3) == [(1, 0), (0, 0), (1, 1)]
    figure = grids({"a": means, "b": np.full((2, 2), np.nan)}, "t", {"a": [(1, 0)]}, {"a": 0.5})
    assert figure.width > 200
    with pytest.raises(ValueError, match="at least one panel"):
        grids({})
    with pytest.raises(ValueError, match="layers, heads"):
        grids({"a": [1.0]})


def test_tiles_are_switched_off():
    processor = tiny_processor("smolvlm")
    processor.image_processor.do_image_splitting = True
    study = HeadStudy(TINY["smolvlm"](), one_view(processor))
    study.read(samples(), progress=False)
    assert study.items == 3
