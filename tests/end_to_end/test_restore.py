"""Workers that come and go while partitions are being restored: nothing lost, nothing twice, stores equal to the changelog."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from pathlib import Path

from stream.broker import LocalBroker
from stream.kafka import Connection
from stream.topics import StreamTopics
from tests.end_to_end.checker import NO_ANOMALY, check
from tests.end_to_end.outcome import create_topic, local_stores, pairs, processed, send
from tests.end_to_end.worker_process import WorkerProcess, null_worker, until, worker

PARTITIONS, WORKERS = 4, 4
RESTORING = "; restoring"


def test_four_workers_join_and_leave_while_every_restore_is_under_way(
    kafka: Connection, name: str, broker: LocalBroker, tmp_path: Path
) -> None:
    # given: a stream with a past, more to do, and on each changelog partition a transaction that is still open, so that no
    # restore ends before it does
    create_topic(kafka, name, PARTITIONS)
    send(kafka, name, pairs(3000), PARTITIONS)
    more = ("--ratio", "1/2", "--cell-cap", "40", "--batch-pairs", "200")
    with worker(
        [*null_worker(kafka, name, tmp_path / "first", *more), "--stop-at-end"], tmp_path / "first.log"
    ) as first:
        first.finish()
    send(kafka, name, pairs(800, prefix="more"), PARTITIONS)
    other = kafka.producer(transactional_id=f"{name}-other", transaction_timeout_ms=120_000)
    other.init_transactions(30)
    other.begin_transaction()
    for p in range(PARTITIONS):
        other.produce(StreamTopics(name).changelog, b"of no known kind", b"?", p)
    other.flush()

    states = [tmp_path / f"state-{n}" for n in range(WORKERS)]
    with ExitStack() as all_of_them:

        def start(n: int) -> WorkerProcess:
            arguments = null_worker(kafka, name, states[n], *more, "--instance-id", f"worker-{n}")
            return all_of_them.enter_context(worker(arguments, tmp_path / f"{n}.log"))

        # when: the last two join the first two; one of those is killed, and another told to leave; both come back
        workers = [start(0), start(1)]
        workers[0].until_it_says(RESTORING)
        workers += [start(2), start(3)]
        for running in workers:
            running.until_it_says(RESTORING)
        workers[0].kill()
        workers[1].process.send_signal(signal.SIGTERM)
        workers[1].finish()
        workers[:2] = [start(0), start(1)]
        for running in workers[:2]:
            running.until_it_says(RESTORING)
        assert not any(" runs from offset " in (tmp_path / f"{n}.log").read_text() for n in range(WORKERS))
        other.abort_transaction(30)

        # then: it goes on, while yet another one leaves for good
        until(lambda: any(running.partitions > 0 for running in workers), "a restore has ended")
        workers[3].drain()
        until(lambda: processed(kafka, name), "everything is processed")
        for running in workers[:3]:
            running.drain()

    with local_stores([tmp_path / "first", *states], PARTITIONS) as stores:
        found = check(broker.bootstrap_servers, name, log_folder=broker.data / "logs", stores=stores)
    assert found.anomalies == NO_ANOMALY, "\n".join(found.lines())
    assert {store.partition for store in stores} == set(range(PARTITIONS))
