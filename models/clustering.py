"""Index vectors → clusters (paper §3.2: K-Means through Faiss), and the forms in which a vector is clustered.

Code 17 is not nearer to 18 than to 2,900, so Euclidean K-Means on raw indices depends on how the codebook happens to be
numbered; forms other than "raw" do not. Assignment is a pure function of one row: every number in it is an integer held
in float64, whose sums and products stay below 2**53 and are therefore exact in whatever order a library adds them up.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.errors import BundleError, CorpusError

FORMS = ("raw", "pca", "histogram", "mean")
PCA_WIDTH = 64  # the authors' code: PCA with whitening and L2 before K-Means
ITERATIONS = 25
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


def fit(
    vectors: NDArray[np.uint16], codebook: NDArray[np.float32], clusters: int, form: str = "mean", seed: int = 0
) -> Clustering:
    """K-Means of the index vectors (n, L) in that form. Raises CorpusError where there are fewer vectors than clusters."""
    import faiss

    if len(vectors) < clusters:
        raise CorpusError(
            f"{len(vectors)} index vectors cannot make {clusters} clusters: fewer clusters, or a larger shard"
        )
    empty = np.empty((0, 0))
    centre, axes = _whitening(vectors) if form == "pca" else (empty, empty)
    space = Clustering(form, empty, np.rint(codebook.astype(np.float64) * GRID["mean"]), centre, axes)
    features = np.concatenate(
        [space.features(vectors[i : i + ROWS_AT_ONCE]) for i in range(0, len(vectors), ROWS_AT_ONCE)]
    )
    # centred and of unit scale: float32 would pick wrong centroids of vectors with squared norms near 6e8
    mean, scale = features.mean(0), features.std() + 1e-9
    kmeans = faiss.Kmeans(
        features.shape[1], clusters, niter=ITERATIONS, nredo=3, seed=seed, max_points_per_centroid=len(features)
    )
    kmeans.train(np.ascontiguousarray((features - mean) / scale, np.float32))
    centroids = np.rint(np.asarray(kmeans.centroids, np.float64) * scale + mean)
    return Clustering(form, centroids, space.codebook, centre, axes)


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
