"""A group is seen whole, or with a partition that nobody has, from what the broker says of it."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from itertools import count

import pytest
from confluent_kafka import Consumer

from stream.group_gap import GapWatch, assigned_partitions
from stream.kafka import Connection
from tests.end_to_end.outcome import create_topic


@pytest.fixture
def members(kafka: Connection, name: str) -> Iterator[list[Consumer]]:
    """Two members of a group that have the topic's two partitions."""
    create_topic(kafka, name, partitions=2)
    consumers = [Consumer(kafka.config(group_id=name, enable_auto_commit=False)) for _ in range(2)]
    for consumer in consumers:
        consumer.subscribe([name])
    deadline = time.monotonic() + 30
    while [len(consumer.assignment()) for consumer in consumers] != [1, 1]:
        assert time.monotonic() < deadline
        for consumer in consumers:
            consumer.poll(0.1)
    yield consumers
    for consumer in consumers:
        consumer.close()


def looked(kafka: Connection, name: str, partitions: int) -> GapWatch:
    """A watch whose time to look has come."""
    now = count(0, 10)
    return GapWatch(kafka, name, name, partitions, clock=lambda: float(next(now)))


def finds(watch: GapWatch, members: list[Consumer], seconds: float) -> bool:
    """Whether it finds a gap within so many seconds, in which the members poll."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if watch.found():
            return True
        for member in members:
            member.poll(0.02)
    return False


def test_a_group_that_has_every_partition_has_no_gap(kafka: Connection, name: str, members: list[Consumer]) -> None:
    assert not finds(looked(kafka, name, 2), members, 2.0)


def test_a_partition_that_nobody_has_is_a_gap(kafka: Connection, name: str, members: list[Consumer]) -> None:
    assert finds(looked(kafka, name, 3), members, 20.0)


def test_a_group_that_is_not_there_has_no_gap(kafka: Connection, name: str) -> None:
    assert not finds(looked(kafka, name, 1), [], 1.0)


def test_an_assignment_is_read_for_its_topic_alone() -> None:
    def part(topic: bytes, *partitions: int) -> bytes:
        return struct.pack(f">h{len(topic)}si{len(partitions)}i", len(topic), topic, len(partitions), *partitions)

    assignment = struct.pack(">hi", 1, 2) + part(b"other", 7) + part(b"raw-pairs", 0, 2) + struct.pack(">i", -1)

    assert assigned_partitions(assignment, "raw-pairs") == {0, 2}
    assert assigned_partitions(assignment, "none") == assigned_partitions(b"", "raw-pairs") == set()
