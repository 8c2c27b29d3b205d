"""`firsthand measure export`: results that the Hub's own parser reads back."""

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from measuring import CHAIR, measured, refused, rows_of, run, save, save_captions

from firsthand.metrics import results


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_captions(tmp_path)
    return tmp_path


EXPORT = ("export", "results.json", "--dataset-id", "org/data", "--out", ".eval_results/x.yaml")


def test_export_reads_back_through_the_hub(folder):
    found = measured(*CHAIR)
    words = (*EXPORT, "--task-id", "val_{metric}", "--source-url", "https://example.org/run")
    assert run(*words) == 0
    text = (folder / ".eval_results" / "x.yaml").read_text()
    entries = parse_eval_result_entries(yaml.safe_load(text))
    assert {entry.task_id: entry.value for entry in entries} == {
        f"val_{name}": row["value"] for name, row in found.items()
    }
    one = next(entry for entry in entries if entry.task_id == "val_chair_i")
    assert (one.dataset_id, one.source_url) == ("org/data", "https://example.org/run")
    row = found["chair_i"]
    for told in (f"{row['low']:.4f} to {row['high']:.4f}", "n=4", "original", "chair_i of plain"):
        assert told in one.notes
    assert row["protocol"]["fingerprint"] in one.notes


def test_export_into_a_model_card(folder):
    found = measured(*CHAIR)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Model\n")
    words = (*EXPORT, "--task-id", "t", "--metrics", "chair_i", "--model-card", "README.md")
    assert run(*words) == 0
    assert run(*words) == 0  # again: replaced, not doubled
    card = ModelCard.load(folder / "README.md")
    (entry,) = card.data.eval_results
    assert (entry.dataset_type, entry.metric_type) == ("org/data", "chair_i")
    assert entry.metric_value == found["chair_i"]["value"]
    assert entry.metric_args["n"] == 4
    assert card.data.license == "mit" and "# Model" in card.text


def test_export_leaves_out_what_is_undefined(folder, capsys):
    save("rows.jsonl", rows_of({"a": "Nothing.", "b": "Nothing."}))
    measured(*CHAIR)
    assert run(*EXPORT, "--task-id", "{metric}") == 0
    out = capsys.readouterr().out
    assert "written: 4" in out and "undefined and left out: 1" in out
    undefined = (*EXPORT, "--task-id", "t", "--metrics", "chair_i")
    assert "undefined" in refused(capsys, *undefined)


EXPORTS = {
    "one task, two values": (("--task-id", "t"), "stand for several values"),
    "no such metric": (("--task-id", "t", "--metrics", "bleu"), "no metric bleu; it has chair_s"),
    "no such arm": (("--task-id", "t", "--arm", "x"), "no arm x"),
    "no Hub id": (("--task-id", "t", "--dataset-id", "data"), "no Hub id"),
    "no YAML": (("--task-id", "t", "--out", "x.json"), "name it .yaml"),
    "no card": (("--task-id", "{metric}", "--model-card", "absent.md"), "no such model card"),
}


@pytest.mark.parametrize("words, told", EXPORTS.values(), ids=EXPORTS)
def test_what_cannot_be_exported_is_refused(folder, capsys, words, told):
    measured(*CHAIR)
    assert told in refused(capsys, *EXPORT, *words)
    assert not (folder / ".eval_results").exists()


def test_export_of_two_arms(folder, capsys):
    both = [*measured(*CHAIR).values(), *measured(*CHAIR, "--arm", "steered").values()]
    results.write_results("results.json", both)
    words = (*EXPORT, "--task-id", "t", "--metrics", "recall")
    assert "choose with --arm" in refused(capsys, *words)
    assert run(*words, "--arm", "steered") == 0
