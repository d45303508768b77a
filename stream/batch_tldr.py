"""The batch reference: what TL;DR picks from one partition's recorded rows, done the plain way, all in memory.

`verify` compares the stream with this. It imports nothing of state/, shares no line with it, and knows no commits,
crashes or files; the rules are those of ARCHITECTURE.md, "The reduced set".
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Row(NamedTuple):
    """One recorded input offset that was no dead letter. cluster None: a takedown of the id."""

    offset: int
    id: str
    cluster: int | None
    itm: float = 1.0


class Kept(NamedTuple):
    """Where a pair of the reduced set was counted."""

    epoch: int
    cluster: int
    position: int
    offset: int


class Outcome(NamedTuple):
    """What became of a row: kept, over quota, over cap, below gate, duplicate, forgotten. -1: does not apply."""

    fate: str
    epoch: int = -1
    position: int = -1
    duplicate_of: int = -1


class Before(NamedTuple):
    """The state from which a replay starts where the rows before have expired. Ids by their hash."""

    reduced: dict[int, tuple[str, Kept]]
    known: dict[int, int]  # → offset at which the id was last counted
    taken_down: set[int]
    counted: dict[tuple[int, int], int]  # cell → n


def reduce_partition(
    rows: Iterable[Row],
    *,
    seed: int,
    partition: int,
    p: int,
    q: int,
    cap: int | None = None,
    window: int | None = None,
    gate: float | None = None,
    switches: Sequence[tuple[int, int]] = ((0, 0),),
    before: Before | None = None,
) -> tuple[dict[str, Kept], dict[int, Outcome]]:
    """The reduced set (by id) and the outcome of every row (by offset) of one partition.

    rows      in the order of their offsets; ITM as recorded
    p, q      the ratio in lowest terms; cap  most pairs in a cell; window  for duplicates, in offsets; gate  least ITM
    switches  (input offset, epoch): from that offset on pairs are counted in that epoch
    before    the state that the rows come upon; None: they are the stream's first
    """
    reduced: dict[int, tuple[str, Kept]] = {}  # by the hash of the id, as is everything about ids
    outcomes: dict[int, Outcome] = {}
    known: dict[int, int] = {}  # hash → offset at which the id was last counted
    taken_down: set[int] = set()
    counted: dict[tuple[int, int], int] = {}  # cell = (epoch, cluster) → n
    members: dict[tuple[int, int], dict[int, tuple[int, int]]] = {}  # cell → hash → (priority, offset)
    if before is not None:
        reduced, known = dict(before.reduced), dict(before.known)
        taken_down, counted = set(before.taken_down), dict(before.counted)
        for name, (pair_id, kept) in reduced.items():
            digest = hashlib.blake2b(pair_id.encode(), digest_size=16, key=struct.pack(">Q", seed)).digest()
            mark = struct.unpack(">QQ", digest)[1], kept.offset
            members.setdefault((kept.epoch, kept.cluster), {})[name] = mark
    for offset, pair_id, cluster, itm in rows:
        digest = hashlib.blake2b(pair_id.encode(), digest_size=16, key=struct.pack(">Q", seed)).digest()
        name, priority = struct.unpack(">QQ", digest)
        if cluster is None or name in taken_down:
            taken_down.add(name)
            if name in reduced:
                _, gone = reduced.pop(name)
                del members[gone.epoch, gone.cluster][name]
            outcomes[offset] = Outcome("forgotten")
            continue
        if name in reduced or (name in known and (window is None or known[name] >= offset - window)):
            outcomes[offset] = Outcome("duplicate", duplicate_of=known[name])
            continue
        if gate is not None and not itm >= gate:
            outcomes[offset] = Outcome("below gate")
            continue
        epoch = max(number for start, number in switches if start <= offset)
        cell = members.setdefault((epoch, cluster), {})
        n = counted.get((epoch, cluster), 0)
        counted[epoch, cluster] = n + 1
        known[name] = offset
        block = struct.pack(">QIIIQ", seed, epoch, partition, cluster & 0xFFFFFFFF, n // q)
        hashes = struct.unpack(f">{q}Q", hashlib.shake_128(block).digest(8 * q))
        if n % q not in sorted(range(q), key=hashes.__getitem__)[:p]:
            outcomes[offset] = Outcome("over quota", epoch, n)
            continue
        cell[name] = (priority, offset)  # a stream has one rate: the order of priority ÷ rate is that of the priority
        reduced[name] = pair_id, Kept(epoch, cluster, n, offset)
        outcomes[offset] = Outcome("kept", epoch, n)
        if cap is not None and len(cell) > cap:
            worst = max(cell, key=cell.__getitem__)
            del cell[worst], reduced[worst]
            if worst == name:
                outcomes[offset] = Outcome("over cap", epoch, n)
    return dict(reduced.values()), outcomes
