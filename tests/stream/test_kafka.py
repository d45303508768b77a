"""How we talk to Kafka: what a user's librdkafka settings may change, and what they must not break."""

from __future__ import annotations

from stream.kafka import Connection


def test_a_member_s_time_outs_do_not_keep_a_reader_from_being_made(kafka: Connection) -> None:
    connection = Connection(kafka.bootstrap_servers, {"max.poll.interval.ms": "6000"})

    connection.reader().close()
