"""M % of every cell, exactly and at once: of each q counted pairs in a row, p are kept.

Pure arithmetic: no clock, no dice, no I/O. With M = p/q in lowest terms, the counted pairs of a cell fall into blocks
of q; a block keeps the pairs at the p positions whose keyed hashes are smallest. Every pair is kept with probability
M, and for M = 1/q the kept count stays within one of M·n at every moment: a block is either not yet reached (its
share is missing, less than one) or already served (its share came early, less than one).
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterable
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from state.errors import BadSetting

# One mask holds a block; a block longer than this would let the kept count stray far from M·n for no gain in precision.
BLOCK_MAX = 100

_cell_of_block = struct.Struct(">QIIIQ").pack
_hashes_of_block = [struct.Struct(f">{q}Q") for q in range(BLOCK_MAX + 1)]


class Ratio(NamedTuple):
    """p/q in lowest terms, 1 ≤ p ≤ q ≤ 100."""

    p: int
    q: int

    @classmethod
    def of(cls, p: int, q: int) -> Ratio:
        """p/q brought to lowest terms. Raises BadSetting unless 0 < p/q ≤ 1 and q ≤ 100 then."""
        if q < 1 or not 1 <= p <= q:
            raise BadSetting(
                f"the ratio {p}/{q} is not above 0 and at most 1; give a percentage or a fraction such as 1/4"
            )
        lowest = Fraction(p, q)
        if lowest.denominator > BLOCK_MAX:
            raise BadSetting(
                f"the ratio {lowest.numerator}/{lowest.denominator} would need blocks of so many pairs, and "
                f"{BLOCK_MAX} is the most; give a whole percentage or a fraction with a smaller denominator"
            )
        return cls(lowest.numerator, lowest.denominator)

    @classmethod
    def parse(cls, text: str) -> Ratio:
        """ "25" and "25%" are a quarter, as is "1/4"; a number without a slash is always a percentage.

        Raises BadSetting.
        """
        found = re.fullmatch(r"\s*(?:(\d+)\s*/\s*(\d+)|(\d+(?:\.\d+)?)\s*%?)\s*", text)
        if not found:
            raise BadSetting(f"{text!r} is no ratio; give a percentage such as 25 or a fraction such as 1/4")
        if found[3] is None:
            return cls.of(int(found[1]), int(found[2]))
        share = Fraction(found[3]) / 100
        return cls.of(share.numerator, share.denominator)

    @property
    def share(self) -> Fraction:
        """The exact share of the counted pairs that is kept."""
        return Fraction(self.p, self.q)

    def __str__(self) -> str:
        return f"{self.p}/{self.q}"


def kept_positions(seed: int, epoch: int, partition: int, cluster: int, block: int, ratio: Ratio) -> int:
    """The positions of one block that are kept, as a mask: bit i is set iff position i is.

    The hash of position i is the i-th 8 bytes of SHAKE128 over (seed, epoch, partition, cluster, block), so that one
    call serves a block; equal hashes go to the lower position.
    """
    p, q = ratio
    if p == q:
        return (1 << q) - 1
    stream = hashlib.shake_128(_cell_of_block(seed, epoch, partition, cluster, block)).digest(8 * q)
    if p == 1:
        hashes = _hashes_of_block[q].unpack(stream)
        return 1 << hashes.index(min(hashes))
    order = sorted(range(q), key=lambda i: stream[8 * i : 8 * i + 8])
    return sum(1 << i for i in order[:p])


def kept_in_blocks(
    seed: int, epoch: int, partition: int, blocks: Iterable[tuple[int, int]], ratio: Ratio
) -> NDArray[np.bool_]:
    """`kept_positions` of many blocks at once, (n, q): whether each position is kept.

    blocks  (cluster, block) each
    """
    p, q = ratio
    streams = [
        hashlib.shake_128(_cell_of_block(seed, epoch, partition, cluster, block)).digest(8 * q)
        for cluster, block in blocks
    ]
    hashes = np.frombuffer(b"".join(streams), ">u8").reshape(-1, q)
    kept = np.zeros(hashes.shape, bool)
    np.put_along_axis(kept, np.argsort(hashes, axis=1, kind="stable")[:, :p], True, axis=1)
    return kept
