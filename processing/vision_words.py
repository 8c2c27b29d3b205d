"""What a model says at each image token: its vision logits as words, regions and soft maps.

Spellings of one word count together: letter case, a leading space, and the piece that a longer word
starts with ("bott" is bottle, where bottle is asked for or said elsewhere in the image). What it is
not: the logits (modeling/vision_modeling.py) or drawing (overlays.py).

    reading = read_words(tokenizer, vision_logits(model, **inputs)[0], (24, 24), words=["bottle"])
    reading.words; reading.region("dog"); reading.soft("dog")
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from firsthand.processing.collator import word_token

SHORTEST = 3  # letters of a piece that may stand for a longer word


@dataclass(frozen=True, eq=False)
class Reading:
    """The words of one image.

    Attributes:
        labels: [R][C], the word of each image token; None where it is no word (punctuation, a
            special token, a single letter).
        words: those in `labels`, the most frequent first.
    """

    labels: list[list[str | None]]
    words: list[str]
    tokenizer: Any
    logits: torch.Tensor
    spelled: dict[str, set[int]]

    def region(self, word: str) -> np.ndarray:
        """Bool [R, C]: the image tokens that say the word."""
        return np.array([[label == word for label in row] for row in self.labels])

    def share(self, word: str) -> float:
        """The share of image tokens that say the word, 0 to 1."""
        return float(self.region(word).mean())

    def soft(self, word: str) -> np.ndarray:
        """The probability of the word (all its spellings) at each image token: float32 [R, C]."""
        spellings = spellings_of(self.tokenizer, word) | self.spelled.get(word, set())
        chosen = self.logits[:, sorted(spellings)].float()
        total = torch.logsumexp(self.logits.float(), -1, keepdim=True)
        found = (chosen - total).exp().sum(-1).cpu().numpy()
        return found.reshape(len(self.labels), -1)


def read_words(
    tokenizer: Any, logits: torch.Tensor, grid: tuple[int, int], words: Iterable[str] = ()
) -> Reading:
    """The most probable word at each image token.

    Args:
        tokenizer: the model's, fast.
        logits: [R * C, V] of one image.
        grid: (R, C).
        words: words in whose favour pieces are merged, though no token says them whole.
    """
    ids, special = logits.argmax(-1).tolist(), set(tokenizer.all_special_ids)
    names = {token: _word(tokenizer, token) for token in set(ids) - special}
    counts = Counter(names.get(token) for token in ids)
    asked = [word.lower() for word in words]
    longer = [*asked, *(name for name, _ in counts.most_common() if name is not None)]
    merged = {
        token: name if name in asked else _merged(tokenizer, token, name, longer)
        for token, name in names.items()
        if name is not None
    }
    spelled: dict[str, set[int]] = {}
    for token, name in merged.items():
        spelled.setdefault(name, set()).add(token)
    flat = [merged.get(token) for token in ids]
    rows, columns = grid
    labels = [flat[row * columns : (row + 1) * columns] for row in range(rows)]
    found = Counter(label for label in flat if label is not None)
    return Reading(labels, [w for w, _ in found.most_common()], tokenizer, logits, spelled)


def spellings_of(tokenizer: Any, word: str) -> set[int]:
    """First tokens of a word in lower case and capitalised, after a space and without one.

    A piece counts only where it has at least SHORTEST letters, or is the whole word.
    """
    found = set()
    for form in {word, word.lower(), word.capitalize()}:
        alone = tokenizer(form, add_special_tokens=False).input_ids
        found |= {word_token(tokenizer, form), *alone[:1]}
    least = min(len(word), SHORTEST)
    texts = {token: str(tokenizer.decode([token])).strip().lower() for token in found}
    whole = {t for t, text in texts.items() if len(text) >= least and word.lower().startswith(text)}
    return whole or {word_token(tokenizer, word)}


def region_iou(region: np.ndarray, coverage: np.ndarray) -> float:
    """Intersection over union of whole image tokens [R, C] with a mask, by area: 0 to 1.

    `coverage` [R, C] is the share of each token that the mask covers (`masks.patch_coverage`), so
    this is the IoU in pixels, of what the model saw. NaN where both are empty.
    """
    both = float(coverage[region].sum())
    either = float(region.sum() + coverage.sum()) - both
    return both / either if either > 0 else float("nan")


def best_iou(coverage: np.ndarray) -> float:
    """The highest IoU that any choice of whole image tokens reaches with a mask [R, C]: 0 to 1."""
    covered = np.cumsum(np.sort(coverage, axis=None)[::-1])
    chosen = np.arange(1, covered.size + 1)
    return float((covered / (chosen + covered[-1] - covered)).max())


def _word(tokenizer: Any, token: int) -> str | None:
    text = str(tokenizer.decode([token])).strip().lower()
    return text if len(text) > 1 and text[0].isalpha() else None


def _merged(tokenizer: Any, token: int, name: str, longer: list[str]) -> str:
    """The first longer word that is spelled with this token, else the token's own text."""
    for word in longer:
        starts = len(word) > len(name) >= SHORTEST and word.startswith(name)
        if starts and token in spellings_of(tokenizer, word):
            return word
    return name
