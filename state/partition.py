"""The live state of one partition: its committed store plus the effects of the open transaction.

`decide` says what is right for one pair, `decide_all` the same for a batch: it is the hot path of the whole service, so it
works on columns, and leaves to the former what is rare. Nothing here reaches the store before `write` or `commit`, which the
caller calls when Kafka has committed; until `commit` the next transaction is decided on top of it. `abort` forgets both. It
must never know a Kafka client, and it reads no clock.

A pair is counted in the cell (epoch, cluster) of its moment: entry, record and counters say so for ever. With a cap, pairs
compete in the cells of the present epoch, where each entry has the cluster that the present bundle gives its vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from functools import partial
from heapq import heapify
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from state.changelog import (
    CELLS_A_RECORD,
    ENTRY,
    POSITION,
    SETTINGS,
    EntryHead,
    Position,
    Record,
    Switch,
    Totals,
    cells_key,
    decode_entry,
    encode_cells,
    encode_entries,
    encode_entry,
    encode_forgotten,
    encode_known,
    encode_position,
    encode_switch,
    entry_head,
    forgotten_key,
    known_key,
    switch_key,
)
from state.errors import SettingsDiffer
from state.partition_store import PartitionStore, Tail
from state.priority import hash_id, id_key
from state.quota import kept_in_blocks
from state.reservoir import OFFSET_MASK, heap_of, mark_of, offer, rank_of
from state.settings import StreamSettings, refuse_difference

# The heaps of capped cells are dropped, least recently touched first, when they hold more numbers than this (about 60 bytes
# each).
LIVE_NUMBERS_MAX = 2_000_000
_NUMBERS_OF_A_HEAP = 8
# In the place of the offset at which an id was counted: it never was, and it was taken down.
NOT_KNOWN, TAKEN_DOWN = -1, -2


class Fate(IntEnum):
    """What became of one input offset."""

    KEPT = 0
    OVER_QUOTA = 1
    BELOW_GATE = 2
    OVER_CAP = 3
    DUPLICATE = 4
    FORGOTTEN = 5
    DEAD = 6


# Members of an IntEnum are slow to look up on the class.
KEPT, OVER_QUOTA, BELOW_GATE, OVER_CAP, DUPLICATE, FORGOTTEN, DEAD = Fate


class Decision(NamedTuple):
    """What was decided about one input offset.

    position      in its cell, -1: not counted
    priority      0 where the id was not looked at (dead letters)
    duplicate_of  the input offset at which the id was counted, -1: no duplicate
    removed       ids that left the reduced set by this: evicted or taken down
    """

    fate: Fate
    position: int
    priority: int
    duplicate_of: int
    removed: tuple[str, ...]


# Made once a record: half the time of Decision(…), and a type checker still sees the five fields.
_decision = cast("Callable[[tuple[Fate, int, int, int, tuple[str, ...]]], Decision]", partial(tuple.__new__, Decision))
_DEAD_LETTER = Decision(DEAD, -1, 0, -1, ())


class Kind(IntEnum):
    """What a row of a batch is. UNSEEN: an image that cannot be decoded, a dead letter unless its id is known by then."""

    PAIR = 0
    KNOWN = 1
    UNSEEN = 2
    DEAD = 3
    TAKEDOWN = 4


class Rows(NamedTuple):
    """A batch of one partition, in the order of its offsets; n rows, m of which are pairs whose image was looked at.

    kinds     (n,) Kind: KNOWN are those of which `is_known` said so
    names     (n,) the ids as UTF-8
    firsts    (n,) what `look_up` said before the batch, of all but dead letters
    known, priorities  (n,) the halves of the ids' hashes
    clusters, itms, vectors  (m,), (m,), (m, tokens)
    """

    offsets: NDArray[np.int64]
    names: Sequence[bytes]
    kinds: NDArray[np.uint8]
    firsts: NDArray[np.int64]
    known: NDArray[np.uint64]
    priorities: NDArray[np.uint64]
    clusters: NDArray[np.int32]
    itms: NDArray[np.float32]
    vectors: NDArray[np.uint16]


class Decisions(NamedTuple):
    """What was decided about the rows, a column for each field of Decision. removed  (row, id) each."""

    fates: NDArray[np.uint8]
    positions: NDArray[np.int64]
    duplicate_of: NDArray[np.int64]
    removed: list[tuple[int, str]]


class _Layer:
    """The effects of one transaction, in memory, on top of the store or of an earlier layer."""

    __slots__ = (
        "changes",
        "counted",
        "entries",
        "gone",
        "hash_at",
        "position",
        "switched",
        "taken_down",
        "touched_heaps",
        "written",
    )

    def __init__(self) -> None:
        self.counted: dict[int, int] = {}  # known hash → offset: ids that this transaction counted
        self.entries: dict[int, bytes | None] = {}  # known hash → entry, None: it left
        self.hash_at: dict[int, int] = {}  # offset → known hash: entries that this transaction added and still has
        self.gone: set[int] = set()  # offsets of entries below this layer that left
        self.taken_down: dict[int, int] = {}  # known hash → offset of the takedown
        self.switched: list[Switch] = []
        self.touched_heaps: set[tuple[int, int]] = set()
        self.changes: list[Record] = []  # of a sealed transaction,
        self.position: Position | None = None  # and where it leads
        self.written = False  # to the store, though what is read of that does not show it yet


class _Cells:
    """The cells of one epoch, live, by cluster: their counters and the blocks that they are in."""

    __slots__ = ("block", "counts", "kept", "sealed", "touched")

    def __init__(self, counts: NDArray[np.int64], q: int) -> None:
        self.counts = counts  # (clusters, 4) counted, entered, evicted, size
        self.block = np.full(len(counts), -1)  # (clusters,) the block whose positions `kept` has
        self.kept = np.zeros((len(counts), q), bool)
        self.touched = np.zeros(len(counts) // CELLS_A_RECORD, bool)  # by the open transaction; a flag a record
        self.sealed = self.touched.copy()  # the same by the sealed one

    def reach(self, cluster: int) -> None:
        """Makes room for the cells up to this one."""
        more = (cluster // CELLS_A_RECORD + 1) * CELLS_A_RECORD - len(self.counts)
        if more > 0:
            self.counts = np.concatenate([self.counts, np.zeros((more, 4), np.int64)])
            self.block = np.concatenate([self.block, np.full(more, -1)])
            self.kept = np.concatenate([self.kept, np.zeros((more, self.kept.shape[1]), bool)])
            fresh = np.zeros(more // CELLS_A_RECORD, bool)
            self.touched = np.concatenate([self.touched, fresh])
            self.sealed = np.concatenate([self.sealed, fresh])


class Partition:
    """The live state of partition number `partition` of a stream.

    Raises SettingsDiffer where the store belongs to a stream with other settings.

    Every input offset goes, in order, through exactly one of `decide`, `duplicate`, `dead`, `take_down` and `decide_all`. Then
    `changes` seals the open transaction and gives its changelog records, and `commit` or `abort` ends it. Between `changes` and
    `commit` the next transaction may go on, and `write` be called beside it; there is one sealed transaction at a time.
    """

    next_offset: int | None  # the next input offset; None: nothing read yet
    epoch: int  # -1 until the first `adopt`
    committed: Position | None  # what the store holds; None: nothing yet

    def __init__(
        self, store: PartitionStore, settings: StreamSettings, partition: int, live_numbers_max: int = LIVE_NUMBERS_MAX
    ) -> None:
        stored = store.settings()
        if stored is not None:
            refuse_difference(stored, settings)
        self.store = store
        self.settings = settings
        self.partition = partition
        self._new_stream = stored is None
        self._live_numbers_max = live_numbers_max
        self._key = id_key(settings.seed)
        self._ratio, (self._p, self._q) = settings.ratio, settings.ratio
        self._cap, self._gate = settings.cell_cap, settings.gate
        # an unbounded window reaches back beyond offset 0
        self._window = settings.dedupe_window if settings.dedupe_window is not None else 1 << 64
        self._cells: dict[int, _Cells] = {}  # by epoch
        self._heaps: dict[tuple[int, int], list[int]] = {}  # of capped cells, by epoch and cluster
        self._live_numbers = 0
        self._retired: list[list[int]] = []  # heaps of epochs that are over
        self._tail: tuple[int, Tail] | None = None  # with its epoch
        self._grouped_in = -1  # the epoch of which it is known that all entries are grouped
        self._forgotten = set(store.forgotten())
        self._begin()

    def _begin(self) -> None:
        """An open transaction without effects, on top of what the store holds."""
        self._sealed: _Layer | None
        position = self.store.position()
        self.committed = position
        self.next_offset = position.next_offset if position else None
        switches = self.store.switches()
        self._switch = switches[-1] if switches else None
        self.epoch = self._switch.epoch if self._switch else -1
        if self._tail is not None and self._tail[0] != self.epoch:
            self._tail = None
        if self._grouped_in != self.epoch:
            self._grouped_in = -1
        self._tally = [0] * len(Fate)
        self._evicted = self._removed = self._lost = 0
        self._totals_before = position.totals if position else Totals()
        self._looked_up: dict[int, int | None] = {}  # known hash → offset, None: the store does not know it
        self._open, self._sealed = _Layer(), None

    # -- one input offset each -----------------------------------------------------------------------------------------

    def look_up(self, known_hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The offset at which each id was counted: NOT_KNOWN where it was not, TAKEN_DOWN where it never counts again."""
        # Few of a batch are known, so only those are looked at one by one.
        hashes = set(known_hashes.tolist())
        found = self.store.known_offsets(known_hashes)
        # An id that was out of the window counts again: the newest offset is meant.
        for layer in reversed(self._layers()):
            found.update((known, layer.counted[known]) for known in layer.counted.keys() & hashes)
        found.update((known, TAKEN_DOWN) for known in self._forgotten & hashes)
        names = sorted(found)
        offsets = np.array([found[name] for name in names], np.int64)
        return _found(np.array(names, np.uint64), offsets, known_hashes)

    def is_known(self, firsts: NDArray[np.int64], offsets: NDArray[np.int64]) -> NDArray[np.bool_]:
        """`fate_if_seen` for many at once: whether no image is needed to decide. firsts  what `look_up` said."""
        seen: NDArray[np.bool_] = (firsts == TAKEN_DOWN) | ((firsts >= 0) & self._in_window(firsts, offsets))
        if self._cap is None:
            for at in np.flatnonzero(~seen & (firsts >= 0)).tolist():
                seen[at] = self._in_reservoir(int(firsts[at]))
        return seen

    def _in_window(self, firsts: NDArray[np.int64], offsets: NDArray[np.int64]) -> NDArray[np.bool_]:
        if self.settings.dedupe_window is None:
            return np.ones(len(firsts), bool)
        inside: NDArray[np.bool_] = firsts >= offsets - self.settings.dedupe_window
        return inside

    def fate_if_seen(self, known_hash: int, offset: int) -> Fate | None:
        """DUPLICATE or FORGOTTEN where no image is needed to decide on the id at this offset, else None.

        May be asked ahead of earlier offsets: what it says then stays true in that the image is not needed (a
        takedown in between makes a duplicate a forgotten one; `duplicate` finds out). An id out of the dedupe window
        that is known only because it is in a capped reservoir may be evicted in between, so for that one the answer
        is None.
        """
        if known_hash in self._forgotten:
            return FORGOTTEN
        first = self._first_offset(known_hash)
        if first is None:
            return None
        if first >= offset - self._window or (self._cap is None and self._in_reservoir(first)):
            return DUPLICATE
        return None

    def decide(
        self,
        offset: int,
        pair_id: str,
        cluster: int,
        itm: float,
        vector: NDArray[np.uint16] | bytes,
        hashes: tuple[int, int] | None = None,
    ) -> Decision:
        """Decide on the pair at `offset` and count it.

        itm      as recorded in pair-codes, so that a replay compares the same number with the gate; NaN is below it
        vector   (tokens,) uint16, or the same as little-endian bytes; looked at only if the pair is kept
        hashes   what `hash_id` said of the id, if the caller has asked already
        """
        known, priority = hashes or hash_id(self._key, pair_id)
        self.next_offset = offset + 1
        first = self._first_offset(known)
        if known in self._forgotten:
            self._tally[FORGOTTEN] += 1
            return _decision((FORGOTTEN, -1, priority, -1, ()))
        if first is not None:
            if first >= offset - self._window or self._in_reservoir(first):
                self._tally[DUPLICATE] += 1
                return _decision((DUPLICATE, -1, priority, first, ()))
            self._open.counted.pop(known, None)  # counted again, later: it goes to the end of the column
        if self._gate is not None and not itm >= self._gate:
            self._tally[BELOW_GATE] += 1
            return _decision((BELOW_GATE, -1, priority, -1, ()))
        cells = self._touch(self.epoch, cluster)
        counts = cells.counts[cluster]
        self._open.counted[known] = offset
        position = int(counts[0])
        counts[0] = position + 1
        block, place = divmod(position, self._q)
        if block != cells.block[cluster]:
            cells.block[cluster] = block
            cells.kept[cluster] = self._kept_in([(cluster, block)])[0]
        if not cells.kept[cluster, place]:
            self._tally[OVER_QUOTA] += 1
            return _decision((OVER_QUOTA, position, priority, -1, ()))
        admitted, removed = self._offer(offset, cluster, priority)
        if not admitted:
            self._tally[OVER_CAP] += 1
            return _decision((OVER_CAP, position, priority, -1, removed))
        counts[1] += 1
        counts[3] += 1
        codes = vector if isinstance(vector, bytes) else vector.astype("<u2", copy=False).tobytes()
        self._open.entries[known] = encode_entry(
            offset, self.epoch, cluster, priority, self._ratio, pair_id.encode(), codes
        )
        self._open.hash_at[offset] = known
        self._tally[KEPT] += 1
        return _decision((KEPT, position, priority, -1, removed))

    def duplicate(self, offset: int, pair_id: str, hashes: tuple[int, int] | None = None) -> Decision:
        """Count a pair of which `fate_if_seen` said that no image is needed.

        Raises ValueError if the id is not known at this offset after all: `decide` is the one to call then.
        """
        known, priority = hashes or hash_id(self._key, pair_id)
        if known in self._forgotten:
            fate, first = FORGOTTEN, -1
        else:
            found = self._first_offset(known)
            if found is None or not (found >= offset - self._window or self._in_reservoir(found)):
                raise ValueError(f"the id {pair_id!r} is not known at offset {offset}")
            fate, first = DUPLICATE, found
        self.next_offset = offset + 1
        self._tally[fate] += 1
        return _decision((fate, -1, priority, first, ()))

    def dead(self, offset: int) -> Decision:
        """Count a dead letter. Its id does not become known."""
        self.next_offset = offset + 1
        self._tally[DEAD] += 1
        return _DEAD_LETTER

    def take_down(self, offset: int, pair_id: str) -> Decision:
        """Take an id out of the reservoir, if it is there, and forget it for good. Its position stays counted."""
        known, priority = hash_id(self._key, pair_id)
        self.next_offset = offset + 1
        self._tally[FORGOTTEN] += 1
        if known in self._forgotten:
            return _decision((FORGOTTEN, -1, priority, -1, ()))
        removed: tuple[str, ...] = ()
        first = self._first_offset(known)
        if first is not None and self._in_reservoir(first):
            head = entry_head(self._entry_at(first)[1])
            if self._cap is not None:
                self._forget_mark(head, first)
            removed = (self._leave(first),)
            self._removed += 1
        self._forgotten.add(known)
        self._open.taken_down[known] = offset
        return _decision((FORGOTTEN, -1, priority, -1, removed))

    def decide_all(self, rows: Rows) -> Decisions:
        """Decide on a batch of this partition and count it: what the others here say of one row each, in order."""
        if self._is_plain(rows):
            return self._decide_columns(rows)
        return self._decide_one_by_one(rows)

    def _is_plain(self, rows: Rows) -> bool:
        """Whether no row changes what an earlier one of the batch made known: no takedown, no id that leaves the window."""
        if not len(rows.offsets) or (rows.kinds == Kind.TAKEDOWN).any():
            return False
        window = self.settings.dedupe_window
        if window is None:
            return True
        again = (rows.firsts >= 0) & ((rows.kinds == Kind.PAIR) | (rows.kinds == Kind.UNSEEN))
        return not again.any() and int(rows.offsets[-1] - rows.offsets[0]) <= window

    def _decide_one_by_one(self, rows: Rows) -> Decisions:
        decided = Decisions(*_undecided(len(rows.offsets)), [])
        for known, first, kind in zip(rows.known.tolist(), rows.firsts.tolist(), rows.kinds.tolist(), strict=True):
            if (
                kind != Kind.DEAD
                and first != TAKEN_DOWN
                and not any(known in layer.counted for layer in self._layers())
            ):
                self._looked_up[known] = None if first == NOT_KNOWN else first
        both = zip(rows.known.tolist(), rows.priorities.tolist(), strict=True)
        places = iter(range(len(rows.clusters)))
        columns = zip(rows.offsets.tolist(), rows.names, rows.kinds.tolist(), both, strict=True)
        for row, (offset, name, kind, hashes) in enumerate(columns):
            pair_id = name.decode()
            if kind == Kind.PAIR:
                at = next(places)
                decision = self.decide(
                    offset, pair_id, int(rows.clusters[at]), float(rows.itms[at]), rows.vectors[at], hashes
                )
            elif kind == Kind.TAKEDOWN:
                decision = self.take_down(offset, pair_id)
            elif kind == Kind.KNOWN or (kind == Kind.UNSEEN and self.fate_if_seen(hashes[0], offset) is not None):
                decision = self.duplicate(offset, pair_id, hashes)
            else:
                decision = self.dead(offset)
            decided.fates[row], decided.positions[row] = decision.fate, decision.position
            decided.duplicate_of[row] = decision.duplicate_of
            decided.removed.extend((row, gone) for gone in decision.removed)
        return decided

    def _decide_columns(self, rows: Rows) -> Decisions:
        """Nothing that a row of the batch may find known can change but by its pairs that count, so columns tell all."""
        fates, positions, duplicate_of = _undecided(len(rows.offsets))
        offsets, kinds, firsts = rows.offsets, rows.kinds, rows.firsts
        fates[kinds == Kind.KNOWN] = DUPLICATE
        fates[firsts == TAKEN_DOWN] = FORGOTTEN
        fates[kinds == Kind.DEAD] = DEAD
        duplicates = fates == DUPLICATE
        duplicate_of[duplicates] = firsts[duplicates]

        # Of the pairs that pass the gate, the first of each id counts; whatever has that id behind it is a duplicate.
        pairs = np.flatnonzero(kinds == Kind.PAIR)
        passing = np.ones(len(pairs), bool) if self._gate is None else rows.itms >= self._gate
        candidates = pairs[passing]
        names, first_at = _first_of_each(rows.known[candidates])
        counting = candidates[np.sort(first_at)] if len(names) < len(candidates) else candidates
        if len(counting) < len(pairs) or (kinds == Kind.UNSEEN).any():
            firsts_here = offsets[candidates[first_at]]
            fates[pairs] = BELOW_GATE
            for kind, otherwise in ((Kind.PAIR, BELOW_GATE), (Kind.UNSEEN, DEAD)):
                its = np.flatnonzero(kinds == kind)
                counted_at = _found(names, firsts_here, rows.known[its])
                again = (counted_at >= 0) & (counted_at < offsets[its])
                fates[its] = np.where(again, DUPLICATE, otherwise)
                duplicate_of[its[again]] = counted_at[again]
        removed: list[tuple[int, str]] = []
        if len(counting):
            its_pair = np.searchsorted(pairs, counting)
            positions[counting], passed = self._count(rows.clusters[its_pair])
            self._open.counted.update(zip(rows.known[counting].tolist(), offsets[counting].tolist(), strict=True))
            fates[counting] = np.where(passed, KEPT, OVER_QUOTA)
            removed = self._keep(rows, counting[passed], its_pair[passed], fates)
        self.next_offset = int(offsets[-1]) + 1
        self._tally = [
            before + now
            for before, now in zip(self._tally, np.bincount(fates, minlength=len(Fate)).tolist(), strict=True)
        ]
        return Decisions(fates, positions, duplicate_of, removed)

    def _count(self, clusters: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Counts pairs that lie in these cells of the present epoch: the position of each, and whether its quota takes it."""
        cells = self._touch(self.epoch, int(clusters.max()))
        cells.touched[clusters // CELLS_A_RECORD] = True
        # By cell and, inside it, as they came: a sort of one number each, a fifth of the time of a stable argsort.
        both = np.sort(clusters.astype(np.int64) << 32 | np.arange(len(clusters)))
        cell, order = both >> 32, both & 0xFFFFFFFF
        begins = np.flatnonzero(np.diff(cell, prepend=-1))  # of each cell
        sizes = np.diff(begins, append=len(cell))
        place = cells.counts[cell, 0] + np.arange(len(cell)) - np.repeat(begins, sizes)
        cells.counts[cell[begins], 0] += sizes

        block, in_block = place // self._q, place % self._q
        turns = np.diff(cell, prepend=-1) | np.diff(block, prepend=-1)  # not 0 where a cell or a block begins
        starts = np.flatnonzero(turns)
        cell_of, block_of = cell[starts], block[starts]
        kept = cells.kept[cell_of]
        new = np.flatnonzero(cells.block[cell_of] != block_of)
        if len(new):
            kept[new] = self._kept_in(zip(cell_of[new].tolist(), block_of[new].tolist(), strict=True))
            # of a cell that is several times among them the last one stays
            cells.block[cell_of], cells.kept[cell_of] = block_of, kept
        positions, passed = np.empty(len(cell), np.int64), np.empty(len(cell), bool)
        positions[order] = place
        passed[order] = kept[np.cumsum(turns != 0) - 1, in_block]
        return positions, passed

    def _keep(
        self, rows: Rows, passed: NDArray[np.int64], its_pair: NDArray[np.int64], fates: NDArray[np.uint8]
    ) -> list[tuple[int, str]]:
        """The rows that passed their quota enter the reservoirs, as far as those take them; who had to leave for which."""
        removed: list[tuple[int, str]] = []
        clusters = rows.clusters[its_pair]
        known, offsets = rows.known[passed].tolist(), rows.offsets[passed].tolist()
        entries = encode_entries(
            rows.offsets[passed], self.epoch, clusters, rows.priorities[passed], self._ratio,
            [rows.names[row] for row in passed.tolist()], rows.vectors[its_pair],
        )  # fmt: skip
        if self._cap is None:
            self._open.entries.update(zip(known, entries, strict=True))
            self._open.hash_at.update(zip(offsets, known, strict=True))
        else:
            entered = np.ones(len(passed), bool)
            columns = zip(offsets, clusters.tolist(), rows.priorities[passed].tolist(), strict=True)
            for at, (offset, cluster, priority) in enumerate(columns):
                entered[at], gone = self._offer(offset, cluster, priority)
                if entered[at]:
                    self._open.entries[known[at]], self._open.hash_at[offset] = entries[at], known[at]
                removed += [(int(passed[at]), name) for name in gone]
            fates[passed[~entered]] = OVER_CAP
            clusters = clusters[entered]
        counts = self._cells[self.epoch].counts
        np.add.at(counts[:, 1], clusters, 1)
        np.add.at(counts[:, 3], clusters, 1)
        return removed

    def skip(self, offset: int) -> None:
        """Go on at `offset`: what lies before it is no longer to be had, and counts as lost."""
        self._lost += offset - (self.next_offset or 0)
        self.next_offset = offset

    def adopt(self, bundle: str, space: str, input_offset: int, tail: Tail | None = None) -> int:
        """Count from `input_offset` on with this bundle; returns the epoch.

        The first bundle of a partition is epoch 0, another one begins the next epoch, the present one changes nothing.
        Nobody leaves by that: a cell that now is over its cap shrinks with the pairs that are offered to it.
        tail  entries of a capped partition that are not grouped in the store yet (Regrouping.tail)
        Raises SettingsDiffer where encoder and codebook are not the stream's, ValueError while a transaction is open or
        sealed (its rows belong to one epoch), or where a capped partition's entries are not grouped for it (regroup.py).
        """
        if space != self.settings.space:
            raise SettingsDiffer(
                f"bundle {bundle} has encoder and codebook {space}, this stream has {self.settings.space}; "
                "a bundle with another encoder or codebook needs a new stream"
            )
        if self._switch is None or self._switch.bundle != bundle:
            if any(self._tally) or self._sealed is not None:
                raise ValueError("a switch needs a transaction that has not begun")
            if self.next_offset is None:  # nothing was ever counted: it is still the first bundle
                self.epoch = -1
                self._open.switched.clear()
            grouped = tail is None or tail.until >= input_offset
            if not grouped or not self.store.grouped(self.epoch + 1, bundle, tail.start if tail else input_offset):
                raise ValueError(f"the entries are not grouped by the bundle {bundle} up to offset {input_offset}")
            self.store.refresh()
            # To free a million numbers takes a while: they go one heap at a time, as new ones come.
            self._retired += self._heaps.values()
            self._heaps, self._live_numbers = {}, 0
            self._tail = None if tail is None else (self.epoch + 1, tail)
            self.epoch += 1
            self._switch = Switch(self.epoch, bundle, space, input_offset)
            self._open.switched.append(self._switch)
        return self.epoch

    # -- one transaction each ------------------------------------------------------------------------------------------

    @property
    def totals(self) -> Totals:
        """What became of everything read so far, the open transaction included."""
        kept, over_quota, below_gate, over_cap, duplicates, forgotten, dead = self._tally
        counted = kept + over_quota + over_cap
        read = counted + below_gate + duplicates + forgotten + dead
        here = Totals(
            read=read,
            dead=dead,
            duplicates=duplicates,
            forgotten=forgotten,
            below_gate=below_gate,
            counted=counted,
            over_quota=over_quota,
            over_cap=over_cap,
            kept=kept,
            evicted=self._evicted,
            removed=self._removed,
            lost=self._lost,
        )
        return Totals(*(before + now for before, now in zip(self._totals_before, here, strict=True)))

    @property
    def live_numbers(self) -> int:
        """How many numbers the heaps of live cells hold, about 60 bytes each: what `live_numbers_max` bounds."""
        return self._live_numbers

    @property
    def switch(self) -> Switch | None:
        """The switch that began the present epoch; None: no bundle adopted yet."""
        return self._switch

    @property
    def switching(self) -> bool:
        """Whether a switch is to be written, and can be: something was read."""
        return bool(self._open.switched) and self.next_offset is not None

    @property
    def bundle(self) -> str | None:
        """The bundle of the present epoch; None: none adopted yet."""
        return self._switch.bundle if self._switch else None

    def changes(self, instance: str, wall_clock_ms: int) -> list[Record]:
        """Seals the open transaction: its changelog records, in the order in which they must be written.

        instance       who writes them; wall_clock_ms  when, in ms since 1970
        Raises ValueError before anything was read or a bundle was adopted, and while another transaction is sealed.
        """
        if self.next_offset is None or self.epoch < 0:
            raise ValueError("a transaction needs an input offset and a bundle")
        if self._sealed is not None:
            raise ValueError("the sealed transaction has not ended yet")
        layer, totals = self._open, self.totals
        records: list[Record] = []
        if self._new_stream:
            records.append((SETTINGS, self.settings.to_json()))
        records += [(switch_key(switch.epoch), encode_switch(switch)) for switch in layer.switched]
        # entries before known ids: see PartitionStore._write
        names = np.fromiter(layer.entries, np.uint64, len(layer.entries)).astype(">u8").view("V8").tolist()
        records += [(ENTRY + name, entry) for name, entry in zip(names, layer.entries.values(), strict=True)]
        if layer.counted:
            count = len(layer.counted)
            hashes = np.fromiter(layer.counted.keys(), np.uint64, count)
            records += encode_known(hashes, np.fromiter(layer.counted.values(), np.uint64, count))
        records += [(forgotten_key(known), encode_forgotten(at)) for known, at in layer.taken_down.items()]
        for epoch, cells in self._cells.items():
            for first in (np.flatnonzero(cells.touched) * CELLS_A_RECORD).tolist():
                records.append((cells_key(epoch, first), encode_cells(cells.counts[first : first + CELLS_A_RECORD])))
            cells.sealed, cells.touched = cells.touched, np.zeros_like(cells.touched)
        records += [(known_key(first), None) for first in self._expired(self.next_offset - self._window)]
        position = Position(self.next_offset, self.epoch, wall_clock_ms, instance, totals)
        records.append((POSITION, encode_position(position)))
        layer.changes, layer.position = records, position
        self._open, self._sealed = _Layer(), layer
        self._new_stream = False
        self._totals_before, self._tally = totals, [0] * len(Fate)
        self._evicted = self._removed = self._lost = 0
        return records

    def write(self, changelog_position: int) -> None:
        """Writes the sealed transaction to the store, after Kafka has committed it, if there is room in the store's map.

        May be called from another thread while the next transaction goes on, which reads the store as it was until `commit`
        shows it.
        changelog_position  the changelog offset behind the transaction. Raises StoreFull; nothing is lost then.
        """
        if self._sealed is None:
            raise ValueError("nothing to write: ask for the changes first, and write them to Kafka")
        self._sealed.written = self.store.apply_beside(self._sealed.changes, changelog_position)

    def commit(self, changelog_position: int) -> None:
        """Ends the sealed transaction, after Kafka has committed it: the store has it, and shows it. Raises as `write`."""
        if self._sealed is None:
            raise ValueError("nothing to commit: ask for the changes first, and write them to Kafka")
        if self._sealed.written:
            self.store.refresh()
        else:
            self.store.apply(self._sealed.changes, changelog_position)
        self.committed, self._sealed = self._sealed.position, None
        self._looked_up = {}
        for cells in self._cells.values():
            cells.sealed[:] = False
        # What the open transaction has touched stands behind the rest, and the store does not know it yet.
        while (
            self._live_numbers > self._live_numbers_max
            and (cell := next(iter(self._heaps))) not in self._open.touched_heaps
        ):
            self._drop(cell)

    def abort(self) -> None:
        """Forget the open and the sealed transaction; the next input offset is the committed one again."""
        self._cells = {
            epoch: cells for epoch, cells in self._cells.items() if not (cells.touched.any() or cells.sealed.any())
        }
        for layer in self._layers():
            for cell in layer.touched_heaps & self._heaps.keys():
                self._drop(cell)
            self._forgotten.difference_update(layer.taken_down)
        self._new_stream = self.store.settings() is None
        self._begin()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _first_offset(self, known: int) -> int | None:
        """The offset at which an id was counted, if anything still tells."""
        for layer in self._layers():
            if (first := layer.counted.get(known)) is not None:
                return first
        if known not in self._looked_up:
            self._looked_up[known] = self.store.known_offset(known)
        return self._looked_up[known]

    def _layers(self) -> tuple[_Layer, ...]:
        """What is not in the store yet, the newest first."""
        return (self._open,) if self._sealed is None else (self._open, self._sealed)

    def _in_reservoir(self, offset: int) -> bool:
        for layer in self._layers():
            if offset in layer.hash_at or offset in layer.gone:
                return offset in layer.hash_at
        return self.store.entry_at(offset) is not None

    def _entry_at(self, offset: int) -> tuple[int, bytes]:
        """(known hash, encoded entry) of a pair that is in the reservoir."""
        for layer in self._layers():
            known = layer.hash_at.get(offset)
            entry = layer.entries[known] if known is not None else None
            if known is not None and entry is not None:
                return known, entry
        stored = self.store.entry_at(offset)
        if stored is None:
            raise LookupError(f"the reservoir has no pair from offset {offset}")
        return stored

    def _leave(self, offset: int) -> str:
        """Take the pair from this offset out of the reservoir and the cell that it was counted in; returns its id."""
        known, entry = self._entry_at(offset)
        head = entry_head(entry)
        self._touch(head.epoch, head.cluster).counts[head.cluster, 3] -= 1
        if self._open.hash_at.pop(offset, None) is None:
            self._open.gone.add(offset)
        self._open.entries[known] = None
        return decode_entry(entry).pair_id

    def _touch(self, epoch: int, cluster: int) -> _Cells:
        """The cells of an epoch up to this one, which the open transaction changes."""
        cells = self._cells.get(epoch)
        if cells is None:
            cells = self._cells[epoch] = _Cells(self.store.cells_of_epoch(epoch), self._q)
        cells.reach(cluster)
        cells.touched[cluster // CELLS_A_RECORD] = True
        return cells

    def _kept_in(self, blocks: Iterable[tuple[int, int]]) -> NDArray[np.bool_]:
        return kept_in_blocks(self.settings.seed, self.epoch, self.partition, blocks, self._ratio)

    def _offer(self, offset: int, cluster: int, priority: int) -> tuple[bool, tuple[str, ...]]:
        """Offers a pair to its cell's reservoir: whether it enters, and the ids that leave for it."""
        if self._cap is None:
            return True, ()
        heap = self._heap(self.epoch, cluster)
        before = len(heap)
        admitted, leaving = offer(heap, mark_of(rank_of(priority, self._ratio), offset), self._cap)
        self._live_numbers += len(heap) - before
        if not leaving:
            return admitted, ()
        self._evicted += len(leaving)
        self._cells[self.epoch].counts[cluster, 2] += len(leaving)
        return admitted, tuple([self._leave(left) for left in leaving])

    def _heap(self, epoch: int, cluster: int) -> list[int]:
        """The heap of a capped cell of the present epoch, which the open transaction changes."""
        cell = epoch, cluster
        heap = self._heaps.pop(cell, None)
        if heap is None:
            self._refuse_ungrouped()
            marks = self.store.marks(epoch, cluster)
            if self._retired:
                self._retired.pop()
            if self._tail is not None and (late := self._tail[1].marks.get(cluster)):
                # some are grouped in the store by now, some have left
                there = {mark for mark in late if self.store.entry_at(mark & OFFSET_MASK) is not None}
                marks = sorted(there.union(marks))
            # Whoever came since the last commit had the heap live, but one may have been taken down without it.
            for layer in self._layers():
                if layer.gone:
                    marks = [mark for mark in marks if mark & OFFSET_MASK not in layer.gone]
            heap = heap_of(marks)
            self._live_numbers += _NUMBERS_OF_A_HEAP + len(heap)
        self._heaps[cell] = heap  # at the end: what stands in front was not touched for longest
        self._open.touched_heaps.add(cell)
        return heap

    def _refuse_ungrouped(self) -> None:
        switch = self._switch
        if self._grouped_in == self.epoch:
            return
        until = -1 if switch is None else self._tail[1].start if self._tail is not None else switch.input_offset
        if switch is None or not self.store.grouped(switch.epoch, switch.bundle, until):
            raise ValueError("the entries are not grouped by the present bundle")
        self._grouped_in = self.epoch

    def _forget_mark(self, head: EntryHead, offset: int) -> None:
        """Takes a pair out of the heap of the cell in which it competes, if that is live."""
        cluster: int | None = head.cluster
        if head.epoch != self.epoch:
            late = self._tail[1].cluster_of.get(offset) if self._tail is not None else None
            cluster = late if late is not None else self.store.group_of(self.epoch, offset)
        if cluster is None or (self.epoch, cluster) not in self._heaps:
            return
        heap = self._heap(self.epoch, cluster)
        heap.remove(-mark_of(rank_of(head.priority, head.rate), offset))
        heapify(heap)
        self._live_numbers -= 1

    def _drop(self, cell: tuple[int, int]) -> None:
        self._live_numbers -= _NUMBERS_OF_A_HEAP + len(self._heaps.pop(cell))

    def _expired(self, before: int) -> list[int]:
        """The first offsets of the K records all of whose ids were counted before this offset."""
        if before <= 0:
            return []
        expired: list[int] = []
        last = None
        for first in self.store.known_firsts():
            # a K record ends before the next one begins
            if last is not None:
                if first > before:
                    break
                expired.append(last)
            last = first
        return expired


def _undecided(count: int) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
    """Columns of fates, positions and offsets of the first, for rows that nothing is said of yet."""
    return np.full(count, OVER_QUOTA, np.uint8), np.full(count, -1), np.full(count, -1)


def _first_of_each(names: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """np.unique(names, return_index=True), in a quarter of the time where no name comes twice."""
    order = np.argsort(names)
    ascending = names[order]
    if (ascending[1:] == ascending[:-1]).any():
        return np.unique(names, return_index=True)
    return ascending, order


def _found(names: NDArray[np.uint64], values: NDArray[np.int64], wanted: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The value of each wanted name, NOT_KNOWN where it is not among the names, which are sorted."""
    if not len(names):
        return np.full(len(wanted), NOT_KNOWN)
    at = np.minimum(np.searchsorted(names, wanted), len(names) - 1)
    return np.where(names[at] == wanted, values[at], NOT_KNOWN)
