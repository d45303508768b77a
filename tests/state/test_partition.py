"""The reduced set of a partition is the one of the batch reference, at every offset and after whatever happened."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from state.changelog import Record, decode_entry, decode_forgotten, forgotten_key
from state.errors import SettingsDiffer
from state.partition import Decision, Fate, Kind, Partition, Rows
from state.partition_store import PartitionStore
from state.priority import hash_id, hash_ids, id_key
from state.quota import Ratio, kept_positions
from state.regroup import Regrouping, sweep
from state.settings import StreamSettings
from stream.batch_tldr import Kept, Outcome, Row, reduce_partition

STREAM = StreamSettings(1, "topic-id", 1, Ratio(1, 2), None, None, None, "paper", "space", 4)
PARTITION = 3
FATES = {
    Fate.KEPT: "kept",
    Fate.OVER_QUOTA: "over quota",
    Fate.BELOW_GATE: "below gate",
    Fate.OVER_CAP: "over cap",
    Fate.DUPLICATE: "duplicate",
    Fate.FORGOTTEN: "forgotten",
}
DEAD = -1  # a cluster that no encoder assigns: the image could not be decoded
# memory instead of a disk: these tests sync thousands of times
MEMORY = next((path for path in ("/dev/shm",) if Path(path).is_dir()), None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def assigned(bundle: str, vectors: NDArray[np.uint16]) -> NDArray[np.int32]:
    """The clusters of index vectors under one of the test's bundles."""
    number = int(bundle.rpartition("-")[2])
    return (vectors[:, 0].astype(np.int64) * (2 * number + 1) // 3 % 3).astype(np.int32)


def scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(dir=MEMORY)


@dataclass
class Life:
    """A partition's life: input rows, a changelog as Kafka keeps it, and a worker's store that may be lost."""

    rows: list[Row]
    stream: StreamSettings
    folder: Path
    bundles: dict[int, str] = field(default_factory=lambda: {0: "bundle-0"})  # row number → bundle adopted before it
    live_numbers_max: int = 10_000
    in_columns: bool = False  # whether rows are decided on together
    log: list[tuple[int, Record]] = field(default_factory=list)
    decisions: dict[int, Decision] = field(default_factory=dict)  # committed ones, by offset
    stores: int = 0
    sealed: bool = False  # whether a transaction is on its way to Kafka
    inherited: bool = False  # whether a switch has ever regrouped pairs of a capped stream

    def __post_init__(self) -> None:
        self.open_decisions: dict[int, Decision] = {}
        self.open_store()

    @property
    def end(self) -> int:
        return self.log[-1][0] + 1 if self.log else 0

    @property
    def done(self) -> int:
        """How many rows lie before the partition's next offset."""
        after = self.partition.next_offset
        return sum(row.offset < after for row in self.rows) if after is not None else 0

    def open_store(self) -> None:
        self.store = PartitionStore(self.folder / str(self.stores), map_bytes=1 << 16)
        start = self.store.changelog_position or 0
        tail = [(at, record) for at, record in self.log if at >= start]
        for cut in range(0, len(tail), 7):  # a restore sees transactions in pieces
            piece = tail[cut : cut + 7]
            self.store.apply([record for _, record in piece], piece[-1][0] + 1)
        self.partition = Partition(self.store, self.stream, PARTITION, self.live_numbers_max)
        switch = self.partition.switch
        if switch is not None and self.stream.cell_cap is not None:
            self.regrouping(switch.epoch, switch.bundle, switch.input_offset).finish()

    def regrouping(self, epoch: int, bundle: str, until: int | None = None) -> Regrouping:
        return Regrouping(
            self.store, epoch, bundle, partial(assigned, bundle), until, alone=until is not None, rows_a_step=3
        )

    def prepare(self, bundle: str = "") -> None:
        """A step beside the stream: some entries are grouped by the next bundle, or by one that never comes."""
        self.commit()
        switch = self.partition.switch
        if switch is not None and not self.store.grouped(switch.epoch, switch.bundle, switch.input_offset):
            regrouping = self.regrouping(switch.epoch, switch.bundle, switch.input_offset)
            regrouping.step()
            return
        if self.stream.cell_cap is not None and self.partition.epoch >= 0:
            self.regrouping(self.partition.epoch + 1, bundle or f"bundle-{self.partition.epoch + 1}").step()
            self.make_room()

    def prepare_another(self) -> None:
        self.prepare("another-9")

    def make_room(self) -> None:
        self.store.make_room()
        sweep(self.store)
        self.store.make_room()

    def switch_to(self, bundle: str, offset: int) -> None:
        self.commit()
        tail = None
        if self.partition.epoch >= 0 and bundle != self.partition.bundle and self.stream.cell_cap is not None:
            until = self.partition.next_offset or offset
            grouping = self.regrouping(self.partition.epoch + 1, bundle, until)
            if self.partition.epoch % 2:  # now the store has all, now the rest is in memory
                while grouping.step():
                    self.store.make_room()
            else:
                tail = grouping.tail()
            self.inherited |= self.store.entry_count() > 0
        self.partition.adopt(bundle, self.stream.space, self.partition.next_offset or offset, tail)

    def process(self, count: int) -> None:
        """Some rows as a worker does it: first it asks which need no image, then it decides, in order."""
        start, end = self.done, min(self.done + count, len(self.rows))
        if self.sealed:  # a switch waits until that has ended
            end = min([end, *(at for at in self.bundles if start <= at < end)])
        if start == end:
            return
        for begin, cut in pairwise(sorted({start, end, *(at for at in self.bundles if start < at < end)})):
            if begin in self.bundles:
                self.switch_to(self.bundles[begin], self.rows[begin].offset)
            (self.decide_together if self.in_columns else self.decide_each)(self.rows[begin:cut])

    def decide_each(self, batch: list[Row]) -> None:
        key = id_key(self.stream.seed)
        ask = self.partition.fate_if_seen
        seen = {row.offset for row in batch if ask(hash_id(key, row.id)[0], row.offset) is not None}
        for row in batch:
            self.open_decisions[row.offset] = self.decide(row, row.offset in seen)

    def decide_together(self, batch: list[Row]) -> None:
        known, priorities = hash_ids(id_key(self.stream.seed), [row.id.encode() for row in batch])
        offsets = np.array([row.offset for row in batch])
        firsts = self.partition.look_up(known)
        kinds = np.array(
            [
                Kind.TAKEDOWN if row.cluster is None else Kind.UNSEEN if row.cluster == DEAD else Kind.PAIR
                for row in batch
            ],
            np.uint8,
        )
        kinds[(kinds != Kind.TAKEDOWN) & self.partition.is_known(firsts, offsets)] = Kind.KNOWN
        pairs = [row for row, kind in zip(batch, kinds, strict=True) if kind == Kind.PAIR]
        vectors = [np.full(self.stream.tokens, row.offset % 65536) for row in pairs]
        rows = Rows(
            offsets,
            [row.id.encode() for row in batch],
            kinds,
            firsts,
            known,
            priorities,
            np.array([row.cluster for row in pairs], np.int32),
            np.array([row.itm for row in pairs], np.float32),
            np.array(vectors, np.uint16).reshape(-1, self.stream.tokens),
        )
        fates, positions, duplicate_of, removed = self.partition.decide_all(rows)
        for at, row in enumerate(batch):
            gone = tuple(name for its, name in removed if its == at)
            numbers = int(positions[at]), int(priorities[at]), int(duplicate_of[at])
            self.open_decisions[row.offset] = Decision(Fate(fates[at]), *numbers, gone)

    def decide(self, row: Row, seen: bool) -> Decision:
        if row.cluster is None:
            return self.partition.take_down(row.offset, row.id)
        if seen:
            return self.partition.duplicate(row.offset, row.id)
        if row.cluster == DEAD:
            return self.partition.dead(row.offset)
        vector = np.full(self.stream.tokens, row.offset % 65536, np.uint16)
        return self.partition.decide(row.offset, row.id, row.cluster, row.itm, vector)

    def kafka_commits(self) -> bool:
        """The transaction becomes visible; the store does not know yet."""
        if not self.open_decisions:
            return False
        for record in self.partition.changes("worker", 1000):
            self.log.append((self.end, record))
        self.log.append((self.end + 1, self.log.pop()[1]))  # offsets have gaps: commit markers
        self.decisions.update(self.open_decisions)
        self.open_decisions = {}
        return True

    def commit(self) -> None:
        if self.kafka_commits():
            self.partition.commit(self.end)

    def commit_while_the_next_is_decided(self) -> None:
        if self.kafka_commits():
            end = self.end
            self.sealed = True
            self.process(5)
            self.sealed = False
            self.partition.commit(end)

    def write_while_the_next_is_decided(self, *, in_sight: bool = False) -> None:
        """The store has the transaction before the partition ends it; in sight: and what is read of the store shows it."""
        if self.kafka_commits():
            end = self.end
            self.sealed = True
            self.process(2)
            self.partition.write(end)
            if in_sight:
                self.store.make_room()
            self.process(3)
            self.sealed = False
            self.partition.commit(end)

    def write_in_sight_while_the_next_is_decided(self) -> None:
        self.write_while_the_next_is_decided(in_sight=True)

    def abort_while_the_next_is_decided(self) -> None:
        """The transaction was sealed and Kafka refused it: what came on top of it is forgotten, too."""
        if self.open_decisions:
            self.partition.changes("worker", 1000)
            self.sealed = True
            self.process(5)
            self.sealed = False
            self.abort()

    def abort(self) -> None:
        self.open_decisions = {}
        self.partition.abort()

    def crash(self) -> None:
        """The process dies; its successor finds the same folder."""
        self.open_decisions = {}
        self.store.close()
        self.open_store()

    def crash_after_kafka_committed(self) -> None:
        self.kafka_commits()
        self.crash()

    def move(self) -> None:
        """The process dies, and its successor has an empty disk."""
        shutil.rmtree(self.folder / str(self.stores))
        self.stores += 1
        self.crash()

    def compact(self) -> None:
        """Kafka keeps the last record of each key."""
        last = {key: at for at, (key, _) in self.log}
        self.log = [(at, record) for at, record in self.log if last[record[0]] == at]

    def compact_and_drop_tombstones(self) -> None:
        """The same after delete.retention.ms, from when on only an empty store may be restored."""
        self.compact()
        self.log = [(at, record) for at, record in self.log if record[1] is not None]
        self.move()

    def reference(self, epochs: list[tuple[int, int]]) -> tuple[dict[str, Kept], dict[int, Outcome]]:
        # an image that cannot be decoded leaves no row, unless its id said that it need not be
        dead = {offset for offset, decision in self.decisions.items() if decision.fate is Fate.DEAD}
        return reduce_partition(
            (row for row in self.rows if row.offset in self.decisions and row.offset not in dead),
            seed=self.stream.seed,
            partition=PARTITION,
            p=self.stream.ratio.p,
            q=self.stream.ratio.q,
            cap=self.stream.cell_cap,
            window=self.stream.dedupe_window,
            gate=self.stream.gate,
            switches=epochs,
            cluster_in=lambda epoch, offset: assigned(f"bundle-{epoch}", np.full((1, 4), offset % 65536))[0],
        )

    def reduced(self) -> dict[str, Kept]:
        """What the store holds."""
        entries = (decode_entry(value) for _, value in self.store.entries())
        return {
            entry.pair_id: Kept(entry.epoch, entry.cluster, self.decisions[entry.offset].position, entry.offset)
            for entry in entries
        }

    def visible(self) -> set[str]:
        """What a reader of the kept pairs sees: added and removed in the order of the input."""
        ids = {row.offset: row.id for row in self.rows}
        visible: set[str] = set()
        for offset in sorted(self.decisions):
            visible.difference_update(self.decisions[offset].removed)
            if self.decisions[offset].fate is Fate.KEPT:
                assert ids[offset] not in visible
                visible.add(ids[offset])
        return visible


ENDINGS = ["go on", "commit", "commit", "abort", "crash", "crash_after_kafka_committed", "move", "compact"]
ENDINGS += ["compact_and_drop_tombstones", "commit_while_the_next_is_decided", "abort_while_the_next_is_decided"]
ENDINGS += ["write_while_the_next_is_decided", "write_in_sight_while_the_next_is_decided"]
ENDINGS += ["prepare", "prepare", "prepare_another"]
steps = st.lists(st.tuples(st.integers(1, 12), st.sampled_from(ENDINGS)), max_size=12)


@st.composite
def inputs(draw: st.DrawFn) -> list[Row]:
    row = st.tuples(
        st.integers(1, 3),
        st.integers(0, 9),
        st.sampled_from([0, 0, 0, 0, 1, 1, 2, DEAD, None]),
        st.sampled_from([0.9, 0.9, 0.5, 0.2, float("nan")]),
    )
    offset = draw(st.sampled_from([-1, 10_000, 2**40]))
    rows = []
    for gap, number, cluster, itm in draw(st.lists(row, min_size=draw(st.sampled_from([0, 30])), max_size=60)):
        offset += gap
        rows.append(Row(offset, f"id-{number}", cluster, itm))
    return rows


streams = st.builds(
    replace,
    st.just(STREAM),
    seed=st.integers(0, 3),
    ratio=st.sampled_from([Ratio(1, 1), Ratio(1, 2), Ratio(2, 3), Ratio(1, 4)]),
    cell_cap=st.sampled_from([None, 1, 2, 3]),
    dedupe_window=st.sampled_from([None, 1, 5, 15]),
    gate=st.sampled_from([None, None, 0.5]),
)


@settings(max_examples=400, deadline=None)
@given(
    inputs(), streams, steps, st.lists(st.integers(1, 59), max_size=2), st.sampled_from([0, 30, 10_000]), st.booleans()
)
@example(
    # counted at 0 and known by the reservoir alone at 4, when its K record has expired
    [Row(0, "a", 0), Row(1, "b", 0), Row(2, "c", 1), Row(4, "a", 0), Row(5, "b", 0), Row(6, "a", 0)],
    replace(STREAM, ratio=Ratio(1, 1), cell_cap=1, dedupe_window=1),
    [(1, "commit"), (1, "commit"), (1, "commit"), (1, "compact_and_drop_tombstones"), (1, "commit")],
    [],
    10_000,
    False,
)
def test_any_split_abort_crash_and_restore_gives_the_batch_references_set(
    rows: list[Row],
    stream: StreamSettings,
    script: list[tuple[int, str]],
    switches: list[int],
    live: int,
    in_columns: bool,
) -> None:
    with scratch() as folder:
        # given
        bundles = {0: "bundle-0"} | {at: f"bundle-{number}" for number, at in enumerate(sorted(set(switches)), 1)}
        life = Life(rows, stream, Path(folder), bundles, live, in_columns)

        # when
        for count, ending in script:
            life.process(count)
            if ending != "go on":
                getattr(life, ending)()
        life.process(len(rows))
        life.commit()

        # then
        reached = [at for at in sorted(bundles) if at < len(rows)]
        reduced, outcomes = life.reference([(rows[at].offset, epoch) for epoch, at in enumerate(reached)])
        event(f"pairs regrouped: {life.inherited}")
        assert life.reduced() == reduced
        assert life.visible() == set(reduced)
        assert_same_outcomes(life.decisions, outcomes)
        assert_totals_add_up(life, len(rows), len(reduced))
        assert_known_offsets(life, reduced, outcomes)
        assert_store_equals_changelog(life)
        life.store.close()


def assert_same_outcomes(decisions: dict[int, Decision], outcomes: dict[int, Outcome]) -> None:
    for offset, decision in decisions.items():
        if decision.fate is Fate.DEAD:
            continue
        outcome = outcomes[offset]
        assert (FATES[decision.fate], decision.position, decision.duplicate_of) == (
            outcome.fate,
            outcome.position,
            outcome.duplicate_of,
        )


def assert_totals_add_up(life: Life, read: int, in_the_set: int) -> None:
    t = life.partition.totals
    assert t.read == read == t.dead + t.duplicates + t.forgotten + t.below_gate + t.counted
    assert t.counted == t.kept + t.over_quota + t.over_cap
    assert in_the_set == t.kept - t.evicted - t.removed
    cells = [cell for _, _, cell in life.store.cells()]
    assert t.counted == sum(cell.counted for cell in cells)
    assert t.kept == sum(cell.entered for cell in cells)
    assert t.evicted == sum(cell.evicted for cell in cells)
    assert in_the_set == sum(cell.size for cell in cells)


def assert_known_offsets(life: Life, reduced: dict[str, Kept], outcomes: dict[int, Outcome]) -> None:
    """The store knows where each id was counted last, if that is in the window or the pair is in the reduced set."""
    ids = {row.offset: row.id for row in life.rows}
    counted = {ids[offset]: offset for offset, outcome in outcomes.items() if outcome.position >= 0}
    window = life.stream.dedupe_window
    for pair_id, offset in counted.items():
        if pair_id in reduced or window is None or offset >= (life.partition.next_offset or 0) - window:
            assert life.store.known_offset(hash_id(id_key(life.stream.seed), pair_id)[0]) == offset


def assert_store_equals_changelog(life: Life) -> None:
    """Key by key: this store, one restored from an empty directory, and the compacted changelog itself."""
    life.compact()
    with PartitionStore(life.folder / "restored") as restored:
        restored.apply([record for _, record in life.log], life.end)
        mine = dict(life.store.items())
        assert dict(restored.items()) == mine
        assert {key: value for _, (key, value) in life.log if value is not None} == mine
        for known in {hash_id(id_key(life.stream.seed), row.id)[0] for row in life.rows}:
            assert restored.known_offset(known) == life.store.known_offset(known)
        assert restored.known_count() == life.store.known_count()
        if life.stream.cell_cap is not None and (switch := life.partition.switch) is not None:
            regrouping = Regrouping(
                restored, switch.epoch, switch.bundle, partial(assigned, switch.bundle), switch.input_offset, alone=True
            )
            regrouping.finish()
            life.regrouping(switch.epoch, switch.bundle, switch.input_offset).finish()
            life.store.refresh()
            restored.refresh()
            marks = [life.store.marks(switch.epoch, cluster) for cluster in range(3)]
            assert [restored.marks(switch.epoch, cluster) for cluster in range(3)] == marks
            assert sum(map(len, marks)) == life.store.entry_count()


# -- promises, one by one ----------------------------------------------------------------------------------------------


@pytest.fixture
def life(tmp_path: Path) -> Iterator[Life]:
    life = Life([], replace(STREAM, ratio=Ratio(1, 1)), tmp_path)
    life.partition.adopt("bundle-0", "space", 0)
    yield life
    life.store.close()


VECTOR = np.zeros(4, np.uint16)


def test_a_pair_seen_twice_counts_once_in_a_batch_and_a_thousand_records_later(life: Life) -> None:
    partition = life.partition

    fates = [partition.decide(0, "a", 0, 1.0, VECTOR).fate, partition.decide(1, "a", 1, 1.0, VECTOR).fate]
    partition.changes("w", 0)
    partition.commit(1)
    for offset in range(2, 1000):
        partition.decide(offset, f"other-{offset}", 0, 1.0, VECTOR)
    later = partition.decide(1000, "a", 0, 1.0, VECTOR)

    assert fates == [Fate.KEPT, Fate.DUPLICATE]
    assert later == (Fate.DUPLICATE, -1, later.priority, 0, ())


def test_a_duplicate_at_the_very_edge_of_the_window_is_one_though_its_transaction_is_long_past(tmp_path: Path) -> None:
    stream = replace(STREAM, ratio=Ratio(1, 4), dedupe_window=5)
    over_quota = next(c for c in range(99) if not kept_positions(stream.seed, 0, 0, c, 0, stream.ratio) & 1)
    with PartitionStore(tmp_path) as store:
        partition = Partition(store, stream, 0)
        partition.adopt("bundle-0", "space", 0)
        for offset, name in ((10, "a"), (11, "b"), (14, "c")):
            partition.decide(offset, name, over_quota, 1.0, VECTOR)
            partition.changes("w", 0)
            partition.commit(offset)

        assert partition.decide(15, "a", 0, 1.0, VECTOR).duplicate_of == 10
        partition.abort()
        assert partition.decide(16, "a", 0, 1.0, VECTOR).duplicate_of == -1


def test_an_id_out_of_the_window_that_was_just_evicted_counts_again(tmp_path: Path) -> None:
    stream = replace(STREAM, ratio=Ratio(1, 1), cell_cap=1, dedupe_window=1)
    small, large = sorted("ab", key=lambda name: hash_id(id_key(stream.seed), name)[1])
    with PartitionStore(tmp_path) as store:
        partition = Partition(store, stream, 0)
        partition.adopt("bundle-0", "space", 0)
        partition.decide(0, large, 0, 1.0, VECTOR)
        partition.changes("w", 0)
        partition.commit(1)

        assert partition.decide(5, large, 0, 1.0, VECTOR).duplicate_of == 0
        assert partition.decide(6, small, 0, 1.0, VECTOR).removed == (large,)
        assert partition.decide(7, large, 0, 1.0, VECTOR).fate is Fate.OVER_CAP


def test_a_dead_letter_or_a_pair_below_the_gate_does_not_make_its_id_known(tmp_path: Path) -> None:
    with PartitionStore(tmp_path) as store:
        partition = Partition(store, replace(STREAM, ratio=Ratio(1, 1), gate=0.5), 0)
        partition.adopt("bundle-0", "space", 0)

        fates = [
            partition.dead(0).fate,
            partition.decide(1, "a", 0, 0.4, VECTOR).fate,
            partition.decide(2, "a", 0, 0.5, VECTOR).fate,
        ]

        assert fates == [Fate.DEAD, Fate.BELOW_GATE, Fate.KEPT]


def test_a_taken_down_id_never_comes_back_and_its_position_stays_counted(life: Life) -> None:
    partition = life.partition
    partition.decide(0, "a", 0, 1.0, VECTOR)
    taken = partition.take_down(1, "a")
    again = partition.decide(2, "a", 0, 1.0, VECTOR)
    records = dict(partition.changes("w", 0))
    partition.commit(1)
    other = partition.decide(3, "b", 0, 1.0, VECTOR)

    assert (taken.fate, taken.removed) == (Fate.FORGOTTEN, ("a",))
    assert again.fate is Fate.FORGOTTEN
    assert other.position == 1
    known = hash_id(id_key(1), "a")[0]
    assert decode_forgotten(records[forgotten_key(known)] or b"") == 1
    assert partition.fate_if_seen(known, 2**60) is Fate.FORGOTTEN


def test_a_takedown_makes_room_in_a_full_cell(tmp_path: Path) -> None:
    stream = replace(STREAM, ratio=Ratio(1, 1), cell_cap=2)
    order = sorted("abcd", key=lambda name: hash_id(id_key(stream.seed), name)[1])
    with PartitionStore(tmp_path) as store:
        partition = Partition(store, stream, 0)
        partition.adopt("bundle-0", "space", 0)
        partition.decide(0, order[0], 0, 1.0, VECTOR)
        partition.decide(1, order[1], 0, 1.0, VECTOR)

        taken = partition.take_down(2, order[1])
        into_the_room = partition.decide(3, order[3], 0, 1.0, VECTOR)
        into_the_full = partition.decide(4, order[2], 0, 1.0, VECTOR)

        assert taken.removed == (order[1],)
        assert (into_the_room.fate, into_the_room.removed) == (Fate.KEPT, ())
        assert (into_the_full.fate, into_the_full.removed) == (Fate.KEPT, (order[3],))


def test_the_heaps_of_live_cells_stay_within_their_bound_and_the_last_touched_stay(tmp_path: Path) -> None:
    with PartitionStore(tmp_path) as store:
        partition = Partition(store, replace(STREAM, ratio=Ratio(1, 1), cell_cap=2), 0, live_numbers_max=100)
        partition.adopt("bundle-0", "space", 0)
        for offset in range(200):
            partition.decide(offset, f"id-{offset}", offset // 4, 1.0, VECTOR)
            if offset % 10 == 9:
                partition.changes("w", 0)
                partition.commit(offset)
                assert partition.live_numbers <= 100
        assert partition.live_numbers > 80


def test_an_abort_takes_back_everything_a_takedown_included(life: Life) -> None:
    partition = life.partition
    partition.decide(0, "a", 0, 1.0, VECTOR)
    partition.changes("w", 0)
    partition.commit(1)
    before = (partition.next_offset, partition.epoch, partition.totals, partition.bundle)

    partition.take_down(1, "a")
    partition.decide(2, "b", 0, 1.0, VECTOR)
    partition.abort()
    partition.adopt("bundle-1", "space", 1)
    partition.decide(1, "c", 0, 1.0, VECTOR)
    partition.abort()

    assert (partition.next_offset, partition.epoch, partition.totals, partition.bundle) == before
    assert partition.decide(1, "b", 0, 1.0, VECTOR).position == 1
    assert partition.decide(2, "a", 0, 1.0, VECTOR).fate is Fate.DUPLICATE


def test_an_evicted_pair_names_itself_and_the_smallest_priorities_stay(tmp_path: Path) -> None:
    with PartitionStore(tmp_path) as store:
        partition = Partition(store, replace(STREAM, ratio=Ratio(1, 1), cell_cap=3), 0)
        partition.adopt("bundle-0", "space", 0)
        decisions = [partition.decide(offset, f"id-{offset}", 0, 1.0, VECTOR) for offset in range(30)]
        partition.changes("w", 0)
        partition.commit(1)

        inside = {decode_entry(value).pair_id for _, value in store.entries()}
        kept = [f"id-{offset}" for offset, decision in enumerate(decisions) if decision.fate is Fate.KEPT]
        evicted = [name for decision in decisions for name in decision.removed]
        order = sorted(range(30), key=lambda offset: decisions[offset].priority)
        assert inside == {f"id-{offset}" for offset in order[:3]} == set(kept) - set(evicted)


def test_the_present_bundle_adopted_again_begins_no_epoch_and_a_foreign_one_is_refused(life: Life) -> None:
    partition = life.partition
    partition.skip(7)

    assert partition.adopt("bundle-0", "space", 7) == 0
    assert partition.adopt("bundle-1", "space", 7) == 1
    with pytest.raises(SettingsDiffer, match="needs a new stream"):
        partition.adopt("bundle-2", "another space", 8)
    assert (partition.epoch, partition.bundle) == (1, "bundle-1")


def test_a_store_of_a_stream_with_other_settings_is_refused(life: Life) -> None:
    life.partition.decide(0, "a", 0, 1.0, VECTOR)
    life.partition.changes("w", 0)
    life.partition.commit(1)

    with pytest.raises(SettingsDiffer, match="dedupe_window is None in the stream and 5 here"):
        Partition(life.store, replace(life.stream, dedupe_window=5), PARTITION)


def test_a_transaction_that_only_moves_over_a_gap_in_the_input_is_one(life: Life) -> None:
    life.partition.next_offset = 1000
    life.partition.changes("w", 0)
    life.partition.commit(5)

    position = life.store.position()
    assert position is not None
    assert (position.next_offset, life.store.changelog_position) == (1000, 5)


def test_changes_without_a_bundle_and_a_commit_without_changes_are_bugs_of_the_caller(tmp_path: Path) -> None:
    with PartitionStore(tmp_path) as store:
        partition = Partition(store, STREAM, 0)
        with pytest.raises(ValueError, match="a bundle"):
            partition.changes("w", 0)
        with pytest.raises(ValueError, match="nothing to commit"):
            partition.commit(1)
        with pytest.raises(ValueError, match="not known"):
            partition.duplicate(0, "a")
