"""Input that retention took before it was processed: said aloud with both offsets, or counted where the operator allows it."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

from confluent_kafka import TopicPartition

from stream.consume import FETCH_WAIT_MS
from stream.kafka import Connection
from tests.end_to_end.outcome import create_topic, outcome_of, pairs, processed, send
from tests.end_to_end.worker_process import WorkerProcess, null_worker, refused, run_command, until, worker


def delete_before(kafka: Connection, topic: str, offset: int) -> None:
    """What retention does, at once, to partition 0."""
    for done in kafka.admin.delete_records([TopicPartition(topic, 0, offset)]).values():
        done.result()


def stream_at_50_of_a_topic_from_80(kafka: Connection, name: str, folder: Path) -> list[str]:
    """Arguments of a worker whose stream has processed 50 records of a topic that has lost 80 of its 100."""
    create_topic(kafka, name, partitions=1)
    send(kafka, name, pairs(50), partitions=1)
    arguments = [*null_worker(kafka, name, folder / "state"), "--stop-at-end"]
    with worker(arguments, folder / "log") as first:
        first.finish()
    send(kafka, name, pairs(50, prefix="more"), partitions=1)
    delete_before(kafka, name, 80)
    return arguments


def test_a_loss_stops_the_worker_with_both_offsets_and_the_way_on(kafka: Connection, name: str, tmp_path: Path) -> None:
    arguments = stream_at_50_of_a_topic_from_80(kafka, name, tmp_path)

    message = refused(*run_command(*arguments), expected=8)

    assert f"{name}/0" in message
    assert "goes on at offset 50" in message and "nothing before 80" in message and "30 offsets are lost" in message
    assert "--on-data-loss continue" in message


def test_a_loss_that_the_operator_allows_is_counted_for_good(kafka: Connection, name: str, tmp_path: Path) -> None:
    # given
    arguments = stream_at_50_of_a_topic_from_80(kafka, name, tmp_path)

    # when
    with worker([*arguments, "--on-data-loss", "continue"], tmp_path / "log") as going_on:
        going_on.finish()

    # then: in the log and in the changelog; the rest of the topic is processed
    assert "30 offsets are lost" in going_on.log
    totals = outcome_of(kafka, name).view.totals
    assert (totals.lost, totals.read) == (30, 70)
    # and a worker that comes later loses nothing more
    with worker(arguments, tmp_path / "log") as later:
        later.finish()
    assert outcome_of(kafka, name).view.totals.lost == 30


def test_verify_finds_no_difference_in_a_stream_that_lost_input_and_says_what_it_could_not_see(
    kafka: Connection, name: str, tmp_path: Path
) -> None:
    # given
    arguments = stream_at_50_of_a_topic_from_80(kafka, name, tmp_path)
    with worker([*arguments, "--on-data-loss", "continue"], tmp_path / "log") as going_on:
        going_on.finish()

    # when
    verify = ("verify", "--topic", name, "--model", "null", "--bootstrap-servers", kafka.bootstrap_servers)
    status, output = run_command(*verify)

    # then: status 4, not 5, and not a clean bill either
    assert status == 4, output
    assert "30 offsets below 80" in output and "30 were counted as lost" in output
    assert "nothing differs" in output


def freeze(running: WorkerProcess) -> None:
    """Stops a worker that stands at the end of its topic, once no fetch of its is under way.

    The broker answers a fetch that waits with the first records that come, and these would then not be lost to the worker.
    """
    running.process.send_signal(signal.SIGSTOP)
    time.sleep(10 * FETCH_WAIT_MS / 1000)


def test_a_loss_under_a_running_worker_stops_it_too(kafka: Connection, name: str, tmp_path: Path) -> None:
    # given: a worker at the end of its topic, frozen while records come and go
    create_topic(kafka, name, partitions=1)
    send(kafka, name, pairs(50), partitions=1)
    with worker(null_worker(kafka, name, tmp_path / "state"), tmp_path / "log") as running:
        until(lambda: processed(kafka, name), "everything is processed")
        freeze(running)
        send(kafka, name, pairs(50, prefix="more"), partitions=1)
        delete_before(kafka, name, 80)

        # when
        running.process.send_signal(signal.SIGCONT)

        # then
        assert running.wait() == 8, running.log
        assert re.search(r"goes on at offset 50, but the broker has nothing before 80", running.log)


def test_a_running_worker_passes_over_a_loss_that_is_allowed_and_its_metric_tells(
    kafka: Connection, name: str, tmp_path: Path
) -> None:
    # given
    create_topic(kafka, name, partitions=1)
    send(kafka, name, pairs(50), partitions=1)
    arguments = [*null_worker(kafka, name, tmp_path / "state"), "--on-data-loss", "continue"]
    with worker(arguments, tmp_path / "log") as running:
        until(lambda: processed(kafka, name), "everything is processed")
        freeze(running)
        send(kafka, name, pairs(50, prefix="more"), partitions=1)
        delete_before(kafka, name, 80)

        # when
        running.process.send_signal(signal.SIGCONT)
        until(lambda: processed(kafka, name), "the rest is processed")

        # then
        until(lambda: "tldr_lost_records_total 30.0" in running.get("/metrics")[1], "the loss is counted")
        running.drain()
    assert outcome_of(kafka, name).view.totals.read == 70
