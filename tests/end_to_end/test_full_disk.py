"""A disk that fills under a running worker: a clear stop, nothing lost, and the next worker goes on from the last commit."""

from __future__ import annotations

from pathlib import Path

from stream.kafka import Connection
from tests.end_to_end.outcome import NO_ANOMALY, create_topic, outcome_of, pairs, send
from tests.end_to_end.worker_process import null_worker, refused, worker

FULL_DISK = str(Path(__file__).with_name("full_disk_worker.py"))
STORE_BYTES = 512 * 1024


def test_a_full_disk_stops_the_worker_with_one_line_and_nothing_is_lost(
    kafka: Connection, name: str, tmp_path: Path
) -> None:
    # given: more pairs than the stores have room for
    create_topic(kafka, name)
    send(kafka, name, pairs(3000))
    arguments = [*null_worker(kafka, name, tmp_path / "state", "--ratio", "1/1"), "--stop-at-end"]

    # when
    with worker(arguments, tmp_path / "log", entry=(FULL_DISK, str(STORE_BYTES))) as full:
        message = refused(full.wait(), full.log, expected=6)

    # then
    assert "cannot grow" in message and "make room on its disk" in message and "nothing is lost" in message
    assert outcome_of(kafka, name).view.totals.read > 0
    # and the next worker goes on, on a disk with room
    send(kafka, name, pairs(1000, prefix="more"))
    with worker(arguments, tmp_path / "log") as roomy:
        roomy.finish()
    outcome = outcome_of(kafka, name)
    assert outcome.anomalies() == NO_ANOMALY
    assert outcome.view.totals.read == 4000
