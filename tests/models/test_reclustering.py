"""A refit keeps the numbers of clusters that are still there, and predicts what a switch to it will do."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from models.clustering import (
    FORMS,
    Clustering,
    Foretold,
    fit,
    foretell,
    held_out_errors,
    matching,
    memory_for,
    refit,
    rows_within,
)
from models.drift import OCCUPANCY, Baseline, error_baseline, signals
from models.errors import CorpusError
from stream.recluster import churn, coming

CODEBOOK = np.random.default_rng(5).normal(size=(60, 8)).astype(np.float32)
TOKENS, CLUSTERS = 12, 6
USUAL = np.array([0.3, 0.25, 0.2, 0.15, 0.1, 0.0])


def pairs(rows: int, seed: int, kinds: np.ndarray = USUAL) -> np.ndarray:
    """Six kinds of image, each with ten codes of its own; the sixth is new to the stream."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(len(kinds), rows, p=kinds)
    return (kind[:, None] * 10 + rng.integers(10, size=(rows, TOKENS))).astype(np.uint16)


LIVE = {form: fit(pairs(4000, 0), CODEBOOK, CLUSTERS, form) for form in FORMS}
DRIFTED = np.array([0.0, 0.15, 0.2, 0.15, 0.1, 0.4])


@pytest.mark.parametrize("form", FORMS)
def test_unchanged_data_keeps_95_percent_of_its_cluster_numbers(form: str) -> None:
    new = refit(LIVE[form], pairs(4000, 1), pairs(1000, 21)).clustering
    fresh = pairs(4000, 2)

    assert (LIVE[form].assign(fresh) == new.assign(fresh)).mean() >= 0.95


@pytest.mark.parametrize("form", FORMS)
def test_the_predicted_churn_is_right_within_two_points_of_what_happens(form: str) -> None:
    window, stream = pairs(6000, 3, DRIFTED), pairs(20_000, 4, DRIFTED)
    apart, fitted = np.split(window, [1200])
    new = refit(LIVE[form], fitted, apart)

    predicted = coming(foretell(LIVE[form], new, fitted, apart))

    were, are = LIVE[form].assign(stream), new.clustering.assign(stream)
    shares = [np.bincount(x, minlength=CLUSTERS) / len(stream) for x in (were, are)]
    assert predicted.moved == pytest.approx((were != are).mean(), abs=0.02)
    assert predicted.margin <= 0.02
    assert predicted.quota_moved == pytest.approx(np.abs(shares[1] - shares[0]).sum() / 2, abs=0.02)


def test_rows_that_were_fitted_move_less_than_others_and_the_prediction_does_not_fall_for_it() -> None:
    """Many clusters of few rows without any structure: the fit suits its own rows only."""
    live = fit(noise(400, 0) // 2, CODEBOOK, 40, "raw")
    vectors, fresh = noise(400, 1), noise(20_000, 2)
    apart, fitted = np.split(vectors, [80])
    new = refit(live, fitted, apart)

    def moved(rows: np.ndarray) -> float:
        return float((live.assign(rows) != new.clustering.assign(rows)).mean())

    predicted = coming(foretell(live, new, fitted, apart))
    assert moved(fitted) < moved(fresh) - 0.15
    assert predicted.moved == pytest.approx(moved(fresh), abs=predicted.margin)


def test_the_margin_that_is_said_covers_what_then_comes_as_often_as_it_claims() -> None:
    """Kinds without sharp borders, all of them new; benchmarks/foretold.py has more of it."""
    dice = np.random.default_rng(8)
    kinds = dice.dirichlet(np.full(60, 0.08), size=8)

    def soft(rows: int, first: int) -> np.ndarray:
        one, other = kinds[first + dice.integers(4, size=(2, rows))]
        share = dice.random(rows)[:, None]
        cumulated = (share * one + (1 - share) * other).cumsum(1)
        codes: np.ndarray = (dice.random((rows, TOKENS, 1)) > cumulated[:, None]).sum(2).clip(max=59)
        return codes.astype(np.uint16)

    live = {form: fit(soft(2000, 0), CODEBOOK, 16, form) for form in FORMS}
    stream, covered = soft(10_000, 4), []
    for turn in range(120):
        old = live[FORMS[turn % len(FORMS)]]
        apart, fitted = np.split(soft(1000, 4), [200])
        new = refit(old, fitted, apart)
        said = coming(foretell(old, new, fitted, apart))
        came = (old.assign(stream) != new.clustering.assign(stream)).mean()
        covered.append(abs(said.moved - came) <= said.margin)

    assert np.mean(covered) >= 0.95


def noise(rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(60, size=(rows, TOKENS)).astype(np.uint16)


def test_a_share_that_was_not_seen_in_a_few_pairs_may_still_come_and_one_that_is_counted_is_known() -> None:
    shares, nothing = np.ones(1), np.zeros(200, np.int32)

    to_come = coming(Foretold(0.0, shares, shares, 200))
    counted = churn(nothing, nothing, 1, nothing.astype(np.int64), 200)

    assert to_come.moved == 0 and 0.01 < to_come.margin < 0.02
    assert counted.margin == 0


@pytest.mark.parametrize("form", FORMS)
def test_a_refit_fits_new_data_better_than_the_old_centroids(form: str) -> None:
    new = refit(LIVE[form], pairs(4000, 5, DRIFTED), pairs(1000, 25, DRIFTED)).clustering
    fresh = pairs(2000, 6, DRIFTED)

    assert new.errors(fresh, new.assign(fresh)).mean() < LIVE[form].errors(fresh, LIVE[form].assign(fresh)).mean()


@pytest.mark.parametrize("form", FORMS)
def test_after_a_refit_the_alarm_is_quiet_on_the_data_that_it_was_fitted_to(form: str) -> None:
    live, window = LIVE[form], pairs(5000, 7, DRIFTED)
    fresh = pairs(2000, 8, DRIFTED)

    def alarms(clustering: Clustering, baseline: Baseline) -> list[str]:
        clusters = clustering.assign(fresh)
        itms = np.full(len(fresh), 0.5, np.float32)
        found = signals(baseline, itms, clusters, fresh, clustering.errors(fresh, clusters))
        return [s.name for s in found if s.alarm]

    before = alarms(live, told(live, pairs(4000, 0), held_out_errors(pairs(4000, 0), CODEBOOK, CLUSTERS, form)))
    apart, fitted = np.split(window, [1000])
    new = refit(live, fitted, apart).clustering
    after = alarms(new, told(new, window, new.errors(apart, new.assign(apart))))

    assert OCCUPANCY in before
    assert after == []


def told(clustering: Clustering, window: np.ndarray, errors: np.ndarray) -> Baseline:
    occupancy = np.bincount(clustering.assign(window), minlength=CLUSTERS).tolist()
    return Baseline.of({"baselines": {"cluster_occupancy": occupancy, "quantisation_error": error_baseline(errors)}})


def test_renumbered_clusters_get_their_numbers_back() -> None:
    live, rows = LIVE["mean"], pairs(2000, 9)
    order = np.random.default_rng(0).permutation(CLUSTERS)
    shuffled = Clustering(live.form, live.centroids[order], live.codebook, live.centre, live.axes)

    found = matching(live, shuffled, live.assign(rows), shuffled.assign(rows))

    assert (order[found] == np.arange(CLUSTERS)).all()


def test_the_same_rows_and_seed_give_the_same_centroids() -> None:
    rows = pairs(3000, 1)

    one, other = (refit(LIVE["mean"], rows, rows[:99], 3).clustering for _ in range(2))

    assert (one.centroids == other.centroids).all()


def test_fewer_rows_than_clusters_are_refused() -> None:
    with pytest.raises(CorpusError, match="7 index vectors cannot make 6 clusters"):
        refit(LIVE["mean"], pairs(5, 1), pairs(2, 2))


def test_the_rows_of_a_refit_fit_into_the_memory_that_is_given_and_one_more_would_not() -> None:
    live = LIVE["mean"]
    rows = rows_within(64 << 20, live, TOKENS)

    assert memory_for(rows, live, TOKENS) <= 64 << 20 < memory_for(rows + 1, live, TOKENS)
    assert rows_within(1 << 20, live, TOKENS) == 0


@pytest.mark.parametrize("form", FORMS)
def test_fitting_and_foretelling_take_no_more_memory_than_is_counted(form: str) -> None:
    """As wide a bundle as the paper's: the vectors of a row's codes are a thousand times its own."""
    dice = np.random.default_rng(0)
    rows = dice.integers(3000, size=(600, 196)).astype(np.uint16)
    live = fit(rows, dice.normal(size=(3000, 768)).astype(np.float32), 8, form)
    apart, fitted = np.split(rows, [120])

    tracemalloc.start()
    foretell(live, refit(live, fitted, apart), fitted, apart)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert most <= memory_for(len(rows), live, 196)
