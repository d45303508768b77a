"""Which bundle a partition gets: announcements on a real topic, real stores, and what happens when one cannot be loaded."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from models.errors import BundleError
from models.model import PairModel
from models.null import NullModel
from state.partition import Partition
from state.partition_store import PartitionStore
from state.quota import Ratio
from state.regroup import Regrouping
from state.settings import StreamSettings
from stream.bundle_switch import BundleComing, BundleMissing, BundleSwitch, Cancelled
from stream.bundles import Announced, Announcement, announce, announce_folder
from stream.errors import TldrError
from stream.kafka import Connection
from stream.metrics import Metrics
from tests.end_to_end.worker_process import until

BASE = NullModel()
STREAM = StreamSettings(1, "topic-id", 1, Ratio(1, 1), 2, None, None, "none", BASE.space, BASE.tokens)


class Worker:
    """What a worker has of it: partitions that run, and a bundle switch that follows the stream `name`."""

    def __init__(self, kafka: Connection, name: str, folder: Path, *, capped: bool = True) -> None:
        self.kafka, self.name, self.folder = kafka, name, folder
        self.settings = replace(STREAM, cell_cap=2 if capped else None)
        self.running: dict[int, Partition] = {}
        self.metrics, self.models, self.missing = Metrics(), dict[str, PairModel](), set[str]()
        self.broken = set[str]()
        self.loads: list[str] = []
        self.brought: dict[str, PairModel] = {}  # what a URI holds, where that is no null model as others
        self.arrives: dict[str, threading.Event] = {}  # of bundles that are slow to fetch
        self.switch = BundleSwitch(
            BASE, name, name, Announced(kafka), self.load, lambda: self.running, capped, self.metrics, self.models
        )
        self.changelog = 0

    def load(self, announcement: Announcement, cancelled: Cancelled) -> PairModel:
        self.loads.append(announcement.uri)
        if announcement.uri in self.arrives:
            while not self.arrives[announcement.uri].wait(0.05):
                if cancelled():
                    raise BundleError("given up")
        if announcement.uri in self.missing:
            raise BundleError(f"{announcement.uri} is cut off")
        if announcement.uri in self.broken:
            raise RuntimeError("a tensor has another shape")
        return self.brought.get(announcement.uri) or NullModel.at(announcement.uri)

    def open(self, number: int) -> Partition:
        return Partition(PartitionStore(self.folder / str(number), map_bytes=1 << 24), self.settings, number)

    def run(self, number: int) -> Partition:
        """What a restore ends with."""
        partition = self.open(number)
        try:
            self.switch.make_ready(partition, partition.next_offset or 0, lambda: False)
        except BaseException:
            partition.store.close()
            raise
        self.switch.begin(partition, partition.next_offset or 0)
        self.running[number] = partition
        return partition

    def close(self, number: int) -> None:
        self.running.pop(number).store.close()

    def feed(self, number: int, count: int) -> None:
        partition = self.running[number]
        first = partition.next_offset or 0
        model = self.models[partition.bundle or ""]
        for offset in range(first, first + count):
            vector = np.full((1, BASE.tokens), offset, np.uint16)
            partition.decide(offset, f"id-{offset}", int(model.assign(vector)[0]), 1.0, vector[0])
        self.commit(number)

    def commit(self, number: int) -> None:
        partition = self.running[number]
        self.changelog += len(partition.changes("w", 0))
        partition.commit(self.changelog)

    def until_ready(self, *numbers: int) -> None:
        until(lambda: self.switch.ready(self.running) == list(numbers), f"{numbers} are ready", 20)

    def look_and_prepare(self) -> None:
        """What the thread does, for tests that have none."""
        self.switch._look()
        while self.switch._prepare():
            pass

    def switch_over(self, *numbers: int) -> None:
        self.until_ready(*numbers)
        for number in numbers:
            assert self.switch.adopt(self.running[number])
            self.commit(number)

    def leave_partition_in(self, uri: str) -> Announcement:
        """Runs partition 0 up to the offset 5, switches it to the bundle `uri` and lets go of it."""
        self.run(0)
        self.feed(0, 5)
        announcement = announce_folder(self.kafka, uri, self.name)
        self.switch_over(0)
        self.close(0)
        return announcement


@pytest.fixture
def worker(kafka: Connection, name: str, tmp_path: Path) -> Iterator[Worker]:
    made = Worker(kafka, name, tmp_path)
    made.switch.start()
    yield made
    made.switch.close()
    for partition in made.running.values():
        partition.store.close()


def test_a_running_partition_goes_from_bundle_to_bundle_back_again_and_twice_the_same_is_nothing(
    worker: Worker,
) -> None:
    worker.run(0)
    worker.feed(0, 20)
    bundles = []
    for uri in ("null:1/2", "null:2/3", "null:1/2"):
        announced = announce_folder(worker.kafka, uri, worker.name)
        worker.switch_over(0)
        worker.feed(0, 10)
        bundles.append(announced.version)
    announce_folder(worker.kafka, "null:1/2", worker.name)
    worker.switch._look()

    assert worker.switch.ready(worker.running) == []
    assert [switch.bundle for switch in worker.running[0].store.switches()] == [BASE.version, *bundles]
    assert [switch.input_offset for switch in worker.running[0].store.switches()] == [0, 20, 30, 40]


def test_a_bundle_that_cannot_be_loaded_changes_nothing_but_a_metric_until_it_can(worker: Worker) -> None:
    worker.run(0)
    worker.feed(0, 5)
    worker.missing.add("null:1/2")
    announced = announce_folder(worker.kafka, "null:1/2", worker.name)
    missing = worker.metrics.registry.get_sample_value

    until(lambda: missing("tldr_bundle_missing") == 1, "the metric tells it", 20)
    assert worker.switch.ready(worker.running) == []
    worker.feed(0, 5)
    worker.missing.clear()
    worker.switch._failed.clear()  # it is tried again after ten seconds
    worker.switch_over(0)

    assert worker.running[0].bundle == announced.version
    assert missing("tldr_bundle_missing") == 0


def test_a_partition_that_comes_while_a_bundle_is_fetched_does_not_wait_for_it(worker: Worker) -> None:
    worker.run(0)
    worker.feed(0, 5)
    worker.arrives["null:1/2"] = arrives = threading.Event()
    announced = announce_folder(worker.kafka, "null:1/2", worker.name)
    until(lambda: worker.loads == ["null:1/2"], "it is being fetched", 20)

    worker.close(0)
    worker.run(0)
    worker.feed(0, 5)

    assert not arrives.is_set() and worker.running[0].bundle == BASE.version
    arrives.set()
    worker.switch_over(0)
    assert worker.running[0].bundle == announced.version


def test_a_worker_that_starts_waits_for_no_bundle_and_is_switched_once_it_has_come(
    worker: Worker, late: Worker
) -> None:
    late.arrives["null:1/2"] = arrives = threading.Event()
    announced = announce_folder(worker.kafka, "null:1/2", worker.name)

    started = threading.Thread(target=late.switch.start, daemon=True)
    started.start()
    started.join(5)
    assert not started.is_alive()
    try:
        late.run(0)
        late.feed(0, 20)
        assert late.running[0].bundle == BASE.version
        arrives.set()
        late.switch_over(0)
        late.feed(0, 20)
    finally:
        arrives.set()
        late.switch.close()

    assert [(s.bundle, s.input_offset) for s in late.running[0].store.switches()] == [
        (BASE.version, 0),
        (announced.version, 20),
    ]


def test_a_worker_that_starts_with_the_newest_bundle_begins_with_it_and_stays(worker: Worker, late: Worker) -> None:
    announce_folder(worker.kafka, "null:1/2", worker.name)
    announce(worker.kafka, "null:0", BASE.version, BASE.space, worker.name)

    late.run(0)
    late.feed(0, 5)
    late.look_and_prepare()

    assert late.switch.ready(late.running) == [] and not late.switch.pending(late.running)
    assert late.loads == [] and late.switch.target is BASE


def test_a_partition_of_which_nothing_was_read_begins_with_the_bundle_that_has_come_where_it_would_have_begun(
    late: Worker,
) -> None:
    announced = announce_folder(late.kafka, "null:1/2", late.name)
    late.running[0] = partition = late.open(0)
    late.switch.begin(partition, 500)  # the topic begins there
    late.look_and_prepare()

    assert late.switch.ready(late.running) == [0]
    assert not late.switch.adopt(partition)  # there is nothing to write yet

    assert partition.switch is not None and (partition.epoch, partition.bundle) == (0, announced.version)
    assert partition.switch.input_offset == 500


def test_whoever_stops_at_the_end_waits_for_a_bundle_that_is_being_fetched_and_not_for_one_that_cannot_be_had(
    worker: Worker,
) -> None:
    worker.run(0)
    worker.feed(0, 5)
    worker.arrives["null:1/2"] = arrives = threading.Event()
    worker.missing.add("null:1/2")
    announce_folder(worker.kafka, "null:1/2", worker.name)

    until(lambda: worker.loads == ["null:1/2"], "it is being fetched", 20)
    assert worker.switch.pending(worker.running)

    arrives.set()
    until(lambda: not worker.switch.pending(worker.running), "the fetch has failed", 20)


def test_a_restore_that_would_have_to_wait_for_a_fetch_makes_room_for_others(worker: Worker, late: Worker) -> None:
    # given: two partitions in a bundle that is slow to come, and one in the base
    for number in (0, 1):
        worker.run(number)
        worker.feed(number, 5)
    announce_folder(worker.kafka, "null:1/2", worker.name)
    worker.switch_over(0, 1)
    for number in (0, 1):
        worker.close(number)
    late.arrives["null:1/2"] = arrives = threading.Event()
    first = threading.Thread(target=late.run, args=(0,), daemon=True)
    first.start()
    until(lambda: late.loads == ["null:1/2"], "it is being fetched", 20)

    # when
    with pytest.raises(BundleComing, match="another one is being fetched"):
        late.run(1)
    arrives.set()
    first.join(20)
    late.run(1)

    # then
    assert late.loads == ["null:1/2"] and sorted(late.running) == [0, 1]


def test_a_partition_that_comes_with_a_bundle_that_cannot_be_had_is_not_run_in_an_older_epoch(worker: Worker) -> None:
    worker.leave_partition_in("null:1/2")
    late = Worker(worker.kafka, worker.name, worker.folder)  # another process, which cannot load it
    late.missing.add("null:1/2")
    late.switch.start()
    try:
        with pytest.raises(BundleMissing, match="cannot be loaded here: null:1/2 is cut off"):
            late.run(0)
        newest = announce_folder(worker.kafka, "null:3/4", worker.name)
        partition = late.run(0)  # a newer one that it can load: straight into the next epoch
        assert (partition.epoch, partition.bundle) == (2, newest.version)
        late.feed(0, 5)
    finally:
        late.switch.close()
        for partition in late.running.values():
            partition.store.close()


@pytest.fixture
def late(worker: Worker, tmp_path: Path) -> Iterator[Worker]:
    """Another worker of the stream, which follows nothing by itself; the tests give it the stores of the first."""
    made = Worker(worker.kafka, worker.name, tmp_path)
    yield made
    for partition in made.running.values():
        partition.store.close()


def test_a_worker_that_cannot_load_the_newest_bundle_leaves_a_partition_in_its_own_one(
    worker: Worker, late: Worker
) -> None:
    own = worker.leave_partition_in("null:1/2")
    late.missing.add("null:3/4")
    announce_folder(worker.kafka, "null:3/4", worker.name)

    # what it could switch to is the base, from before
    partition = late.run(0)
    late.switch._look()
    while late.switch._prepare():
        pass

    assert (partition.bundle, late.switch.target) == (own.version, BASE)
    assert late.switch.ready(late.running) == [] and not late.switch.pending(late.running)


def test_a_bundle_that_a_restore_loaded_is_not_left_for_the_target_from_before(worker: Worker, late: Worker) -> None:
    worker.run(0)
    worker.feed(0, 5)
    for uri in ("null:3/4", "null:1/2"):
        late.switch._look()  # up to the first one, which is its target
        announce_folder(worker.kafka, uri, worker.name)
        worker.switch_over(0)
    worker.close(0)

    late.run(0)  # it has not looked again since
    while late.switch._prepare():
        pass

    assert late.switch.ready(late.running) == []


def test_a_partition_that_was_switched_back_is_not_switched_again_by_a_worker_that_does_not_know_yet(
    worker: Worker, late: Worker
) -> None:
    worker.run(0)
    worker.feed(0, 5)
    versions = []
    for uri in ("null:1/2", "null:2/3"):
        versions.append(announce_folder(worker.kafka, uri, worker.name).version)
        worker.switch_over(0)
        late.switch._look()
    announce_folder(worker.kafka, "null:1/2", worker.name)
    worker.switch_over(0)
    worker.close(0)

    late.run(0)  # it has both, and the second one is its target
    while late.switch._prepare():
        pass

    assert late.running[0].bundle == versions[0]
    assert late.switch.ready(late.running) == []


def test_a_straight_way_that_was_not_gone_is_forgotten(worker: Worker, late: Worker) -> None:
    # given: it was about to take the partition straight to the newest bundle when it was taken back
    own = worker.leave_partition_in("null:1/2")
    late.missing.add("null:1/2")
    announce_folder(worker.kafka, "null:3/4", worker.name)
    partition = late.open(0)
    assert late.switch.make_ready(partition, 5, lambda: False)
    partition.store.close()

    # when: it comes again, and its own bundle can be had
    late.missing.clear()
    late.switch._failed.clear()
    partition = late.run(0)

    assert (partition.epoch, partition.bundle) == (1, own.version)


def test_a_straight_way_that_is_about_to_be_gone_is_not_grouped_for_a_newer_bundle(
    worker: Worker, late: Worker
) -> None:
    worker.leave_partition_in("null:1/2")
    late.missing.add("null:1/2")
    straight = announce_folder(worker.kafka, "null:3/4", worker.name)
    partition = late.running[0] = late.open(0)
    assert late.switch.make_ready(partition, 5, lambda: False)

    # when: a newer one comes before the loop has begun with it
    announce_folder(worker.kafka, "null:2/3", worker.name)
    late.switch._look()
    late.switch._prepare()
    late.switch.begin(partition, 5)

    assert (partition.epoch, partition.bundle) == (2, straight.version)


def test_a_fetch_that_hangs_holds_up_neither_a_partition_that_is_taken_back_nor_the_end(
    worker: Worker, late: Worker
) -> None:
    worker.leave_partition_in("null:1/2")
    late.arrives["null:1/2"] = arrives = threading.Event()
    partition, taken_back, restored = late.open(0), threading.Event(), list[bool]()
    restore = threading.Thread(
        target=lambda: restored.append(late.switch.make_ready(partition, 5, taken_back.is_set)), daemon=True
    )

    restore.start()
    until(lambda: late.loads == ["null:1/2"], "it is being fetched", 20)
    taken_back.set()
    restore.join(5)
    late.switch.close()

    assert not restore.is_alive() and restored == [False]
    partition.store.close()
    arrives.set()


def test_nothing_is_grouped_for_the_epoch_after_one_that_is_not_committed(worker: Worker) -> None:
    worker.run(0)
    worker.feed(0, 20)
    announce_folder(worker.kafka, "null:1/2", worker.name)
    worker.until_ready(0)
    partition = worker.running[0]
    assert worker.switch.adopt(partition)

    newest = announce_folder(worker.kafka, "null:2/3", worker.name)
    until(lambda: worker.switch.target.version == newest.version, "it is the target", 20)
    worker.switch._prepare()

    assert not partition.store.grouped(2, newest.version, 0)
    worker.commit(0)
    worker.switch_over(0)
    assert partition.bundle == newest.version


class HeldUp(NullModel):
    """Does not answer from when it is told to stop until it is told to go."""

    def __init__(self, seed: int, clusters: int) -> None:
        super().__init__(seed=seed, clusters=clusters)
        self.go, self.asked = threading.Event(), threading.Event()
        self.go.set()

    def stop(self) -> None:
        self.go.clear()
        self.asked.clear()

    def assign(self, vectors: NDArray[np.uint16]) -> NDArray[np.int32]:
        self.asked.set()
        self.go.wait(60)
        return super().assign(vectors)


def test_while_an_epoch_begins_its_groups_are_not_thrown_away_for_a_newer_bundle(late: Worker) -> None:
    # given: a partition that is ready, with a few entries that are left to the moment of the switch
    late.brought["null:1/20"] = held_up = HeldUp(1, 20)
    late.run(0)
    late.feed(0, 300)
    announce_folder(late.kafka, "null:1/20", late.name)
    late.look_and_prepare()
    late.feed(0, 10)
    partition, begun = late.running[0], list[bool]()

    # when: a newer bundle comes and is prepared for while the loop is grouping those
    held_up.stop()
    loop = threading.Thread(target=lambda: begun.append(late.switch.adopt(partition)), daemon=True)
    loop.start()
    until(held_up.asked.is_set, "the epoch is being begun", 20)
    newest = announce_folder(late.kafka, "null:2/30", late.name)
    thread = threading.Thread(target=late.look_and_prepare, daemon=True)
    thread.start()
    until(lambda: late.switch.target.version == newest.version, "the newer one is the target", 20)
    thread.join(1)  # it may have to wait for the loop, or not
    held_up.go.set()
    for one in (loop, thread):
        one.join(20)

    # then: the epoch has its groups, and goes on with them
    assert begun == [True] and (partition.epoch, partition.bundle) == (1, held_up.version)
    late.commit(0)
    late.look_and_prepare()
    assert partition.store.grouped(1, held_up.version, 310)
    late.feed(0, 300)
    assert partition.store.position().totals.read == 610  # type: ignore[union-attr]


class Picky(NullModel):
    """Cannot assign the vectors of `feed` from the tenth on."""

    def assign(self, vectors: NDArray[np.uint16]) -> NDArray[np.int32]:
        if (vectors >= 10).any():
            raise RuntimeError("no such code")
        return super().assign(vectors)


def test_a_partition_that_cannot_be_prepared_is_told_of_once_and_holds_up_no_other(
    late: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    late.brought["null:1/2"] = Picky(seed=1, clusters=2)
    for number, count in ((0, 20), (1, 5)):
        late.run(number)
        late.feed(number, count)
    announce_folder(late.kafka, "null:1/2", late.name)
    for _ in range(3):
        late.look_and_prepare()

    assert late.switch.ready(late.running) == [1]
    told = [record.getMessage() for record in caplog.records if "cannot be prepared" in record.getMessage()]
    assert len(told) == 1 and told[0].startswith("partition 0 ") and "no such code" in told[0]
    assert late.switch.pending(late.running)
    late.switch_over(1)
    assert not late.switch.pending(late.running)  # it is not waited for: nobody knows whether it ever can be


def test_what_is_grouped_for_one_epoch_is_not_taken_for_the_next_one(late: Worker) -> None:
    # given: the newest bundle's clusters are grouped for epoch 1
    late.run(0)
    late.feed(0, 20)
    first = NullModel.at("null:1/2")
    announce_folder(late.kafka, "null:1/2", late.name)
    announce_folder(late.kafka, "null:2/3", late.name)
    late.look_and_prepare()
    assert late.switch.ready(late.running) == [0]

    # when: another bundle begins that epoch
    partition = late.running[0]
    while Regrouping(partition.store, 1, first.version, first.assign, 20).step():
        pass
    partition.adopt(first.version, first.space, 20)
    late.commit(0)

    # then: the loop does not group for epoch 2 by itself
    assert late.switch.ready(late.running) == []
    late.look_and_prepare()
    assert late.switch.ready(late.running) == [0]


def test_whatever_is_wrong_with_a_bundle_the_live_one_goes_on(worker: Worker) -> None:
    worker.run(0)
    worker.broken.add("null:1/2")
    announce_folder(worker.kafka, "null:1/2", worker.name)

    until(lambda: "null:1/2" in worker.loads, "it was tried", 20)
    until(lambda: worker.metrics.registry.get_sample_value("tldr_bundle_missing") == 1, "the metric tells it", 20)


def test_bundles_of_another_space_or_for_another_stream_are_passed_over_and_refused_where_they_are_announced(
    worker: Worker,
) -> None:
    worker.run(0)
    worker.feed(0, 5)
    other = NullModel(tokens=7)
    announce(worker.kafka, "null:9", other.version, other.space, worker.name)
    announce_folder(worker.kafka, "null:4/4", f"{worker.name}-other")
    worker.switch._look()

    assert worker.switch.target is BASE
    assert worker.switch.ready(worker.running) == []
    assert worker.loads == []


def test_what_another_stream_is_told_changes_nothing_of_what_this_one_was_told(late: Worker) -> None:
    # given: a partition in the first bundle of two
    late.run(0)
    late.feed(0, 5)
    announce_folder(late.kafka, "null:1/2", late.name)
    late.look_and_prepare()
    assert late.switch.adopt(late.running[0])
    late.commit(0)
    second = announce_folder(late.kafka, "null:2/3", late.name)

    # when: another stream is told of both, the first one last
    announce_folder(late.kafka, "null:2/3", f"{late.name}-other")
    announce_folder(late.kafka, "null:1/2", f"{late.name}-other")
    late.look_and_prepare()

    # then
    assert late.switch.target.version == second.version
    assert late.switch.ready(late.running) == [0]


def test_a_bundle_that_only_another_stream_was_told_of_is_loaded_for_a_partition_that_runs_with_it(
    late: Worker,
) -> None:
    announce_folder(late.kafka, "null:1/2", f"{late.name}-other")
    late.run(0)
    late.feed(0, 5)
    other = NullModel.at("null:1/2")
    while Regrouping(late.running[0].store, 1, other.version, other.assign, 5).step():
        pass
    late.running[0].adopt(other.version, other.space, 5)  # by a worker that was given it with --bundle
    late.commit(0)
    late.close(0)

    late.run(0)

    assert late.running[0].bundle == other.version and other.version in late.models
    assert late.switch.target is BASE


def test_a_restore_across_three_switches_on_an_empty_disk_needs_the_last_bundle_only(
    worker: Worker, tmp_path: Path
) -> None:
    worker.run(0)
    records = []
    for uri in ("", "null:1/2", "null:2/3", "null:3/1"):
        if uri:
            announce_folder(worker.kafka, uri, worker.name)
            worker.switch_over(0)
        worker.feed(0, 6)
    records = list(worker.running[0].store.items())
    late = Worker(worker.kafka, worker.name, tmp_path / "elsewhere")
    late.missing |= {"null:1/2", "null:2/3"}
    with PartitionStore(tmp_path / "elsewhere" / "0") as empty:
        empty.apply(records, len(records))

    late.switch.start()
    try:
        late.run(0)
        for one in (worker, late):
            one.feed(0, 20)
        assert sorted(late.running[0].store.items()) == sorted(worker.running[0].store.items())
    finally:
        late.switch.close()
        late.running[0].store.close()


def test_a_worker_with_a_bundle_of_its_own_follows_nothing_and_refuses_a_partition_of_another(
    worker: Worker,
) -> None:
    worker.leave_partition_in("null:1/2")
    pinned = BundleSwitch(BASE, worker.name, worker.name, None, worker.load, dict, True, worker.metrics, {})
    partition = worker.open(0)

    with pytest.raises(TldrError, match="leave --bundle out"):
        pinned.make_ready(partition, 5, lambda: False)
    partition.store.close()
