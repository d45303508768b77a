"""How we talk to Kafka: what a user's librdkafka settings may change, what they must not break, and a broker that is away."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from stream import kafka as module
from stream.broker import LocalBroker
from stream.errors import Unavailable
from stream.kafka import Connection, partition_counts


def test_a_member_s_time_outs_do_not_keep_a_reader_from_being_made(kafka: Connection) -> None:
    connection = Connection(kafka.bootstrap_servers, {"max.poll.interval.ms": "6000"})

    connection.reader().close()


def test_to_ask_again_for_a_broker_that_went_away_is_to_wait_and_not_to_spin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given: a client that knew the broker, and has met that it is away
    monkeypatch.setattr(module, "CONNECT_TIMEOUT_S", 2.0)
    broker = LocalBroker(tmp_path)
    broker.start()
    connection = Connection(broker.bootstrap_servers)
    partition_counts(connection, ["any"])
    broker.kill()
    with pytest.raises(Unavailable, match="no Kafka broker answers"):
        partition_counts(connection, ["any"])

    # when
    before = time.process_time()
    with pytest.raises(Unavailable, match="no Kafka broker answers"):
        partition_counts(connection, ["any"])

    # then: librdkafka's own request takes nearly all of the two seconds
    assert time.process_time() - before < 0.5
