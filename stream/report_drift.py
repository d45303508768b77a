"""What a report says of drift: the newest pairs against the bundle's baselines, and how it came to that over time.

Memory does not grow with the stream: over time a uniform sample is judged, the newest pairs are read once more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from models.drift import LEAST_PAIRS, Baseline, Signal, signals
from stream.live_bundle import LiveBundle
from stream.recent_codes import Rows
from stream.recluster import drift_window
from stream.report_data import numbers_of
from stream.stream_view import StreamSource, StreamView

SAMPLE_PAIRS = 20_000
STRETCHES_MAX = 24
BINS_BEYOND_MAX = 60


@dataclass(frozen=True)
class Stretch:
    """The signals of the pairs that were read between two shares of each partition's offsets in its epoch."""

    begin: float
    end: float
    signals: list[Signal]


@dataclass
class ReportDrift:
    """The newest pairs beside the baselines, each of which is None where the bundle has none.

    itm, occupancy  pairs of each bin and cluster; codes  uses of each code; errors  (n,) quantisation errors
    keywords        that the codes started from; empty where the bundle does not say
    """

    baseline: Baseline
    signals: list[Signal]
    pairs: int
    itm: NDArray[np.int64]
    occupancy: NDArray[np.int64]
    codes: NDArray[np.int64]
    errors: NDArray[np.float64]
    keywords: list[str]
    stretches: list[Stretch] = field(default_factory=list)


class DriftWalk:
    """Samples the rows of each partition's epoch with this bundle while pair-codes is walked over."""

    def __init__(self, view: StreamView, bundle: str, seed: int) -> None:
        self._view, self._epochs, self._seed = view, view.epochs_with(bundle), seed
        self._rows: list[tuple[NDArray[np.float64], Rows]] = []
        # pairs below the gate are not counted, but looked at
        looked_at = max(1, view.totals.counted + view.totals.below_gate)
        self._limit = np.uint64(min(1.0, SAMPLE_PAIRS / looked_at) * (2**64 - 2**11))

    def add(self, rows: Rows) -> None:
        """Draws of these rows, by a keyed hash of their place."""
        if self._epochs.get(rows.partition) != rows.epoch:
            return
        part = self._view.partitions[rows.partition]
        drawn = (numbers_of(self._seed + 1, rows.partition, rows.offsets) <= self._limit) & (rows.offsets < part.cut)
        if drawn.any():
            begin = part.switches[rows.epoch].input_offset
            taken = rows.part(drawn)
            self._rows.append(((taken.offsets - begin) / max(1, part.cut - begin), taken))

    def stretches(self, live: LiveBundle) -> list[Stretch]:
        """As many stretches of the partitions' epochs as the sample can tell apart."""
        if not self._rows:
            return []
        at = np.concatenate([places for places, _ in self._rows])
        itms, clusters, vectors = (
            np.concatenate([rows.itms for _, rows in self._rows]),
            np.concatenate([rows.clusters for _, rows in self._rows]),
            np.concatenate([rows.vectors for _, rows in self._rows]),
        )
        edges = np.linspace(0, 1, min(STRETCHES_MAX, max(1, len(at) // LEAST_PAIRS)) + 1)
        found = []
        for begin, end in pairwise(edges.tolist()):
            inside = (at >= begin) & (at < end)
            if inside.any():
                errors = live.clustering.errors(vectors[inside], clusters[inside])
                said = signals(live.baseline, itms[inside], clusters[inside], vectors[inside], errors)
                found.append(Stretch(begin, end, said))
        return found


def error_shares(
    baseline: Baseline, errors: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]] | None:
    """Edges of bins, and the shares of the baseline's and of these errors between them; None where there is no baseline.

    The bins are the baseline's, from its least error to its largest: of what lies between its quantiles a bundle says no
    more. Errors beyond have bins of their own, as wide as the others are on average.
    """
    edges, counts = baseline.error_edges, baseline.error_counts
    if edges is None or counts is None or len(edges) != len(counts) + 1 or not counts.sum() or not len(errors):
        return None
    step = (edges[-1] - edges[0]) / len(counts)
    below = _bins(min(float(errors.min()), edges[0]), edges[0], step)
    above = _bins(edges[-1], max(float(errors.max()), edges[-1]), step)
    wider = np.concatenate([below[:-1], edges, above[1:]])
    before = np.zeros(len(wider) - 1)
    before[len(below) - 1 :][: len(counts)] = counts / counts.sum()
    return wider, before, np.histogram(errors, wider)[0] / len(errors)


def _bins(begin: float, end: float, step: float) -> NDArray[np.float64]:
    return np.linspace(begin, end, min(BINS_BEYOND_MAX, int(np.ceil((end - begin) / step))) + 1)


def drift_of(source: StreamSource, view: StreamView, live: LiveBundle, walk: DriftWalk) -> ReportDrift:
    """The newest pairs, and the stretches of the walk."""
    window = drift_window(source, view, live)
    bins = 1 if live.baseline.itm is None else len(live.baseline.itm)
    return ReportDrift(
        live.baseline,
        window.look() if window.pairs else [],
        window.pairs,
        np.histogram(window.itms, bins, (0.0, 1.0))[0],
        np.bincount(window.clusters, minlength=len(live.clustering.centroids)),
        np.bincount(window.vectors.ravel(), minlength=0 if live.baseline.codes is None else len(live.baseline.codes)),
        window.errors,
        list(live.manifest.data.get("keywords", [])),
        walk.stretches(live),
    )
