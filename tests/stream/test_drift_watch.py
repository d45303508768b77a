"""A worker's drift metrics: of its newest committed pairs, cheap whatever the rate, and of the bundle that it runs with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models.clustering import fit
from models.drift import CODES, ERROR, ITM, LEAST_PAIRS, OCCUPANCY, WINDOW_PAIRS, Baseline, error_baseline
from models.null import NullModel
from state.partition import Partition
from state.partition_store import PartitionStore
from state.quota import Ratio
from state.settings import StreamSettings
from stream.drift_watch import LOOK_EVERY_S, ROWS_A_COMMIT, DriftWatch, watched
from stream.metrics import Metrics
from stream.reduce import CodesColumns, CodesRows

TOKENS, CODES_K, CLUSTERS = 8, 50, 4
CODEBOOK = np.random.default_rng(1).normal(size=(CODES_K, 6)).astype(np.float32)


def pairs(rows: int, seed: int, codes: int = CODES_K) -> np.ndarray:
    return np.random.default_rng(seed).integers(codes, size=(rows, TOKENS)).astype(np.uint16)


class Fitted(NullModel):
    """The null model with clusters that were fitted to what it is shown."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(tokens=TOKENS, codebook_size=CODES_K, clusters=CLUSTERS)
        vectors = pairs(4000, seed)
        self.version = f"fitted-{seed}"
        clustering = fit(vectors, CODEBOOK, CLUSTERS, "mean")
        self.clustering = clustering
        clusters = clustering.assign(vectors)
        told = {
            "pairs": 4000,
            "itm_histogram": [0] * 10 + [400] * 10,
            "cluster_occupancy": np.bincount(clusters, minlength=CLUSTERS).tolist(),
            "code_usage": np.bincount(vectors.ravel(), minlength=CODES_K).tolist(),
            "quantisation_error": error_baseline(clustering.errors(vectors, clusters)),
        }
        self.baseline = Baseline.of({"baselines": told})

    def assign(self, vectors: np.ndarray) -> np.ndarray:
        assert self.clustering is not None
        return self.clustering.assign(vectors)


def committed(vectors: np.ndarray, itm: tuple[float, float] = (0.5, 1.0)) -> CodesColumns:
    """Rows of one partition, every fifth of them a duplicate that nobody looked at."""
    n = len(vectors) * 5 // 4
    clusters = np.where(np.arange(n) % 5 == 4, -1, 0).astype(np.int32)
    vectors = vectors[: int((clusters >= 0).sum())]
    zeros = np.zeros(n, np.int64)
    itms = np.full(n, np.nan, np.float32)
    itms[clusters >= 0] = np.random.default_rng(int(vectors.sum())).uniform(*itm, len(vectors))
    fates = np.zeros(n, np.uint8)
    rows = CodesRows([b""] * n, zeros, fates, clusters, zeros, zeros.astype(np.uint64), itms, zeros, vectors, [])
    return CodesColumns([rows])


def shown(metrics: Metrics, what: str, signal: str) -> float | None:
    return metrics.registry.get_sample_value(f"tldr_drift_{what}", {"signal": signal})


@pytest.fixture
def clock() -> list[float]:
    return [0.0]


def feed(watch: DriftWatch, model: NullModel, clock: list[float], commits: int = 12, codes: int = CODES_K) -> None:
    for seed in range(commits):
        clock[0] += 1
        watch.take([committed(pairs(400, 100 + seed, codes))], model)


def test_unchanged_pairs_fill_the_window_and_raise_no_alarm(clock: list[float]) -> None:
    metrics = Metrics()
    watch = DriftWatch(metrics, lambda: clock[0])

    feed(watch, Fitted(), clock, commits=20)

    assert LEAST_PAIRS <= (metrics.registry.get_sample_value("tldr_drift_window_pairs") or 0) <= WINDOW_PAIRS
    assert [shown(metrics, "alarm", name) for name in (ITM, OCCUPANCY, CODES, ERROR)] == [0, 0, 0, 0]


def test_other_images_and_worse_captions_show_in_the_metric_that_names_them(clock: list[float]) -> None:
    metrics, model = Metrics(), Fitted()
    watch = DriftWatch(metrics, lambda: clock[0])
    for seed in range(15):
        clock[0] += 1
        watch.take([committed(pairs(400, seed, codes=20), itm=(0.2, 0.9))], model)

    assert (shown(metrics, "alarm", CODES), shown(metrics, "alarm", ITM)) == (1, 1)
    assert (shown(metrics, "effect", ITM) or 0) == pytest.approx(-0.2, abs=0.03)
    assert (shown(metrics, "effect", CODES) or 0) > 0.4


def test_a_commit_gives_a_bounded_number_of_rows_and_looks_are_far_apart(clock: list[float]) -> None:
    metrics, model = Metrics(), Fitted()
    watch = DriftWatch(metrics, lambda: clock[0])

    watch.take([committed(pairs(4000, 1)), committed(pairs(4000, 2))], model)
    assert metrics.registry.get_sample_value("tldr_drift_window_pairs") == 0  # 256 pairs are too few for a look
    watch.take([committed(pairs(4000, 3))], model)
    assert watch._window is not None and watch._window.pairs == 2 * ROWS_A_COMMIT
    assert shown(metrics, "effect", ITM) is not None

    first = watch._looked_at
    clock[0] += LOOK_EVERY_S - 1
    feed(watch, model, [0.0], commits=4)
    assert watch._looked_at == first


def test_another_bundle_begins_another_window(clock: list[float]) -> None:
    watch = DriftWatch(Metrics(), lambda: clock[0])
    feed(watch, Fitted(0), clock, commits=4)

    watch.take([committed(pairs(100, 9))], Fitted(1))

    assert watch._window is not None and watch._window.pairs == 100


def test_an_alarm_of_the_bundle_before_does_not_outlive_the_switch(clock: list[float]) -> None:
    metrics = Metrics()
    watch = DriftWatch(metrics, lambda: clock[0])
    feed(watch, Fitted(0), clock, commits=15, codes=20)
    assert shown(metrics, "alarm", CODES) == 1

    watch.take([], Fitted(1))

    assert [shown(metrics, what, CODES) for what in ("alarm", "effect", "p_value")] == [None, None, None]
    assert metrics.registry.get_sample_value("tldr_drift_window_pairs") == 0


def test_drift_is_watched_by_the_newest_bundle_though_another_partition_has_switched_more_often(tmp_path: Path) -> None:
    settings = StreamSettings(2, "id", 1, Ratio(1, 2), None, None, None, "paper", "space", TOKENS)
    with PartitionStore(tmp_path / "0") as one, PartitionStore(tmp_path / "1") as two:
        behind, newest = Partition(one, settings, 0), Partition(two, settings, 1)
        for partition, bundles in ((behind, ("first", "second", "first again")), (newest, ("first", "third"))):
            partition.next_offset = 0
            for bundle in bundles:
                partition.adopt(bundle, "space", 0)
        assert behind.epoch > newest.epoch

        assert watched([behind, newest], "third") is newest
        assert watched([behind, newest], "fourth") is behind  # nobody has switched to it yet
        assert watched([], "third") is None


def test_a_model_without_baselines_has_no_drift(clock: list[float]) -> None:
    metrics = Metrics()
    watch = DriftWatch(metrics, lambda: clock[0])

    feed(watch, NullModel(tokens=TOKENS, codebook_size=CODES_K, clusters=CLUSTERS), clock)

    assert shown(metrics, "effect", ITM) is None
