"""The hallucination warning: a calibrated chance that a word names what the image does not show.

What it is: logistic regression over the signals of `evidence.py`, in numpy, fitted on labelled
words and saved as one small JSON file. What it is not: a source of words or labels
(recipes/labelled_words.py), or valid for another model than the one whose words it was fitted on.

    warning = fit(words, protocol=protocol); warning.save("warning.json")
    HallucinationWarning.load("warning.json").score(evidence(...))
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Word = Mapping[str, Any]  # a row of `evidence`; to fit, also `true` and `scene`
SIGNALS: dict[str, Callable[[Word], list[float]]] = {
    "visual_contribution": lambda w: [w["visual_contribution"], math.log1p(w["contribution_max"])],
    "attention_share": lambda w: w["attention_share"],
    "probability": lambda w: [w["log_probability"]],
    "asked": lambda w: [w["yes_over_no"]],
    "support": lambda w: [w["log_likelihood_ratio"]],
    "attention": lambda w: w["attention_ads"] + w["cgc"],
    "relevancy": lambda w: w["relevancy_ads"] + w["relevancy_cgc"],
}
PENALTIES = (1.0, 10.0, 100.0, 1000.0)
FOLDS = 5
LEAST = 5  # words of each kind, to fit anything


@dataclass(frozen=True)
class HallucinationWarning:
    """Weights over standardised signals, and from which score on a word is warned about.

    Attributes:
        signals: names in SIGNALS, in the order of the weights.
        layers: decoder layers of the model that it was fitted for.
        mean, scale, weights: a number a feature.
        bias: of the logit.
        threshold: score, 0 to 1, from which on a word is warned about.
        protocol: what it was fitted on.
    """

    signals: list[str]
    layers: int
    mean: list[float]
    scale: list[float]
    weights: list[float]
    bias: float
    threshold: float
    protocol: dict[str, Any] = field(default_factory=dict)

    def score(self, words: Sequence[Word]) -> np.ndarray:
        """The chance that each word is hallucinated, float64 [n]: 0 seen, 1 made up.

        Raises:
            ValueError: for words of a model with another number of layers.
        """
        if not words:
            return np.zeros(0)
        layers = len(words[0]["cgc"])
        if layers != self.layers:
            raise ValueError(
                f"This warning was fitted for a model of {self.layers} decoder layers; these words "
                f"are of one with {layers}. Fit one for it with firsthand.recipes.fit_warning."
            )
        features = _features(words, self.signals)
        return _sigmoid((features - self.mean) / self.scale @ np.array(self.weights) + self.bias)

    def save(self, path: str | Path) -> None:
        """Write one JSON file, exactly."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(asdict(self)) + "\n", "utf-8")

    @classmethod
    def load(cls, path: str | Path) -> HallucinationWarning:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: where there is no such file.
            ValueError: for a file that holds something else.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such warning; make one with recipes.fit_warning.")
        try:
            found = cls(**json.loads(Path(path).read_text("utf-8")))
            unknown = set(found.signals) - set(SIGNALS)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no hallucination warning ({error}).") from None
        if unknown:
            raise ValueError(f"{path} reads signals that are not known here: {sorted(unknown)}.")
        return found


def fit(
    words: Sequence[Word], signals: Sequence[str] = tuple(SIGNALS), protocol: Any = None
) -> HallucinationWarning:
    """A warning from labelled words.

    The L2 penalty is the one with the best AUROC on held-out scenes (5 folds); its scores there are
    calibrated by Platt's logistic, and the threshold maximises balanced accuracy on them. The
    weights are of all words.

    Args:
        words: rows of `evidence` with `true` (the image shows it) and `scene`.
        signals: names in SIGNALS to read.
        protocol: kept with the weights.

    Raises:
        ValueError: for unknown signals, or fewer than 5 true or made-up words.
    """
    made_up = _made_up(words, signals)
    penalty, held, rightly = _held_out(words, signals, made_up)
    slope, offset = _calibration(held, made_up)
    standard, mean, scale = _standard(words, signals)
    *weights, bias = _logistic(standard, made_up, penalty)
    return HallucinationWarning(
        signals=list(signals),
        layers=len(words[0]["cgc"]),
        mean=mean.tolist(),
        scale=scale.tolist(),
        weights=(np.array(weights) * slope).tolist(),
        bias=float(bias * slope + offset),
        threshold=_threshold(_sigmoid(held * slope + offset), made_up),
        protocol=dict(protocol or {})
        | {"penalty": penalty, "held_out_auroc": _quality(rightly, made_up)},
    )


def choose(words: Sequence[Word], candidates: Sequence[str] = tuple(SIGNALS)) -> list[str]:
    """Which signals to read: the best one, and those that help it by more than chance.

    Forward selection: of the signals that are left, the one is added that lifts the AUROC on
    held-out scenes most, as long as the gain is more than one standard error of it (DeLong's, of
    two AUROCs on the same words). So each signal alone is always among what is compared.

    Args:
        words: as for `fit`.
        candidates: names in SIGNALS.

    Returns:
        The chosen signals, in the order of their choice.

    Raises:
        ValueError: as `fit`.
    """
    made_up = _made_up(words, candidates)
    chosen: list[str] = []
    before = np.zeros(len(words))
    while left := [name for name in candidates if name not in chosen]:
        tried = {name: _held_out(words, [*chosen, name], made_up)[2] for name in left}
        best = max(left, key=lambda name: _quality(tried[name], made_up))
        gain, error = _gain(tried[best], before, made_up)
        if chosen and gain <= error:
            break
        chosen, before = [*chosen, best], tried[best]
    return chosen


def _made_up(words: Sequence[Word], signals: Sequence[str]) -> np.ndarray:
    """bool [n]; or ValueError where nothing can be fitted."""
    if unknown := set(signals) - set(SIGNALS):
        raise ValueError(f"unknown signals {sorted(unknown)}; there are {sorted(SIGNALS)}.")
    made_up = np.array([not word["true"] for word in words], dtype=bool)
    if min(made_up.sum(), (~made_up).sum()) < LEAST:
        raise ValueError(
            f"{len(words)} words, {int(made_up.sum())} of them made up: a warning needs at least "
            f"{LEAST} of each kind. Read more scenes."
        )
    return made_up


def _standard(
    words: Sequence[Word], signals: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features [n, d] of mean 0 and deviation 1; the means and deviations that were taken out."""
    features = _features(words, signals)
    mean, scale = features.mean(0), features.std(0)
    scale = np.where(scale > 1e-9, scale, 1.0)
    return (features - mean) / scale, mean, scale


def _features(words: Sequence[Word], signals: Sequence[str]) -> np.ndarray:
    return np.array([[x for s in signals for x in SIGNALS[s](word)] for word in words], dtype=float)


def _held_out(
    words: Sequence[Word], signals: Sequence[str], made_up: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """The best penalty, and each word's logit and place by weights that did not see its fold."""
    standard, folds = _standard(words, signals)[0], _folds(words)
    best: tuple[float, np.ndarray, np.ndarray] | None = None
    for penalty in PENALTIES:
        logits, places = np.zeros(len(words)), np.zeros(len(words))
        for fold in np.unique(folds):
            inside = folds == fold
            *weights, bias = _logistic(standard[~inside], made_up[~inside], penalty)
            logits[inside] = standard[inside] @ np.array(weights) + bias
            places[inside] = _places(logits[inside], made_up[inside])
        if best is None or _quality(places, made_up) >= _quality(best[2], made_up):
            best = penalty, logits, places
    assert best is not None
    return best


def _folds(words: Sequence[Word]) -> np.ndarray:
    """int [n]: words of one scene share a fold."""
    scenes = {scene: i for i, scene in enumerate(dict.fromkeys(w["scene"] for w in words))}
    return np.array([scenes[word["scene"]] % FOLDS for word in words])


def _places(scores: np.ndarray, made_up: np.ndarray) -> np.ndarray:
    """Of each word, the share of the words of the other kind that it is on the right side of.

    Ties count half; NaN where there is none of the other kind. Its mean over either kind is AUROC.
    """
    above, below = scores[made_up][:, None], scores[~made_up]
    ahead = (above > below) + (above == below) / 2
    places = np.full(len(scores), np.nan)
    if ahead.size:
        places[made_up], places[~made_up] = ahead.mean(1), ahead.mean(0)
    return places


def _quality(places: np.ndarray, made_up: np.ndarray) -> float:
    """AUROC within folds, their mean by made-up words."""
    return float(np.nanmean(places[made_up]))


def _gain(places: np.ndarray, before: np.ndarray, made_up: np.ndarray) -> tuple[float, float]:
    """How much AUROC has grown, and DeLong's standard error of that."""
    more = places - before
    kinds = [kind[~np.isnan(kind)] for kind in (more[made_up], more[~made_up])]
    error = sum(kind.var(ddof=1) / len(kind) for kind in kinds)
    return float(kinds[0].mean()), float(np.sqrt(error))


def _calibration(logits: np.ndarray, made_up: np.ndarray) -> tuple[float, float]:
    """Platt's slope and offset of held-out logits; those that mislead leave the base rate alone."""
    slope, offset = _logistic(logits[:, None], made_up, 1e-3)
    if slope > 0:
        return float(slope), float(offset)
    return 0.0, float(_logistic(np.zeros((len(logits), 1)), made_up, 1.0)[-1])


def _logistic(x: np.ndarray, y: np.ndarray, penalty: float) -> np.ndarray:
    """Weights [d] and bias, last, of least log-loss + penalty / 2 |weights|^2, by Newton's steps.

    A step that does not lower the loss is halved.
    """
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    ridge = np.full(x.shape[1], penalty)
    ridge[-1] = 1e-6

    def loss(w: np.ndarray) -> float:
        return float(np.logaddexp(0, x @ w).sum() - y @ (x @ w) + (ridge * w * w).sum() / 2)

    weights = np.zeros(x.shape[1])
    for _ in range(100):
        chance = _sigmoid(x @ weights)
        slope = x.T @ (chance - y) + ridge * weights
        curve = (x * (chance * (1 - chance))[:, None]).T @ x + np.diag(ridge)
        step, size = np.linalg.solve(curve, slope), 1.0
        while loss(weights - size * step) > loss(weights) and size > 1e-6:
            size /= 2
        weights = weights - size * step
        if np.abs(size * step).max() < 1e-8:
            break
    return weights


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / 2))


def _threshold(scores: np.ndarray, made_up: np.ndarray) -> float:
    """The score with the highest balanced accuracy of `score >= threshold`."""
    points = np.unique(scores)
    caught = [(scores[made_up] >= p).mean() for p in points]
    passed = [(scores[~made_up] < p).mean() for p in points]
    return float(points[int(np.argmax(np.add(caught, passed)))])
