"""The reduced set at a cut, as an index on disk: who is in it, and which pair goes into which shard.

A stream's kept pairs do not fit into memory, their index need not either: it is a temporary LMDB, filled in one pass over
the kept topic, with a second pass (snapshot.py) streaming the pairs themselves. Must not know files or formats.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import lmdb

from state.quota import Ratio
from state.reservoir import rank_of, take_share
from stream.errors import TldrError
from stream.stream_view import KeptRecord

# Address space, not disk: the file grows as it is filled, up to 1 TB of index.
MAP_BYTES = 1 << 40
WRITES_A_TRANSACTION = 50_000

_live_key = struct.Struct(">I16s").pack
_live = struct.Struct(">QqiiQHH")  # kept offset, cause, epoch, cluster, priority, p, q; then the id
_cell_key = struct.Struct(">III16sQ")  # partition, epoch, cluster, rank, kept offset
_drawn_key = struct.Struct(">I8sQ")  # partition, draw, kept offset
_place_key = struct.Struct(">IQ")  # partition, kept offset
_shard = struct.Struct(">I")
U32 = 0xFFFFFFFF


class Live(NamedTuple):
    """A pair of the reduced set. kept_offset: where its record lies; cause: the input offset, None: nobody's."""

    partition: int
    kept_offset: int
    cause: int | None
    epoch: int
    cluster: int
    priority: int
    rate: Ratio
    id: str


class Repeated(NamedTuple):
    """A record that made the same pair visible once more, for the same input offset."""

    id: str
    cause: int
    kept_offset: int


class KeptIndex:
    """An index in the folder `folder`, which is made and left to the caller to remove."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # Thrown away after use: nothing need survive a crash.
        self._env = lmdb.open(
            str(folder), map_size=MAP_BYTES, max_dbs=4, sync=False, metasync=False, lock=False, readahead=False
        )
        self._live = self._env.open_db(b"live")
        self._by_rank = self._env.open_db(b"by rank")
        self._drawn = self._env.open_db(b"drawn")
        self._places = self._env.open_db(b"places")
        self.repeated: list[Repeated] = []
        self.visible = 0  # kept records seen below the cut, removed ones included as far as they are still there

    def __enter__(self) -> KeptIndex:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._env.close()

    # -- who is in the set ---------------------------------------------------------------------------------------------

    def fill(self, records: Iterable[list[KeptRecord]], cut: Mapping[int, int]) -> None:
        """Takes in the kept topic's records, of which those caused below the cut count; the last one of a key wins."""
        for batch in records:
            with self._env.begin(write=True, db=self._live) as txn:
                for record in batch:
                    if record.cause is not None and record.cause >= cut[record.partition]:
                        continue
                    key = _live_key(record.partition, _digest(record.key))
                    if record.value is None:
                        txn.delete(key)
                        continue
                    self.visible += 1
                    cause = -1 if record.cause is None else record.cause
                    before = txn.get(key)
                    if before is not None and _live.unpack_from(before)[1] == cause:
                        self.repeated.append(Repeated(record.id, cause, record.offset))
                    p, q = record.rate
                    fixed = _live.pack(record.offset, cause, record.epoch, record.cluster, record.priority, p, q)
                    txn.put(key, fixed + record.key)

    def live(self, partition: int) -> Iterator[Live]:
        """The pairs of one partition that are in the set, in no order that means anything."""
        prefix = partition.to_bytes(4, "big")
        with self._env.begin(db=self._live) as txn, txn.cursor() as cursor:
            if cursor.set_range(prefix):
                for key, value in cursor.iternext():
                    if key[:4] != prefix:
                        return
                    offset, cause, epoch, cluster, priority, p, q = _live.unpack_from(value)
                    pair_id = value[_live.size :].decode("utf-8", "replace")
                    yield Live(
                        partition,
                        offset,
                        None if cause < 0 else cause,
                        epoch,
                        cluster,
                        priority,
                        Ratio(p, q),
                        pair_id,
                    )

    def get(self, partition: int, pair_id: str) -> Live | None:
        """One pair of the set; None where it is not in it."""
        with self._env.begin(db=self._live) as txn:
            value = txn.get(_live_key(partition, _digest(pair_id.encode())))
        if value is None:
            return None
        offset, cause, epoch, cluster, priority, p, q = _live.unpack_from(value)
        rate = Ratio(p, q)
        return Live(partition, offset, None if cause < 0 else cause, epoch, cluster, priority, rate, pair_id)

    def live_count(self, partition: int) -> int:
        """How many pairs of the partition are in the set."""
        return sum(1 for _ in _keys(self._env, self._live, partition))

    # -- which of them a snapshot takes --------------------------------------------------------------------------------

    def choose(
        self, partition: int, wanted: Ratio, sampled: Ratio, seed: int, shard_pairs: int
    ) -> tuple[dict[tuple[int, int], tuple[int, int]], list[int]]:
        """Takes of each cell its share, and draws a shard for every pair that was taken.

        Returns the (size, taken) of every cell by (epoch, cluster), and the pairs of each shard. A cell's share are the
        pairs of smallest priority ÷ rate (state.reservoir.take_share); a pair's shard is drawn by a keyed hash of its id,
        so that shards are shuffled against the stream's order and of equal size.
        """
        self._sort_by_rank(partition)
        cells: dict[tuple[int, int], tuple[int, int]] = {}
        taken = 0
        with _Writer(self._env, self._drawn) as out:
            for (epoch, cluster), members in self._cells(partition):
                # They come sorted by rank already, equal ones by offset, so a member's number is as good as its rank.
                chosen = take_share(range(len(members)), wanted, sampled, seed, epoch, partition, cluster)
                cells[epoch, cluster] = len(members), len(chosen)
                taken += len(chosen)
                for i in chosen:
                    offset, draw = members[i]
                    out.put(_drawn_key.pack(partition, draw, offset), b"")
        shards = -(-taken // shard_pairs)
        pairs = [0] * shards
        with _Writer(self._env, self._places) as out:
            for i, key in enumerate(_keys(self._env, self._drawn, partition)):
                shard = i * shards // taken
                pairs[shard] += 1
                out.put(_place_key.pack(partition, _drawn_key.unpack(key)[2]), _shard.pack(shard))
        return cells, pairs

    def places(self, partition: int) -> Iterator[tuple[int, int]]:
        """(kept offset, shard) of every pair taken from the partition, in the order of the topic."""
        with self._env.begin(db=self._places) as txn, txn.cursor() as cursor:
            if cursor.set_range(partition.to_bytes(4, "big")):
                for key, value in cursor.iternext():
                    number, offset = _place_key.unpack(key)
                    if number != partition:
                        return
                    yield offset, _shard.unpack(value)[0]

    def taken(self, partition: int) -> Iterator[tuple[Live, int]]:
        """Every pair of the set with the number of its shard, -1: not taken. In an order that the ids alone determine."""
        with self._env.begin(db=self._places) as txn:
            for pair in self.live(partition):
                shard = txn.get(_place_key.pack(partition, pair.kept_offset))
                yield pair, -1 if shard is None else _shard.unpack(shard)[0]

    def _sort_by_rank(self, partition: int) -> None:
        with _Writer(self._env, self._by_rank) as out:
            for pair in self.live(partition):
                if pair.cause is None or pair.epoch < 0 or pair.cluster < 0:
                    raise TldrError(
                        f"the record at offset {pair.kept_offset} of the kept topic's partition {partition} was not "
                        "written by a worker (it lacks a header): `tldr-stream verify` lists what else differs"
                    )
                rank = rank_of(pair.priority, pair.rate).to_bytes(16, "big")
                key = _cell_key.pack(partition, pair.epoch, pair.cluster, rank, pair.kept_offset)
                out.put(key, _draw(pair))

    def _cells(self, partition: int) -> Iterator[tuple[tuple[int, int], list[tuple[int, bytes]]]]:
        """The members of each cell, smallest rank first, as (kept offset, draw)."""
        cell: tuple[int, int] | None = None
        members: list[tuple[int, bytes]] = []
        with self._env.begin(db=self._by_rank) as txn, txn.cursor() as cursor:
            if cursor.set_range(partition.to_bytes(4, "big")):
                for key, draw in cursor.iternext():
                    number, epoch, cluster, _, offset = _cell_key.unpack(key)
                    if number != partition:
                        break
                    if cell != (epoch, cluster):
                        if cell is not None:
                            yield cell, members
                        cell, members = (epoch, cluster), []
                    members.append((offset, draw))
        if cell is not None:
            yield cell, members


class _Writer:
    """Many puts into one database, committed now and then so that no transaction outgrows memory."""

    def __init__(self, env: lmdb.Environment, db: lmdb._Database) -> None:
        self._env, self._db = env, db
        self._pending: list[tuple[bytes, bytes]] = []

    def __enter__(self) -> _Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._flush()

    def put(self, key: bytes, value: bytes) -> None:
        self._pending.append((key, value))
        if len(self._pending) >= WRITES_A_TRANSACTION:
            self._flush()

    def _flush(self) -> None:
        with self._env.begin(write=True, db=self._db) as txn, txn.cursor() as cursor:
            cursor.putmulti(sorted(self._pending))
        self._pending.clear()


def _keys(env: lmdb.Environment, db: lmdb._Database, partition: int) -> Iterator[bytes]:
    prefix = partition.to_bytes(4, "big")
    with env.begin(db=db) as txn, txn.cursor() as cursor:
        if cursor.set_range(prefix):
            for key in cursor.iternext(values=False):
                if key[:4] != prefix:
                    return
                yield key


def _digest(key: bytes) -> bytes:
    return hashlib.blake2b(key, digest_size=16).digest()


def _draw(pair: Live) -> bytes:
    """The keyed hash that draws a pair's shard: the priority is keyed with the stream's seed, and hashed it is independent
    of which pairs of a cell are taken."""
    return hashlib.blake2b(
        pair.id.encode(), digest_size=8, key=pair.priority.to_bytes(8, "big"), person=b"shard"
    ).digest()
