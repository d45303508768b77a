"""Assignment is a pure function of one index vector."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.bundle import read_files
from models.clustering import (
    FORMS,
    MEMORY_BYTES,
    SAMPLED_PER_CLUSTER,
    Clustering,
    coarse_sample,
    fit,
    fit_features,
    fit_measured,
    rows_sampled,
    too_small,
)
from models.device import choose_device
from models.device_clustering import DeviceClustering
from models.encoding import PaddedEncoder
from models.errors import BundleError, CorpusError
from models.images import decode
from models.loaded import CaptionerParts
from stream.pair_sources import BadEntry, open_source

ROOT = Path(__file__).parents[2]

RNG = np.random.default_rng(5)
CODES = RNG.normal(size=(40, 8)).astype(np.float32)
# four kinds of image: each uses its own ten codes
KINDS = RNG.integers(4, size=300)
VECTORS = (KINDS[:, None] * 10 + RNG.integers(10, size=(300, 12))).astype(np.uint16)
FITTED = {form: fit(VECTORS, CODES, 6, form) for form in FORMS}


@pytest.fixture(scope="module")
def corpus() -> tuple[np.ndarray, np.ndarray]:
    """(index vectors of 1,000 images of the sample corpus, codebook of the sample bundle)."""
    parts = CaptionerParts.of(*read_files(ROOT / "bundles" / "sample"))
    pairs = [
        p for p in open_source(str(ROOT / "corpus" / "sample" / "sample-00000[01].tar")) if not isinstance(p, BadEntry)
    ]
    encoder = PaddedEncoder(parts.captioner, torch.device("cpu"))
    vectors = encoder.vectors([decode(p.image or b"", encoder.side) for p in pairs])
    return vectors, parts.captioner.quantiser.codebook.codes.numpy()


@pytest.mark.parametrize("form", FORMS)
@given(cuts=st.lists(st.integers(0, 300), max_size=8), order=st.randoms(use_true_random=False))
@settings(max_examples=25, deadline=None)
def test_assignment_does_not_depend_on_the_batch(form: str, cuts: list[int], order: object) -> None:
    whole = FITTED[form].assign(VECTORS)
    shuffled = np.arange(300)
    order.shuffle(shuffled)  # type: ignore[attr-defined]

    parts = np.concatenate([FITTED[form].assign(p) for p in np.split(VECTORS[shuffled], sorted(cuts))])

    assert (parts == whole[shuffled]).all()


@pytest.mark.parametrize("form", FORMS)
def test_assignment_is_the_nearest_centroid_of_a_slow_loop(form: str) -> None:
    clustering = FITTED[form]
    features = clustering.features(VECTORS[:50]).astype(int).tolist()
    centroids = clustering.centroids.astype(int).tolist()

    expected = []
    for x in features:
        distances = [sum((a - b) ** 2 for a, b in zip(x, c, strict=True)) for c in centroids]
        expected.append(distances.index(min(distances)))

    assert clustering.assign(VECTORS[:50]).tolist() == expected


@pytest.mark.parametrize("form", FORMS)
@given(seed=st.integers(0, 1 << 30))
@settings(max_examples=25, deadline=None)
def test_a_device_assigns_what_a_cpu_assigns_to_the_last_tie(form: str, seed: int) -> None:
    vectors = np.random.default_rng(seed).integers(40, size=(50, 12)).astype(np.uint16)
    fitted = FITTED[form]
    # Each centroid twice, and some of them rows themselves: as many ties as there can be.
    rows = fitted.features(vectors[:6])
    tied = replace(fitted, centroids=np.concatenate([rows, fitted.centroids, fitted.centroids, rows]))

    assert np.array_equal(DeviceClustering(tied, choose_device()).assign(vectors), tied.assign(vectors))


def test_equal_centroids_go_to_the_lower_cluster() -> None:
    one = FITTED["mean"]
    doubled = Clustering(one.form, np.concatenate([one.centroids, one.centroids]), one.codebook, one.centre, one.axes)

    assert (doubled.assign(VECTORS) == one.assign(VECTORS)).all()


@pytest.mark.parametrize("form", ["histogram", "mean"])
def test_renumbering_the_codebook_changes_no_cluster(form: str) -> None:
    new = np.random.default_rng(1).permutation(len(CODES))
    codes = np.empty_like(CODES)
    codes[new] = CODES
    renumbered = fit(new[VECTORS].astype(np.uint16), codes, 4, form).assign(new[VECTORS].astype(np.uint16))
    original = fit(VECTORS, CODES, 4, form).assign(VECTORS)

    together = original[:, None] == original[None]
    assert (together == (renumbered[:, None] == renumbered[None])).mean() > 0.99


def test_renumbering_the_codebook_changes_raw_clusters() -> None:
    """Code numbers are names: the paper's own form depends on how they were given."""
    new = np.random.default_rng(1).permutation(len(CODES))
    original = fit(VECTORS, CODES, 4, "raw").assign(VECTORS)
    renumbered = fit(new[VECTORS].astype(np.uint16), CODES, 4, "raw").assign(new[VECTORS].astype(np.uint16))

    together = original[:, None] == original[None]
    assert (together == (renumbered[:, None] == renumbered[None])).mean() < 0.9


@pytest.mark.parametrize("form", FORMS)
def test_a_sample_by_the_rule_fits_within_2_percent_of_all_rows(form: str) -> None:
    rng = np.random.default_rng(3)
    kinds = rng.integers(4, size=6000)
    rows = (kinds[:, None] * 10 + rng.integers(10, size=(6000, 12))).astype(np.uint16)

    whole, sampled = fit_measured(rows, CODES, 8, form, rows_max=6000), fit_measured(rows, CODES, 8, form)

    assert (whole.rows_fitted, sampled.rows_fitted) == (6000, 8 * SAMPLED_PER_CLUSTER)
    assert sampled.inertia < 1.02 * whole.inertia


@pytest.mark.parametrize("form", FORMS)
def test_a_sample_by_the_rule_fits_the_corpus_within_2_percent_of_all_its_rows(
    form: str, corpus: tuple[np.ndarray, np.ndarray]
) -> None:
    vectors, codes = corpus

    whole, sampled = fit_measured(vectors, codes, 2, form, rows_max=len(vectors)), fit_measured(vectors, codes, 2, form)

    assert whole.rows_fitted == len(vectors) == 1000 and sampled.rows_fitted == 512
    assert sampled.inertia < 1.02 * whole.inertia


def test_the_sample_has_as_many_rows_as_the_rule_says_and_as_fit_into_the_memory() -> None:
    assert rows_sampled(10**9, 3000, 64) == 3000 * SAMPLED_PER_CLUSTER
    assert rows_sampled(1000, 3000, 64) == 1000
    assert rows_sampled(10**9, 3000, 3000) == MEMORY_BYTES // 12_000
    assert rows_sampled(10**9, 10, 1000, memory_bytes=40_000) == 10
    assert coarse_sample(10**9, rows_sampled(10**9, 3000, 3000), 3000) is None
    assert "24 rows a cluster" in str(coarse_sample(10**9, rows_sampled(10**9, 30_000, 3000), 30_000))


def test_features_of_anything_else_are_clustered_and_measured_alike() -> None:
    features = RNG.normal(size=(2000, 6)).astype(np.float32)

    fitted = fit_features(features, 4)

    distances = ((features[:, None] - fitted.centroids[None]) ** 2).sum(2)
    assert fitted.rows_fitted == 4 * SAMPLED_PER_CLUSTER and fitted.occupancy.sum() == 2000
    assert fitted.inertia == pytest.approx(float(distances.min(1).mean()), rel=1e-4)
    assert fitted.occupancy.tolist() == np.bincount(distances.argmin(1), minlength=4).tolist()


@pytest.mark.parametrize("rows", [1024, 5000])
def test_whitening_in_parts_is_that_of_the_whole(rows: int) -> None:
    vectors = np.random.default_rng(1).integers(40, size=(rows, 12)).astype(np.uint16)
    centred = vectors - np.rint(vectors.mean(0))
    values, directions = np.linalg.eigh(np.cov(centred.T))

    axes = fit(vectors, CODES, 3, "pca", rows_max=rows).axes / 2**34

    whitened = centred @ axes
    np.testing.assert_allclose(np.cov(whitened.T), np.eye(12), atol=1e-6)
    np.testing.assert_allclose(np.abs(axes), np.abs(directions[:, ::-1] / np.sqrt(values[::-1])), atol=1e-6)


def test_empty_clusters_are_counted_and_nothing_is_assigned_to_them() -> None:
    same = np.repeat(VECTORS[:2], 50, axis=0)

    measured = fit_measured(same, CODES, 5, "mean")

    assert measured.occupancy.sum() == 100 and (measured.occupancy == 0).sum() == 3
    assert measured.inertia < 1e-6


def test_a_shard_too_small_for_its_clusters_is_told_what_would_do() -> None:
    assert too_small(3900, 100) is None
    assert "--clusters 10" in str(too_small(390, 3000)) and "117,000 pairs" in str(too_small(390, 3000))


def test_the_same_seed_gives_the_same_centroids() -> None:
    assert (fit(VECTORS, CODES, 6, "mean", seed=3).centroids == fit(VECTORS, CODES, 6, "mean", seed=3).centroids).all()


def test_more_clusters_than_vectors_are_refused() -> None:
    with pytest.raises(CorpusError, match="fewer clusters"):
        fit(VECTORS[:5], CODES, 6)


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(BundleError, match="unknown"):
        Clustering("spiral", *[np.empty((0, 0))] * 4)


def test_nothing_assigned_is_nothing() -> None:
    assert FITTED["mean"].assign(VECTORS[:0]).shape == (0,)
