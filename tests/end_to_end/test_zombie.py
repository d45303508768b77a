"""Workers that are dead to the group and do not know it, and what they leave: transactions that nobody ends."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stream.broker import LocalBroker
from stream.kafka import Connection, end_offsets
from tests.end_to_end.checker import OUTPUTS, Findings
from tests.end_to_end.crash import Stand, Stream, died_of
from tests.end_to_end.outcome import NO_ANOMALY, create_topic, outcome_of, pairs, processed, send
from tests.end_to_end.worker_process import null_worker, until, worker

SLOW = str(Path(__file__).with_name("slow_worker.py"))
FENCED_STATUS = 7
# transaction.abort.timed.out.transaction.cleanup.interval.ms, Kafka's default
SWEEP_S = 10.0


@pytest.fixture(scope="module")
def stand(broker: LocalBroker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    where = Stand(broker, tmp_path_factory.mktemp("zombies"))
    yield where
    where.close()


def written(stream: Stream) -> dict[str, dict[int, int]]:
    """The true ends of the output topics: every write moves one, committed or not."""
    topics = [f"{stream.name}.{kind}" for kind in OUTPUTS]
    return {topic: end_offsets(stream.stand.kafka, topic, [0, 1], committed=False) for topic in topics}


@pytest.mark.parametrize("step", ["before flush", "before send_offsets_to_transaction", "before commit_transaction"])
def test_a_zombie_writes_nothing_after_it_wakes(stand: Stand, step: str) -> None:
    # given: a worker frozen in the middle of a transaction, and its heir on another disk that has done all the work
    stream = stand.stream()
    stream.feed()
    stand.nursery.begin(stream.arguments(), stream.log, nth=1, at=step, how=signal.SIGSTOP)
    until(lambda: stand.nursery.steps[-1:] == [step], "the worker is frozen")
    with worker([*stream.arguments(who="other"), "--instance-id", "mortal", "--stop-at-end"], stream.log) as heir:
        heir.finish()
    before = written(stream)

    # when
    os.kill(stand.nursery.pid, signal.SIGCONT)
    life = stand.nursery.end()

    # then
    assert life.status == FENCED_STATUS, stream.log.read_text()[-2000:]
    assert written(stream) == before
    assert stream.findings().lines() == Findings().lines()


def test_two_deaths_in_a_row_on_two_disks_lose_nothing(stand: Stand) -> None:
    # given: a stream with a past, whose worker dies between flushing and committing
    stream = stand.stream()
    stream.feed()
    stream.live_through()
    stream.feed()
    assert died_of(stream.live(1, at="before commit_transaction"), stream) == "before commit_transaction"

    # when: its successor starts on another disk and dies there too, and a third takes over on the first disk
    first_disk = stream.state
    stream.state = stream.folder / "second-disk"
    stream.feed()
    assert died_of(stream.live(1, at="after flush"), stream) == "after flush"
    stream.state = first_disk
    stream.live_through()

    # then
    assert stream.findings().lines() == Findings().lines()
    assert outcome_of(stand.kafka, stream.name).view.totals.read == 3 * 8


def test_an_orphaned_transaction_blocks_readers_no_longer_than_its_time_out_and_the_sweep(stand: Stand) -> None:
    # given: a worker that dies with everything written and nothing committed, and nobody takes its place
    transaction_timeout_s = 2.0
    stream = stand.stream()
    stream.feed()
    arguments = stream.arguments("--transaction-timeout-s", f"{transaction_timeout_s:g}")
    stand.nursery.run(arguments, stream.log, nth=1, at="before commit_transaction")
    died_at = time.monotonic()
    topic = f"{stream.name}.{OUTPUTS[0]}"

    # when
    def free() -> bool:
        ends = [end_offsets(stand.kafka, topic, [0, 1], committed=committed) for committed in (True, False)]
        return ends[0] == ends[1]

    assert not free()
    until(free, "readers are free")

    # then: a second for the markers to be written
    assert time.monotonic() - died_at < transaction_timeout_s + SWEEP_S + 1
    # and what it left is another worker's to do
    with worker([*stream.arguments(who="other"), "--stop-at-end"], stream.log) as other:
        other.finish()
    assert stream.findings().lines() == Findings().lines()


def test_a_batch_that_takes_twice_max_poll_interval_causes_no_rebalance(
    kafka: Connection, name: str, tmp_path: Path
) -> None:
    # given: one pair, so that there is one batch
    create_topic(kafka, name)
    send(kafka, name, pairs(1))
    arguments = null_worker(kafka, name, tmp_path / "state", "--kafka", "max.poll.interval.ms=6000")

    # when
    with worker(arguments, tmp_path / "log", entry=(SLOW, "12")) as slow:
        slow.until_it_runs(2)
        until(lambda: processed(kafka, name), "everything is processed")
        slow.drain()

    # then: it has kept what it was given first, and everything happened once
    assert slow.log.count("assigned [") == 1 and "for dead" not in slow.log
    assert outcome_of(kafka, name).anomalies() == NO_ANOMALY
