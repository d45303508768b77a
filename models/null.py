"""A model that hashes instead of looking: same interface, no torch, millions of images an hour on one core.

For tests of the stream, benchmarks of everything but the GPU, and dry runs of a deployment. Deterministic: the same image
bytes give the same vector, cluster and caption everywhere. Image bytes that start with `BAD` cannot be decoded.
"""

import hashlib
import re
from collections.abc import Sequence
from functools import partial
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from models.clustering import Clustering
from models.drift import Baseline
from models.errors import BadImage, BundleError, Reason
from models.model import Picture, Vectors

BAD = b"BAD"
DIGEST_BYTES = 4  # the "pixels" are a check sum
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
# A check sum of every byte of a picture would be most of the work at 30 KB; its ends and its size tell pictures apart.
END_BYTES = 256
# A row's hash looks at its first codes only: 3000^8 of them are enough.
HASHED_CODES = 8
# What is worked on at once stays in a core's cache.
ROWS_AT_ONCE = 128

_picture = partial(tuple.__new__, Picture)


class NullModel:
    """models.model.PairModel without a model."""

    def __init__(
        self, tokens: int = 196, codebook_size: int = 3000, clusters: int = 3000, gate: float | None = 0.5, batch: int = 5000,
        seed: int = 0,
    ) -> None:  # fmt: skip
        self.tokens = tokens
        self.codebook_size = codebook_size
        self.clusters = clusters
        self.gate = gate
        self.batch = self.pairs_at_once = batch
        self.space = hashlib.sha256(f"null/3/{tokens}/{codebook_size}/{gate}".encode()).hexdigest()
        self.seed = seed  # of the clusters alone, so that bundles which differ in it can replace each other
        name = f"{self.space}/{clusters}" + (f"/{seed}" if seed else "")
        self.version = hashlib.sha256(name.encode()).hexdigest()[:16]
        self.fingerprint = {"device": "none", "batch": str(batch)}
        self.made_with = self.fingerprint
        self.clustering: Clustering | None = None
        self.baseline: Baseline | None = None

    @classmethod
    def at(cls, uri: str) -> "NullModel":
        """The null model `null:SEED` or `null:SEED/CLUSTERS`: other clusters of the same codes. Raises BundleError."""
        found = re.fullmatch(r"null:(\d+)(?:/(\d+))?", uri)
        if not found or found[2] == "0":
            raise BundleError(f"{uri} is no null model: give null:SEED or null:SEED/CLUSTERS")
        return cls(seed=int(found[1]), clusters=int(found[2] or 3000))

    def decode(self, image: bytes | memoryview) -> Picture:
        """The four bytes of a check sum of its ends and its size. Raises BadImage for none, and for those that start with
        b"BAD"."""
        if not image or (image[0] == BAD[0] and image[:3] == BAD):
            raise BadImage(Reason.NOT_AN_IMAGE, f"{len(image)} bytes that are empty or planted as bad")
        size = len(image)
        ends = crc32(image[-END_BYTES:], crc32(image[:END_BYTES], size)) if size > END_BYTES else crc32(image)
        # bytes, not an array, which would take longer to make than all else here
        return _picture((ends.to_bytes(DIGEST_BYTES, "little"), None))

    def encode(self, pictures: Sequence[Picture]) -> Vectors:
        """(n, L) uniform indices, each a hash of the digest and of its place."""
        if not len(pictures):
            return np.empty((0, self.tokens), np.uint16)
        # An odd seed times an odd constant of the place, in 32 bits: eight lanes a step where 64 bits and a division have one.
        digests: list[bytes] = [picture.pixels for picture in pictures]  # type: ignore[misc]
        seeds = np.frombuffer(b"".join(digests), "<u4").reshape(-1, 1) | np.uint32(1)
        places = _mixed(np.arange(1, self.tokens + 1, dtype=np.uint64) * GOLDEN).astype(np.uint32) | np.uint32(1)
        codes = np.empty((len(pictures), self.tokens), np.uint16)
        for start in range(0, len(pictures), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            mixed = seeds[rows] * places
            mixed ^= mixed >> np.uint32(15)
            mixed *= np.uint32(0x2C1B3C6D)
            mixed >>= np.uint32(16)
            mixed *= np.uint32(self.codebook_size)
            mixed >>= np.uint32(16)
            codes[rows] = mixed
        return codes

    def assign(self, vectors: Vectors) -> NDArray[np.int32]:
        """(n,) a hash of each row."""
        hashes = self._row_hashes(vectors)
        if self.seed:
            hashes = _mixed(hashes + np.uint64(self.seed * int(GOLDEN) % 2**64))
        return (hashes % np.uint64(self.clusters)).astype(np.int32)

    def match(self, vectors: Vectors, captions: Sequence[str], pictures: Sequence[Picture] = ()) -> NDArray[np.float32]:
        """(n,) a hash of row and caption, uniform in [0, 1)."""
        try:
            words = np.array([crc32(caption.encode()) for caption in captions], np.uint64)
        except UnicodeEncodeError:  # half of a surrogate pair: JSON may hold one
            words = np.array([crc32(caption.encode("utf-8", "surrogatepass")) for caption in captions], np.uint64)
        mixed = _mixed(self._row_hashes(vectors) + words * GOLDEN)
        return (mixed >> np.uint64(40)).astype(np.float32) / np.float32(2**24)

    def caption(self, vectors: Vectors, pictures: Sequence[Picture] = ()) -> list[str]:
        """The row's first codes as words."""
        return ["codes" + " %d" * len(row) % tuple(row) for row in vectors[:, :4].tolist()]

    def _row_hashes(self, vectors: Vectors) -> NDArray[np.uint64]:
        codes = vectors[:, :HASHED_CODES].astype(np.uint64)
        weights = _mixed(np.arange(1, codes.shape[1] + 1, dtype=np.uint64) * GOLDEN)
        return _mixed((codes * weights).sum(1, dtype=np.uint64))


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele et al. 2014); multiplication wraps by design."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
