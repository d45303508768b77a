"""`Clustering.assign` where the encoder works: a GPU.

Every number is an integer held in float64 (models/clustering.py), and those are exact on any device and in any order: the
clusters are the same, to the last tie. On one thread of a CPU the paper's size takes 0.3 ms a vector, as long as its encoder on
a GPU.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from models.clustering import GRID, Clustering

ROWS_AT_ONCE = 1024


class DeviceClustering:
    """The centroids of a clustering on `device`."""

    def __init__(self, clustering: Clustering, device: torch.device) -> None:
        def there(array: NDArray[np.float64]) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        self.form, self.device = clustering.form, device
        self._centroids, self._codebook = there(clustering.centroids), there(clustering.codebook)
        self._centre, self._axes = there(clustering.centre), there(clustering.axes)
        self._lengths = (self._centroids**2).sum(1)

    @torch.inference_mode()
    def assign(self, vectors: NDArray[np.uint16]) -> NDArray[np.int32]:
        """(n,) nearest centroid of each row of (n, L); equal distances go to the lower number."""
        parts = []
        for start in range(0, len(vectors), ROWS_AT_ONCE):
            rows = torch.from_numpy(vectors[start : start + ROWS_AT_ONCE].astype(np.int64)).to(self.device)
            distances = self._lengths - 2 * (self._features(rows) @ self._centroids.T)
            parts.append(distances.argmin(1).int())
        return torch.cat(parts).cpu().numpy() if parts else np.empty(0, np.int32)

    def _features(self, rows: Tensor) -> Tensor:
        """(n, d), as `Clustering.features`."""
        if self.form == "raw":
            return rows.double() * GRID["raw"]
        if self.form == "histogram":
            counts = self._codebook.new_zeros(len(rows), len(self._codebook))
            counts.scatter_add_(1, rows, torch.ones_like(rows, dtype=torch.float64))
            return (counts.sqrt() * GRID["histogram"]).round()
        if self.form == "mean":
            return F.embedding_bag(rows, self._codebook, mode="sum")
        projected = ((rows - self._centre) @ self._axes / 2**20).round()
        length = (projected**2).sum(1, keepdim=True).sqrt()
        return (projected / length.clamp(min=1) * GRID["pca"]).round()
