"""The store of one partition: the records of its changelog, materialised in LMDB.

`apply` and `apply_beside` write the same, for a commit and for a restore, and nothing else writes records, so that a store
cannot differ from its changelog. It must never know Kafka, and never hold what Kafka may yet abort: callers hand over
committed records only.

Databases: `records` (S, P, W, C, K and F as they are), `entries` (input offset → hash, entry: offsets grow, so that the
largest values are appended and not scattered), `known` (hash → input offset, of every K record and every entry; sorted
runs, see known_ids.py), `marks` (with a cap: the entries of a cell by rank), `groups` (with a cap, after a switch: epoch and
input offset → cluster, of entries from older epochs) and `meta` (changelog position, layout, how far an epoch is grouped).

`groups` and its marks are computed from the entries beside the running stream (regroup.py), for the present epoch and for
the one that a switch is being prepared for. They claim nothing: they are used once a committed switch says so.
"""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, NoReturn

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
    EntryHead,
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
from state.errors import RoomWanted, StoreClosed, StoreCorrupt, StoreFull, UnknownRecord
from state.known_ids import KnownIds, SeenIds
from state.reservoir import mark_of, rank_of
from state.settings import StreamSettings

MAP_BYTES = 1 << 30  # where a store starts; address space only, the file grows as it is filled
_LAYOUT = b"3"
_GROUPING = b"grouping"
_AFTER_SWITCHES = bytes([SWITCH[0] + 1])
_PLAIN = {SETTINGS, POSITION, SWITCH, CELL, FORGOTTEN}
# How a full disk shows itself: LMDB reports a short write as EIO, a file over its limit fails with EFBIG.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
_NOT_OURS = (lmdb.CorruptedError, lmdb.InvalidError, lmdb.PageNotFoundError, lmdb.VersionMismatchError)


# Rows that one step removes: some 10 ms, for which a commit may have to wait.
_SWEPT_AT_ONCE = 5000


class Grouping(NamedTuple):
    """Entries of older epochs from before the input offset `through` are grouped by the clusters of this bundle."""

    bundle: str
    through: int


class Ungrouped(NamedTuple):
    """The next entries to group: (input offset, entry) each. They, and what needs none, lie in [start, through)."""

    rows: list[tuple[bytes, bytes]]
    start: int
    through: int
    last: bool  # whether none is left behind them


class Tail(NamedTuple):
    """Entries of older epochs from [start, until) that are grouped in memory, until that is done beside the stream.

    marks  by cluster; cluster_of  by input offset
    """

    start: int
    until: int
    marks: dict[int, list[int]]
    cluster_of: dict[int, int]


def _rows(column: bytes) -> list[bytes]:
    """A column of 8-byte numbers, one by one (three times as fast as slices)."""
    rows: list[bytes] = np.frombuffer(column, "V8").tolist()
    return rows


def _numbers(column: bytes) -> NDArray[np.uint64]:
    return np.frombuffer(column, ">u8").astype(np.uint64)


def _marks_of(epoch: int, cluster: int) -> bytes:
    """What the marks of a cell begin with."""
    return epoch.to_bytes(4, "big") + cluster.to_bytes(4, "big")


def _mark_key(head: EntryHead, epoch: int, cluster: int) -> bytes:
    mark = mark_of(rank_of(head.priority, head.rate), head.offset)
    return _marks_of(epoch, cluster) + mark.to_bytes(24, "big")


def _group_key(epoch: int, offset: bytes) -> bytes:
    return epoch.to_bytes(4, "big") + offset


def _grouping_key(epoch: int) -> bytes:
    return _GROUPING + epoch.to_bytes(4, "big")


def _grouping_in(txn: lmdb.Transaction[bytes], meta: lmdb._Database, epoch: int) -> Grouping | None:
    value = txn.get(_grouping_key(epoch), db=meta)
    return None if value is None else Grouping(**json.loads(value))


def _encoded(grouping: Grouping) -> bytes:
    return json.dumps(grouping._asdict()).encode()


class PartitionStore:
    """Open (or make) the store in the folder `path`. One open store a folder and process.

    One thread at a time, but for what is said to work beside it: that has transactions of its own, and a lock keeps them from
    those of `apply`.

    Raises StoreCorrupt where the folder holds something else or something damaged.
    """

    def __init__(self, path: Path | str, map_bytes: int = MAP_BYTES) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        # an older store may already be larger than the map that the caller thought of
        map_bytes = max(map_bytes, self._file_bytes())
        self._writing = threading.Lock()
        self._closed = False
        self.room_wanted = False  # a step beside found the map full, which only its user may enlarge
        self._behind = False  # a step beside has written since our own view began
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
            self._groups = self._env.open_db(b"groups")
            self._meta = self._env.open_db(b"meta")
            self._known = KnownIds(self._env)
            self._begin_view()
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
        with self._writing:
            self._end_view()
            try:
                while not self._try(records, changelog_position):
                    self._grow()
            except _NOT_OURS as error:
                self._refuse(error)
            except lmdb.Error as error:
                self._explain(error)
            finally:
                self._begin_view()

    def apply_beside(self, records: Iterable[Record], changelog_position: int) -> bool:
        """`apply` from any thread, while the store's user reads on: he sees it once he calls `refresh`.

        False: nothing happened, since the map is too small for it, which only `apply` can enlarge. Raises as `apply`, and
        StoreClosed.
        """
        records = list(records)
        try:
            with self._beside() as txn:
                self._put_all(txn, records, changelog_position)
        except RoomWanted:
            return False
        return True

    def _begin_view(self) -> None:
        self._behind = False
        self._read = self._env.begin()
        self._buffers: lmdb.Transaction[memoryview] = self._env.begin(buffers=True)
        self._seen: SeenIds | None = None  # the known ids in there, once somebody has asked

    def _end_view(self) -> None:
        self._seen = None
        self._buffers.abort()
        self._read.abort()

    def _grow(self) -> None:
        self._env.set_mapsize(2 * self._env.info()["map_size"])
        self.room_wanted = False

    def _try(self, records: list[Record], changelog_position: int) -> bool:
        """One write transaction, opened, filled and committed here; False: the map is too small for it."""
        try:
            with self._env.begin(write=True) as txn:
                self._put_all(txn, records, changelog_position)
        except lmdb.MapFullError:
            return False
        return True

    def _put_all(self, txn: lmdb.Transaction[bytes], records: list[Record], changelog_position: int) -> None:
        self._write(txn, records)
        txn.put(b"position", changelog_position.to_bytes(8, "big"), db=self._meta)
        txn.put(b"layout", _LAYOUT, db=self._meta)

    def _write(self, txn: lmdb.Transaction[bytes], records: list[Record]) -> None:
        """Gather the effects of all records first, so that each database is written once and in the order of its keys.

        An E record stands before the K record of its transaction: `known` then still tells where the id's entry lies
        that is replaced or removed.
        """
        plain: dict[bytes, bytes | None] = {}
        entries: dict[bytes, bytes | None] = {}  # input offset → hash and entry
        known: dict[bytes, bytes] = {}
        # What K records say, as columns, until somebody asks for one of the ids: almost never but in a restore.
        columns: list[tuple[bytes, bytes]] = []

        def look_into_columns() -> None:
            for hashes, offsets in columns:
                known.update(zip(_rows(hashes), _rows(offsets), strict=True))
            columns.clear()

        loose: list[tuple[bytes, bytes]] = []  # (hash, offset): no longer known, unless something else holds them
        committed = self._offsets_of([key[1:] for key, _ in records if key[:1] == ENTRY])
        for key, value in records:
            kind = key[:1]
            if kind == ENTRY:
                if columns:
                    look_into_columns()
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
                    if value is None:
                        loose.extend(zip(_rows(hashes), _rows(offsets), strict=True))
                    else:
                        columns.append((hashes, offsets))
                plain[key] = value
            elif kind in _PLAIN:
                plain[key] = value
            else:
                raise UnknownRecord(
                    f"a changelog record with the key {key!r} is of no known kind; it comes from a newer version of "
                    "tldr-stream or by something else: upgrade this worker, or look who else writes to the topic"
                )
        self._write_plain(txn, plain)
        self._write_entries(txn, entries, self._epoch_in(txn))
        if loose:
            look_into_columns()
        gone = self._no_longer_held(txn, loose, known)
        for known_hash in gone:
            known.pop(known_hash, None)
        columns = [*reversed(columns), (b"".join(known), b"".join(known.values()))]
        self._known.put(
            txn, [(_numbers(hashes), _numbers(offsets)) for hashes, offsets in columns], _numbers(b"".join(gone))
        )

    def _offsets_of(self, known_hashes: list[bytes]) -> dict[bytes, bytes]:
        """The committed offsets of those of the ids that are known."""
        if not known_hashes:
            return {}
        with self._env.begin(buffers=True) as view:
            found = self._known.seen_in(view).offsets_of(_numbers(b"".join(known_hashes)))
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

    def _epoch_in(self, txn: lmdb.Transaction[bytes]) -> int:
        """The epoch of the last switch; -1: none yet."""
        with txn.cursor(self._records) as cursor:
            found = cursor.prev() if cursor.set_range(_AFTER_SWITCHES) else cursor.last()
            return number_of(cursor.key()) if found and cursor.key()[:1] == SWITCH else -1

    def _write_entries(self, txn: lmdb.Transaction[bytes], entries: dict[bytes, bytes | None], epoch: int) -> None:
        added: list[tuple[bytes, bytes]] = []
        for offset in sorted(entries):
            value = entries[offset]
            if value is not None:
                added.append((offset, value))
                continue
            old = txn.pop(offset, db=self._entries)
            if old is not None and self._capped:
                self._remove_marks(txn, offset, old, epoch)
        if not added:
            return
        with txn.cursor(self._entries) as cursor:
            at_the_end = not cursor.last() or cursor.key() < added[0][0]
            cursor.putmulti(added, append=at_the_end)
        if self._capped:
            heads = [entry_head(value[8:]) for _, value in added]
            # An entry of an older epoch, which only a restore adds, is grouped by the present one's clusters later.
            marks = [_mark_key(head, head.epoch, head.cluster) for head in heads if head.epoch == epoch]
            with txn.cursor(self._marks) as cursor:
                cursor.putmulti(sorted((mark, b"") for mark in marks))

    def _remove_marks(self, txn: lmdb.Transaction[bytes], offset: bytes, stored: bytes, epoch: int) -> None:
        head = entry_head(stored[8:])
        txn.delete(_mark_key(head, head.epoch, head.cluster), db=self._marks)
        if not txn.stat(self._groups)["entries"]:
            return
        for grouped in (epoch, epoch + 1):
            cluster = txn.pop(_group_key(grouped, offset), db=self._groups)
            if cluster is not None:
                txn.delete(_mark_key(head, grouped, int.from_bytes(cluster, "big")), db=self._marks)

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

    # -- grouping: beside the running stream, from any thread ------------------------------------------------------------

    def begin_grouping(self, epoch: int, bundle: str) -> bool:
        """Makes ready to group entries by this bundle for an epoch; False: call again, what another bundle left is going.

        Raises RoomWanted, StoreFull, StoreClosed.
        """
        with self._beside() as txn:
            found = _grouping_in(txn, self._meta, epoch)
            if found is not None and found.bundle == bundle:
                return True
            txn.delete(_grouping_key(epoch), db=self._meta)
            with txn.cursor(self._groups) as cursor:
                there = cursor.set_range(epoch.to_bytes(4, "big"))
                for _ in range(_SWEPT_AT_ONCE):
                    if not there or cursor.key()[:4] != epoch.to_bytes(4, "big"):
                        txn.put(_grouping_key(epoch), _encoded(Grouping(bundle, 0)), db=self._meta)
                        return True
                    stored = txn.get(cursor.key()[4:], db=self._entries)
                    if stored is not None:
                        mark = _mark_key(entry_head(stored[8:]), epoch, int.from_bytes(cursor.value(), "big"))
                        txn.delete(mark, db=self._marks)
                    there = cursor.delete()
            return False

    def ungrouped(self, epoch: int, until: int | None, count: int) -> Ungrouped:
        """The next `count` entries at most of epochs before this one, from before the input offset `until`.

        until  None: up to what is committed now. Raises StoreClosed.
        """
        with self._beside(write=False) as txn:
            position = txn.get(POSITION, db=self._records)
            if until is None:
                until = decode_position(position).next_offset if position is not None else 0
            grouping = _grouping_in(txn, self._meta, epoch)
            start = grouping.through if grouping is not None else 0
            rows: list[tuple[bytes, bytes]] = []
            with txn.cursor(self._entries) as cursor:
                there = cursor.set_range(start.to_bytes(8, "big"))
                while there and int.from_bytes(cursor.key(), "big") < until:
                    if len(rows) == count:
                        return Ungrouped(rows, start, int.from_bytes(rows[-1][0], "big") + 1, False)
                    entry = cursor.value()[8:]
                    if entry_head(entry).epoch < epoch:
                        rows.append((cursor.key(), entry))
                    there = cursor.next()
            return Ungrouped(rows, start, max(start, until), True)

    def group(self, epoch: int, bundle: str, found: Ungrouped, clusters: Sequence[int]) -> bool:
        """Notes the clusters of these entries, as far as they are still there; False: nothing was noted, look again.

        Raises RoomWanted, StoreFull, StoreClosed.
        """
        with self._beside() as txn:
            if _grouping_in(txn, self._meta, epoch) != Grouping(bundle, found.start):
                return False
            groups, marks = [], []
            for (offset, entry), cluster in zip(found.rows, clusters, strict=True):
                if txn.get(offset, db=self._entries) is not None:
                    groups.append((_group_key(epoch, offset), cluster.to_bytes(4, "big")))
                    marks.append((_mark_key(entry_head(entry), epoch, cluster), b""))
            with txn.cursor(self._groups) as cursor:
                cursor.putmulti(groups)
            with txn.cursor(self._marks) as cursor:
                cursor.putmulti(sorted(marks))
            txn.put(_grouping_key(epoch), _encoded(Grouping(bundle, found.through)), db=self._meta)
        return True

    def sweep(self) -> bool:
        """Removes some of what earlier epochs were grouped by; False: nothing is left. Raises RoomWanted, StoreClosed."""
        with self._beside(write=False) as txn:
            first = max(0, self._epoch_in(txn)).to_bytes(4, "big")
            with txn.cursor(self._marks) as marks, txn.cursor(self._groups) as groups:
                if not any(cursor.first() and cursor.key()[:4] < first for cursor in (marks, groups)):
                    return False
        with self._beside() as txn:
            left = _SWEPT_AT_ONCE
            for database in (self._groups, self._marks):
                with txn.cursor(database) as cursor:
                    there = cursor.first()
                    while there and left and cursor.key()[:4] < first:
                        there, left = cursor.delete(), left - 1
            with txn.cursor(self._meta) as cursor:
                there = cursor.set_range(_GROUPING)
                while there and cursor.key()[: len(_GROUPING)] == _GROUPING and cursor.key()[len(_GROUPING) :] < first:
                    there = cursor.delete()
        return True

    @contextmanager
    def _beside(self, *, write: bool = True) -> Iterator[lmdb.Transaction[bytes]]:
        """A transaction of its own, beside whoever uses the store. Raises RoomWanted where the map is too small for it."""
        with self._writing:
            if self._closed:
                raise StoreClosed(f"the store {self.path} is closed")
            try:
                with self._env.begin(write=write) as txn:
                    yield txn
                self._behind |= write
            except lmdb.MapFullError as error:
                self.room_wanted = True
                raise RoomWanted(f"the map of the store {self.path} is full") from error
            except _NOT_OURS as error:
                self._refuse(error)
            except lmdb.Error as error:
                self._explain(error)

    def make_room(self) -> None:
        """Lets go of the pages that steps beside have replaced, and enlarges the map if one has asked for it.

        By the store's user, with nobody reading. A view that outlives many such steps keeps all that they replace: the file of
        a million entries grew by gigabytes while they were grouped.
        """
        if self.room_wanted:
            with self._writing:
                self._end_view()
                try:
                    self._grow()
                finally:
                    self._begin_view()
        elif self._behind:
            self.refresh()

    def refresh(self) -> None:
        """Sees from now on what was grouped beside."""
        self._end_view()
        self._begin_view()

    def grouped(self, epoch: int, bundle: str, until: int) -> bool:
        """Whether the marks of an epoch are all there: of entries from before the input offset `until`."""
        if not self._capped or epoch <= 0:
            return True
        with self._beside(write=False) as txn:
            found = _grouping_in(txn, self._meta, epoch)
        return found is not None and found.bundle == bundle and found.through >= until

    def group_of(self, epoch: int, offset: int) -> int | None:
        """The cluster of an entry of an older epoch in this one."""
        cluster = self._read.get(_group_key(epoch, offset.to_bytes(8, "big")), db=self._groups)
        return None if cluster is None else int.from_bytes(cluster, "big")

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
        if self._seen is None:
            self._seen = self._known.seen_in(self._buffers)
        return self._seen.offsets_of(np.asarray(known_hashes, np.uint64))

    def known_count(self) -> int:
        """How many ids are known."""
        return self._known.count()

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
        """The marks (reservoir.mark_of) of a cell in ascending order; kept for streams with a cap only.

        Of the present epoch, and of one that is grouped: those of every entry that its clusters have there.
        """
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
        """Let go of the files. What was applied is durable already. Waits for the step beside."""
        with self._writing:
            self._closed = True
            self._end_view()
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
