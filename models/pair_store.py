"""Pairs on this machine's disk, read in any order: what training shuffles, whatever the pairs came from.

Three files: all images one after the other, all captions one after the other, and a row of numbers a pair. Shards, Parquet
and topics can only be read from front to back; a copy costs disk and makes an epoch a true permutation, a resumed training
the same one, and memory independent of how many pairs there are (24 bytes each).
"""

import hashlib
import mmap
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.errors import BadImage
from models.images import decode

PAIRS_AT_ONCE = 256
THREADS = min(16, os.cpu_count() or 1)


@dataclass(frozen=True)
class TrainingPair:
    """An image that decodes and its caption."""

    id: str
    caption: str
    image: bytes


class PairStore:
    """A folder that `PairStore.write` made."""

    def __init__(self, folder: Path) -> None:
        rows = np.fromfile(folder / "rows", np.int64).reshape(-1, 3)
        self.image_ends, self.caption_ends = (np.concatenate([[0], rows[:, c]]) for c in (0, 1))
        self.caption_hashes = rows[:, 2]
        self.digest = (folder / "sha256").read_text()
        self._images, self._captions = (_mapped(folder / name) for name in ("images", "captions"))

    @staticmethod
    def write(folder: Path, pairs: Iterable[TrainingPair], side: int) -> "PairStore":
        """Copy the pairs whose image decodes and whose caption says anything. A folder that stands there is replaced."""
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        digest, image_end, caption_end = hashlib.sha256(), 0, 0
        with open(partial / "images", "wb") as images, open(partial / "captions", "wb") as captions, open(
            partial / "rows", "wb"
        ) as rows:  # fmt: skip
            for pair in _usable(pairs, side):
                caption = pair.caption.strip().encode()
                image_end, caption_end = image_end + len(pair.image), caption_end + len(caption)
                images.write(pair.image)
                captions.write(caption)
                known_by = hashlib.blake2b(caption, digest_size=8).digest()
                rows.write(np.array([image_end, caption_end, int.from_bytes(known_by, "big", signed=True)]).tobytes())
                digest.update(pair.image + caption)
        (partial / "sha256").write_text(digest.hexdigest())
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        return PairStore(folder)

    def __len__(self) -> int:
        return len(self.caption_hashes)

    def image(self, row: int) -> bytes:
        """The image file of a pair."""
        return bytes(self._images[self.image_ends[row] : self.image_ends[row + 1]])

    def caption(self, row: int) -> str:
        """The caption of a pair."""
        return self._captions[self.caption_ends[row] : self.caption_ends[row + 1]].decode()

    def captions(self, rows: Sequence[int] | NDArray[np.int64] | None = None) -> Iterator[str]:
        """Captions of these rows, or all."""
        return (self.caption(int(row)) for row in (range(len(self)) if rows is None else rows))

    def caption_bytes(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """How long the captions of these rows are."""
        length: NDArray[np.int64] = self.caption_ends[rows + 1] - self.caption_ends[rows]
        return length


def _mapped(file: Path) -> mmap.mmap | bytes:
    if file.stat().st_size == 0:
        return b""
    with open(file, "rb") as opened:
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)


def _usable(pairs: Iterable[TrainingPair], side: int) -> Iterator[TrainingPair]:
    def decodes(pair: TrainingPair) -> bool:
        try:
            decode(pair.image, side)
        except BadImage:
            return False
        return bool(pair.caption.strip())

    remaining = iter(pairs)
    with ThreadPoolExecutor(THREADS) as pool:
        while some := list(islice(remaining, PAIRS_AT_ONCE)):
            yield from (pair for pair, good in zip(some, pool.map(decodes, some), strict=True) if good)
