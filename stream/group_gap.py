"""Partitions that the group has given to nobody: noticed after joining, so that the worker can join once more.

A static member that dies while a partition is being taken from it is succeeded without a rebalance (KIP-345): its heir is
handed what the dead one was to keep, and the second half of the cooperative rebalance (KIP-429), which would give the
partition to its new owner, never comes. Must not know what is done with partitions.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread

from confluent_kafka import KafkaException

from stream.kafka import REQUEST_TIMEOUT_S, Connection

# A rebalance under way has gaps for a moment; a member hears of one with its next heartbeat (3 s).
LOOK_AFTER_S = 3.0
STABLE = "Stable"

_short, _int = struct.Struct(">h"), struct.Struct(">i")


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
        self._asked: Future[set[int] | None] | None = None
        self._look_at = clock() + LOOK_AFTER_S
        self._whole = False

    def found(self) -> bool:
        """Whether a partition has no owner although no rebalance is under way. To be called again and again."""
        if self._whole or self._clock() < self._look_at:
            return False
        if self._asked is None:
            self._asked = Future()
            Thread(target=self._ask, args=(self._asked,), name="group", daemon=True).start()
        if not self._asked.done():
            return False
        asked, self._asked = self._asked, None
        self._look_at = self._clock() + LOOK_AFTER_S
        owned = asked.result()
        if owned is None:
            return False
        self._whole = owned >= self._partitions
        return not self._whole

    def _ask(self, answer: Future[set[int] | None]) -> None:
        """The partitions that have an owner; None while nobody can tell."""
        # Not AdminClient.describe_consumer_groups: librdkafka (2.16) ends the process with a failed assertion in it where
        # the broker goes away at the wrong moment (docs/tried.md).
        try:
            groups = self._connection.admin.list_groups(self._group, timeout=REQUEST_TIMEOUT_S)
            group = next((one for one in groups if one.id == self._group), None)
            if group is None or group.state != STABLE:
                answer.set_result(None)
                return
            answer.set_result(
                {p for member in group.members for p in assigned_partitions(member.assignment, self._topic)}
            )
        except KafkaException:  # the broker is away: the next look tells
            answer.set_result(None)
        except Exception as error:
            answer.set_exception(error)


def assigned_partitions(assignment: bytes, topic: str) -> set[int]:
    """The partitions of `topic` in a member's assignment, as Kafka's ConsumerProtocolAssignment has it; none in no bytes."""
    if not assignment:
        return set()
    found: set[int] = set()
    at = _short.size  # the version: all of them begin alike
    (topics,) = _int.unpack_from(assignment, at)
    at += _int.size
    for _ in range(topics):
        (size,) = _short.unpack_from(assignment, at)
        at += _short.size
        name = assignment[at : at + size].decode()
        at += size
        (count,) = _int.unpack_from(assignment, at)
        at += _int.size
        if name == topic:
            found.update(struct.unpack_from(f">{count}i", assignment, at))
        at += count * _int.size
    return found
