"""kill -9 at every step of a commit and at random times: nothing lost, nothing counted twice, one caption of every pair."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from stream.kafka import Connection
from tests.end_to_end.dying_worker import MOMENTS
from tests.end_to_end.outcome import NO_ANOMALY, create_topic, outcome_of, pairs, processed, send, stores_of
from tests.end_to_end.worker_process import WorkerProcess, null_worker, until, worker

ENTRY = str(Path(__file__).with_name("dying_worker.py"))


@pytest.mark.parametrize("keeps_its_directory", [True, False], ids=["with-its-directory", "without-it"])
def test_killed_at_each_step_of_a_commit_the_set_is_the_batch_reference_s(
    kafka: Connection, name: str, tmp_path: Path, keeps_its_directory: bool
) -> None:
    # given: a worker that is killed at one step after the other, each time a few transactions further
    create_topic(kafka, name)
    send(kafka, name, pairs(1100))
    state = tmp_path / "state"
    arguments = null_worker(kafka, name, state, "--ratio", "1/3", "--instance-id", "the-one")
    for moment in MOMENTS:
        nth = 40 if moment == "produce" else 3
        with worker(arguments, tmp_path / "log", entry=(ENTRY, moment, str(nth))) as dying:
            assert dying.wait() == -signal.SIGKILL, dying.log
        if not keeps_its_directory:
            shutil.rmtree(state)

    # when: the last one gets through
    with worker([*arguments, "--stop-at-end"], tmp_path / "log") as last:
        last.finish()

    # then
    outcome = outcome_of(kafka, name)
    assert outcome.anomalies() == NO_ANOMALY
    assert outcome.view.totals.read == 1100
    # and the store that went through all of it is the one that a restore makes
    with worker([*null_worker(kafka, name, tmp_path / "fresh", "--ratio", "1/3", "--instance-id", "the-one"),
                 "--stop-at-end"], tmp_path / "log") as fresh:  # fmt: skip
        fresh.finish()
    assert stores_of([state], 2) == stores_of([tmp_path / "fresh"], 2)


def test_two_workers_killed_at_random_times_leave_the_set_of_the_batch_reference(
    kafka: Connection, name: str, tmp_path: Path
) -> None:
    # given
    dice = random.Random(7)
    create_topic(kafka, name)
    arguments = [null_worker(kafka, name, tmp_path / f"state-{n}", "--cell-cap", "12") for n in (0, 1)]
    running = [WorkerProcess(a, tmp_path / f"{n}.log") for n, a in enumerate(arguments)]
    try:
        until(lambda: all(w.partitions == 1 for w in running), "each worker has a partition")

        # when: input goes on while one after the other is killed and comes back with its state directory
        for round_ in range(4):
            send(kafka, name, pairs(500, prefix=f"round-{round_}"))
            time.sleep(dice.uniform(0.0, 0.25))
            victim = dice.randrange(2)
            running[victim].kill()
            running[victim] = WorkerProcess(arguments[victim], tmp_path / f"{victim}.log")
        until(lambda: processed(kafka, name), "everything is processed")
        for one in running:
            one.drain()
    finally:
        for one in running:
            if one.running:
                one.kill()

    # then
    assert outcome_of(kafka, name).anomalies() == NO_ANOMALY


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

    # then: most of it is the start of the process
    assert took < 20


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
