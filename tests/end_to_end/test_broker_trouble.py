"""The broker goes away under a running worker and comes back: the worker says so, keeps trying, and goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from stream.broker import LocalBroker
from stream.kafka import Connection
from tests.end_to_end.outcome import NO_ANOMALY, create_topic, outcome_of, pairs, processed, send
from tests.end_to_end.worker_process import null_worker, until, worker


@pytest.fixture
def own_broker(tmp_path: Path) -> Iterator[LocalBroker]:
    """A broker that a test may kill."""
    server = LocalBroker(tmp_path / "kafka", heap_mb=256)
    server.start()
    yield server
    server.kill()


def test_a_worker_outlives_its_broker_says_so_and_goes_on(own_broker: LocalBroker, tmp_path: Path) -> None:
    # given: a worker that has done what there was to do
    kafka = Connection(own_broker.bootstrap_servers)
    create_topic(kafka, "raw")
    send(kafka, "raw", pairs(600))
    with worker(null_worker(kafka, "raw", tmp_path / "state"), tmp_path / "log") as running:
        until(lambda: processed(kafka, "raw"), "everything is processed")

        # when: the broker is killed, and started again after the worker has noticed
        own_broker.kill()
        running.until_it_says("trying on")
        assert running.get("/healthz")[0] == 200
        own_broker.start()
        send(kafka, "raw", pairs(600, prefix="after"))

        # then
        until(lambda: processed(kafka, "raw"), "what came after is processed, too")
        assert running.log.count("trying on") < 20  # librdkafka says it many times a second
        running.drain()
    assert outcome_of(kafka, "raw").anomalies() == NO_ANOMALY
