"""What a cell holds: everything that passed its quota, or with a cap the k of smallest priority ÷ rate.

Pure: values in, verdicts out; no clock, no dice, no I/O. A bottom-k sample by a hash of the id is a uniform sample of
the cell whatever the order of arrival (Cohen and Kaplan, "Summarizing data using bottom-k sketches", 2007), and
smaller samples are nested in larger ones. A full cell is a heap of marks; a mark is rank · 2^64 + input offset, one
plain integer that sorts by rank and remembers which pair it stands for. A switch of the bundle may leave a cell over its
cap; it shrinks by LEAVE_AT_ONCE - 1 pairs with each pair that is offered to it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from heapq import heappop, heappush, heapreplace
from typing import NamedTuple

from state.quota import Ratio

OFFSET_BITS = 64
OFFSET_MASK = (1 << OFFSET_BITS) - 1
# So many pairs leave a cell for one that is offered, at most: a cell that a switch made a thousand times too large must not
# make one transaction a thousand times too large.
LEAVE_AT_ONCE = 16

_cell = struct.Struct(">5sQIII").pack


class Verdict(NamedTuple):
    """Whether the pair entered, and the input offsets of the pairs that had to leave, largest rank first."""

    admitted: bool
    evicted: tuple[int, ...]


ENTERED = Verdict(True, ())
REFUSED = Verdict(False, ())


def rank_of(priority: int, rate: Ratio) -> int:
    """priority ÷ rate, rounded down: the order in which entries survive, comparable between rates."""
    return priority * rate.q // rate.p


def mark_of(rank: int, offset: int) -> int:
    """The integer under which a pair stands in its cell; equal ranks go to the earlier offset."""
    return rank << OFFSET_BITS | offset


def heap_of(marks: Sequence[int]) -> list[int]:
    """The heap of a cell from its marks in ascending order; the pair that would leave first is at [0], negated."""
    return [-mark for mark in reversed(marks)]


def offer(heap: list[int], mark: int, cap: int) -> Verdict:
    """Offer a pair to a cell of at most `cap`; the heap is changed if somebody enters or leaves.

    The pair is ranked among those that are there, and what is largest beyond the cap leaves, LEAVE_AT_ONCE at most; the
    pair itself may be one of them, and is then refused.
    """
    over = len(heap) + 1 - cap
    if over <= 0:
        heappush(heap, -mark)
        return ENTERED
    if over == 1:
        if -heap[0] < mark:
            return REFUSED
        return Verdict(True, (-heapreplace(heap, -mark) & OFFSET_MASK,))
    heappush(heap, -mark)
    leaving = [-heappop(heap) for _ in range(min(over, LEAVE_AT_ONCE))]
    admitted = mark not in leaving
    return Verdict(admitted, tuple(left & OFFSET_MASK for left in leaving if left != mark))


def take_share(
    ranks: Sequence[int], wanted: Ratio, sampled: Ratio, seed: int, epoch: int, partition: int, cluster: int
) -> list[int]:
    """The indices into `ranks` that a snapshot at the ratio `wanted` takes of one cell, in ascending order of rank.

    Of e entries sampled at the rate M it takes the ⌊e·R/M + u⌋ of smallest rank, with u in [0, 1) a keyed hash of the
    cell: the expected share is exact, and a smaller ratio takes a subset of what a larger one takes. `wanted` is at
    most `sampled`; at equality everything is taken. Equal ranks go to the lower index.
    """
    digest = hashlib.shake_128(_cell(b"share", seed, epoch, partition, cluster)).digest(8)
    chance = int.from_bytes(digest, "big")
    above, below = wanted.p * sampled.q, wanted.q * sampled.p
    count = ((len(ranks) * above << 64) + chance * below) // (below << 64)
    order = sorted(range(len(ranks)), key=ranks.__getitem__)
    return order[: min(count, len(ranks))]
