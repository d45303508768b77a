"""Index vectors → clusters (paper §3.2: K-Means through Faiss), and the forms in which a vector is clustered.

Code 17 is not nearer to 18 than to 2,900, so Euclidean K-Means on raw indices depends on how the codebook happens to be
numbered; forms other than "raw" do not. Assignment is a pure function of one row: every number in it is an integer held
in float64, whose sums and products stay below 2**53 and are therefore exact in whatever order a library adds them up.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.errors import BundleError, CorpusError

FORMS = ("raw", "pca", "histogram", "mean")
PCA_WIDTH = 64  # the authors' code: PCA with whitening and L2 before K-Means
ITERATIONS = 25
STARTS = 3
ROWS_PER_CLUSTER = 39  # Faiss's own least number of points a centroid
# K-Means is given a uniform sample of so many rows a cluster, or all rows where there are fewer. A centroid is the mean of
# its rows, so a sample of r of them costs about 1/r of the inertia, and with few K-Means finds another optimum: within 1.1 %
# of the full fit measured (benchmarks/kmeans_sample.py, docs/reference.md).
SAMPLED_PER_CLUSTER = 256
# … within this much memory of features, 8 GiB: 238 rows a cluster of histograms of 3,000 codes at N = 3,000.
MEMORY_BYTES = 8 << 30
ROWS_AT_ONCE = 1024
PART_BYTES = 4 << 20  # … and no more of them than have so many bytes of features, distances, or codes' vectors
JUDGED_ROWS_MAX = 100_000  # rows whose error is measured: more would not make its distribution clearer
HELD_OUT_SHARE = 5  # one row in so many is kept apart to measure the error of rows that were not fitted
ROWS_ENOUGH = 9_604  # tell a share within a point at 95 %, whatever it is: 1.96 √(½ · ½ ÷ 9,604)
# Of a live centroid in a refit, in mean clusters' worth of rows; the strongest last.
PULLS = (0.0, 0.25, 1.0, 4.0, 16.0)
CORRECTED = 1.25**2  # corrected rows tell a share as well as so many times fewer that are counted: docs/drift.md
WORTH = 0.03  # an error smaller by less than this share is worth no pair's moving (docs/tried.md)
# What a refit and what it foretells take at once, in copies, as benchmarks/recluster_memory.py finds:
SAMPLE_COPIES = (
    5  # of a row's codes while a sample is drawn: twice as many as are kept, their join, and what is kept of it
)
FORETELL_COPIES = 3  # of a row's codes afterwards: the sample, all rows in another order, those that a refit is given
ROW_BYTES = 96  # of a row beside that: numbers and their order, later clusters, weights and masks
CENTROID_COPIES = 8  # of the live centroids: the best fit, the one in work, and what that is computed by
MATCHING_COPIES = 4  # of a table of old by new clusters
PARTS_AT_ONCE = 6  # of PART_BYTES: features, distances, and what they are computed by

# What one unit of a feature is worth in the integer grid of each form. All bounds below hold for L ≤ 1024, K ≤ 65,536.
GRID = {
    "raw": 16.0,  # indices < 2**16 → features < 2**20, distances < 2**51
    "pca": 65536.0,  # rows of length 1 → distances < 2**35
    "histogram": 1024.0,  # square roots of counts: rows of length √L → distances < 2**31
    "mean": 256.0,  # codes of a few units, summed over L tokens < 2**22 → distances < 2**53 for D ≤ 512
}

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Clustering:
    """Fitted centroids and what turns index vectors into the space they live in. All arrays hold integers as float64."""

    form: str
    centroids: Floats  # (N, d)
    codebook: Floats  # (K, D) on the grid of "mean"; only its shape matters to the others
    centre: Floats  # (L,) of "pca", else empty
    axes: Floats  # (L, d) of "pca", else empty

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise BundleError(f'clusters of the form "{self.form}" are unknown; this version has {", ".join(FORMS)}')

    def assign(self, vectors: NDArray[np.uint16]) -> NDArray[np.int32]:
        """(n,) nearest centroid of each row of (n, L); equal distances go to the lower number."""
        lengths = (self.centroids**2).sum(1)
        nearest = np.empty(len(vectors), np.int32)
        for part in self.parts(vectors):
            distances = self.features(vectors[part]) @ self.centroids.T
            distances *= -2
            distances += lengths
            nearest[part] = distances.argmin(1)
        return nearest

    def parts(self, vectors: NDArray[np.uint16]) -> Iterator[slice]:
        """The rows in parts whose features, and whose distances to all centroids, have PART_BYTES at most."""
        widest = max(len(self.centroids), feature_width(self.form, vectors.shape[1], self.codebook))
        return _slices(len(vectors), min(ROWS_AT_ONCE, PART_BYTES // (8 * widest)))

    def features(self, vectors: NDArray[np.uint16]) -> Floats:
        """(n, d) integers in float64, each row from that row alone."""
        if self.form == "raw":
            return vectors.astype(np.float64) * GRID["raw"]
        if self.form == "histogram":
            roots: Floats = np.sqrt(_histogram(vectors, len(self.codebook)))
            roots *= GRID["histogram"]
            return np.rint(roots, out=roots)
        if self.form == "mean":
            summed = np.empty((len(vectors), self.codebook.shape[1]))
            for part in _slices(len(vectors), PART_BYTES // (8 * vectors.shape[1] * self.codebook.shape[1])):
                self.codebook[vectors[part]].sum(1, out=summed[part])
            return summed
        projected = np.rint((vectors - self.centre) @ self.axes / 2**20)
        length = np.sqrt((projected**2).sum(1, keepdims=True))  # an exact sum, so the root is the same everywhere
        unit: Floats = np.rint(projected / np.maximum(length, 1) * GRID["pca"])
        return unit

    def errors(self, vectors: NDArray[np.uint16], clusters: NDArray[np.int32]) -> Floats:
        """(n,) quantisation error: squared distance of each row to the centroid of its cluster, in grid units."""
        found = np.empty(len(vectors))
        for part in self.parts(vectors):
            found[part] = ((self.features(vectors[part]) - self.centroids[clusters[part]]) ** 2).sum(1)
        return found


@dataclass(frozen=True)
class Fit:
    """A clustering, and how well it fits the rows that it was given.

    rows_fitted  the uniform sample that K-Means saw; inertia  mean squared distance to the centroid over all rows, in units
    of the features' own variance; occupancy  (N,) rows of each cluster.
    """

    clustering: Clustering
    rows_fitted: int
    inertia: float
    occupancy: NDArray[np.int64]


def fit(
    vectors: NDArray[np.uint16], codebook: NDArray[np.float32], clusters: int, form: str = "mean", seed: int = 0,
    rows_max: int | None = None,
) -> Clustering:  # fmt: skip
    """K-Means of the index vectors (n, L) in that form; the same bytes for the same arguments on one machine.

    vectors   may be mapped from a file: no more than the sample is copied.
    rows_max  of more rows, K-Means is given a uniform sample of so many; None: what `rows_sampled` says.
    Raises    CorpusError where there are fewer vectors than clusters.
    """
    if len(vectors) < clusters:
        raise CorpusError(
            f"{len(vectors)} index vectors cannot make {clusters} clusters: fewer clusters, or a larger shard"
        )
    width = feature_width(form, vectors.shape[1], codebook)
    sample = vectors[_sample(len(vectors), rows_max or rows_sampled(len(vectors), clusters, width), seed)]
    empty = np.empty((0, 0))
    centre, axes = _whitening(sample) if form == "pca" else (empty, empty)
    space = Clustering(form, empty, np.rint(codebook.astype(np.float64) * GRID["mean"]), centre, axes)
    mean, scale = _centre_and_scale(space, sample)
    # centred and of unit scale: float32 would pick wrong centroids of vectors with squared norms near 6e8
    features = np.empty((len(sample), width), np.float32)
    for part in space.parts(sample):
        features[part] = (space.features(sample[part]) - mean) / scale
    centroids = np.rint(kmeans(features, clusters, seed).astype(np.float64) * scale + mean)
    return Clustering(form, centroids, space.codebook, centre, axes)


def fit_measured(
    vectors: NDArray[np.uint16], codebook: NDArray[np.float32], clusters: int, form: str = "mean", seed: int = 0,
    rows_max: int | None = None,
) -> Fit:  # fmt: skip
    """`fit`, and how well it does on all of `vectors`. Raises CorpusError as `fit` does."""
    rows = rows_max or rows_sampled(len(vectors), clusters, feature_width(form, vectors.shape[1], codebook))
    clustering = fit(vectors, codebook, clusters, form, seed, rows)
    _, scale = _centre_and_scale(clustering, vectors)
    squares, occupancy = 0.0, np.zeros(clusters, np.int64)
    for part in clustering.parts(vectors):
        assigned = clustering.assign(vectors[part])
        squares += float((((clustering.features(vectors[part]) - clustering.centroids[assigned]) / scale) ** 2).sum())
        occupancy += np.bincount(assigned, minlength=clusters)
    return Fit(clustering, min(rows, len(vectors)), squares / len(vectors), occupancy)


@dataclass(frozen=True)
class FeatureFit:
    """Clusters of anything but codes, for comparison; fields as those of Fit, inertia in the features' own units."""

    centroids: NDArray[np.float32]
    rows_fitted: int
    inertia: float
    occupancy: NDArray[np.int64]


def fit_features(features: NDArray[np.float32], clusters: int, seed: int = 0) -> FeatureFit:
    """K-Means of features (n, d) as they are, which may be mapped from a file; sampled as `fit` does."""
    import faiss

    rows = rows_sampled(len(features), clusters, features.shape[1])
    centroids = kmeans(np.ascontiguousarray(features[_sample(len(features), rows, seed)]), clusters, seed)
    squares, occupancy = 0.0, np.zeros(clusters, np.int64)
    for part in (features[of] for of in _slices(len(features), ROWS_AT_ONCE)):
        distances, nearest = faiss.knn(np.ascontiguousarray(part), centroids, 1)
        squares += float(distances.sum(dtype=np.float64))
        occupancy += np.bincount(nearest.ravel(), minlength=clusters)
    return FeatureFit(centroids, rows, squares / len(features), occupancy)


@dataclass(frozen=True)
class Refit:
    """New centroids in the place of live ones. pull  of PULLS, the one that counted."""

    clustering: Clustering
    pull: float


def refit(live: Clustering, vectors: NDArray[np.uint16], apart: NDArray[np.uint16], seed: int = 0) -> Refit:
    """K-Means of the index vectors (n, L) in the space of `live`, warm-started from its centroids and numbered as they are.

    The space stays (form, codebook, and the axes of "pca"), so that the centroids of both mean the same. Where data has no
    sharp clusters, K-Means wanders from one good fit to another as good: so the live centroids pull, as weighted rows, and of
    several pulls the strongest counts whose error on the rows `apart`, which are not fitted, is within WORTH of the best. A
    new cluster gets the number of the old one with which it shares its rows (`matching`).
    Raises CorpusError where there are fewer vectors than clusters, or no rows apart.
    """
    clusters = len(live.centroids)
    if len(vectors) < clusters or not len(apart):
        raise CorpusError(
            f"{len(vectors) + len(apart)} index vectors cannot make {clusters} clusters and show how well they do: take a "
            "longer window"
        )
    best, chosen, chosen_pull = np.inf, live, 0.0
    for pull, fitted in _pulled(live, vectors, PULLS, seed):  # one at a time: centroids may be large
        error = float(fitted.errors(apart, fitted.assign(apart)).mean())
        best = min(best, error)
        if error <= best * (1 + WORTH):
            chosen, chosen_pull = fitted, pull
    return Refit(_numbered_as(live, chosen, vectors), chosen_pull)


@dataclass(frozen=True)
class Foretold:
    """What a refit does to pairs that it has not seen. moved  the share whose cluster changes; before, after  (N,) each
    cluster's share of them; rows  as many as would tell it as well by counting.
    """

    moved: float
    before: Floats
    after: Floats
    rows: int


def foretell(
    live: Clustering, fit: Refit, vectors: NDArray[np.uint16], apart: NDArray[np.uint16], seed: int = 0
) -> Foretold:  # fmt: skip
    """What `fit`, of `vectors` and the rows `apart`, does to pairs like them, from all of these rows.

    Rows that were fitted move less than others do: centroids and numbers are made to suit them. By how much less, refits tell
    that leave out another part of the rows each, as large as `apart` (Efron's correction of optimism, by cross-validation);
    the churn of the fitted rows and that difference are known better than the rows apart alone would tell (docs/drift.md).
    """
    clusters = len(live.centroids)
    rows = np.concatenate([apart, vectors])
    were = live.assign(rows)

    def seen(clustering: Clustering, part: NDArray[np.bool_]) -> tuple[Floats, Floats]:
        """(share moved, shares after…) of the rows that a fit has not seen, and of those that it has."""
        are = clustering.assign(rows)
        told = [
            np.concatenate([[(were[of] != are[of]).mean()], np.bincount(are[of], minlength=clusters) / of.sum()])
            for of in (part, ~part)
        ]
        return told[0], told[1]

    first = np.arange(len(rows)) < len(apart)
    outside, inside = seen(fit.clustering, first)
    left = len(rows) - -(-len(vectors) // (HELD_OUT_SHARE - 1))
    if len(apart) < ROWS_ENOUGH and left >= clusters:
        pairs = [(outside, inside)]
        for part in np.array_split(np.arange(len(apart), len(rows)), HELD_OUT_SHARE - 1):
            out = np.zeros(len(rows), bool)
            out[part] = True
            left_in = rows[~out]
            for _, moved in _pulled(live, left_in, (fit.pull,), seed):
                pairs.append(seen(_numbered_as(live, moved, left_in), out))
        optimism = np.mean([unseen - its for unseen, its in pairs], axis=0)
        share = len(apart) / len(rows)
        outside, known = share * outside + (1 - share) * (inside + optimism), round(len(rows) / CORRECTED)
    else:
        known = len(apart)
    before = np.bincount(were, minlength=clusters) / len(rows)
    return Foretold(float(np.clip(outside[0], 0, 1)), before, np.maximum(outside[1:], 0), known)


def _pulled(
    live: Clustering, vectors: NDArray[np.uint16], pulls: tuple[float, ...], seed: int
) -> Iterator[tuple[float, Clustering]]:  # fmt: skip
    """K-Means of these rows from the live centroids, once for each pull; not numbered yet."""
    mean, scale = _centre_and_scale(live, vectors)
    n, start = len(vectors), ((live.centroids - mean) / scale).astype(np.float32)
    # the live centroids are rows, too: behind the others, so that there is one copy of all
    features = np.empty((n + len(start), start.shape[1]), np.float32)
    features[n:] = start
    for part in live.parts(vectors):
        features[part] = (live.features(vectors[part]) - mean) / scale
    for pull in pulls:
        weights = np.ones(n + len(start), np.float32)
        weights[n:] = pull * n / len(start)
        moved = (
            kmeans(features, len(start), seed, start, weights)
            if pull
            else kmeans(features[:n], len(start), seed, start)
        )
        yield pull, replace(live, centroids=np.rint(moved.astype(np.float64) * scale + mean))


def _numbered_as(live: Clustering, fitted: Clustering, vectors: NDArray[np.uint16]) -> Clustering:
    return replace(
        fitted, centroids=fitted.centroids[matching(live, fitted, live.assign(vectors), fitted.assign(vectors))]
    )


def matching(
    old: Clustering, new: Clustering, were: NDArray[np.int32], are: NDArray[np.int32]
) -> NDArray[np.int64]:  # fmt: skip
    """(N,) for each old number the new cluster that gets it, by Hungarian assignment over the rows that both hold.

    were, are  (n,) the rows' clusters by the old and by the new centroids. Clusters that share no row go by distance.
    """
    from scipy.optimize import linear_sum_assignment

    clusters = len(old.centroids)
    shared = np.bincount(were.astype(np.int64) * clusters + are, minlength=clusters**2).reshape(clusters, clusters)
    mean = old.centroids.mean(0)
    a, b = old.centroids - mean, new.centroids - mean
    gain = a @ b.T
    gain *= -2
    gain += (a**2).sum(1)[:, None]
    gain += (b**2).sum(1)
    np.maximum(gain, 0, out=gain)  # squared distances …
    # … of less than one row in all, so that they decide only between assignments that keep as many rows
    gain /= -2 * clusters * max(1.0, float(gain.max()))
    gain += shared
    _, order = linear_sum_assignment(gain, maximize=True)
    return np.asarray(order, np.int64)


def held_out_errors(
    vectors: NDArray[np.uint16], codebook: NDArray[np.float32], clusters: int, form: str, seed: int = 0
) -> Floats:
    """Quantisation errors of rows that the fit did not see, at least a fifth: what rows to come will have.

    The errors of rows that were fitted are smaller, the more so the fewer rows a cluster has. Where `fit` takes a sample, the
    other rows are judged by that very fit; where it takes all, a fifth is kept apart from a fit of its own. Empty where four
    fifths of the rows cannot make the clusters.
    """
    least = len(vectors) // HELD_OUT_SHARE
    fitted = rows_sampled(len(vectors), clusters, feature_width(form, vectors.shape[1], codebook))
    order = np.random.default_rng(seed).permutation(len(vectors))
    if len(vectors) - fitted >= least:
        clustering = fit(vectors, codebook, clusters, form, seed)
        unseen = np.ones(len(vectors), bool)
        unseen[_sample(len(vectors), fitted, seed)] = False
        apart = order[unseen[order]][:JUDGED_ROWS_MAX]
    else:
        apart, others = np.split(order, [least])
        if len(others) < clusters or not len(apart):
            return np.empty(0)
        clustering = fit(vectors[np.sort(others)], codebook, clusters, form, seed)
    rows = vectors[np.sort(apart)]
    return clustering.errors(rows, clustering.assign(rows))


def memory_for(rows: int, live: Clustering, tokens: int) -> int:
    """Bytes that a refit of a sample of so many rows takes, from the drawing of the sample to what is foretold."""
    clusters, width = (int(n) for n in live.centroids.shape)
    codes = 2 * tokens
    drawn, fitted = SAMPLE_COPIES * codes, FORETELL_COPIES * codes + 4 * width
    centroids, matching = CENTROID_COPIES * 8 * clusters * width, MATCHING_COPIES * 8 * clusters**2
    return centroids + matching + PARTS_AT_ONCE * PART_BYTES + rows * (max(drawn, fitted) + ROW_BYTES)


def rows_within(memory_bytes: int, live: Clustering, tokens: int) -> int:
    """The largest sample that a refit can take in so much memory; 0 where its clusters alone take more."""
    none = memory_for(0, live, tokens)
    return max(0, (memory_bytes - none) // (memory_for(1, live, tokens) - none))


def kmeans(
    features: NDArray[np.float32],
    clusters: int,
    seed: int,
    start: NDArray[np.float32] | None = None,
    weights: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """(N, d) centroids by Faiss, on its GPUs where the installed build has any. A cluster that loses all its rows is put
    beside a large one (Faiss does so in each iteration); one that is empty in the end is left to the caller to report.

    start    (N, d) centroids to begin with, once; None: STARTS random draws, of which the best fit counts
    weights  (n,) of the rows; None: all weigh as much
    """
    import faiss

    gpus = getattr(faiss, "get_num_gpus", lambda: 0)()
    fitted = faiss.Kmeans(
        features.shape[1], clusters, niter=ITERATIONS, nredo=STARTS if start is None else 1, seed=seed, gpu=gpus > 0,
        max_points_per_centroid=len(features), min_points_per_centroid=1,
    )  # fmt: skip
    fitted.train(np.ascontiguousarray(features), weights=weights, init_centroids=start)
    centroids: NDArray[np.float32] = np.asarray(fitted.centroids, np.float32)
    return centroids


def too_small(rows: int, clusters: int) -> str | None:
    """What to say where `rows` are too few for so many clusters (Faiss asks for 39 a cluster); None where they are enough."""
    if rows >= ROWS_PER_CLUSTER * clusters:
        return None
    return (
        f"{rows:,} pairs are few for {clusters:,} clusters ({rows / clusters:.1f} each): take {ROWS_PER_CLUSTER * clusters:,} "
        f"pairs or more, or --clusters {max(1, rows // ROWS_PER_CLUSTER)}"
    )


def coarse_sample(rows: int, rows_fitted: int, clusters: int) -> str | None:
    """What to say where memory left K-Means fewer rows a cluster than the rule wants; None where it did not."""
    if rows_fitted >= min(rows, (SAMPLED_PER_CLUSTER * 9 // 10) * clusters):
        return None
    return (
        f"K-Means saw {rows_fitted / clusters:.0f} rows a cluster, all that fit into {MEMORY_BYTES >> 30} GiB, and wants "
        f"{SAMPLED_PER_CLUSTER}: its inertia may be more than 2 % above that of all rows; fewer clusters, or another form"
    )


def feature_width(form: str, tokens: int, codebook: NDArray[np.floating[Any]]) -> int:
    """Numbers of one row in that form."""
    widths = {"raw": tokens, "pca": min(PCA_WIDTH, tokens), "histogram": len(codebook), "mean": codebook.shape[1]}
    return int(widths[form])


def rows_sampled(rows: int, clusters: int, width: int, memory_bytes: int = MEMORY_BYTES) -> int:
    """How many of `rows` rows K-Means is given: SAMPLED_PER_CLUSTER a cluster, as far as their features fit into the memory
    as float32, and never fewer than there are clusters.
    """
    return min(rows, max(clusters, min(SAMPLED_PER_CLUSTER * clusters, memory_bytes // (4 * width))))


def _sample(rows: int, most: int, seed: int) -> slice | NDArray[np.int64]:
    """Which of `rows` rows are fitted: all, or a uniform sample of `most`, in their order."""
    if rows <= most:
        return slice(None)
    return np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))


def _slices(rows: int, at_once: int) -> Iterator[slice]:
    at_once = max(1, at_once)
    return (slice(first, min(first + at_once, rows)) for first in range(0, rows, at_once))


def _centre_and_scale(space: Clustering, vectors: NDArray[np.uint16]) -> tuple[Floats, float]:
    """Mean of the features (d,) and one standard deviation of all their numbers, without holding them all."""
    parts = list(space.parts(vectors))
    mean = sum(space.features(vectors[part]).sum(0) for part in parts) / len(vectors)
    squares = sum(float(((space.features(vectors[part]) - mean) ** 2).mean(1).sum()) for part in parts)
    return np.asarray(mean, np.float64), float(np.sqrt(squares / len(vectors)) + 1e-9)


def _histogram(vectors: NDArray[np.uint16], codes: int) -> NDArray[np.int64]:
    """(n, K) how often each code occurs in each row."""
    rows = np.arange(len(vectors))[:, None] * codes
    return np.bincount((rows + vectors).ravel(), minlength=len(vectors) * codes).reshape(-1, codes)


def _whitening(vectors: NDArray[np.uint16]) -> tuple[Floats, Floats]:
    """(centre, axes) as integers; axes times 2**36, so that projections have about 16 significant bits after the shift."""
    parts = [vectors[of] for of in _slices(len(vectors), ROWS_AT_ONCE)]  # views
    centre = np.rint(sum(part.sum(0, dtype=np.float64) for part in parts) / len(vectors))
    sums, squares = np.zeros(len(centre)), np.zeros((len(centre), len(centre)))
    for part in parts:  # whole numbers: exact as long as their sums stay below 2**53
        centred = part - centre
        sums += centred.sum(0)
        squares += centred.T @ centred
    covariance = (squares - np.outer(sums, sums) / len(vectors)) / (len(vectors) - 1)
    values, directions = np.linalg.eigh(covariance)
    order = np.argsort(values)[::-1][: min(PCA_WIDTH, vectors.shape[1])]
    axes = directions[:, order] / np.sqrt(values[order] + 1e-9)
    return centre, np.rint(axes * 2**34)
