"""kill -9 in each kind of window (`make crash`: in every one): nothing lost, nothing counted twice, one caption a pair."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from stream.broker import LocalBroker
from stream.kafka import Connection
from tests.end_to_end.checker import Findings
from tests.end_to_end.crash import Stand, died_of, revoked_life
from tests.end_to_end.outcome import NO_ANOMALY, create_topic, outcome_of, pairs, processed, send
from tests.end_to_end.worker_process import null_worker, until, worker


@pytest.fixture(scope="module")
def stand(broker: LocalBroker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    where = Stand(broker, tmp_path_factory.mktemp("crash"))
    yield where
    where.close()


# (step, the how many-th of its kind): one window of each kind; `make crash` goes through all of them.
COMMIT = [
    ("before begin_transaction", 1), ("after begin_transaction", 1), ("after produce", 1), ("after produce", 12),
    ("after flush", 1), ("before send_offsets_to_transaction", 1), ("after send_offsets_to_transaction", 1),
    ("before commit_transaction", 1), ("after commit_transaction", 1), ("after apply", 1), ("before close", 1),
]  # fmt: skip
RESTORE = [
    ("after producer", 1), ("after init", 2), ("read a batch in read_partition", 2), ("after apply", 2),
    ("after where_to_go_on", 1), ("before start", 2),
]  # fmt: skip


@pytest.mark.parametrize(
    ("windows", "keeps_its_directory"), [(COMMIT, True), (RESTORE, False)], ids=["commit", "restore-from-nothing"]
)
def test_killed_in_each_kind_of_window_the_set_is_the_batch_reference_s(
    stand: Stand, windows: list[tuple[str, int]], keeps_its_directory: bool
) -> None:
    # given: a stream that has something to lose
    stream = stand.stream()
    stream.feed()
    stream.live_through()
    stream.feed()

    # when: each worker takes over from the one before it, and dies a window further
    for step, nth in windows:
        if not keeps_its_directory:
            shutil.rmtree(stream.state)
        life = stream.live(nth, at=step)
        assert died_of(life, stream) == step
        if "after commit_transaction" in life.steps:
            stream.feed()
    stream.live_through()

    # then
    assert stream.findings().lines() == Findings().lines()


@pytest.mark.parametrize("step", ["before on_revoke", "after send_offsets_to_transaction"])
def test_killed_while_a_partition_is_taken_from_it_nothing_is_lost(stand: Stand, step: str) -> None:
    stream = stand.stream()
    stream.feed()
    assert died_of(revoked_life(stream, 1, at=step), stream) == step
    assert stream.findings().lines() == Findings().lines()


def test_a_killed_static_member_has_its_partitions_back_long_before_its_session_ends(
    kafka: Connection, name: str, tmp_path: Path
) -> None:
    # given
    create_topic(kafka, name)
    send(kafka, name, pairs(200))
    arguments = [*null_worker(kafka, name, tmp_path / "state"), "--session-timeout-s", "45"]
    with worker(arguments, tmp_path / "log") as first:
        first.until_it_runs(2)
        first.kill()

    # when
    with worker(arguments, tmp_path / "log") as second:
        took = second.until_it_runs(2)
        second.kill()

    # then: `make restart` measures it
    assert took < 10


def test_a_paused_worker_that_lost_its_partitions_writes_nothing_more_and_joins_again(
    kafka: Connection, name: str, tmp_path: Path
) -> None:
    # given: two workers, one of them stopped for longer than its session (6 s)
    create_topic(kafka, name)
    arguments = [null_worker(kafka, name, tmp_path / f"state-{n}") for n in (0, 1)]
    with worker(arguments[0], tmp_path / "0.log") as sleeper, worker(arguments[1], tmp_path / "1.log") as other:
        until(lambda: sleeper.partitions == other.partitions == 1, "each worker has a partition")
        send(kafka, name, pairs(600))
        sleeper.process.send_signal(signal.SIGSTOP)

        # when: the other one takes over, then the first one wakes up
        other.until_it_runs(2)
        until(lambda: processed(kafka, name), "everything is processed")
        sleeper.process.send_signal(signal.SIGCONT)
        until(lambda: sleeper.partitions == other.partitions == 1, "the partitions are shared again")
        send(kafka, name, pairs(600, prefix="after"))
        until(lambda: processed(kafka, name), "everything is processed")
        sleeper.drain()
        other.drain()

    # then
    assert outcome_of(kafka, name).anomalies() == NO_ANOMALY
