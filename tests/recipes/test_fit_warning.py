"""Fitting a warning from the command line: which scenes and captions it reads, what it writes."""

import numpy as np
import pytest

from firsthand.processing.warning import HallucinationWarning
from firsthand.recipes import fit_warning
from firsthand.recipes.demo_data import SCENES


@pytest.fixture
def asked(monkeypatch):
    """Words without a model: probability tells them apart, nothing else does."""
    seen = []
    rng = np.random.default_rng(0)

    def word(scene, index):
        noise = rng.standard_normal(9).tolist()
        true = bool(index % 3)
        return {
            "scene": scene, "true": true, "log_probability": -0.1 if true else -2.0,
            "yes_over_no": noise[0], "log_likelihood_ratio": noise[1], "visual_contribution": 0.5,
            "contribution_max": 1.0, "attention_share": noise[:3], "attention_ads": noise[2:5],
            "cgc": noise[4:7], "relevancy_ads": noise[5:7], "relevancy_cgc": noise[6:9],
        }  # fmt: skip

    def labelled_words(work, model, processor, split, rows, source, seed):
        seen.append((split, [row["id"] for row in rows], source, seed))
        return [word(row["id"], i) for row in rows for i in range(3)]

    monkeypatch.setattr(fit_warning, "labelled_words", labelled_words)
    monkeypatch.setattr(fit_warning, "load_model", lambda name: (None, None))
    return seen


def test_the_models_own_captions_of_the_scenes_are_read(tmp_path, asked, capsys):
    out = tmp_path / "warning.json"
    fit_warning.main(["--out", str(out), "--count", "12", "--seed", "3"])
    ids = [f"validation-{i:06}" for i in range(12)]
    assert asked == [("validation", ids, "own", 3), ("validation", ids, "drawn", 3)]
    warning = HallucinationWarning.load(out)
    assert warning.signals == ["probability"] and warning.layers == 3
    assert warning.protocol["n_ids"] == 12 and warning.protocol["held_out_auroc"] == 1
    assert "72 words, 24 made up; chosen signals: probability" in capsys.readouterr().out


def test_scenes_of_ones_own_are_read(tmp_path, asked):
    given = ["--data", str(SCENES), "--split", "test", "--count", "8"]
    fit_warning.main(["--out", str(tmp_path / "w.json"), *given])
    assert {split for split, *_ in asked} == {"test"}
    with pytest.raises(ValueError, match="has no scenes of split 'train'"):
        fit_warning.main(["--out", "w.json", "--data", str(SCENES), "--split", "train"])
