"""The store of one partition: the records of its changelog, materialised in LMDB.

`apply` is the only writer, for a commit and for a restore alike, so that a store cannot differ from its changelog. It
must never know Kafka, and never hold what Kafka may yet abort: callers hand over committed records only.

Databases: `records` (S, P, W, C, K and F as they are), `entries` (input offset → hash, entry: offsets grow, so that the
largest values are appended and not scattered), `known` (hash → input offset, of every K record and every entry; sorted
runs, see known_ids.py), `marks` (with a cap: the entries of a cell by rank) and `meta` (changelog position, layout).
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import lmdb
import numpy as np
from numpy.typing import NDArray

from state.changelog import (
    CELL,
    CELLS_A_RECORD,
    ENTRY,
    FORGOTTEN,
    KNOWN,
    POSITION,
    SETTINGS,
    SWITCH,
    CellCounts,
    Position,
    Record,
    Switch,
    cells_key,
    cells_of,
    decode_cells,
    decode_position,
    decode_switch,
    entry_head,
    entry_offset_bytes,
    known_columns,
    number_of,
)
from state.errors import StoreCorrupt, StoreFull, UnknownRecord
from state.known_ids import KnownIds
from state.reservoir import mark_of, rank_of
from state.settings import StreamSettings

MAP_BYTES = 1 << 30  # where a store starts; address space only, the file grows as it is filled
_LAYOUT = b"3"
_PLAIN = {SETTINGS, POSITION, SWITCH, CELL, FORGOTTEN}
# How a full disk shows itself: LMDB reports a short write as EIO, a file over its limit fails with EFBIG.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
_NOT_OURS = (lmdb.CorruptedError, lmdb.InvalidError, lmdb.PageNotFoundError, lmdb.VersionMismatchError)


def _rows(column: bytes) -> list[bytes]:
    """A column of 8-byte numbers, one by one (three times as fast as slices)."""
    rows: list[bytes] = np.frombuffer(column, "V8").tolist()
    return rows


def _marks_of(epoch: int, cluster: int) -> bytes:
    """What the marks of a cell begin with."""
    return epoch.to_bytes(4, "big") + cluster.to_bytes(4, "big")


class PartitionStore:
    """Open (or make) the store in the folder `path`. One thread at a time; one open store a folder and process.

    Raises StoreCorrupt where the folder holds something else or something damaged.
    """

    def __init__(self, path: Path | str, map_bytes: int = MAP_BYTES) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        # an older store may already be larger than the map that the caller thought of
        map_bytes = max(map_bytes, self._file_bytes())
        try:
            self._env = lmdb.open(str(self.path), map_size=map_bytes, max_dbs=8, max_readers=16)
        except _NOT_OURS as error:
            self._refuse(error)
        except lmdb.Error as error:
            self._explain(error)
        try:
            self._open_databases()
        except BaseException:
            self._env.close()
            raise

    def _open_databases(self) -> None:
        try:
            self._records = self._env.open_db(b"records")
            self._entries = self._env.open_db(b"entries")
            self._marks = self._env.open_db(b"marks")
            self._meta = self._env.open_db(b"meta")
            self._known = KnownIds(self._env)
            self._read = self._env.begin()
            layout = self._read.get(b"layout", db=self._meta)
            if layout not in (None, _LAYOUT):
                raise StoreCorrupt(
                    f"the store {self.path} has layout {layout!r}, this version knows {_LAYOUT!r}; "
                    "remove the folder: it is rebuilt from the changelog"
                )
            settings = self.settings()
        except _NOT_OURS as error:
            self._refuse(error)
        except lmdb.Error as error:
            self._explain(error)
        self._capped = settings is not None and settings.cell_cap is not None

    # -- writing -------------------------------------------------------------------------------------------------------

    def apply(self, records: Iterable[Record], changelog_position: int) -> None:
        """Apply committed changelog records in their order, as one durable transaction: all of them or none.

        changelog_position  the offset in the changelog up to which (exclusively) they reach.
        A restore goes fastest with 10,000 records or more a call. Applying records again, from any earlier position
        up to the end, ends in the same store. A full map grows and the transaction is tried again.
        Raises StoreFull where the disk is full (the store then is as it was), UnknownRecord.
        """
        records = list(records)
        self._read.abort()
        try:
            while not self._try(records, changelog_position):
                self._env.set_mapsize(2 * self._env.info()["map_size"])
        except _NOT_OURS as error:
            self._refuse(error)
        except lmdb.Error as error:
            self._explain(error)
        finally:
            self._read = self._env.begin()

    def _try(self, records: list[Record], changelog_position: int) -> bool:
        """One write transaction, opened, filled and committed here; False: the map is too small for it."""
        try:
            with self._env.begin(write=True) as txn:
                self._write(txn, records)
                txn.put(b"position", changelog_position.to_bytes(8, "big"), db=self._meta)
                txn.put(b"layout", _LAYOUT, db=self._meta)
        except lmdb.MapFullError:
            return False
        return True

    def _write(self, txn: lmdb.Transaction[bytes], records: list[Record]) -> None:
        """Gather the effects of all records first, so that each database is written once and in the order of its keys.

        An E record stands before the K record of its transaction: `known` then still tells where the id's entry lies
        that is replaced or removed.
        """
        plain: dict[bytes, bytes | None] = {}
        entries: dict[bytes, bytes | None] = {}  # input offset → hash and entry
        known: dict[bytes, bytes] = {}
        loose: list[tuple[bytes, bytes]] = []  # (hash, offset): no longer known, unless something else holds them
        committed = self._offsets_of([key[1:] for key, _ in records if key[:1] == ENTRY])
        for key, value in records:
            kind = key[:1]
            if kind == ENTRY:
                known_hash = key[1:]
                old = known.get(known_hash) or committed.get(known_hash)
                if value is None:
                    if old is not None:
                        entries[old] = None
                        loose.append((known_hash, old))
                    continue
                offset = entry_offset_bytes(value)
                if old is not None and old != offset:
                    entries[old] = None
                entries[offset] = known_hash + value
                known[known_hash] = offset
            elif kind == KNOWN:
                counted = value if value is not None else plain.get(key) or txn.get(key, db=self._records)
                if counted is not None:
                    hashes, offsets = known_columns(key, counted)
                    ids = zip(_rows(hashes), _rows(offsets), strict=True)
                    if value is None:
                        loose.extend(ids)
                    else:
                        known.update(ids)
                plain[key] = value
            elif kind in _PLAIN:
                plain[key] = value
            else:
                raise UnknownRecord(
                    f"a changelog record with the key {key!r} is of no known kind; it comes from a newer version of "
                    "tldr-stream or by something else: upgrade this worker, or look who else writes to the topic"
                )
        self._write_plain(txn, plain)
        self._write_entries(txn, entries)
        gone = self._no_longer_held(txn, loose, known)
        for known_hash in gone:
            known.pop(known_hash, None)
        self._known.put(txn, known, gone)

    def _offsets_of(self, known_hashes: list[bytes]) -> dict[bytes, bytes]:
        """The committed offsets of those of the ids that are known."""
        if not known_hashes:
            return {}
        with self._env.begin(buffers=True) as view:
            found = self._known.offsets_of(view, np.frombuffer(b"".join(known_hashes), ">u8").astype(np.uint64))
        return {known.to_bytes(8, "big"): offset.to_bytes(8, "big") for known, offset in found.items()}

    def _write_plain(self, txn: lmdb.Transaction[bytes], plain: dict[bytes, bytes | None]) -> None:
        settings = plain.get(SETTINGS)
        if settings is not None:
            self._capped = StreamSettings.from_json(settings).cell_cap is not None
        for key in sorted(plain):
            value = plain[key]
            if value is None:
                txn.delete(key, db=self._records)
            else:
                txn.put(key, value, db=self._records)

    def _write_entries(self, txn: lmdb.Transaction[bytes], entries: dict[bytes, bytes | None]) -> None:
        added: list[tuple[bytes, bytes]] = []
        for offset in sorted(entries):
            value = entries[offset]
            if value is not None:
                added.append((offset, value))
                continue
            old = txn.pop(offset, db=self._entries)
            if old is not None and self._capped:
                txn.delete(self._mark_key(old), db=self._marks)
        if not added:
            return
        with txn.cursor(self._entries) as cursor:
            at_the_end = not cursor.last() or cursor.key() < added[0][0]
            cursor.putmulti(added, append=at_the_end)
        if self._capped:
            with txn.cursor(self._marks) as cursor:
                cursor.putmulti(sorted((self._mark_key(value), b"") for _, value in added))

    @staticmethod
    def _mark_key(stored: bytes) -> bytes:
        head = entry_head(stored[8:])
        mark = mark_of(rank_of(head.priority, head.rate), head.offset)
        return _marks_of(head.epoch, head.cluster) + mark.to_bytes(24, "big")

    def _no_longer_held(
        self, txn: lmdb.Transaction[bytes], loose: list[tuple[bytes, bytes]], known: dict[bytes, bytes]
    ) -> list[bytes]:
        """Those of the loose ids that neither a K record nor an entry holds any more; `known`: ids of this transaction.

        K records leave oldest first, so that the oldest one there is tells whether an offset still lies in one.
        """
        if not loose:
            return []
        with txn.cursor(self._records) as cursor:
            held_from = cursor.key()[1:] if cursor.set_range(KNOWN) and cursor.key()[:1] == KNOWN else None
        last = dict(loose)
        now = self._offsets_of(list(last)) | known
        return [
            known_hash
            for known_hash, offset in last.items()
            if (held_from is None or offset < held_from)
            and now.get(known_hash) == offset
            and txn.get(offset, db=self._entries) is None
        ]

    # -- reading -------------------------------------------------------------------------------------------------------

    @property
    def changelog_position(self) -> int | None:
        """The changelog offset from which a restore goes on; None: nothing was ever applied."""
        value = self._read.get(b"position", db=self._meta)
        return None if value is None else int.from_bytes(value, "big")

    def settings(self) -> StreamSettings | None:
        """The settings of the stream; None: a new store."""
        value = self._read.get(SETTINGS, db=self._records)
        return None if value is None else StreamSettings.from_json(value)

    def position(self) -> Position | None:
        """Where the partition stands in its input; None: a new store."""
        value = self._read.get(POSITION, db=self._records)
        return None if value is None else decode_position(value)

    def switches(self) -> list[Switch]:
        """The bundle of every epoch, in order."""
        return [decode_switch(value) for _, value in self._kind(SWITCH)]

    def cell(self, epoch: int, cluster: int) -> CellCounts | None:
        """The counters of one cell; None: nothing was ever counted in it."""
        value = self._read.get(cells_key(epoch, cluster), db=self._records)
        near = [] if value is None else decode_cells(value).tolist()
        counts = near[cluster % CELLS_A_RECORD : cluster % CELLS_A_RECORD + 1]
        return CellCounts(*counts[0]) if counts and counts[0][0] else None

    def cells(self) -> Iterator[tuple[int, int, CellCounts]]:
        """(epoch, cluster, counters) of every cell, in that order."""
        for key, value in self._kind(CELL):
            yield from cells_of(key, value)

    def cells_of_epoch(self, epoch: int) -> NDArray[np.int64]:
        """(n, 4) counted, entered, evicted, size of every cell of an epoch, by cluster."""
        records = [(number_of(key) & 0xFFFFFFFF, value) for key, value in self._kind(cells_key(epoch, 0)[:5])]
        counts = np.zeros((records[-1][0] + CELLS_A_RECORD if records else 0, 4), np.int64)
        for first, value in records:
            near = decode_cells(value)
            counts[first : first + len(near)] = near
        return counts

    def known_offset(self, known_hash: int) -> int | None:
        """The input offset at which the id was counted, if a K record or an entry still tells."""
        return self.known_offsets([known_hash]).get(known_hash)

    def known_offsets(self, known_hashes: Sequence[int] | NDArray[np.uint64]) -> dict[int, int]:
        """The input offsets at which those of the ids were counted that are known. Much faster than one by one."""
        with self._env.begin(buffers=True) as view:
            return self._known.offsets_of(view, np.asarray(known_hashes, np.uint64))

    def known_count(self) -> int:
        """How many ids are known."""
        return self._known.count(self._read)

    def entry_at(self, offset: int) -> tuple[int, bytes] | None:
        """(known hash, encoded entry) of the pair from this input offset, if it is in the reservoir."""
        stored = self._read.get(offset.to_bytes(8, "big"), db=self._entries)
        return None if stored is None else (int.from_bytes(stored[:8], "big"), stored[8:])

    def entries(self) -> Iterator[tuple[int, bytes]]:
        """(known hash, encoded entry) of all pairs in the reservoir, by input offset."""
        with self._read.cursor(self._entries) as cursor:
            for stored in cursor.iternext(keys=False, values=True):
                yield int.from_bytes(stored[:8], "big"), stored[8:]

    def entry_count(self) -> int:
        """How many pairs are in the reservoir."""
        return int(self._read.stat(self._entries)["entries"])

    def marks(self, epoch: int, cluster: int) -> list[int]:
        """The marks (reservoir.mark_of) of a cell in ascending order; kept for streams with a cap only."""
        prefix = _marks_of(epoch, cluster)
        marks: list[int] = []
        with self._read.cursor(self._marks) as cursor:
            if cursor.set_range(prefix):
                for key in cursor.iternext(keys=True, values=False):
                    if key[:8] != prefix:
                        break
                    marks.append(int.from_bytes(key[8:], "big"))
        return marks

    def forgotten(self) -> Iterator[int]:
        """The hashes of all ids that were taken down."""
        for key, _ in self._kind(FORGOTTEN):
            yield number_of(key)

    def known_firsts(self) -> Iterator[int]:
        """The first offset of every K record, oldest first."""
        with self._read.cursor(self._records) as cursor:
            if cursor.set_range(KNOWN):
                for key in cursor.iternext(keys=True, values=False):
                    if key[:1] != KNOWN:
                        return
                    yield number_of(key)

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Every changelog record that the store holds: equal stores have equal items."""
        with self._read.cursor(self._records) as cursor:
            yield from cursor.iternext(keys=True, values=True)
        for known_hash, value in self.entries():
            yield ENTRY + known_hash.to_bytes(8, "big"), value

    def _kind(self, kind: bytes) -> Iterator[tuple[bytes, bytes]]:
        """The records whose keys begin so."""
        with self._read.cursor(self._records) as cursor:
            if cursor.set_range(kind):
                for key, value in cursor.iternext(keys=True, values=True):
                    if not key.startswith(kind):
                        return
                    yield key, value

    # -- the rest ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Let go of the files. What was applied is durable already."""
        self._read.abort()
        self._env.close()

    def __enter__(self) -> PartitionStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _file_bytes(self) -> int:
        file = self.path / "data.mdb"
        return file.stat().st_size if file.exists() else 0

    def _refuse(self, error: Exception) -> NoReturn:
        raise StoreCorrupt(
            f"the store {self.path} cannot be read ({error}); remove the folder: it is rebuilt from the changelog"
        ) from error

    def _explain(self, error: lmdb.Error) -> NoReturn:
        """A full disk as the one error that says so; anything else as it came."""
        if error.code not in _FULL:
            raise error
        raise StoreFull(
            f"the store {self.path} cannot grow ({error}); make room on its disk and start the worker again: "
            "nothing is lost, it goes on from the last commit"
        ) from error
