"""How a worker ends: drained on SIGTERM, stopped by its own failure, fenced by another one. Each leaves whole transactions."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from state.directory import StateDirectory
from stream.kafka import Connection, group_offsets
from tests.end_to_end.outcome import NO_ANOMALY, create_topic, outcome_of, pairs, processed, send
from tests.end_to_end.worker_process import null_worker, refused, until, worker

FAILING = str(Path(__file__).with_name("failing_worker.py"))


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_the_worker(kafka: Connection, name: str, tmp_path: Path, how: signal.Signals) -> None:
    # given: a worker that has read everything and would commit in an hour
    create_topic(kafka, name)
    send(kafka, name, pairs(300))
    arguments = null_worker(kafka, name, tmp_path / "state", "--commit-interval-s", "3600")
    with worker(arguments, tmp_path / "log") as running:
        running.until_it_runs(2)
        until(lambda: "tldr_payload_bytes_total 0.0" not in running.get("/metrics")[1], "it has read something")

        # when
        running.process.send_signal(how)
        running.finish()

    # then: what it had decided is committed, and the group stands where the changelog does
    outcome = outcome_of(kafka, name)
    assert outcome.view.totals.read > 0
    assert group_offsets(kafka, name, name, outcome.view.cut) == outcome.view.cut
    assert {row.offset for row in outcome.rows if row.partition == 0} == set(range(outcome.view.cut[0]))


def test_a_caption_that_fails_stops_the_worker_and_commits_nothing_of_its_batch(
    kafka: Connection, name: str, tmp_path: Path
) -> None:
    # given
    create_topic(kafka, name)
    send(kafka, name, pairs(400))
    arguments = null_worker(kafka, name, tmp_path / "state", "--stop-at-end")

    # when: the model fails in the third batch
    with worker(arguments, tmp_path / "log", entry=(FAILING, "3")) as failing:
        assert failing.wait() != 0
        log = failing.log

    # then: two batches are committed, the third one is not, not even by halves
    outcome = outcome_of(kafka, name)
    assert "CUDA error" in log
    assert 0 < outcome.view.totals.read <= 80
    assert all(record.key for record in outcome.kept)
    # and a worker whose model works does the rest
    with worker(arguments, tmp_path / "log") as sound:
        sound.finish()
    assert outcome_of(kafka, name).anomalies() == NO_ANOMALY


def test_a_second_worker_with_the_same_instance_id_fences_the_first_which_writes_nothing_more(
    kafka: Connection, name: str, tmp_path: Path
) -> None:
    # given
    create_topic(kafka, name)
    send(kafka, name, pairs(300))
    arguments = [null_worker(kafka, name, tmp_path / f"{n}", "--instance-id", "same") for n in (0, 1)]
    with worker(arguments[0], tmp_path / "0.log") as first:
        until(lambda: processed(kafka, name), "everything is processed")

        # when
        with worker(arguments[1], tmp_path / "1.log") as second:
            status = first.wait()
            second.until_it_runs(2)
            send(kafka, name, pairs(300, prefix="after"))
            until(lambda: processed(kafka, name), "everything is processed")
            second.drain()

    # then
    message = refused(status, first.log, expected=7)
    assert "--instance-id" in message
    assert outcome_of(kafka, name).anomalies() == NO_ANOMALY
    # and its next life can tell an operator, who sees no metric of a process that is gone
    with StateDirectory(tmp_path / "0") as directory:
        assert directory.fencings == 1


def test_a_second_default_worker_takes_the_next_free_directory(kafka: Connection, name: str, tmp_path: Path) -> None:
    # given: two workers that were told nothing but their topic (and where the broker is)
    create_topic(kafka, name)
    arguments = ["consume", "--topic", name, "--model", "null", "--bootstrap-servers", kafka.bootstrap_servers]
    home = str(tmp_path)

    # when
    with worker(arguments, tmp_path / "1.log", XDG_STATE_HOME=home) as one:
        one.until_it_runs(2)
        with worker(arguments, tmp_path / "2.log", XDG_STATE_HOME=home) as two:
            until(lambda: one.partitions == two.partitions == 1, "they share the partitions")

            # then
            assert sorted(os.listdir(tmp_path / "tldr-stream" / name)) == ["worker-1", "worker-2"]
            assert f"{name}/worker-2" in two.log


def test_health_and_readiness_are_served_while_it_works(kafka: Connection, name: str, tmp_path: Path) -> None:
    create_topic(kafka, name)
    with worker(null_worker(kafka, name, tmp_path / "state"), tmp_path / "log") as running:
        running.until_it_runs(2)

        assert running.get("/healthz") == (200, "ok\n")
        assert running.get("/readyz") == (200, "ok\n")


def test_a_worker_that_the_group_took_for_dead_is_not_ready_until_it_has_joined_again(
    kafka: Connection, name: str, tmp_path: Path
) -> None:
    # given: one partition, so that one worker has it and the other one, ready too, has none
    create_topic(kafka, name, partitions=1)
    with (
        worker(null_worker(kafka, name, tmp_path / "1"), tmp_path / "1.log") as one,
        worker(null_worker(kafka, name, tmp_path / "2"), tmp_path / "2.log") as two,
    ):
        until(lambda: one.partitions >= 0 and two.partitions >= 0, "both serve metrics")
        until(lambda: one.get("/readyz")[0] == two.get("/readyz")[0] == 200, "both are ready")
        until(lambda: one.partitions + two.partitions == 1, "one of them has the partition")  # told a second later
        holder, spare = (one, two) if one.partitions else (two, one)

        # when: it hangs beyond its session, and wakes while the group waits for the other one
        holder.process.send_signal(signal.SIGSTOP)
        until(lambda: spare.partitions == 1, "the other one has the partition")
        spare.process.send_signal(signal.SIGSTOP)
        holder.process.send_signal(signal.SIGCONT)
        holder.until_it_says("lost [0]")

        # then
        assert holder.get("/readyz")[0] == 503
        spare.process.send_signal(signal.SIGCONT)
        until(lambda: holder.get("/readyz")[0] == spare.get("/readyz")[0] == 200, "both are ready again")
        until(lambda: holder.partitions + spare.partitions == 1, "one of them has the partition again")
