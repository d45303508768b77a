"""What `--dlq-limit` judges: the last records of a worker, whatever became of its transactions and of its earlier lives."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import pytest

from models.errors import Reason
from state.quota import Ratio
from stream.dead_letters import DeadLetter
from stream.dead_share import Dead, DeadShare, Stretch
from stream.errors import Stopped
from stream.reduce import Effects


class Message(NamedTuple):
    """As much of a Kafka message as is looked at."""

    number: int

    def partition(self) -> int:
        return 3

    def offset(self) -> int:
        return self.number


class Reading:
    """A worker's effects, batch by batch."""

    def __init__(self, limit: Ratio = Ratio(1, 5)) -> None:
        self.share = DeadShare(limit, window_records=10)
        self.effects = Effects()
        self.offset = 0

    def batch(self, records: int, dead: int, reason: Reason = Reason.NOT_AVRO) -> None:
        self.effects.records += records
        self.effects.dead += [DeadLetter(Message(self.offset + i), reason, "because.") for i in range(dead)]
        self.offset += records
        self.share.take(self.effects)

    def commit(self) -> None:
        self.share.seal()
        self.share.commit()
        self.effects = Effects()

    def abort(self) -> None:
        self.share.abort()
        self.effects = Effects()


def test_nothing_is_judged_before_the_window_is_full() -> None:
    reading = Reading()
    reading.batch(9, 9)

    assert reading.share.share is None
    reading.share.refuse_above_limit("raw")


def test_batches_of_a_transaction_are_judged_one_by_one_and_old_ones_leave() -> None:
    reading = Reading()
    for _ in range(4):
        reading.batch(5, 0)
    reading.commit()
    reading.batch(5, 1)
    reading.batch(5, 2)

    assert reading.share.share == Fraction(3, 10)
    reading.batch(5, 0)
    assert reading.share.share == Fraction(1, 5)
    reading.share.refuse_above_limit("raw")


def test_what_was_aborted_is_not_counted_twice() -> None:
    reading = Reading()
    reading.batch(8, 0)
    reading.commit()
    reading.batch(2, 2)
    reading.abort()
    reading.batch(2, 2)

    assert reading.share.share == Fraction(1, 5)


def test_what_was_committed_before_this_worker_counts_the_newest_first_and_once() -> None:
    reading = Reading()
    dead = [Dead(0, i, "truncated", "early") for i in range(4)]
    reading.share.remember(0, 100, Stretch(8, dead))
    reading.share.remember(1, 50, Stretch(100, []))
    reading.batch(2, 0)

    assert reading.share.share == Fraction(2, 5)
    reading.batch(2, 0)
    reading.commit()
    reading.share.remember(0, 200, Stretch(8, [*dead, *dead]))  # it came back to this worker, which knows of it
    assert reading.share.share == Fraction(4, 12)


def test_the_line_names_the_most_frequent_reason_and_where_it_is_and_what_to_do() -> None:
    reading = Reading(Ratio(1, 4))
    reading.batch(10, 1, Reason.NO_ID)
    reading.batch(10, 6)

    with pytest.raises(Stopped) as stopped:
        reading.share.refuse_above_limit("raw")

    assert str(stopped.value) == (
        "60.0 % of the last 10 records would be dead letters, more than --dlq-limit 25%: 6 of them not-avro, from raw/3 "
        "offset 10 to raw/3 offset 15 (because). The open transaction was given up, nothing is lost: put the cause right "
        "and start again, or raise --dlq-limit"
    )
