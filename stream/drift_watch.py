"""Drift as a worker sees it: a window of its newest committed pairs, looked at now and then, as metrics.

Cheap whatever the stream's rate: of a commit at most ROWS_A_COMMIT pairs are taken, drawn by chance, and a look, which takes
some ten milliseconds, comes every LOOK_EVERY_S at most. What a whole stream says is `status`'s to tell.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import numpy as np

from models.drift import DriftWindow
from models.model import PairModel
from state.partition import Partition
from stream.metrics import Metrics
from stream.reduce import CodesColumns

ROWS_A_COMMIT = 256
LOOK_EVERY_S = 10.0


def watched(running: Iterable[Partition], target: str) -> Partition | None:
    """The partition whose bundle drift is watched by: one that runs with `target`, the newest bundle that this worker could
    load; while none does, the first. Epochs do not tell: each partition counts its own switches.
    """
    return max(running, key=lambda partition: partition.bundle == target, default=None)


class DriftWatch:
    """The window of one worker; a new one for another bundle."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics, self._clock = metrics, clock
        self._version: str | None = None
        self._window: DriftWindow | None = None
        self._draw = np.random.default_rng(0)
        self._looked_at = -LOOK_EVERY_S

    def take(self, committed: Iterable[CodesColumns], model: PairModel) -> None:
        """Takes what was committed, and looks if it is time to."""
        if model.version != self._version:
            self._version, self._window = model.version, None
            self._show_nothing()
            if model.clustering is not None and model.baseline is not None:
                self._window = DriftWindow(model.baseline, model.clustering, model.tokens)
        if self._window is None:
            return
        batches = [batch for columns in committed for batch in columns.batches if len(batch.vectors)]
        if batches:
            itms = np.concatenate([batch.itms[batch.clusters >= 0] for batch in batches])
            vectors = np.concatenate([batch.vectors for batch in batches])
            drawn = self._draw.permutation(len(vectors))[:ROWS_A_COMMIT]
            # assigned anew: right after a switch a batch may still name clusters of the bundle before
            self._window.add(itms[drawn], model.assign(vectors[drawn]), vectors[drawn])
        now = self._clock()
        if self._window.due and now - self._looked_at >= LOOK_EVERY_S:
            self._looked_at = now
            self._show(self._window)

    def _show_nothing(self) -> None:
        """What was said of another bundle's baselines says nothing of this one's."""
        metrics = self._metrics
        metrics.drift_pairs.set(0)
        for gauge in (metrics.drift_effect, metrics.drift_p_value, metrics.drift_alarm):
            gauge.clear()

    def _show(self, window: DriftWindow) -> None:
        metrics = self._metrics
        metrics.drift_pairs.set(window.pairs)
        for signal in window.look():
            metrics.drift_effect.labels(signal.name).set(signal.effect)
            metrics.drift_p_value.labels(signal.name).set(signal.p_value)
            metrics.drift_alarm.labels(signal.name).set(signal.alarm)
