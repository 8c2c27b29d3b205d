"""The warning: its logistic regression, its calibration, and what it refuses."""

import json

import numpy as np
import pytest

from firsthand.processing.warning import (
    SIGNALS,
    HallucinationWarning,
    _gain,
    _logistic,
    _places,
    choose,
    fit,
)


def words(count: int = 400, layers: int = 3, seed: int = 0) -> list[dict]:
    """Made-up words have less support and scattered attention; a tenth of the labels is noise."""
    rng = np.random.default_rng(seed)
    made = []
    for index in range(count):
        true = bool(rng.random() < 0.7)
        seen = true if rng.random() < 0.9 else not true

        def near(value, size=layers, spread=0.3):
            return (value + spread * rng.standard_normal(size)).tolist()

        made.append(
            {
                "scene": f"s{index // 3}",
                "true": true,
                "visual_contribution": 0.5,
                "contribution_max": 1.0,
                "log_probability": -1.0,
                "log_likelihood_ratio": near(2.0 * seen, 1)[0],
                "yes_over_no": near(1.0 * seen, 1, 0.5)[0],
                "attention_share": near(0.2),
                "attention_ads": near(0.8 - 0.3 * seen),
                "cgc": near(0.2),
                "relevancy_ads": near(0.5, 2),
                "relevancy_cgc": near(0.1),
            }
        )
    return made


def test_logistic_regression_is_at_the_minimum_of_its_loss():
    """At the minimum the slope of log-loss + penalty / 2 |w|^2 is zero; the bias is not held."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((60, 4)), (rng.random(60) < 0.3).astype(float)
    *weights, bias = _logistic(x, y, 2.0)
    residual = 1 / (1 + np.exp(-(x @ np.array(weights) + bias))) - y
    assert np.abs(x.T @ residual + 2.0 * np.array(weights)).max() < 1e-6
    assert abs(residual.sum()) < 1e-4


def test_logistic_regression_stands_separable_words():
    *weights, _ = _logistic(np.array([[-1.0], [1.0]]), np.array([0.0, 1.0]), 1e-3)
    assert np.isfinite(weights).all() and weights[0] > 0


def test_unseen_words_are_told_apart_and_scores_are_chances():
    warning = fit(words())
    fresh = words(900, seed=1)
    scores, made_up = warning.score(fresh), np.array([not w["true"] for w in fresh])
    assert scores[made_up].mean() > 0.5 > scores[~made_up].mean()
    assert scores.mean() == pytest.approx(made_up.mean(), abs=0.05)
    warned = scores >= warning.threshold
    assert warned[made_up].mean() + (~warned)[~made_up].mean() > 1.7


def test_signals_without_a_clue_give_the_base_rate():
    warning = fit(words(), ["probability", "visual_contribution"])
    scores = warning.score(words())
    assert scores == pytest.approx(np.full(len(scores), scores[0]))
    assert 0.2 < scores[0] < 0.4


def test_the_fewest_signals_that_are_as_good_as_the_best_are_chosen():
    made = words()
    assert choose(made) == list(SIGNALS)  # each has noise of its own
    for word in made:
        word["yes_over_no"] = float(word["true"])
    assert choose(made) == ["probability", "asked"]
    for word in made:
        word["log_probability"] = -0.1 if word["true"] else -1.0
    assert choose(made) == ["probability"]


def test_places_and_their_gain_are_those_of_the_pairs():
    """AUROC is the share of pairs in order, ties half; the error is DeLong's, here by hand."""
    made_up = np.array([True, True, False, False])
    places = _places(np.array([2.0, 1.0, 1.0, 0.0]), made_up)
    assert places.tolist() == [1.0, 0.75, 0.75, 1.0]
    others = _places(np.array([0.0, 1.0, 1.0, 0.0]), made_up)
    gain, error = _gain(places, others, made_up)
    assert gain == pytest.approx(0.875 - 0.5)
    spread = [np.var(more, ddof=1) / 2 for more in ((0.75, 0.0), (0.5, 0.25))]
    assert error == pytest.approx(np.sqrt(sum(spread)))
    assert np.isnan(_places(np.ones(2), np.array([True, True]))).all()


def test_saved_is_loaded(tmp_path):
    warning = fit(words(), ["support", "attention"], {"n": 400})
    warning.save(tmp_path / "new" / "w.json")
    loaded = HallucinationWarning.load(tmp_path / "new" / "w.json")
    assert loaded == warning and loaded.protocol["n"] == 400
    assert (loaded.score(words()) == warning.score(words())).all()
    assert loaded.score([]).shape == (0,)


def test_refusals(tmp_path):
    few = [w for w in words(40) if w["true"]]
    for refuses in (fit, choose):
        with pytest.raises(ValueError, match="0 of them made up: a warning needs at least 5"):
            refuses(few)
    with pytest.raises(ValueError, match="unknown signals"):
        fit(words(), ["luck"])
    with pytest.raises(ValueError, match="of 3 decoder layers; these words are of one with 4"):
        fit(words()).score(words(4, layers=4))
    with pytest.raises(FileNotFoundError, match="no such warning"):
        HallucinationWarning.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(ValueError, match="holds no hallucination warning"):
        HallucinationWarning.load(tmp_path / "bad.json")
    saved = vars(fit(words(), ["support"])) | {"signals": ["luck"]}
    (tmp_path / "other.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="signals that are not known here: \\['luck'\\]"):
        HallucinationWarning.load(tmp_path / "other.json")
    assert "luck" not in SIGNALS
