"""Has the data moved away from what a bundle was made on? A window of pairs against the bundle's baselines, by four signals.

Each signal has a test (is it more than chance?) and an effect in words of its own (is it enough to matter?); it alarms only
if both say so. With a large window every test is significant, with a small one every effect is large. Knows no Kafka.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.clustering import Clustering

ITM, OCCUPANCY, CODES, ERROR = "itm", "occupancy", "codes", "quantisation_error"
SIGNALS = (ITM, OCCUPANCY, CODES, ERROR)
# What reclustering cures; it changes neither captions nor codes.
CURED_BY_RECLUSTERING = (OCCUPANCY, ERROR)

WINDOW_PAIRS = 2000
LEAST_PAIRS = 500
# A sliding window is looked at when an eighth of it is new.
LOOKS_A_WINDOW = 8
# At most one false alarm in a thousand windows, shared (Bonferroni) between the signals and the looks at one window.
LEVEL = 0.001 / (len(SIGNALS) * LOOKS_A_WINDOW)
# The least effect that matters: points of median ITM, shares of pairs or of code uses, rise of the mean error.
THRESHOLDS = {ITM: 0.05, OCCUPANCY: 0.10, CODES: 0.10, ERROR: 0.10}

ERROR_BINS = 20
EXPECTED_LEAST = 5.0  # pairs in a cell of a chi-square table (Cochran 1954): smaller ones are put together

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Baseline:
    """What a bundle's manifest says of the pairs that it was made on. None: this bundle does not say it.

    itm         (B,) pairs by score, in B equal bins of [0, 1]
    occupancy   (N,) pairs of each cluster; codes  (K,) uses of each code, by code_pairs pairs
    error_edges, error_counts, error_mean  quantisation errors of pairs that were not fitted
    """

    itm: Counts | None = None
    occupancy: Counts | None = None
    codes: Counts | None = None
    code_pairs: int = 0
    error_edges: Floats | None = None
    error_counts: Counts | None = None
    error_mean: float = 0.0

    @staticmethod
    def of(manifest: Mapping[str, Any]) -> "Baseline":
        """From the data of a bundle's manifest, of whatever age."""
        told = manifest.get("baselines", {})
        errors = told.get("quantisation_error") or {}
        return Baseline(
            _counts(told.get("itm_histogram")), _counts(told.get("cluster_occupancy")), _counts(told.get("code_usage")),
            int(told.get("code_pairs", told.get("pairs", 0))),
            np.array(errors["edges"], np.float64) if errors else None, _counts(errors.get("counts")),
            float(errors.get("mean", 0.0)),
        )  # fmt: skip

    @property
    def missing(self) -> tuple[str, ...]:
        """The signals that this bundle has no baseline for."""
        has = (self.itm, self.occupancy, self.codes, self.error_counts)
        return tuple(name for name, what in zip(SIGNALS, has, strict=True) if what is None)


@dataclass(frozen=True)
class Signal:
    """One signal of one window. effect  in the signal's own unit; alarm  the effect matters and is no chance."""

    name: str
    pairs: int
    effect: float
    threshold: float
    p_value: float
    alarm: bool
    words: str


def error_baseline(errors: Floats) -> dict[str, Any] | None:
    """What a manifest says of the quantisation errors of pairs that were not fitted; None for too few of them."""
    if len(errors) < ERROR_BINS:
        return None
    edges = np.unique(np.quantile(errors, np.linspace(0, 1, ERROR_BINS + 1)))
    counts, _ = np.histogram(errors, _open_ended(edges))
    return {"edges": edges.tolist(), "counts": counts.tolist(), "mean": float(errors.mean()), "pairs": len(errors)}


def signals(
    baseline: Baseline,
    itms: NDArray[np.float32],
    clusters: NDArray[np.int32],
    vectors: NDArray[np.uint16],
    errors: Floats,
) -> list[Signal]:
    """The signals of a window of pairs that the bundle has a baseline for. All arrays have a row a pair."""
    found = []
    if baseline.itm is not None:
        scores = itms[~np.isnan(itms)]
        found.append(itm_signal(baseline.itm, np.histogram(scores, len(baseline.itm), (0.0, 1.0))[0]))
    if baseline.occupancy is not None:
        found.append(occupancy_signal(baseline.occupancy, np.bincount(clusters, minlength=len(baseline.occupancy))))
    if baseline.codes is not None:
        found.append(code_signal(baseline.codes, baseline.code_pairs, vectors))
    if baseline.error_edges is not None and baseline.error_counts is not None:
        found.append(error_signal(baseline, errors))
    return found


def itm_signal(baseline: Counts, window: Counts) -> Signal:
    """Effect: by how much the median score moved. Test: Kolmogorov-Smirnov of two samples, at the bins' edges."""
    n = int(window.sum())
    moved = _median(window) - _median(baseline) if n else 0.0
    p_value = _ks(baseline, window)
    words = f"median ITM {100 * abs(moved):.1f} points {'below' if moved < 0 else 'above'} the baseline's"
    return _judged(ITM, n, moved, p_value, words)


def occupancy_signal(baseline: Counts, window: Counts) -> Signal:
    """Effect: the share of pairs that would have to be in another cluster, beyond chance. Test: chi-square of two samples."""
    n = int(window.sum())
    effect = moved_share(baseline, window)
    return _judged(
        OCCUPANCY,
        n,
        effect,
        _chi_square(baseline, window),
        f"{effect:.1%} of the pairs are in other clusters than before",
    )


def code_signal(baseline: Counts, baseline_pairs: int, vectors: NDArray[np.uint16]) -> Signal:
    """Effect: the share of code uses that would have to be of another code, beyond chance. Test: chi-square over its
    design effect (Rao & Scott 1981), since the tokens of one image are far from independent.
    """
    n = len(vectors)
    uses = np.bincount(vectors.ravel(), minlength=len(baseline))
    design = design_effect(vectors, len(baseline))
    effect = moved_share(baseline, uses, design)
    p_value = _chi_square(baseline, uses, design) if baseline_pairs else 1.0
    return _judged(CODES, n, effect, p_value, f"{effect:.1%} of the tokens use other codes than before")


def error_signal(baseline: Baseline, errors: Floats) -> Signal:
    """Effect: rise of the mean squared distance to the own centroid. Test: Kolmogorov-Smirnov at the baseline's edges."""
    if baseline.error_edges is None or baseline.error_counts is None:
        raise ValueError("this baseline has no quantisation error")
    counts, _ = np.histogram(errors, _open_ended(baseline.error_edges))
    rise = float(errors.mean()) / baseline.error_mean - 1 if len(errors) and baseline.error_mean else 0.0
    words = f"mean quantisation error {abs(rise):.1%} {'above' if rise >= 0 else 'below'} the baseline's"
    # A smaller error is no reason to do anything.
    return _judged(ERROR, len(errors), rise, _ks(baseline.error_counts, counts), words, only_above=True)


def design_effect(vectors: NDArray[np.uint16], codes: int) -> float:
    """By how much the counts of codes vary more than those of independent tokens: mean over the codes, weighted by 1 - p."""
    n, tokens = vectors.shape
    if n < 2:
        return 1.0
    code_in_image, together = np.unique(np.arange(n)[:, None] * codes + vectors, return_counts=True)
    of_code = code_in_image % codes
    uses = np.bincount(of_code, together, codes)
    squares = np.bincount(of_code, together.astype(np.float64) ** 2, codes)
    used = uses > 0
    share = uses[used] / (n * tokens)
    variance = (squares[used] - uses[used] ** 2 / n) / (n - 1)  # of a code's count in an image
    effects = variance / (tokens * share * (1 - share) + 1e-12)
    return max(1.0, float(np.average(effects, weights=1 - share)))


def moved_share(baseline: Counts, window: Counts, design: float = 1.0) -> float:
    """Total variation distance of two samples of categories, less what samples of that size have by chance; at least 0.

    By chance two samples of one distribution differ in a category of share r by a mean of √(2/π · r(1-r)(1/n + 1/m)).
    """
    n, m = int(baseline.sum()), int(window.sum())
    if not n or not m:
        return 0.0
    distance = float(np.abs(baseline / n - window / m).sum()) / 2
    r = (baseline + window) / (n + m)
    by_chance = np.minimum(np.sqrt(2 / np.pi * r * (1 - r) * (1 / n + 1 / m) * design), 2 * r)
    return max(0.0, distance - float(by_chance.sum()) / 2)


class DriftWindow:
    """The newest pairs of a stream, at most `size`, in memory that does not grow: 2 L + 24 bytes a pair."""

    def __init__(self, baseline: Baseline, clustering: Clustering, tokens: int, size: int = WINDOW_PAIRS) -> None:
        self.baseline, self.size = baseline, size
        self._clustering = clustering
        self._itms = np.empty(size, np.float32)
        self._clusters = np.empty(size, np.int32)
        self._vectors = np.empty((size, tokens), np.uint16)
        self._errors = np.empty(size)
        self._at = 0  # where the next pair goes
        self.pairs = 0
        self.fresh = 0  # pairs since the last look

    def add(self, itms: NDArray[np.float32], clusters: NDArray[np.int32], vectors: NDArray[np.uint16]) -> None:
        """Takes pairs, oldest first; the oldest ones of the window leave. All have a cluster and a vector."""
        self.fresh += len(clusters)
        itms, clusters, vectors = itms[-self.size :], clusters[-self.size :], vectors[-self.size :]
        places = (self._at + np.arange(len(clusters))) % self.size
        self._itms[places], self._clusters[places], self._vectors[places] = itms, clusters, vectors
        self._errors[places] = np.nan  # computed when somebody looks
        self._at = (self._at + len(clusters)) % self.size
        self.pairs = min(self.size, self.pairs + len(clusters))

    @property
    def itms(self) -> NDArray[np.float32]:
        """(n,) the scores in the window."""
        return self._itms[: self.pairs]

    @property
    def clusters(self) -> NDArray[np.int32]:
        """(n,) the clusters in the window."""
        return self._clusters[: self.pairs]

    @property
    def vectors(self) -> NDArray[np.uint16]:
        """(n, L) the index vectors in the window."""
        return self._vectors[: self.pairs]

    @property
    def errors(self) -> Floats:
        """(n,) the quantisation errors in the window."""
        new = np.flatnonzero(np.isnan(self._errors[: self.pairs]))
        self._errors[new] = self._clustering.errors(self._vectors[new], self._clusters[new])
        return self._errors[: self.pairs]

    @property
    def due(self) -> bool:
        """Whether there are enough pairs, and enough new ones, for a look."""
        return self.pairs >= min(LEAST_PAIRS, self.size) and self.fresh >= self.size // LOOKS_A_WINDOW

    def look(self) -> list[Signal]:
        """The signals of the window as it is now."""
        self.fresh = 0
        return signals(self.baseline, self.itms, self.clusters, self.vectors, self.errors)


# -- tests -------------------------------------------------------------------------------------------------------------


def _judged(
    name: str, pairs: int, effect: float, p_value: float, words: str, *, only_above: bool = False
) -> Signal:  # fmt: skip
    matters = (effect if only_above else abs(effect)) >= THRESHOLDS[name]
    enough = pairs >= LEAST_PAIRS
    return Signal(
        name,
        pairs,
        float(effect),
        THRESHOLDS[name],
        float(p_value),
        bool(matters and enough and p_value < LEVEL),
        words,
    )


def _ks(a: Counts, b: Counts) -> float:
    """Kolmogorov-Smirnov of two samples known by their bins: the largest gap at an edge is at most the true one, so the p
    value is never too small.
    """
    from scipy.stats import kstwobign

    n, m = int(a.sum()), int(b.sum())
    if not n or not m:
        return 1.0
    gap = float(np.abs(np.cumsum(a) / n - np.cumsum(b) / m).max())
    return float(kstwobign.sf(gap * np.sqrt(n * m / (n + m))))


def _chi_square(a: Counts, b: Counts, design: float = 1.0) -> float:
    """Chi-square of two samples of categories; those with too few expected are put together."""
    from scipy.stats import chi2, chi2_contingency

    n, m = int(a.sum()), int(b.sum())
    if not n or not m:
        return 1.0
    rare = (a + b) * min(n, m) / (n + m) < EXPECTED_LEAST * design
    table = np.stack([np.append(a[~rare], a[rare].sum()), np.append(b[~rare], b[rare].sum())])
    table = table[:, table.sum(0) > 0]
    if table.shape[1] < 2:
        return 1.0
    found = chi2_contingency(table, correction=False)
    return float(chi2.sf(found.statistic / design, found.dof))


def _median(counts: Counts) -> float:
    """Of scores in [0, 1] in equal bins, inside its bin by proportion."""
    below = np.cumsum(counts)
    half = below[-1] / 2
    at = int(np.searchsorted(below, half))
    inside = (half - (below[at] - counts[at])) / max(1, counts[at])
    return float((at + inside) / len(counts))


def _open_ended(edges: Floats) -> Floats:
    return np.concatenate([[-np.inf], edges[1:-1], [np.inf]])


def _counts(values: Sequence[int] | None) -> Counts | None:
    return None if values is None else np.array(values, np.int64)
