"""Drift: what stays the same raises no alarm, what changes raises the one that names it, and each effect has its own size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from models.clustering import Clustering, fit, held_out_errors
from models.drift import (
    CODES,
    ERROR,
    ITM,
    LOOKS_A_WINDOW,
    OCCUPANCY,
    SIGNALS,
    Baseline,
    DriftWindow,
    Signal,
    design_effect,
    error_baseline,
    itm_signal,
    moved_share,
    signals,
)

CODEBOOK = np.random.default_rng(5).normal(size=(40, 8)).astype(np.float32)
TOKENS, CLUSTERS, WINDOW = 12, 6, 1500
USUAL = (0.4, 0.3, 0.2, 0.1)


def pairs(rows: int, seed: int, kinds: tuple[float, ...] = USUAL) -> np.ndarray:
    """Index vectors of four kinds of image, each of which uses ten codes of its own."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(len(kinds), rows, p=kinds)
    return (kind[:, None] * 10 + rng.integers(10, size=(rows, TOKENS))).astype(np.uint16)


def scores(rows: int, seed: int, middle: float = 0.6) -> np.ndarray:
    return np.random.default_rng(seed).normal(middle, 0.15, rows).clip(0, 1).astype(np.float32)


@pytest.fixture(scope="module")
def made() -> tuple[Baseline, Clustering]:
    """What a bootstrap of 4,000 pairs says."""
    vectors = pairs(4000, 0)
    clustering = fit(vectors, CODEBOOK, CLUSTERS, "mean")
    told = {
        "pairs": len(vectors),
        "itm_histogram": np.histogram(scores(4000, 0), 20, (0, 1))[0].tolist(),
        "cluster_occupancy": np.bincount(clustering.assign(vectors), minlength=CLUSTERS).tolist(),
        "code_usage": np.bincount(vectors.ravel(), minlength=len(CODEBOOK)).tolist(),
        "quantisation_error": error_baseline(held_out_errors(vectors, CODEBOOK, CLUSTERS, "mean")),
    }
    return Baseline.of({"baselines": json.loads(json.dumps(told))}), clustering


def look(made: tuple[Baseline, Clustering], vectors: np.ndarray, itms: np.ndarray) -> dict[str, Signal]:
    baseline, clustering = made
    clusters = clustering.assign(vectors)
    found = signals(baseline, itms, clusters, vectors, clustering.errors(vectors, clusters))
    return {signal.name: signal for signal in found}


def test_no_alarm_in_a_hundred_windows_of_unchanged_data(made: tuple[Baseline, Clustering]) -> None:
    alarms = [
        s for i in range(100) for s in look(made, pairs(WINDOW, i + 1), scores(WINDOW, i + 1)).values() if s.alarm
    ]

    assert alarms == []


def test_captions_that_no_longer_match_alarm_by_itm_alone(made: tuple[Baseline, Clustering]) -> None:
    found = look(made, pairs(WINDOW, 1), scores(WINDOW, 1, middle=0.45))

    assert [name for name in SIGNALS if found[name].alarm] == [ITM]
    assert found[ITM].effect == pytest.approx(-0.15, abs=0.02)
    assert found[ITM].words.endswith("points below the baseline's")


def test_another_mix_of_images_alarms_by_occupancy_and_codes_and_tells_the_share_that_moved(
    made: tuple[Baseline, Clustering],
) -> None:
    found = look(made, pairs(WINDOW, 1, (0.1, 0.3, 0.2, 0.4)), scores(WINDOW, 1))

    assert found[OCCUPANCY].alarm and found[CODES].alarm and not found[ITM].alarm
    assert found[OCCUPANCY].effect == pytest.approx(0.3, abs=0.05)


def test_a_kind_of_image_that_no_centroid_knows_alarms_by_quantisation_error(made: tuple[Baseline, Clustering]) -> None:
    rng = np.random.default_rng(2)
    vectors = pairs(WINDOW, 1)
    vectors[: WINDOW // 2] = rng.integers(40, size=(WINDOW // 2, 1))  # one code all over

    found = look(made, vectors, scores(WINDOW, 1))

    assert found[ERROR].alarm and found[ERROR].effect > 0.1


def test_a_smaller_error_is_no_alarm(made: tuple[Baseline, Clustering]) -> None:
    baseline, clustering = made
    vectors = pairs(WINDOW, 1)
    clusters = clustering.assign(vectors)
    errors = clustering.errors(vectors, clusters) / 4

    found = signals(baseline, scores(WINDOW, 1), clusters, vectors, errors)

    assert not next(s for s in found if s.name == ERROR).alarm


def test_a_large_window_makes_no_alarm_of_what_does_not_matter() -> None:
    """Every difference is significant in a million pairs; an alarm needs one that a person would care for."""
    a = np.histogram(scores(1_000_000, 1, 0.60), 20, (0, 1))[0]
    b = np.histogram(scores(1_000_000, 2, 0.61), 20, (0, 1))[0]

    found = itm_signal(a, b)

    assert found.p_value < 1e-12 and not found.alarm


@pytest.mark.parametrize("categories", [5, 300, 3000])
def test_the_share_that_moved_is_about_0_by_chance_however_many_cells_there_are(categories: int) -> None:
    rng = np.random.default_rng(3)
    p = rng.dirichlet(np.ones(categories))
    shares = [moved_share(rng.multinomial(3000, p), rng.multinomial(2000, p)) for _ in range(20)]

    assert max(shares) < 0.05


def test_tokens_of_one_image_count_as_what_they_are_worth() -> None:
    rng = np.random.default_rng(4)
    alone = rng.integers(40, size=(2000, 12)).astype(np.uint16)
    alike = np.repeat(rng.integers(40, size=(2000, 1)), 12, 1).astype(np.uint16)

    assert design_effect(alone, 40) == pytest.approx(1, abs=0.05)
    assert design_effect(alike, 40) == pytest.approx(12, abs=0.5)


def test_a_bundle_without_a_baseline_says_which_and_gives_no_signal_for_it() -> None:
    baseline = Baseline.of({"baselines": {"pairs": 10, "itm_histogram": [5, 5]}})

    assert baseline.missing == (OCCUPANCY, CODES, ERROR)
    found = signals(
        baseline, np.array([0.2], np.float32), np.zeros(1, np.int32), np.zeros((1, 3), np.uint16), np.ones(1)
    )
    assert [s.name for s in found] == [ITM]


def test_the_sample_bundle_has_the_baselines_that_are_read_here() -> None:
    manifest = json.loads((Path(__file__).parents[2] / "bundles" / "sample" / "manifest.json").read_text())

    assert set(Baseline.of(manifest).missing) <= {ERROR}


def test_the_window_holds_the_newest_pairs_and_is_due_when_an_eighth_is_new(made: tuple[Baseline, Clustering]) -> None:
    baseline, clustering = made
    window = DriftWindow(baseline, clustering, TOKENS, size=1000)
    newest = np.zeros(CLUSTERS, np.int64)
    for start in range(0, 2500, 100):
        vectors = pairs(100, start, USUAL if start < 1500 else (0.0, 0.0, 0.0, 1.0))
        if start >= 1500:
            newest += np.bincount(clustering.assign(vectors), minlength=CLUSTERS)
        window.add(scores(100, start), clustering.assign(vectors), vectors)
    assert window.pairs == 1000 and window.due

    found = {s.name: s for s in window.look()}

    # all of the window is of the fourth kind, which was a tenth
    assert baseline.occupancy is not None
    assert found[OCCUPANCY].effect == moved_share(baseline.occupancy, newest) > 0.8
    assert not window.due
    window.add(scores(1000 // LOOKS_A_WINDOW, 1), np.zeros(125, np.int32), pairs(125, 1))
    assert window.due


def test_a_window_gives_the_same_signals_however_the_pairs_come(made: tuple[Baseline, Clustering]) -> None:
    baseline, clustering = made
    vectors, itms = pairs(700, 9), scores(700, 9)
    clusters = clustering.assign(vectors)
    whole = DriftWindow(baseline, clustering, TOKENS, size=600)
    parts = DriftWindow(baseline, clustering, TOKENS, size=600)

    whole.add(itms, clusters, vectors)
    for at in range(0, 700, 70):
        parts.add(itms[at : at + 70], clusters[at : at + 70], vectors[at : at + 70])
        parts.look()

    for a, b in zip(whole.look(), parts.look(), strict=True):
        assert (a.name, a.pairs) == (b.name, b.pairs)
        assert a.effect == pytest.approx(b.effect, abs=1e-12) and a.p_value == pytest.approx(b.p_value, rel=1e-9)
