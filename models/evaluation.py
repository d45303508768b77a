"""Is a generated caption about its image? Rates on held-out pairs, with intervals that respect families of near copies.

A pair's own caption competes with that of every other pair; the rate is what a random draw of the other would give on
average, without the noise of drawing. Ties count half, so a constant caption comes to exactly 50 %.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000


@dataclass(frozen=True)
class Rate:
    """A share, and the bounds of its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1%} ({self.low:.1%} to {self.high:.1%})"


def wins(generated: NDArray[np.float32], own: NDArray[np.float32], families: Sequence[str]) -> NDArray[np.float64]:
    """(n,) for each pair the share of other captions that its generated caption is farther from than from its own.

    generated, own  (n, d) embeddings of length 1. Captions of the pair's own family do not compete: they are near copies.
    """
    nearness = generated @ own.T
    mine = np.diag(nearness)[:, None]
    names = np.array(families)
    other = names[:, None] != names[None]
    # equal to 6 digits is equal: the same caption twice must tie, whatever the last bit of a product says
    better = np.where(np.abs(mine - nearness) < 1e-6, 0.5, mine > nearness)
    share: NDArray[np.float64] = (better * other).sum(1) / np.maximum(other.sum(1), 1)
    return share


def rate_by_family(values: NDArray[np.float64], families: Sequence[str], seed: int = 0) -> Rate:
    """Mean of `values`, its interval by resampling whole families (Efron's percentile bootstrap)."""
    names, of = np.unique(np.array(families), return_inverse=True)
    sums = np.bincount(of, weights=values, minlength=len(names))
    sizes = np.bincount(of, minlength=len(names))
    drawn = np.random.default_rng(seed).integers(len(names), size=(RESAMPLES, len(names)))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Rate(float(values.mean()), float(low), float(high))


def auc(positive: NDArray[np.float32], negative: NDArray[np.float32]) -> float:
    """Chance that a positive scores above a negative, ties half (Mann-Whitney)."""
    both = np.concatenate([positive, negative]).astype(np.float64)
    values, of, counts = np.unique(both, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[of]
    n, m = len(positive), len(negative)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m)) if len(values) else 0.5
