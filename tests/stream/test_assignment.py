"""Partitions that come and go while others are restored."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from confluent_kafka import Consumer

from stream.assignment import RESTORES_AT_ONCE, Assignment
from stream.intake import Intake
from stream.kafka import Connection
from stream.restore import Cancel


@pytest.fixture
def consumer(kafka: Connection) -> Iterator[Consumer]:
    made = kafka.reader()
    yield made
    made.close()


def test_a_partition_whose_restore_waits_for_its_turn_is_given_back_at_once(consumer: Consumer) -> None:
    # given: as many restores as go on at once, which take long, and one behind them
    end = threading.Event()

    def restore(number: int, cancel: Cancel) -> None:
        end.wait(60)

    assignment = Assignment(Intake(consumer, "raw", 1 << 20), restore, lambda number, restored: None)
    assignment.assigned(list(range(RESTORES_AT_ONCE + 1)))

    # when
    taken_back = threading.Thread(target=assignment.revoked, args=([RESTORES_AT_ONCE],), daemon=True)
    taken_back.start()
    taken_back.join(5)

    # then
    waits = taken_back.is_alive()
    end.set()
    assignment.close()
    assert not waits


def test_a_worker_that_the_group_took_for_dead_has_not_joined_until_the_group_answers(consumer: Consumer) -> None:
    assignment = Assignment(
        Intake(consumer, "raw", 1 << 20), lambda number, cancel: None, lambda number, restored: None
    )
    assignment.assigned([0])
    assignment.joined = False  # as when it is lost

    assignment.restore_again([0])
    restored_again, joined = assignment.restoring, assignment.joined
    assignment.assigned([])

    assert (restored_again, joined, assignment.joined) == ([0], False, True)
    assignment.close()
