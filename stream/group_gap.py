"""Partitions that the group has given to nobody: noticed after joining, so that the worker can join once more.

A static member that dies while a partition is being taken from it is succeeded without a rebalance (KIP-345): its heir is
handed what the dead one was to keep, and the second half of the cooperative rebalance (KIP-429), which would give the
partition to its new owner, never comes. Must not know what is done with partitions.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from confluent_kafka import ConsumerGroupState, KafkaException

from stream.kafka import REQUEST_TIMEOUT_S, Connection

# A rebalance under way has gaps for a moment; a member hears of one with its next heartbeat (3 s).
LOOK_AFTER_S = 3.0


class GapWatch:
    """Asks now and then who has which partition, until the group was seen whole once; never waits for the answer."""

    def __init__(
        self,
        connection: Connection,
        group: str,
        topic: str,
        partition_count: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connection, self._group, self._topic = connection, group, topic
        self._partitions = set(range(partition_count))
        self._clock = clock
        self._asked: Future[Any] | None = None
        self._look_at = clock() + LOOK_AFTER_S
        self._whole = False

    def found(self) -> bool:
        """Whether a partition has no owner although no rebalance is under way. To be called again and again."""
        if self._whole or self._clock() < self._look_at:
            return False
        if self._asked is None:
            admin = self._connection.admin
            self._asked = admin.describe_consumer_groups([self._group], request_timeout=REQUEST_TIMEOUT_S)[self._group]
        if not self._asked.done():
            return False
        asked, self._asked = self._asked, None
        self._look_at = self._clock() + LOOK_AFTER_S
        try:
            group = asked.result()
        except KafkaException:  # the broker is away: the next look tells
            return False
        if group.state != ConsumerGroupState.STABLE:
            return False
        owned = {
            tp.partition
            for member in group.members
            for tp in member.assignment.topic_partitions
            if tp.topic == self._topic
        }
        self._whole = owned >= self._partitions
        return not self._whole
