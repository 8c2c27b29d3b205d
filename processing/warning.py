"""The hallucination warning: a calibrated chance that a word names what the image does not show.

What it is: logistic regression over some signals of `evidence.py`, in numpy, chosen and fitted on
labelled words and saved as one small JSON file. What it is not: a source of words or labels
(recipes/labelled_words.py), or valid for another model than the one whose words it was fitted on.

    warning = fit(words, choose(words), protocol); warning.save("warning.json")
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


def _log_odds(word: Word) -> float:
    chance = math.exp(word["log_probability"])
    return math.log(max(chance, LEAST_CHANCE) / max(1 - chance, LEAST_CHANCE))


def _thirds(layers: Sequence[float]) -> list[float]:
    """Means over the early, middle and late layers."""
    return [float(np.mean(third)) for third in np.array_split(layers, min(3, len(layers)))]


SIGNALS: dict[str, Callable[[Word], list[float]]] = {
    "probability": lambda w: [_log_odds(w)],
    "asked": lambda w: [w["yes_over_no"]],
    "attention_share": lambda w: _thirds(w["attention_share"]),
    "attention": lambda w: _thirds(w["attention_ads"]) + _thirds(w["cgc"]),
    "visual_contribution": lambda w: [w["visual_contribution"], math.log1p(w["contribution_max"])],
    "relevancy": lambda w: w["relevancy_ads"] + _thirds(w["relevancy_cgc"]),
    "support": lambda w: [w["log_likelihood_ratio"]],
}
LADDER = (  # by what they cost: forward passes for probability and for nouns, attention, gradients
    ("probability",),
    ("probability", "asked"),
    ("probability", "asked", "attention_share", "attention"),
    tuple(SIGNALS),
)
LEAST_CHANCE = 1e-6  # of a word and of its opposite, before their logarithm
PENALTIES = (0.1, 1.0, 10.0, 100.0)
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

    The L2 penalty is the one with the least log-loss on held-out scenes (5 folds); its scores there
    are calibrated by Platt's logistic, and the threshold maximises balanced accuracy on them. The
    weights are of all words.

    Args:
        words: rows of `evidence` with `true` (the image shows it) and `scene`.
        signals: names in SIGNALS to read.
        protocol: kept with the weights.

    Raises:
        ValueError: for unknown signals, or fewer than 5 true or made-up words.
    """
    made_up = _made_up(words, signals)
    penalty, held, places = _held_out(words, signals, made_up)
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
        | {"penalty": penalty, "held_out_auroc": _quality(places, made_up)},
    )


def choose(words: Sequence[Word]) -> list[str]:
    """Which signals to read: the fewest that are as good as the best, but for chance.

    Of LADDER, whose first step is the word's probability alone, the first step whose AUROC on
    held-out scenes is within one standard error of the best step's (DeLong's, of the difference of
    two AUROCs on the same words).

    Args:
        words: as for `fit`.

    Raises:
        ValueError: as `fit`.
    """
    made_up = _made_up(words, list(SIGNALS))
    tried = {step: _held_out(words, step, made_up)[2] for step in LADDER}
    best = max(tried.values(), key=lambda places: _quality(places, made_up))
    gains = {step: _gain(best, places, made_up) for step, places in tried.items()}
    good = [step for step, (gain, error) in gains.items() if gain <= error]
    return list(good[0] if good else LADDER[0])  # none where too few words leave no error to tell


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
    logits = {penalty: np.zeros(len(words)) for penalty in PENALTIES}
    for penalty, held in logits.items():
        for inside in (folds == fold for fold in np.unique(folds)):
            *weights, bias = _logistic(standard[~inside], made_up[~inside], penalty)
            held[inside] = standard[inside] @ np.array(weights) + bias
    penalty = min(PENALTIES, key=lambda penalty: _log_loss(logits[penalty], made_up))
    places = np.zeros(len(words))
    for inside in (folds == fold for fold in np.unique(folds)):
        places[inside] = _places(logits[penalty][inside], made_up[inside])
    return penalty, logits[penalty], places


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


def _gain(places: np.ndarray, others: np.ndarray, made_up: np.ndarray) -> tuple[float, float]:
    """How much larger the AUROC of `places` is than of `others`, and DeLong's error of that."""
    more = places - others
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
        return _log_loss(x @ w, y) + float((ridge * w * w).sum() / 2)

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


def _log_loss(logits: np.ndarray, y: np.ndarray) -> float:
    return float(np.logaddexp(0, logits).sum() - y @ logits)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / 2))


def _threshold(scores: np.ndarray, made_up: np.ndarray) -> float:
    """The score with the highest balanced accuracy of `score >= threshold`."""
    points = np.unique(scores)
    caught = [(scores[made_up] >= p).mean() for p in points]
    passed = [(scores[~made_up] < p).mean() for p in points]
    return float(points[int(np.argmax(np.add(caught, passed)))])
