"""A switch of the bundle: who competes with whom afterwards, and that it is prepared beside the running stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from state.errors import StoreClosed
from state.partition import Fate, Partition
from state.partition_store import PartitionStore
from state.quota import Ratio
from state.regroup import Regrouping, sweep
from state.reservoir import LEAVE_AT_ONCE
from state.settings import StreamSettings
from stream.batch_tldr import Row, reduce_partition

STREAM = StreamSettings(1, "topic-id", 1, Ratio(1, 1), 4, None, None, "paper", "space", 2)
Assign = Callable[[NDArray[np.uint16]], NDArray[np.int32]]


def vector(offset: int) -> NDArray[np.uint16]:
    return np.array([offset % 65536, offset // 65536], np.uint16)


def numbers(vectors: NDArray[np.uint16]) -> NDArray[np.int64]:
    return vectors[:, 0].astype(np.int64) + vectors[:, 1].astype(np.int64) * 65536


def clusters_of(switch: int, clusters: int, moved: int = 5) -> Assign:
    """Clusters after so many switches, each of which moves one entry in `moved` to another one."""

    def assign(vectors: NDArray[np.uint16]) -> NDArray[np.int32]:
        at = numbers(vectors)
        moves = sum(((at * 2654435761 + n * 40503 >> 7) % moved == 0).astype(np.int64) for n in range(switch))
        found: NDArray[np.int32] = ((at + moves) % clusters).astype(np.int32)
        return found

    return assign


class Stream:
    """A partition that is fed pairs, a commit for each call, and switched."""

    def __init__(self, folder: Path, settings: StreamSettings, assign: Assign, map_bytes: int = 1 << 24) -> None:
        self.store = PartitionStore(folder, map_bytes=map_bytes)
        self.settings = settings
        self.partition = Partition(self.store, settings, 0)
        self.assigns = [assign]
        self.partition.adopt("bundle-0", "space", 0)
        self.rows: list[Row] = []
        self.switches = [(0, 0)]
        self.fates: dict[int, tuple[Fate, tuple[str, ...]]] = {}
        self.changelog = 0

    def feed(self, count: int) -> list[tuple[Fate, tuple[str, ...]]]:
        first = len(self.rows)
        for offset in range(first, first + count):
            cluster = int(self.assigns[-1](vector(offset)[None])[0])
            self.rows.append(Row(offset, f"id-{offset}", cluster))
            decision = self.partition.decide(offset, f"id-{offset}", cluster, 1.0, vector(offset))
            self.fates[offset] = decision.fate, decision.removed
        self.commit()
        return [self.fates[offset] for offset in range(first, first + count)]

    def commit(self) -> None:
        self.changelog += len(self.partition.changes("w", 0))
        self.partition.commit(self.changelog)

    def regrouping(self, assign: Assign) -> Regrouping:
        epoch = self.partition.epoch + 1
        return Regrouping(self.store, epoch, f"bundle-{epoch}", assign, rows_a_step=100)

    def switch(self, assign: Assign, *, prepared: bool = True) -> None:
        regrouping = self.regrouping(assign)
        if prepared:
            regrouping.step()
        epoch = self.partition.adopt(regrouping.bundle, "space", len(self.rows), regrouping.tail())
        self.assigns.append(assign)
        self.switches.append((len(self.rows), epoch))
        self.commit()

    def in_the_set(self) -> set[str]:
        removed = {gone for _, removed in self.fates.values() for gone in removed}
        return {self.rows[at].id for at, (fate, _) in self.fates.items() if fate is Fate.KEPT} - removed

    def reference(self) -> set[str]:
        settings = self.settings
        reduced, outcomes = reduce_partition(
            self.rows, seed=settings.seed, partition=0, p=settings.ratio.p, q=settings.ratio.q, cap=settings.cell_cap,
            switches=self.switches,
            cluster_in=lambda epoch, offset: int(self.assigns[epoch](vector(offset)[None])[0]),
        )  # fmt: skip
        assert {at: fate.name.lower().replace("_", " ") for at, (fate, _) in self.fates.items()} == {
            at: outcome.fate for at, outcome in outcomes.items()
        }
        return set(reduced)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Stream]]:
    made: list[Stream] = []

    def one(assign: Assign, **settings: object) -> Stream:
        made.append(Stream(tmp_path / str(len(made)), replace(STREAM, **settings), assign))  # type: ignore[arg-type]
        return made[-1]

    yield one
    for stream in made:
        stream.store.close()


def test_a_switch_that_finds_no_room_in_the_map_makes_some(tmp_path: Path) -> None:
    # given: so many entries that the map is nearly full
    stream = Stream(tmp_path, STREAM, clusters_of(0, 3), map_bytes=1 << 16)
    stream.feed(208)
    wanted, make_room = [], stream.store.make_room

    def making_room() -> None:
        wanted.append(stream.store.room_wanted)
        make_room()

    stream.store.make_room = making_room  # type: ignore[method-assign]

    stream.switch(clusters_of(1, 3), prepared=False)

    assert any(wanted)
    assert stream.in_the_set() == stream.reference()
    stream.store.close()


def test_five_switches_that_move_a_fifth_of_the_entries_shrink_no_cell_that_is_under_its_cap(
    make: Callable[..., Stream],
) -> None:
    stream = make(clusters_of(0, 20), cell_cap=1000)
    stream.feed(2000)
    moved = []

    for number in range(1, 6):
        before = clusters_of(number - 1, 20)(np.stack([vector(row.offset) for row in stream.rows]))
        after = clusters_of(number, 20)(np.stack([vector(row.offset) for row in stream.rows]))
        moved.append(float((before != after).mean()))
        stream.switch(clusters_of(number, 20))
        stream.feed(200)

    assert all(0.15 < share < 0.25 for share in moved)
    assert len(stream.in_the_set()) == len(stream.rows) == 3000
    assert stream.in_the_set() == stream.reference()
    assert stream.partition.totals.evicted == 0


def test_a_switch_evicts_nobody_and_a_cell_over_its_cap_shrinks_step_by_step_to_the_smallest_priorities(
    make: Callable[..., Stream],
) -> None:
    stream = make(clusters_of(0, 50), cell_cap=4)
    stream.feed(1000)
    full = stream.in_the_set()

    stream.switch(lambda vectors: np.zeros(len(vectors), np.int32))  # all in one
    after_switch = stream.in_the_set()
    sizes = []
    for _ in range(20):
        ((_, removed),) = stream.feed(1)
        assert len(removed) <= LEAVE_AT_ONCE
        sizes.append(len(stream.in_the_set()))

    assert after_switch == full and len(full) == 200
    assert sizes[0] == 200 + 1 - LEAVE_AT_ONCE
    assert sizes[-1] == 4
    assert stream.in_the_set() == stream.reference()


def test_an_entry_added_and_one_removed_while_a_switch_is_prepared_are_where_they_belong_after_it(
    make: Callable[..., Stream],
) -> None:
    stream = make(clusters_of(0, 10), cell_cap=40)
    stream.feed(400)
    regrouping = stream.regrouping(clusters_of(1, 7, moved=2))
    regrouping.step()

    stream.feed(50)  # some evict entries that are grouped already
    stream.partition.take_down(450, "id-3")
    stream.rows.append(Row(450, "id-3", None))
    stream.fates[450] = Fate.FORGOTTEN, ("id-3",)
    stream.commit()
    stream.switch(clusters_of(1, 7, moved=2))
    stream.feed(50)
    Regrouping(stream.store, 1, "bundle-1", clusters_of(1, 7, moved=2), 451, rows_a_step=30).finish()
    stream.feed(50)

    assert stream.in_the_set() == stream.reference()
    marks = [mark for cluster in range(7) for mark in stream.store.marks(1, cluster)]
    assert len(marks) == stream.store.entry_count() == len(stream.in_the_set())


def test_what_was_prepared_for_a_bundle_that_never_came_is_removed_and_old_epochs_are_swept(
    make: Callable[..., Stream],
) -> None:
    stream = make(clusters_of(0, 10), cell_cap=40)
    stream.feed(400)
    never = Regrouping(stream.store, 1, "never", clusters_of(3, 4), rows_a_step=100)
    never.finish()

    stream.switch(clusters_of(1, 10))
    stream.switch(clusters_of(2, 10))
    Regrouping(stream.store, 2, "bundle-2", clusters_of(2, 10), 400).finish()
    while sweep(stream.store):
        pass
    stream.store.refresh()

    assert stream.in_the_set() == stream.reference()
    assert [stream.store.marks(epoch, cluster) for epoch in (0, 1) for cluster in range(10)] == [[]] * 20
    assert sum(len(stream.store.marks(2, cluster)) for cluster in range(10)) == stream.store.entry_count()
    assert not stream.store.grouped(1, "bundle-1", 0)


def test_a_switch_that_is_not_prepared_or_comes_inside_a_transaction_is_a_bug_of_the_caller(
    make: Callable[..., Stream],
) -> None:
    stream = make(clusters_of(0, 10), cell_cap=40)
    stream.feed(10)

    with pytest.raises(ValueError, match="not grouped"):
        stream.partition.adopt("bundle-1", "space", 10)
    stream.partition.decide(10, "id-10", 0, 1.0, vector(10))
    with pytest.raises(ValueError, match="not begun"):
        stream.partition.adopt("bundle-1", "space", 11)


def test_a_partition_that_is_taken_back_ends_what_goes_on_beside_it(tmp_path: Path) -> None:
    store = PartitionStore(tmp_path)
    store.close()

    with pytest.raises(StoreClosed):
        Regrouping(store, 1, "bundle", clusters_of(0, 3)).step()


def test_grouping_replaces_pages_and_does_not_pile_them_up(make: Callable[..., Stream]) -> None:
    """Entries of one step lie in cells all over, so that a step replaces most pages of their marks."""
    stream = make(clusters_of(0, 1000), cell_cap=50)
    stream.feed(20_000)
    file = Path(stream.store.path) / "data.mdb"
    before = file.stat().st_size
    regrouping = stream.regrouping(clusters_of(1, 1000))

    while regrouping.step():
        stream.store.make_room()  # as the worker's loop does between two batches

    assert file.stat().st_size < 2.5 * before
