"""A restore ends in exactly what was last committed, however the changelog ends and whatever compaction has eaten of it."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from confluent_kafka import KafkaError, KafkaException, Producer, TopicPartition

from state.changelog import ENTRY, encode_forgotten, forgotten_key
from state.partition_store import PartitionStore
from stream.broker import LocalBroker
from stream.errors import DataLoss
from stream.kafka import Connection, end_offsets, read_partition
from stream.restore import Restored, restore
from tests.end_to_end.checker import NO_ANOMALY, Seen, StoreContent, check, read_topic
from tests.end_to_end.worker_process import until
from tests.stream.compaction import EAGER, clean_every, set_topic
from tests.stream.stream_writer import StreamWriter

SOMEBODY = 0x1234  # the hash of an id that nobody has


@contextmanager
def stream(kafka: Connection, name: str, folder: Path, **changelog_settings: str) -> Iterator[StreamWriter]:
    """A stream of one partition that has counted 60 pairs, taken some down, and evicted some."""
    settings = EAGER | {key.replace("_", "."): value for key, value in changelog_settings.items()}
    with StreamWriter(kafka, name, folder, partitions=1, cap=5, batch=10, changelog_settings=settings) as writer:
        writer.feed([*(f"pair-{n}" for n in range(60)), ("pair-3", None), "pair-4"])
        yield writer.run()


@pytest.fixture
def writer(kafka: Connection, name: str, tmp_path: Path) -> Iterator[StreamWriter]:
    with stream(kafka, name, tmp_path / "writer") as made:
        yield made


def copy_of_the_store(writer: StreamWriter, folder: Path) -> Path:
    """What a worker would have on its disk that left now."""
    return Path(shutil.copytree(writer.stores[0].path, folder))


def restored(writer: StreamWriter, folder: Path, **more: object) -> Restored:
    done = restore(writer.kafka, writer.topics, writer.name, writer.name, writer.settings, 0, folder, **more)  # type: ignore[arg-type]
    assert done is not None
    return done


def content(store: PartitionStore) -> dict[bytes, bytes]:
    return dict(store.items())


def is_exact(writer: StreamWriter, broker: LocalBroker, store: PartitionStore) -> bool:
    """Whether a store is the live one, key by key, and what the checker reads in the changelog."""
    as_a_checker_sees_it = StoreContent(0, store.changelog_position or 0, content(store), store.known_offset)
    found = check(broker.bootstrap_servers, writer.name, stores=[as_a_checker_sees_it])
    assert found.anomalies == NO_ANOMALY, found.lines()
    live = writer.stores[0]
    return content(store) == content(live) and store.known_count() == live.known_count()


# -- how a changelog ends ----------------------------------------------------------------------------------------------


@contextmanager
def open_transaction(writer: StreamWriter, key: bytes, value: bytes) -> Iterator[Producer]:
    """Another producer has written a record to the changelog and has not committed it."""
    producer = writer.kafka.producer(transactional_id=f"{writer.name}-other", transaction_timeout_ms=60_000)
    producer.init_transactions(30)
    producer.begin_transaction()
    producer.produce(writer.topics.changelog, value, key, 0)
    producer.flush()
    yield producer


def true_end(writer: StreamWriter) -> int:
    return end_offsets(writer.kafka, writer.topics.changelog, [0], committed=False)[0]


@pytest.mark.parametrize("has_a_store", [True, False], ids=["tail", "rebuilt"])
def test_it_ends_behind_a_commit_marker(
    writer: StreamWriter, broker: LocalBroker, tmp_path: Path, has_a_store: bool
) -> None:
    # given: behind the last record lies the marker of its transaction, and nothing else
    folder = tmp_path / "restored"
    if has_a_store:
        copy_of_the_store(writer, folder)
        writer.feed(["one more"]).run()
    assert writer.stores[0].changelog_position == true_end(writer) - 1

    # when
    done = restored(writer, folder)

    # then
    with done.partition.store as store:
        assert is_exact(writer, broker, store)
        assert done.rebuilt == (not has_a_store)
        assert store.changelog_position == true_end(writer)


def test_a_store_that_has_reached_the_end_reads_nothing_again_however_old_it_is(
    writer: StreamWriter, broker: LocalBroker, tmp_path: Path
) -> None:
    # given: nothing was written since this store was restored, for longer than tombstones are kept
    with restored(writer, tmp_path / "restored").partition.store:
        pass
    set_topic(writer.kafka, writer.topics.changelog, delete_retention_ms="0")

    # when
    done = restored(writer, tmp_path / "restored")

    # then
    with done.partition.store as store:
        assert (done.rebuilt, done.records) == (False, 0)
        assert is_exact(writer, broker, store)


def test_an_aborted_transaction_at_the_end_is_passed_over(
    writer: StreamWriter, broker: LocalBroker, tmp_path: Path
) -> None:
    # given: a record that a store would refuse if it were handed one
    with open_transaction(writer, b"?", b"of no known kind") as producer:
        producer.abort_transaction(30)

    # when
    done = restored(writer, tmp_path / "restored")

    # then
    with done.partition.store as store:
        assert is_exact(writer, broker, store)
        assert store.changelog_position == true_end(writer)


@pytest.mark.parametrize("commits", [True, False], ids=["commits", "aborts"])
def test_an_open_transaction_is_waited_for(
    writer: StreamWriter, broker: LocalBroker, tmp_path: Path, commits: bool
) -> None:
    # given: a restore that has read all there is, and stands before a record whose marker is on its way
    looks = 0

    def look() -> bool:
        nonlocal looks
        looks += 1
        return False

    key, value = forgotten_key(SOMEBODY), encode_forgotten(0)
    with open_transaction(writer, key, value) as producer, ThreadPoolExecutor(1) as thread:
        future: Future[Restored] = thread.submit(restored, writer, tmp_path / "restored", cancelled=look)
        until(lambda: looks > 5, "the restore looks again and again")
        assert not future.done()

        # when
        (producer.commit_transaction if commits else producer.abort_transaction)(30)
        done = future.result(30)

    # then: it has what was committed, and only that
    with done.partition.store as store:
        had = content(store)
        assert had.pop(key, None) == (value if commits else None)
        assert had == content(writer.stores[0])


# -- what compaction has eaten -----------------------------------------------------------------------------------------


def changelog(writer: StreamWriter, broker: LocalBroker) -> list[Seen]:
    return read_topic(broker.bootstrap_servers, writer.topics.changelog)[0]


def run_until_eaten(writer: StreamWriter, broker: LocalBroker, eaten: int, tombstones: int = 0) -> None:
    """Feeds the stream until the cleaner has eaten all but the newest record of every key below the offset `eaten`, and
    every tombstone below the offset `tombstones`. It leaves the last segment alone, so new ones are begun."""
    clean_every(writer.kafka, 100)

    numbers = itertools.count()

    def all_eaten() -> bool:
        writer.feed([f"filler-{next(numbers)}"]).run()
        seen = changelog(writer, broker)
        newest = {record.key: record.offset for record in seen}
        return all(record.offset == newest[record.key] for record in seen if record.offset < eaten) and not any(
            record.value is None for record in seen if record.offset < tombstones
        )

    until(all_eaten, "the cleaner has been there")


@pytest.mark.parametrize("has_a_store", [True, False], ids=["tail", "rebuilt"])
def test_it_goes_over_the_gaps_that_compaction_leaves(
    writer: StreamWriter, broker: LocalBroker, tmp_path: Path, has_a_store: bool
) -> None:
    # given: a store whose next offset, and much behind it, compaction has eaten
    folder = tmp_path / "restored"
    if has_a_store:
        copy_of_the_store(writer, folder)
    position = writer.stores[0].changelog_position or 0
    writer.feed(f"more-{n}" for n in range(60)).run()
    end = true_end(writer)
    run_until_eaten(writer, broker, end)
    offsets = {record.offset for record in changelog(writer, broker)}
    assert position not in offsets and len(offsets & set(range(end))) < end / 2

    # when
    done = restored(writer, folder)

    # then
    with done.partition.store as store:
        assert is_exact(writer, broker, store)
        assert done.rebuilt == (not has_a_store)


def test_a_store_older_than_the_tombstones_that_compaction_has_eaten_is_rebuilt(
    kafka: Connection, name: str, broker: LocalBroker, tmp_path: Path
) -> None:
    with stream(kafka, name, tmp_path / "writer", delete_retention_ms="1") as writer:
        # given: a store with entries that left since, and whose tombstones are eaten
        folder = copy_of_the_store(writer, tmp_path / "old")
        before = content(writer.stores[0])
        writer.feed([("pair-5", None), *(f"more-{n}" for n in range(120))]).run()
        end = true_end(writer)
        run_until_eaten(writer, broker, end, tombstones=end)
        left = {key for key in before if key[:1] == ENTRY} - content(writer.stores[0]).keys()
        assert left
        # so that the tail alone would bring them back
        with PartitionStore(shutil.copytree(folder, tmp_path / "not-rebuilt")) as wrong:
            for messages in read_partition(kafka, writer.topics.changelog, 0, wrong.changelog_position or 0, end):
                wrong.apply([(m.key(), m.value()) for m in messages], messages[-1].offset() + 1)
            assert left <= content(wrong).keys()

        # when
        done = restored(writer, folder)

        # then
        with done.partition.store as store:
            assert done.rebuilt
            assert is_exact(writer, broker, store)


# -- a changelog that has lost its beginning ---------------------------------------------------------------------------


def delete_changelog_before(writer: StreamWriter, offset: int) -> None:
    set_topic(writer.kafka, writer.topics.changelog, cleanup_policy="compact,delete")

    def deleted() -> bool:
        try:
            for done in writer.kafka.admin.delete_records(
                [TopicPartition(writer.topics.changelog, 0, offset)]
            ).values():
                done.result()
        except KafkaException as error:
            if error.args[0].code() != KafkaError.POLICY_VIOLATION:  # the policy comes into force a little later
                raise
            return False
        return True

    until(deleted, "the broker deletes records")


def test_a_store_below_the_log_s_start_is_rebuilt(writer: StreamWriter, tmp_path: Path) -> None:
    # given: a stream whose whole state was written once more, and what was before it deleted
    folder = copy_of_the_store(writer, tmp_path / "old")
    writer.feed([("pair-5", None), *(f"more-{n}" for n in range(60))]).run()
    end = true_end(writer)
    producer = writer.kafka.producer()
    for key, value in writer.stores[0].items():
        producer.produce(writer.topics.changelog, value, key, 0)
    producer.flush()
    delete_changelog_before(writer, end)

    # when
    done = restored(writer, folder)

    # then
    with done.partition.store as store:
        assert done.rebuilt
        assert content(store) == content(writer.stores[0])
        assert store.known_count() == writer.stores[0].known_count()


@pytest.mark.parametrize("has_a_store", [True, False], ids=["below-the-start", "without-a-store"])
def test_a_state_whose_beginning_is_deleted_is_not_taken_for_a_whole_one(
    writer: StreamWriter, tmp_path: Path, has_a_store: bool
) -> None:
    folder = tmp_path / "restored"
    if has_a_store:
        copy_of_the_store(writer, folder)
    end = true_end(writer)
    writer.feed(f"more-{n}" for n in range(20)).run()
    delete_changelog_before(writer, end)

    with pytest.raises(DataLoss, match=f"begins at offset {end}"):
        restored(writer, folder)


def test_a_store_above_the_log_s_start_needs_nothing_from_before_it(writer: StreamWriter, tmp_path: Path) -> None:
    folder = copy_of_the_store(writer, tmp_path / "restored")
    end = true_end(writer)
    writer.feed(f"more-{n}" for n in range(20)).run()
    delete_changelog_before(writer, end - 1)

    done = restored(writer, folder)

    with done.partition.store as store:
        assert not done.rebuilt
        assert content(store) == content(writer.stores[0])
