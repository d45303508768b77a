"""What the stream may ask of a model: five steps, each a function of its arguments alone. Knows no network library.

Clusters are functions of the index vector alone, so what was recorded is enough to find every one of them again. In the
paper's architecture captions are, too (§3.2: the decoder sees the quantised tokens), and scores where the bundle's own head
judges. Captions of `authors` and scores of a BLIP need the picture beside the vector.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from models.clustering import Clustering
from models.drift import Baseline

Pixels: TypeAlias = NDArray[np.uint8]  # (S, S, 3) RGB
Vectors: TypeAlias = NDArray[np.uint16]  # (n, L) codebook indices


class Picture(NamedTuple):
    """What a model sees of one image, decoded once: nothing that was counted can turn out to be unreadable later."""

    pixels: Pixels  # for the encoder
    judged: Pixels | None = None  # in the size of a scorer that looks at the image itself


class PairModel(Protocol):
    """A loaded bundle, or something that behaves like one."""

    version: str  # hash of the bundle's content: hex, 16 characters
    space: str  # hash of encoder, codebook and gate: bundles of one space can replace each other in a running stream
    tokens: int  # L
    codebook_size: int  # K
    clusters: int  # N
    gate: float | None  # the bundle's ITM threshold, used only where the rule asks for it
    batch: int  # the one padded batch shape of the encoder
    pairs_at_once: int  # that a worker should hand over together
    fingerprint: dict[str, str]  # device, dtype, threads, versions … of this process
    made_with: dict[str, str]  # the same of the process that made the bundle
    clustering: Clustering | None  # what `assign` assigns by, None where there is nothing to measure an error by
    baseline: Baseline | None  # what drift is measured against, None without a bundle

    def decode(self, image: bytes | memoryview) -> Picture:
        """What the steps below look at. Thread safe. Raises models.errors.BadImage."""
        ...

    def encode(self, pictures: Sequence[Picture]) -> Vectors:
        """(n, L) index vectors; an image's vector does not depend on the others or on its place among them."""
        ...

    def assign(self, vectors: Vectors) -> NDArray[np.int32]:
        """(n,) clusters in [0, N): a pure function of each row."""
        ...

    def match(self, vectors: Vectors, captions: Sequence[str], pictures: Sequence[Picture] = ()) -> NDArray[np.float32]:
        """(n,) image-text matching scores in [0, 1]. Raises ShapeError where the bundle's scorer needs the pictures."""
        ...

    def caption(self, vectors: Vectors, pictures: Sequence[Picture] = ()) -> list[str]:
        """T_g, one generated caption a row. Raises ShapeError where the bundle's decoder needs the pictures."""
        ...
