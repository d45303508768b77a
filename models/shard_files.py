"""What a pass over a bootstrap shard leaves on disk, so that memory does not grow with it: rows of numbers, a sample of pairs.

Must not know where pairs come from, nor what is done with them.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


class RowFile:
    """Rows of one width and type, appended to a file that is then mapped: pages that memory may give back at any time."""

    def __init__(self, file: Path, dtype: DTypeLike) -> None:
        self._file, self._dtype = file, np.dtype(dtype)
        self._opened = open(file, "wb")  # noqa: SIM115 - open as long as rows come
        self._width = 0

    def append(self, rows: NDArray[Any]) -> None:
        """Writes (n, width) rows behind those that are there."""
        self._width = rows.shape[1]
        self._opened.write(np.ascontiguousarray(rows, self._dtype).tobytes())

    def mapped(self) -> NDArray[Any]:
        """All rows (n, width), read-only; nothing can be appended any more."""
        self._opened.close()
        if self._file.stat().st_size == 0:
            return np.empty((0, self._width), self._dtype)
        return np.memmap(self._file, self._dtype, "r").reshape(-1, self._width)


class PairSample:
    """A uniform sample of at most `size` of the pairs that it is offered (Vitter's algorithm R, 1985), the same for a seed.

    Images and captions lie on disk, one file each and never more than `size` of them; memory holds the index vectors.
    """

    def __init__(self, folder: Path, size: int, seed: int) -> None:
        folder.mkdir()
        self._folder, self._size, self._offered = folder, size, 0
        self._dice = np.random.default_rng(seed)
        self._vectors: list[NDArray[np.uint16]] = []

    def __len__(self) -> int:
        return len(self._vectors)

    def offer(self, image: bytes, caption: str, vector: NDArray[np.uint16]) -> None:
        """Takes the pair with the probability that keeps the sample uniform; another one leaves for it."""
        place = self._offered if self._offered < self._size else int(self._dice.integers(self._offered + 1))
        self._offered += 1
        if place >= self._size:
            return
        if place == len(self._vectors):
            self._vectors.append(vector.copy())  # a row of a batch would keep the whole batch alive
        else:
            self._vectors[place] = vector.copy()
        (self._folder / f"{place}.image").write_bytes(image)
        (self._folder / f"{place}.caption").write_bytes(caption.encode("utf-8", "surrogatepass"))

    def vectors(self, start: int, stop: int) -> NDArray[np.uint16]:
        """(stop - start, L) of these pairs."""
        return np.stack(self._vectors[start:stop])

    def image(self, place: int) -> bytes:
        """The image file of a pair."""
        return (self._folder / f"{place}.image").read_bytes()

    def caption(self, place: int) -> str:
        """The caption of a pair, as it was found."""
        return (self._folder / f"{place}.caption").read_bytes().decode("utf-8", "surrogatepass")
