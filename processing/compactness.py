"""Is a word grounded in one compact region? Dispersion and grounding consistency of a word's maps.

What it is: the two per-layer figures of token-level detection (arXiv 2604.04863), as far as its
abstract and project page define them; where they leave a choice, it is ours and stands below. What
it is not: attention or relevancy, which it is given, or a verdict (warning.py).

    dispersion(rows[None].reshape(-1, 24, 24))  # [1], 0 compact to 1 scattered
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

TOP = 0.1  # share of the patches that make the foreground


def foreground(maps: Any, top: float = TOP) -> np.ndarray:
    """The blob that a map points at: the strongest patches, of which the largest cluster is kept.

    Clusters are of neighbours, also diagonal ones; isolated strong patches (attention sinks) lose
    against a cluster, and of equally large clusters the one with the most mass is kept.

    Args:
        maps: [..., R, C], >= 0.
        top: share of the patches that counts as strongest, in (0, 1]; at least one patch.

    Returns:
        bool [..., R, C].
    """
    maps = np.asarray(maps, dtype=np.float64)
    rows, columns = maps.shape[-2:]
    flat = maps.reshape(-1, rows * columns)
    strongest = np.zeros(flat.shape, dtype=bool)
    chosen = np.argsort(-flat, axis=1, kind="stable")[:, : _count(rows * columns, top)]
    np.put_along_axis(strongest, chosen, True, axis=1)
    labels = _clusters(strongest.reshape(-1, rows, columns)).reshape(flat.shape)
    best = np.zeros(flat.shape, dtype=bool)
    for row, label in enumerate(labels):
        sizes = np.bincount(label, minlength=rows * columns + 1)
        masses = np.bincount(label, flat[row], minlength=rows * columns + 1)
        largest = np.flatnonzero(sizes[1:] == sizes[1:].max()) + 1
        best[row] = label == largest[np.argmax(masses[largest])]
    return best.reshape(maps.shape)


def _count(patches: int, top: float) -> int:
    if not 0 < top <= 1:
        raise ValueError(f"top is {top}; it must lie in (0, 1]")
    return math.ceil(top * patches)


def _clusters(strongest: np.ndarray) -> np.ndarray:
    """[B, R, C] labels from 1, equal within a cluster of neighbours, 0 outside."""
    rows, columns = strongest.shape[1:]
    numbers = np.arange(1, rows * columns + 1).reshape(rows, columns)
    labels, before = np.where(strongest, numbers, 0), None
    while before is None or (labels != before).any():
        before, padded = labels, np.pad(labels, ((0, 0), (1, 1), (1, 1)))
        near = [
            padded[:, down : down + rows, right : right + columns]
            for down in range(3)
            for right in range(3)
        ]
        labels = np.where(strongest, np.max(near, axis=0), 0)
    return labels


def dispersion(maps: Any, top: float = TOP) -> np.ndarray:
    """How scattered maps are: what lies outside the blob, times the entropy of how it lies there.

    ADS = (1 - m) * H, with m the share of the map in its `foreground` and H the entropy of the
    rest, normalised by that of an even spread. The source combines blob mass and background
    entropy; the product is our reading of it.

    Args:
        maps: [..., R, C], >= 0, of any scale.
        top: as in `foreground`.

    Returns:
        float64 [...], 0 (all in one blob) to 1; 1 for a map of zeros.
    """
    maps = np.asarray(maps, dtype=np.float64)
    flat = maps.reshape(-1, maps.shape[-2] * maps.shape[-1])
    total = flat.sum(1)
    shares = flat / np.where(total > 0, total, 1)[:, None]
    blob = foreground(maps, top).reshape(flat.shape)
    outside = np.where(blob, 0, shares)
    rest = outside.sum(1)
    even = np.log(np.maximum((~blob).sum(1), 2))
    parts = outside / np.where(rest > 0, rest, 1)[:, None]
    entropy = -(parts * np.log(np.where(parts > 0, parts, 1))).sum(1) / even
    return np.where(total > 0, rest * entropy, 1.0).reshape(maps.shape[:-2])


def similarities(token: Any, patches: Any) -> np.ndarray:
    """Cosines of a token's states [L, D] with the image positions' [L, N, D]: [L, N], -1 to 1."""
    token, patches = np.asarray(token, np.float64), np.asarray(patches, np.float64)
    norms = np.linalg.norm(token, axis=-1)[:, None] * np.linalg.norm(patches, axis=-1)
    return np.einsum("ld,lnd->ln", token, patches) / np.where(norms > 0, norms, 1)


def consistency(cosines: Any, top: float = TOP) -> np.ndarray:
    """Grounding consistency: the mean of the `top` share of cosines [..., N], -1 to 1; [...].

    High = some patches hold what the token holds. At least one patch counts.
    """
    cosines = np.asarray(cosines, dtype=np.float64)
    count = _count(cosines.shape[-1], top)
    return np.sort(cosines, axis=-1)[..., -count:].mean(-1)
