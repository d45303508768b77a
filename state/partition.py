"""The live state of one partition: its committed store plus the effects of the open transaction.

`decide` is the hot path of the whole service: one hash an id, live cells as plain objects, columns instead of
records, and bytes are made once a touched cell and transaction. Nothing here reaches the store before `commit`, which
the caller calls when Kafka has committed; `abort` forgets. It must never know a Kafka client, and it reads no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import partial
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from state.changelog import (
    POSITION,
    SETTINGS,
    Position,
    Record,
    Switch,
    Totals,
    cell_key,
    decode_entry,
    encode_cell,
    encode_entry,
    encode_forgotten,
    encode_known,
    encode_position,
    encode_switch,
    entry_head,
    entry_key,
    forgotten_key,
    known_key,
    switch_key,
)
from state.errors import SettingsDiffer
from state.partition_store import PartitionStore
from state.priority import hash_id, id_key
from state.quota import kept_positions
from state.reservoir import heap_of, mark_of, offer, rank_of
from state.settings import StreamSettings, refuse_difference

# Live cells are dropped, least recently touched first, when they and the marks in them hold more numbers than this
# (about 60 bytes each).
LIVE_NUMBERS_MAX = 2_000_000
_NUMBERS_OF_A_CELL = 8


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


class _Cell:
    """One cell, live: its counters, the mask of the block it is in, and with a cap the heap of its marks."""

    __slots__ = ("block", "counted", "entered", "evicted", "heap", "key", "mask", "size", "touched")

    def __init__(self, key: int, counted: int, entered: int, evicted: int, size: int, heap: list[int] | None) -> None:
        self.key = key
        self.counted, self.entered, self.evicted, self.size = counted, entered, evicted, size
        self.heap = heap
        self.block, self.mask = -1, 0
        self.touched = False

    def encoded(self) -> bytes:
        return encode_cell(self.counted, self.entered, self.evicted, self.size)


class Partition:
    """The live state of partition number `partition` of a stream.

    Raises SettingsDiffer where the store belongs to a stream with other settings.

    Every input offset goes, in order, through exactly one of `decide`, `duplicate`, `dead` and `take_down`. Then
    `changes` gives the changelog records of the open transaction, and `commit` or `abort` ends it.
    """

    next_offset: int | None  # the next input offset; None: nothing read yet
    epoch: int  # -1 until the first `adopt`

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
        self._live_numbers = 0
        self._key = id_key(settings.seed)
        self._ratio, (self._p, self._q) = settings.ratio, settings.ratio
        self._cap, self._gate = settings.cell_cap, settings.gate
        # an unbounded window reaches back beyond offset 0
        self._window = settings.dedupe_window if settings.dedupe_window is not None else 1 << 64
        self._cells: dict[int, _Cell] = {}
        self._forgotten = set(store.forgotten())
        self._begin()

    def _begin(self) -> None:
        """An open transaction without effects, on top of what the store holds."""
        position = self.store.position()
        self.next_offset = position.next_offset if position else None
        switches = self.store.switches()
        self._switch = switches[-1] if switches else None
        self.epoch = self._switch.epoch if self._switch else -1
        self._tally = [0] * len(Fate)
        self._evicted = self._removed = self._lost = 0
        self._committed = position.totals if position else Totals()
        self._touched: list[_Cell] = []
        self._counted: dict[int, int] = {}  # known hash → offset: ids that this transaction counted
        self._stored: dict[int, int] = {}  # known hash → offset: looked up in the store already,
        self._absent: set[int] = set()  # and those that are not there
        self._entries: dict[int, bytes | None] = {}  # known hash → entry, None: it left
        self._hash_at: dict[int, int] = {}  # offset → known hash: entries that this transaction added and still has
        self._gone: set[int] = set()  # offsets of committed entries that left
        self._taken_down: dict[int, int] = {}  # known hash → offset of the takedown
        self._switched: list[Switch] = []
        self._changes: list[Record] | None = None

    # -- one input offset each -----------------------------------------------------------------------------------------

    def look_up(self, known_hashes: Sequence[int]) -> None:
        """Ask the store about many ids at once, so that what `fate_if_seen` and `decide` need of it is in memory."""
        found = self.store.known_offsets(known_hashes)
        self._stored |= found
        self._absent.update(known_hashes)
        self._absent -= found.keys()

    def fate_if_seen(self, known_hash: int, offset: int) -> Fate | None:
        """DUPLICATE or FORGOTTEN where no image is needed to decide on the id at this offset, else None.

        May be asked ahead of earlier offsets: what it says then stays true in that the image is not needed (a
        takedown in between makes a duplicate a forgotten one; `duplicate` finds out). An id out of the dedupe window
        that is known only because it is in a capped reservoir may be evicted in between, so for that one the answer
        is None.
        """
        if known_hash in self._forgotten:
            return FORGOTTEN
        first = self._counted.get(known_hash)
        if first is None:
            if known_hash in self._absent:
                return None
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
            self._counted.pop(known, None)  # counted again, later: it goes to the end of the column
        if self._gate is not None and not itm >= self._gate:
            self._tally[BELOW_GATE] += 1
            return _decision((BELOW_GATE, -1, priority, -1, ()))
        cell = self._cells.get(self.epoch << 32 | cluster)
        if cell is None or not cell.touched:
            cell = self._touch(self.epoch, cluster)
        self._counted[known] = offset
        position = cell.counted
        cell.counted = position + 1
        block = position // self._q
        if block != cell.block:
            cell.block = block
            cell.mask = kept_positions(self.settings.seed, self.epoch, self.partition, cluster, block, self._ratio)
        if not cell.mask >> position % self._q & 1:
            self._tally[OVER_QUOTA] += 1
            return _decision((OVER_QUOTA, position, priority, -1, ()))
        removed: tuple[str, ...] = ()
        if cell.heap is not None and self._cap is not None:
            verdict = offer(cell.heap, mark_of(rank_of(priority, self._ratio), offset), self._cap)
            if not verdict.admitted:
                self._tally[OVER_CAP] += 1
                return _decision((OVER_CAP, position, priority, -1, ()))
            if verdict.evicted >= 0:
                removed = (self._leave(verdict.evicted),)
                cell.evicted += 1
                cell.size -= 1
                self._evicted += 1
            else:
                self._live_numbers += 1
        cell.entered += 1
        cell.size += 1
        codes = vector if isinstance(vector, bytes) else vector.astype("<u2", copy=False).tobytes()
        self._entries[known] = encode_entry(offset, self.epoch, cluster, priority, self._ratio, pair_id.encode(), codes)
        self._hash_at[offset] = known
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
            cell = self._touch(head.epoch, head.cluster)
            cell.size -= 1
            if cell.heap is not None:
                marks = sorted(-mark for mark in cell.heap)
                marks.remove(mark_of(rank_of(head.priority, head.rate), first))
                cell.heap = heap_of(marks)
                self._live_numbers -= 1
            removed = (self._leave(first),)
            self._removed += 1
        self._forgotten.add(known)
        self._taken_down[known] = offset
        return _decision((FORGOTTEN, -1, priority, -1, removed))

    def skip(self, offset: int) -> None:
        """Go on at `offset`: what lies before it is no longer to be had, and counts as lost."""
        self._lost += offset - (self.next_offset or 0)
        self.next_offset = offset

    def adopt(self, bundle: str, space: str, input_offset: int) -> int:
        """Count from `input_offset` on with this bundle; returns the epoch.

        The first bundle of a partition is epoch 0, another one begins the next epoch, the present one changes nothing.
        Raises SettingsDiffer where encoder and codebook are not the stream's.
        """
        if space != self.settings.space:
            raise SettingsDiffer(
                f"bundle {bundle} has encoder and codebook {space}, this stream has {self.settings.space}; "
                "a bundle with another encoder or codebook needs a new stream"
            )
        if self._switch is None or self._switch.bundle != bundle:
            self.epoch += 1
            self._switch = Switch(self.epoch, bundle, space, input_offset)
            self._switched.append(self._switch)
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
        return Totals(*(before + now for before, now in zip(self._committed, here, strict=True)))

    @property
    def live_numbers(self) -> int:
        """How many numbers the live cells hold, about 60 bytes each: what `live_numbers_max` bounds."""
        return self._live_numbers

    @property
    def bundle(self) -> str | None:
        """The bundle of the present epoch; None: none adopted yet."""
        return self._switch.bundle if self._switch else None

    def changes(self, instance: str, wall_clock_ms: int) -> list[Record]:
        """The changelog records of the open transaction, in the order in which they must be written.

        instance       who writes them; wall_clock_ms  when, in ms since 1970
        Raises ValueError before anything was read or a bundle was adopted.
        """
        if self.next_offset is None or self.epoch < 0:
            raise ValueError("a transaction needs an input offset and a bundle")
        records: list[Record] = []
        if self._new_stream:
            records.append((SETTINGS, self.settings.to_json()))
        records += [(switch_key(switch.epoch), encode_switch(switch)) for switch in self._switched]
        # entries before known ids: see PartitionStore._write
        records += [(entry_key(known), entry) for known, entry in self._entries.items()]
        if self._counted:
            count = len(self._counted)
            hashes = np.fromiter(self._counted.keys(), np.uint64, count)
            records += encode_known(hashes, np.fromiter(self._counted.values(), np.uint64, count))
        records += [(forgotten_key(known), encode_forgotten(at)) for known, at in self._taken_down.items()]
        records += [(cell_key(cell.key >> 32, cell.key & 0xFFFFFFFF), cell.encoded()) for cell in self._touched]
        records += [(known_key(first), None) for first in self._expired(self.next_offset - self._window)]
        position = Position(self.next_offset, self.epoch, wall_clock_ms, instance, self.totals)
        records.append((POSITION, encode_position(position)))
        self._changes = records
        return records

    def commit(self, changelog_position: int) -> None:
        """Write to the store what `changes` last gave, after Kafka has committed it, and begin the next transaction.

        changelog_position  the changelog offset behind the transaction. Raises StoreFull; nothing is lost then.
        """
        if self._changes is None:
            raise ValueError("nothing to commit: ask for the changes first, and write them to Kafka")
        self.store.apply(self._changes, changelog_position)
        self._new_stream = False
        for cell in self._touched:
            cell.touched = False
        self._drop_cells()
        self._begin()

    def abort(self) -> None:
        """Forget the open transaction; the next input offset is the committed one again."""
        for cell in self._touched:
            self._drop(cell.key)
        self._forgotten.difference_update(self._taken_down)
        self._begin()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _first_offset(self, known: int) -> int | None:
        """The offset at which an id was counted, if anything still tells."""
        first = self._counted.get(known)
        if first is not None or known in self._absent:
            return first
        if known not in self._stored:
            self.look_up([known])
        return self._stored.get(known)

    def _in_reservoir(self, offset: int) -> bool:
        return offset in self._hash_at or (offset not in self._gone and self.store.entry_at(offset) is not None)

    def _entry_at(self, offset: int) -> tuple[int, bytes]:
        """(known hash, encoded entry) of a pair that is in the reservoir."""
        known = self._hash_at.get(offset)
        entry = self._entries[known] if known is not None else None
        if known is not None and entry is not None:
            return known, entry
        stored = self.store.entry_at(offset)
        if stored is None:
            raise LookupError(f"the reservoir has no pair from offset {offset}")
        return stored

    def _leave(self, offset: int) -> str:
        """Take the pair from this offset out of the reservoir; returns its id."""
        known, entry = self._entry_at(offset)
        if self._hash_at.pop(offset, None) is None:
            self._gone.add(offset)
        self._entries[known] = None
        return decode_entry(entry).pair_id

    def _touch(self, epoch: int, cluster: int) -> _Cell:
        """The live cell, which this transaction changes."""
        key = epoch << 32 | cluster
        cell = self._cells.pop(key, None)
        if cell is None:
            counts = self.store.cell(epoch, cluster) or (0, 0, 0, 0)
            heap = heap_of(self.store.marks(epoch, cluster)) if self._cap is not None else None
            cell = _Cell(key, *counts, heap)
            self._live_numbers += _NUMBERS_OF_A_CELL + len(heap or ())
        self._cells[key] = cell  # at the end: what stands in front was not touched for longest
        if not cell.touched:
            cell.touched = True
            self._touched.append(cell)
        return cell

    def _drop(self, key: int) -> None:
        cell = self._cells.pop(key)
        self._live_numbers -= _NUMBERS_OF_A_CELL + len(cell.heap or ())

    def _drop_cells(self) -> None:
        while self._live_numbers > self._live_numbers_max:
            self._drop(next(iter(self._cells)))

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
