"""Index vectors → clusters (paper §3.2: K-Means through Faiss), and the forms in which a vector is clustered.

Code 17 is not nearer to 18 than to 2,900, so Euclidean K-Means on raw indices depends on how the codebook happens to be
numbered; forms other than "raw" do not. Assignment is a pure function of one row: every number in it is an integer held
in float64, whose sums and products stay below 2**53 and are therefore exact in whatever order a library adds them up.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.errors import BundleError, CorpusError

FORMS = ("raw", "pca", "histogram", "mean")
PCA_WIDTH = 64  # the authors' code: PCA with whitening and L2 before K-Means
ITERATIONS = 25
STARTS = 3
ROWS_PER_CLUSTER = 39  # Faiss's own least number of points a centroid
MEMORY_BYTES = (
    1 << 30
)  # of the features that K-Means holds: 87,000 rows of histograms of 3,000 codes, a million of means
ROWS_AT_ONCE = 1024

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
        parts = [
            (lengths - 2 * self.features(vectors[i : i + ROWS_AT_ONCE]) @ self.centroids.T).argmin(1)
            for i in range(0, len(vectors), ROWS_AT_ONCE)
        ]
        return np.concatenate(parts).astype(np.int32) if parts else np.empty(0, np.int32)

    def features(self, vectors: NDArray[np.uint16]) -> Floats:
        """(n, d) integers in float64, each row from that row alone."""
        if self.form == "raw":
            return vectors.astype(np.float64) * GRID["raw"]
        if self.form == "histogram":
            roots: Floats = np.rint(np.sqrt(_histogram(vectors, len(self.codebook))) * GRID["histogram"])
            return roots
        if self.form == "mean":
            summed: Floats = self.codebook[vectors].sum(1)
            return summed
        projected = np.rint((vectors - self.centre) @ self.axes / 2**20)
        length = np.sqrt((projected**2).sum(1, keepdims=True))  # an exact sum, so the root is the same everywhere
        unit: Floats = np.rint(projected / np.maximum(length, 1) * GRID["pca"])
        return unit


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
    memory_bytes: int = MEMORY_BYTES,
) -> Clustering:  # fmt: skip
    """K-Means of the index vectors (n, L) in that form; the same bytes for the same arguments on one machine.

    memory_bytes  bound of the features that K-Means holds: of more rows than fit, a uniform sample is taken.
    Raises        CorpusError where there are fewer vectors than clusters.
    """
    if len(vectors) < clusters:
        raise CorpusError(
            f"{len(vectors)} index vectors cannot make {clusters} clusters: fewer clusters, or a larger shard"
        )
    sample = vectors[_sample(len(vectors), _rows_max(vectors, codebook, clusters, form, memory_bytes), seed)]
    empty = np.empty((0, 0))
    centre, axes = _whitening(sample) if form == "pca" else (empty, empty)
    space = Clustering(form, empty, np.rint(codebook.astype(np.float64) * GRID["mean"]), centre, axes)
    mean, scale = _centre_and_scale(space, sample)
    # centred and of unit scale: float32 would pick wrong centroids of vectors with squared norms near 6e8
    features = np.concatenate(
        [((space.features(part) - mean) / scale).astype(np.float32) for part in _parts(sample)], dtype=np.float32
    )
    centroids = np.rint(kmeans(features, clusters, seed).astype(np.float64) * scale + mean)
    return Clustering(form, centroids, space.codebook, centre, axes)


def fit_measured(
    vectors: NDArray[np.uint16], codebook: NDArray[np.float32], clusters: int, form: str = "mean", seed: int = 0,
    memory_bytes: int = MEMORY_BYTES,
) -> Fit:  # fmt: skip
    """`fit`, and how well it does on all of `vectors`. Raises CorpusError as `fit` does."""
    clustering = fit(vectors, codebook, clusters, form, seed, memory_bytes)
    assigned = clustering.assign(vectors)
    _, scale = _centre_and_scale(clustering, vectors)
    squares = sum(
        float((((clustering.features(part) - clustering.centroids[to]) / scale) ** 2).sum())
        for part, to in zip(_parts(vectors), _parts(assigned), strict=True)
    )
    rows = min(len(vectors), _rows_max(vectors, codebook, clusters, form, memory_bytes))
    return Fit(clustering, rows, squares / len(vectors), np.bincount(assigned, minlength=clusters))


def kmeans(features: NDArray[np.float32], clusters: int, seed: int) -> NDArray[np.float32]:
    """(N, d) centroids by Faiss, on its GPUs where the installed build has any. A cluster that loses all its rows is put
    beside a large one (Faiss does so in each iteration); one that is empty in the end is left to the caller to report.
    """
    import faiss

    gpus = getattr(faiss, "get_num_gpus", lambda: 0)()
    fitted = faiss.Kmeans(
        features.shape[1], clusters, niter=ITERATIONS, nredo=STARTS, seed=seed, gpu=gpus > 0,
        max_points_per_centroid=len(features), min_points_per_centroid=1,
    )  # fmt: skip
    fitted.train(np.ascontiguousarray(features))
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


def _rows_max(
    vectors: NDArray[np.uint16], codebook: NDArray[np.float32], clusters: int, form: str, memory_bytes: int
) -> int:
    """How many rows of float32 features fit into the memory, and never fewer than there are clusters."""
    tokens = vectors.shape[1]
    widths = {"raw": tokens, "pca": min(PCA_WIDTH, tokens), "histogram": len(codebook), "mean": codebook.shape[1]}
    rows: int = memory_bytes // (4 * widths[form])
    return max(clusters, rows)


def _sample(rows: int, most: int, seed: int) -> slice | NDArray[np.int64]:
    """Which of `rows` rows are fitted: all, or a uniform sample of `most`, in their order."""
    if rows <= most:
        return slice(None)
    return np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))


def _parts(rows: NDArray[Any]) -> Iterator[NDArray[Any]]:
    for first in range(0, len(rows), ROWS_AT_ONCE):
        yield rows[first : first + ROWS_AT_ONCE]


def _centre_and_scale(space: Clustering, vectors: NDArray[np.uint16]) -> tuple[Floats, float]:
    """Mean of the features (d,) and one standard deviation of all their numbers, without holding them all."""
    mean = sum(space.features(part).sum(0) for part in _parts(vectors)) / len(vectors)
    squares = sum(float(((space.features(part) - mean) ** 2).mean(1).sum()) for part in _parts(vectors))
    return np.asarray(mean, np.float64), float(np.sqrt(squares / len(vectors)) + 1e-9)


def _histogram(vectors: NDArray[np.uint16], codes: int) -> Floats:
    """(n, K) how often each code occurs in each row."""
    rows = np.arange(len(vectors))[:, None] * codes
    return np.bincount((rows + vectors).ravel(), minlength=len(vectors) * codes).reshape(-1, codes).astype(np.float64)


def _whitening(vectors: NDArray[np.uint16]) -> tuple[Floats, Floats]:
    """(centre, axes) as integers; axes times 2**36, so that projections have about 16 significant bits after the shift."""
    x = vectors.astype(np.float64)
    centre = np.rint(x.mean(0))
    values, directions = np.linalg.eigh(np.cov((x - centre).T))
    order = np.argsort(values)[::-1][: min(PCA_WIDTH, vectors.shape[1])]
    axes = directions[:, order] / np.sqrt(values[order] + 1e-9)
    return centre, np.rint(axes * 2**34)
