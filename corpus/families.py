"""Which pairs belong together, so that a held-out picture has no twin in training.

Two pairs are of one family when their titles are the same but for numbers, or when their pictures are nearly identical.
"""

import re
from collections.abc import Sequence

import numpy as np

DISTANCE_MAX = 6.0  # mean difference in grey levels of a 16×16 thumbnail; by eye: recoloured or re-exported twins


def family_key(title: str, path: str) -> str:
    """The title without numbers, case and punctuation; the file's name where there is no title worth the name."""
    for text in (title, path.rsplit("/", 1)[-1].removesuffix(".svg").removesuffix(".png")):
        words = [w for w in re.findall(r"[^\W\d_]+", text.lower()) if len(w) > 1]
        if words:
            return " ".join(words)
    return path


def families(keys: Sequence[str], thumbnails: np.ndarray) -> list[str]:
    """The family's name for each pair: the smallest key of all that are joined by key or by picture.

    thumbnails  (n, d) float32 of corpus.render.thumbnail.
    """
    parent = list(range(len(keys)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[str, int] = {}
    for i, key in enumerate(keys):
        parent[root(i)] = root(first.setdefault(key, i))
    for i, j in _twins(thumbnails):
        parent[root(i)] = root(j)
    name: dict[int, str] = {}
    for i, key in enumerate(keys):
        name[root(i)] = min(name.get(root(i), key), key)
    return [name[root(i)] for i in range(len(keys))]


def _twins(thumbnails: np.ndarray, block: int = 512) -> list[tuple[int, int]]:
    """Pairs of nearly identical pictures. Root mean square by one matrix product a block, then the exact mean."""
    x = thumbnails.astype(np.float32) - 255.0  # white becomes zero: most of clip art is background
    norms = (x * x).sum(1)
    limit = 4 * DISTANCE_MAX**2 * x.shape[1]
    found = []
    for start in range(0, len(x), block):
        part = x[start : start + block]
        squared = norms[start : start + block, None] - 2 * part @ x.T + norms[None]
        for a, j in zip(*np.nonzero(squared < limit), strict=True):
            i = start + int(a)
            if i < j and np.abs(x[i] - x[j]).mean() < _limit_for(x[i], x[j]):
                found.append((i, int(j)))
    return found


def _limit_for(a: np.ndarray, b: np.ndarray) -> float:
    """Sparse drawings differ little from anything sparse: demand a tenth of their own ink at most."""
    ink = min(float(np.abs(a).mean()), float(np.abs(b).mean()))
    return min(DISTANCE_MAX, 0.12 * ink)
