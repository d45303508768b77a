"""Messages of the raw topic, buffered by bytes: poll, pause, seek.

Must not know what a message means or who owns a partition. It polls while the model works, because a consumer that does not
poll is thrown out of its group; and it pauses only when its buffer is full *and* it has not polled for a while, because a
pause makes librdkafka throw away what it has fetched already (docs/tried.md: 46 s instead of 5).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from stream.broker_errors import fenced_member, kafka_error_of, lacks_right, says_fenced
from stream.errors import RightLost, Stopped

log = logging.getLogger(__name__)

Message = Any  # confluent_kafka.Message

# Of small messages: most of what a batch of the null model costs is paid once a batch (docs/tried.md).
FETCH_MESSAGES = 5000
# What a message is thought to take before there was one.
MESSAGE_BYTES = 100_000
# The object, its key, its headers.
MESSAGE_OVERHEAD_BYTES = 500
# With a full buffer a poll may wait this long, far below max.poll.interval.ms; a rebalance waits for it.
FULL_POLL_EVERY_S = 3.0
# Resume when this share of the buffer is free again.
RESUME_SHARE = 0.5

_GONE = frozenset({KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError.UNKNOWN_TOPIC_ID})
_OUT_OF_RANGE = frozenset({KafkaError.OFFSET_OUT_OF_RANGE, KafkaError._AUTO_OFFSET_RESET})
_FOR_GOOD = frozenset({KafkaError._FATAL, KafkaError.INVALID_SESSION_TIMEOUT})
# States of the world that pass by themselves; librdkafka goes on trying.
_PASSING = frozenset({KafkaError._ALL_BROKERS_DOWN, KafkaError._TRANSPORT, KafkaError._TIMED_OUT, KafkaError._RESOLVE})


class Intake:
    """The worker's side of the consumer.

    bytes_max  soft bound of the buffer: a fetch overshoots it where messages are larger than those of the fetch before.
    """

    def __init__(
        self, consumer: Consumer, topic: str, bytes_max: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.consumer = consumer
        self.topic = topic
        self.bytes_max = bytes_max
        self.buffered_bytes = 0
        self.received_bytes = 0
        self.out_of_range: set[int] = set()  # partitions whose next offset the broker no longer has
        self.at_end: dict[int, int] = {}  # partition → the end that the reader stands at
        self._buffer: deque[Message] = deque()
        self._message_bytes = MESSAGE_BYTES  # the mean of the last fetch
        self._paused: set[int] = set()
        self._consumed: set[int] = set()  # partitions that we consume
        # partition → offset of those that were started inside a poll; None outside of one
        self._started_while_polling: dict[int, int] | None = None
        self._polled_at = clock()
        self._clock = clock

    def __len__(self) -> int:
        return len(self._buffer)

    def poll(self, wait_s: float) -> list[Message]:
        """Fetches into the buffer and serves the group's callbacks; waits at most `wait_s` for the first message.

        Returns what came. Raises Fenced or Stopped where consuming cannot go on.
        """
        full = self.buffered_bytes >= self.bytes_max
        if full and self._clock() - self._polled_at < FULL_POLL_EVERY_S:
            return []
        if full:
            self._pause()
        elif self._paused and self.buffered_bytes <= self.bytes_max * (1 - RESUME_SHARE):
            self._resume()
        self._started_while_polling = {}
        try:
            # consume(n, t) waits for n messages or the whole of t; poll returns with the first.
            head = self.consumer.poll(wait_s)
            more = min(FETCH_MESSAGES, (self.bytes_max - self.buffered_bytes) // self._message_bytes) - 1
            messages = [] if head is None else [head, *(self.consumer.consume(more, 0) if more > 0 else ())]
        except (KafkaException, KafkaError, SystemError) as failure:
            self._refuse(kafka_error_of(failure), None)
            messages = []
        self._polled_at = self._clock()
        restarted, self._started_while_polling = self._started_while_polling, None
        fresh = self._sorted_out(messages, restarted)
        self._buffer.extend(fresh)
        size = _weight(fresh)
        if fresh:
            self._message_bytes = size // len(fresh)
        self.buffered_bytes += size
        self.received_bytes += size - MESSAGE_OVERHEAD_BYTES * len(fresh)
        self.received_bytes += sum([len(key) for message in fresh if (key := message.key())])
        # Started inside the call by a callback of the group: what the call returned may come from before or from after it.
        for partition, offset in restarted.items():
            self.go_back(partition, offset)
        return fresh

    def _sorted_out(self, messages: list[Message], restarted: Collection[int]) -> list[Message]:
        """The messages that are ones, and of partitions that we consume; what the others tell is noted. Raises as `poll`."""
        numbers = {message.partition() for message in messages}
        events = [message for message in messages if message.error() is not None]
        # Almost always so.
        if not (events or restarted) and numbers <= self._consumed and numbers.isdisjoint(self.at_end):
            return messages
        fresh: list[Message] = []
        for message in messages:
            error = message.error()
            partition = message.partition()
            if error is not None:
                if error.code() == KafkaError._PARTITION_EOF:
                    self.at_end[partition] = message.offset()
                elif error.code() in _OUT_OF_RANGE and partition in self._consumed:
                    self.out_of_range.add(partition)
                else:
                    self._refuse(error, message)
                continue
            # A partition that was revoked meanwhile may still have messages on their way.
            if partition in self._consumed and partition not in restarted:
                fresh.append(message)
                if self.at_end:
                    self.at_end.pop(partition, None)
        return fresh

    def take(self, count: int) -> list[Message]:
        """The next `count` messages or fewer, in the order of each partition."""
        next_one = self._buffer.popleft
        taken = [next_one() for _ in range(min(count, len(self._buffer)))]
        self.buffered_bytes -= _weight(taken)
        return taken

    def start(self, partition: int, offset: int) -> None:
        """Begins to consume an assigned partition at `offset`."""
        self.consumer.incremental_assign([TopicPartition(self.topic, partition, offset)])
        self._consumed.add(partition)
        if self._started_while_polling is not None:
            self._started_while_polling[partition] = offset

    def stop(self, partitions: Collection[int], *, lost: bool = False) -> bool:
        """Ends consuming partitions and drops what is buffered of them; whether any of them was consumed.

        All in one call of the client: while it closes, the group may be gone after the first one, and librdkafka (2.16) would
        wait for ever for the answer to a second.
        """
        consumed = self._consumed.intersection(partitions)
        self._consumed -= consumed
        self._paused.difference_update(partitions)
        self.out_of_range.difference_update(partitions)
        for partition in partitions:
            self.at_end.pop(partition, None)
        self._buffer = deque(m for m in self._buffer if m.partition() not in partitions)
        self.buffered_bytes = _weight(self._buffer)
        if not consumed:
            return False
        try:
            self.consumer.incremental_unassign([TopicPartition(self.topic, p) for p in sorted(consumed)])
        except (KafkaException, RuntimeError):  # RuntimeError: the consumer is closed
            if not lost:
                raise
        return True

    def go_back(self, partition: int, offset: int) -> None:
        """Consumes again from `offset`: what came after it was aborted."""
        if partition in self._consumed:
            self.stop([partition])
            self.start(partition, offset)

    def _pause(self) -> None:
        fresh = self._consumed - self._paused
        if fresh:
            self.consumer.pause([TopicPartition(self.topic, p) for p in fresh])
            self._paused |= fresh

    def _resume(self) -> None:
        self.consumer.resume([TopicPartition(self.topic, p) for p in self._paused])
        self._paused.clear()

    def _refuse(self, error: KafkaError, message: Message | None) -> None:
        """Raises for an error that will not pass; says the others once they come."""
        code = error.code()
        where = self.topic if message is None else f"{self.topic}/{message.partition()}"
        if says_fenced(error):
            raise fenced_member(error)
        if code in _GONE:
            raise Stopped(f"{where} is gone ({error.str()}): it was deleted or recreated; use another --stream")
        if lacks_right(error):
            raise RightLost(f"Kafka's ACLs refuse to let {where} be consumed: {error.str()}", error)
        if error.fatal() or code in _FOR_GOOD:
            raise Stopped(f"cannot consume {where}: {error.str()}")
        if code == KafkaError._MAX_POLL_EXCEEDED:
            log.warning("the group took this worker for dead, since it did not poll in time; it joins again")
        elif code not in _PASSING:
            log.warning("%s: %s", where, error.str())


def _weight(messages: Collection[Message]) -> int:
    """Bytes of messages in the buffer: their values (a message's length is its value's), and what the rest takes."""
    return sum(map(len, messages)) + MESSAGE_OVERHEAD_BYTES * len(messages)
