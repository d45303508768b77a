"""The batch reference: what TL;DR picks from one partition's recorded rows, done the plain way, all in memory.

`verify` compares the stream with this. It imports nothing of state/, shares no line with it, and knows no commits,
crashes or files; the rules are those of ARCHITECTURE.md, "The reduced set".
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

# Pairs that leave an overfull cell (after a switch) for one that is offered to it, at most.
LEAVE_AT_ONCE = 16


def no_other_epoch(epoch: int, offset: int) -> int:
    """For streams without a switch, or without a cap: nothing is ever asked."""
    raise LookupError(f"the cluster in epoch {epoch} of the pair from offset {offset} is not known")


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
    cluster_in: Callable[[int, int], int] = no_other_epoch,
    before: Before | None = None,
) -> tuple[dict[str, Kept], dict[int, Outcome]]:
    """The reduced set (by id) and the outcome of every row (by offset) of one partition.

    rows      in the order of their offsets; ITM as recorded
    p, q      the ratio in lowest terms; cap  most pairs in a cell; window  for duplicates, in offsets; gate  least ITM
    switches  (input offset, epoch): from that offset on pairs are counted in that epoch
    cluster_in  (epoch, offset) → the cluster that the epoch's bundle gives the vector of the pair from there; asked with a
              cap only, for pairs of the set that come from an older epoch
    before    the state that the rows come upon; None: they are the stream's first
    """
    reduced: dict[int, tuple[str, Kept]] = {}  # by the hash of the id, as is everything about ids
    outcomes: dict[int, Outcome] = {}
    known: dict[int, int] = {}  # hash → offset at which the id was last counted
    taken_down: set[int] = set()
    counted: dict[tuple[int, int], int] = {}  # cell = (epoch, cluster) → n
    present = -1  # the epoch, whose clusters say who competes with whom once there is a cap
    members: dict[int, dict[int, tuple[int, int]]] = {}  # cluster → hash → (priority, offset)
    member_of: dict[int, int] = {}  # hash → cluster
    if before is not None:
        reduced, known = dict(before.reduced), dict(before.known)
        taken_down, counted = set(before.taken_down), dict(before.counted)
    for offset, pair_id, cluster, itm in rows:
        epoch = max(number for start, number in switches if start <= offset)
        if cap is not None and epoch != present:
            members.clear()
            for name, (other_id, kept) in reduced.items():
                now = kept.cluster if kept.epoch == epoch else cluster_in(epoch, kept.offset)
                digest = hashlib.blake2b(other_id.encode(), digest_size=16, key=struct.pack(">Q", seed)).digest()
                members.setdefault(now, {})[name] = struct.unpack(">QQ", digest)[1], kept.offset
                member_of[name] = now
        present = epoch
        digest = hashlib.blake2b(pair_id.encode(), digest_size=16, key=struct.pack(">Q", seed)).digest()
        name, priority = struct.unpack(">QQ", digest)
        if cluster is None or name in taken_down:
            taken_down.add(name)
            if reduced.pop(name, None) and cap is not None:
                del members[member_of[name]][name]
            outcomes[offset] = Outcome("forgotten")
            continue
        if name in reduced or (name in known and (window is None or known[name] >= offset - window)):
            outcomes[offset] = Outcome("duplicate", duplicate_of=known[name])
            continue
        if gate is not None and not itm >= gate:
            outcomes[offset] = Outcome("below gate")
            continue
        n = counted.get((epoch, cluster), 0)
        counted[epoch, cluster] = n + 1
        known[name] = offset
        block = struct.pack(">QIIIQ", seed, epoch, partition, cluster & 0xFFFFFFFF, n // q)
        hashes = struct.unpack(f">{q}Q", hashlib.shake_128(block).digest(8 * q))
        if n % q not in sorted(range(q), key=hashes.__getitem__)[:p]:
            outcomes[offset] = Outcome("over quota", epoch, n)
            continue
        reduced[name] = pair_id, Kept(epoch, cluster, n, offset)
        outcomes[offset] = Outcome("kept", epoch, n)
        if cap is None:
            continue
        cell = members.setdefault(cluster, {})
        cell[name] = (priority, offset)  # a stream has one rate: the order of priority ÷ rate is that of the priority
        member_of[name] = cluster
        # Whoever is largest beyond the cap leaves; only a switch can leave more than one too many.
        for _ in range(min(len(cell) - cap, LEAVE_AT_ONCE)):
            gone = max(cell, key=cell.__getitem__)
            del cell[gone], reduced[gone]
            if gone == name:
                outcomes[offset] = Outcome("over cap", epoch, n)
    return dict(reduced.values()), outcomes
