"""The store of a partition beside a plain dict: it holds the last record of every key, whatever happens."""

from __future__ import annotations

import random
import resource
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from state import changelog
from state.changelog import CellCounts, Position, Record, Switch, Totals
from state.errors import StoreCorrupt, StoreFull, UnknownRecord
from state.partition_store import PartitionStore
from state.quota import Ratio
from state.reservoir import mark_of, rank_of
from state.settings import StreamSettings
from tests.state.test_partition import scratch

STREAM = StreamSettings(1, "topic-id", 1, Ratio(1, 2), 5, 100, None, "paper", "space", 4)
HASHES = [0, 1, 2**63, 2**64 - 1]


def entry(known: int, offset: int, cluster: int = 0) -> Record:
    value = changelog.encode_entry(offset, 0, cluster, known ^ 12345, Ratio(1, 2), f"id-{known}".encode(), bytes(8))
    return changelog.entry_key(known), value


def counted(ids: dict[int, int]) -> list[Record]:
    return changelog.encode_known(np.array([*ids], np.uint64), np.array([*ids.values()], np.uint64))


class StoreBesideADict(RuleBasedStateMachine):
    """Transactions as a partition makes them, restarts, crashes and copies of the folder."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = scratch()
        self.generation = 0
        self.model: dict[bytes, bytes] = {}
        self.inside: dict[int, tuple[int, int]] = {}  # hash → (offset, cluster) of the entries
        self.batches: list[dict[int, int]] = []  # K records there are, oldest first
        self.offset = 0
        self.log: list[Record] = []
        self.store = PartitionStore(self.path, map_bytes=1 << 16)

    @property
    def path(self) -> Path:
        return Path(self.folder.name) / str(self.generation)

    def apply(self, *records: Record) -> None:
        self.log.extend(records)
        self.store.apply(records, len(self.log))
        for key, value in records:
            if value is None:
                self.model.pop(key, None)
            else:
                self.model[key] = value

    @initialize()
    def first_transaction(self) -> None:
        self.apply((b"S", STREAM.to_json()), (changelog.switch_key(0), changelog.encode_switch(Switch(0, "b", "s", 0))))

    @rule(ids=st.lists(st.sampled_from(HASHES), unique=True), keep=st.sets(st.sampled_from(HASHES)))
    def count(self, ids: list[int], keep: set[int]) -> None:
        fresh = [known for known in ids if known not in self.inside]
        batch = {known: self.offset + number for number, known in enumerate(fresh)}
        self.offset += 10
        entries = [entry(known, offset, offset % 2) for known, offset in batch.items() if known in keep]
        self.inside |= {known: (offset, offset % 2) for known, offset in batch.items() if known in keep}
        self.batches += [batch] if batch else []
        cell = changelog.cells_key(0, 0), changelog.encode_cells(np.array([[self.offset, len(self.inside), 0, 0]]))
        position = Position(self.offset, 0, 0, "w", Totals())
        self.apply(*entries, *counted(batch), cell, (b"P", changelog.encode_position(position)))

    @rule(known=st.sampled_from(HASHES))
    def leave(self, known: int) -> None:
        self.inside.pop(known, None)
        self.apply((changelog.entry_key(known), None))

    @rule(known=st.sampled_from(HASHES))
    def take_down(self, known: int) -> None:
        self.inside.pop(known, None)
        forgotten = changelog.forgotten_key(known), changelog.encode_forgotten(self.offset)
        self.apply((changelog.entry_key(known), None), forgotten)

    @rule()
    def expire_the_oldest(self) -> None:
        if self.batches:
            oldest = self.batches.pop(0)
            self.apply((changelog.known_key(min(oldest.values())), None))

    @rule()
    def a_strange_record_changes_nothing(self) -> None:
        with pytest.raises(UnknownRecord):
            self.store.apply([entry(7, self.offset), (b"Z", b"")], 10**9)

    @rule(size=st.integers(1, 200_000))
    def a_transaction_larger_than_the_map(self, size: int) -> None:
        position = Position(self.offset, 0, 0, "x" * size, Totals())
        self.apply((b"P", changelog.encode_position(position)))

    @rule()
    def close_and_reopen(self) -> None:
        self.store.close()
        self.store = PartitionStore(self.path, map_bytes=1 << 16)

    @rule()
    def crash_and_reopen(self) -> None:
        # what lies on the disk at this moment, without closing anything
        shutil.copytree(self.path, Path(self.folder.name) / str(self.generation + 1))
        self.store.close()
        self.generation += 1
        self.store = PartitionStore(self.path)

    @rule(pieces=st.integers(1, 5))
    def restore_into_an_empty_directory(self, pieces: int) -> None:
        self.store.close()
        self.generation += 1
        self.store = PartitionStore(self.path)
        for cut in range(0, len(self.log), pieces):
            self.store.apply(self.log[cut : cut + pieces], min(cut + pieces, len(self.log)))

    @rule(back=st.integers(1, 30))
    def apply_the_tail_of_the_changelog_again(self, back: int) -> None:
        self.store.apply(self.log[-back:], len(self.log))

    @invariant()
    def the_store_holds_the_last_record_of_every_key(self) -> None:
        assert dict(self.store.items()) == self.model

    @invariant()
    def known_are_the_ids_of_known_records_and_of_entries(self) -> None:
        known = {known: offset for batch in self.batches for known, offset in batch.items()}
        known |= {known: offset for known, (offset, _) in self.inside.items()}
        assert {name: self.store.known_offset(name) for name in HASHES} == {name: known.get(name) for name in HASHES}
        assert self.store.known_count() == len(known)
        assert list(self.store.known_firsts()) == [min(batch.values()) for batch in self.batches]

    @invariant()
    def entries_are_found_by_their_offset_and_by_rank(self) -> None:
        assert self.store.entry_count() == len(self.inside)
        for known, (offset, cluster) in self.inside.items():
            assert self.store.entry_at(offset) == (known, entry(known, offset, cluster)[1])
        for cluster in (0, 1):
            assert self.store.marks(0, cluster) == sorted(
                mark_of(rank_of(known ^ 12345, Ratio(1, 2)), offset)
                for known, (offset, its) in self.inside.items()
                if its == cluster
            )

    @invariant()
    def the_position_is_the_one_of_the_last_transaction(self) -> None:
        assert (self.store.changelog_position or 0) == len(self.log)

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()


TestStoreBesideADict = StoreBesideADict.TestCase
TestStoreBesideADict.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_a_new_store_knows_nothing(tmp_path: Path) -> None:
    with PartitionStore(tmp_path) as store:
        assert store.changelog_position is None
        assert store.settings() is None
        assert store.position() is None
        assert store.cell(0, 0) is None
        assert list(store.items()) == []


def test_cells_switches_and_takedowns_are_listed_in_order(tmp_path: Path) -> None:
    with PartitionStore(tmp_path) as store:
        cells = [(0, 3, CellCounts(1, 0, 0, 0)), (0, 4, CellCounts(9, 2, 1, 1)), (1, 64, CellCounts(4, 1, 0, 1))]
        switches = [Switch(epoch, f"bundle-{epoch}", "space", epoch * 10) for epoch in range(3)]
        store.apply(
            [
                (changelog.cells_key(1, 64), changelog.encode_cells(np.array([[4, 1, 0, 1]]))),
                (
                    changelog.cells_key(0, 0),
                    changelog.encode_cells(np.array([[0] * 4] * 3 + [[1, 0, 0, 0], [9, 2, 1, 1]])),
                ),
            ]
            + [(changelog.switch_key(switch.epoch), changelog.encode_switch(switch)) for switch in switches]
            + [(changelog.forgotten_key(known), changelog.encode_forgotten(1)) for known in (9, 3)],
            1,
        )

        assert list(store.cells()) == cells
        assert [store.cell(epoch, cluster) for epoch, cluster, _ in cells] == [counts for *_, counts in cells]
        assert [store.cell(*cell) for cell in ((0, 0), (0, 5), (1, 65), (1, 0))] == [None] * 4
        assert store.cells_of_epoch(1)[64].tolist() == [4, 1, 0, 1]
        assert store.switches() == switches
        assert list(store.forgotten()) == [3, 9]


WRITER = """
import sys
from state.partition_store import PartitionStore
from tests.state.test_partition_store import a_batch
store = PartitionStore(sys.argv[1], map_bytes=1 << 16)
for number in range(10_000):
    store.apply(a_batch(number), number + 1)
    print(number + 1, flush=True)
"""


def a_batch(number: int) -> list[Record]:
    """A transaction that replaces what earlier ones wrote."""
    offset = 100 * number
    entries = [entry(offset % 997 + i, offset + i) for i in range(20)]
    ids = {offset % 997 + i: offset + i for i in range(20)}
    gone = [(changelog.entry_key(offset % 97 + i), None) for i in range(5)]
    return [*gone, *entries, *counted(ids), (changelog.known_key(offset - 500), None)] if number > 5 else entries


@pytest.mark.parametrize("after", [1, 7, 40])
def test_a_store_whose_process_was_killed_is_the_one_of_its_last_commit(tmp_path: Path, after: int) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "killed")], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        for _ in range(after):
            acknowledged = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)

    with PartitionStore(tmp_path / "killed") as killed, PartitionStore(tmp_path / "whole") as whole:
        position = killed.changelog_position
        assert position is not None
        assert position >= acknowledged
        for number in range(position):
            whole.apply(a_batch(number), number + 1)
        assert dict(killed.items()) == dict(whole.items())
        assert killed.known_count() == whole.known_count()


def test_a_full_disk_is_one_clear_error_and_nothing_is_lost(tmp_path: Path) -> None:
    # A limit on the size of files fails a write as a full disk does, without needing one (and root to make it).
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with PartitionStore(tmp_path) as store:
        store.apply(a_batch(0), 1)
        before = dict(store.items())
        room = (tmp_path / "data.mdb").stat().st_size + (1 << 16)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            with pytest.raises(StoreFull, match="make room on its disk") as full:
                store.apply([record for number in range(1, 200) for record in a_batch(number)], 200)
            assert (dict(store.items()), store.changelog_position) == (before, 1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

        assert "\n" not in str(full.value)
        store.apply([record for number in range(1, 200) for record in a_batch(number)], 200)

    with PartitionStore(tmp_path) as store, PartitionStore(tmp_path / "whole") as whole:
        for number in range(200):
            whole.apply(a_batch(number), number + 1)
        assert dict(store.items()) == dict(whole.items())


def test_what_is_written_beside_shows_once_its_user_looks_again(tmp_path: Path) -> None:
    with PartitionStore(tmp_path) as store, ThreadPoolExecutor(1) as beside:
        store.apply(a_batch(0), 1)
        before = dict(store.items())

        written = beside.submit(store.apply_beside, a_batch(1), 2).result()

        assert written
        assert (dict(store.items()), store.changelog_position) == (before, 1)
        store.refresh()
        assert dict(store.items()) == before | dict(a_batch(1))
        assert store.changelog_position == 2


def test_what_the_map_has_no_room_for_is_not_written_beside_and_its_user_makes_room(tmp_path: Path) -> None:
    big = changelog.switch_key(0), changelog.encode_switch(Switch(0, "x" * 3_000_000, "s", 0))
    with PartitionStore(tmp_path, map_bytes=1 << 18) as store:
        written = store.apply_beside([big], 1)

        assert (written, store.room_wanted, list(store.items())) == (False, True, [])
        store.make_room()
        store.apply([big], 1)
        assert len(store.switches()) == 1


def test_what_is_no_store_is_refused_with_the_remedy(tmp_path: Path) -> None:
    dice = random.Random(1)
    (tmp_path / "data.mdb").write_bytes(dice.randbytes(20_000))

    with pytest.raises(StoreCorrupt, match="remove the folder: it is rebuilt from the changelog") as refused:
        PartitionStore(tmp_path)

    assert "\n" not in str(refused.value)


def test_a_store_larger_than_the_map_that_was_asked_for_opens(tmp_path: Path) -> None:
    big = changelog.switch_key(0), changelog.encode_switch(Switch(0, "x" * 3_000_000, "s", 0))
    with PartitionStore(tmp_path, map_bytes=1 << 16) as store:
        store.apply([big], 1)

    with PartitionStore(tmp_path, map_bytes=1 << 16) as store:
        store.apply([(changelog.switch_key(1), big[1])], 2)
        assert len(store.switches()) == 2
