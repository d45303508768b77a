"""Single records of a topic by their offsets: a few hundred of them out of millions, without reading what lies between."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

from confluent_kafka import KafkaError, Message, TopicPartition

from stream.errors import Unavailable
from stream.kafka import Connection, refuse_reading, start_offsets

POLL_WAIT_S = 0.2
TIMEOUT_S = 30.0
# Reading on is cheaper than a new fetch while what is wanted next lies this near.
GAP_OFFSETS = 50
# A fetch brings what follows, too: as little of it as possible.
PREFETCH_KB = 1024


def records_at(
    connection: Connection, topic: str, wanted: Mapping[int, Sequence[int]]
) -> Iterator[tuple[int, int, Message | None]]:
    """(partition, offset, message) for every wanted offset, in no order; None where the broker has the record no more.

    Raises Unavailable if the broker stops answering.
    """
    starts = start_offsets(connection, topic, wanted)
    waiting: dict[int, list[int]] = {}
    for p, offsets in wanted.items():
        yield from ((p, offset, None) for offset in sorted(offsets) if offset < starts[p])
        if later := sorted({offset for offset in offsets if offset >= starts[p]}, reverse=True):
            waiting[p] = later  # the next one stands last
    if not waiting:
        return
    reader = connection.reader(queued_max_messages_kbytes=PREFETCH_KB)
    try:
        reader.assign([TopicPartition(topic, p, offsets[-1]) for p, offsets in waiting.items()])
        moved_at = time.monotonic()
        while waiting:
            message = reader.poll(POLL_WAIT_S)
            if message is None:
                if time.monotonic() - moved_at > TIMEOUT_S:
                    raise Unavailable(f"{topic} does not answer for {TIMEOUT_S:.0f} s")
                continue
            moved_at = time.monotonic()
            p, error = message.partition(), message.error()
            if p not in waiting:
                continue
            offsets = waiting[p]
            if error is None:
                at = message.offset()
                while offsets and offsets[-1] <= at:
                    offset = offsets.pop()
                    yield p, offset, message if offset == at else None
            elif error.code() in (
                KafkaError._PARTITION_EOF,
                KafkaError._AUTO_OFFSET_RESET,
                KafkaError.OFFSET_OUT_OF_RANGE,
            ):
                at = message.offset()
                yield p, offsets.pop(), None  # gone meanwhile, or never visible
            else:
                refuse_reading(connection, topic, p, error)
                continue
            if not offsets:
                del waiting[p]
                reader.incremental_unassign([TopicPartition(topic, p)])
            elif error is not None or offsets[-1] > at + GAP_OFFSETS:
                reader.seek(TopicPartition(topic, p, offsets[-1]))
    finally:
        reader.close()
