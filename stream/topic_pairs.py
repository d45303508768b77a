"""Image-text pairs straight from a raw topic, for the jobs that learn from them. Must not know what is learnt.

A bounded look at the newest records, partition after partition, as far as they carry their image: no group, no commit, and
nothing of the stream's own state. What has been taken down (a null value behind it, in any partition) is never handed out.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b

from confluent_kafka import Message

from stream.kafka import Connection, end_offsets, partition_count, read_partition, start_offsets
from stream.pair_sources import BadEntry, SourcePair
from stream.raw_format import RawReader
from stream.records import UndecodableRecord
from stream.rights import check_rights

BATCH = 500
TIMEOUT_S = 60.0


def pairs_of_topic(
    connection: Connection, topic: str, reader: RawReader, records: int | None = None
) -> Iterator[SourcePair | BadEntry]:
    """The pairs of the newest `records` offsets of `topic` (None: of all), an equal share of each partition, an id once.

    Reads them twice: what is taken down has to be known before the first pair is handed out. Image URIs are left to the
    caller; a record that is no pair is a BadEntry. Raises TldrError for a topic that is not there, Unavailable for a broker
    that stops answering.
    """
    check_rights(connection, "a raw topic to learn from", raw=topic)
    partitions = range(partition_count(connection, topic))
    starts, ends = start_offsets(connection, topic, partitions), end_offsets(connection, topic, partitions)
    if records is not None:
        starts = {p: max(starts[p], ends[p] - -(-records // len(partitions))) for p in partitions}

    def messages() -> Iterator[Message]:
        for p in partitions:
            for batch in read_partition(connection, topic, p, starts[p], ends[p], batch=BATCH, timeout_s=TIMEOUT_S):
                yield from batch

    taken_down = {m.key() for m in messages() if m.value() is None}
    seen: set[bytes] = set()
    for message in messages():
        value, place = message.value(), f"{topic}/{message.partition()}@{message.offset()}"
        if value is None:
            continue
        try:
            pair = reader.read(message.key(), value)
        except UndecodableRecord as error:
            yield BadEntry(place, error.reason, error.detail)
            continue
        known_by = blake2b(pair.id.encode(), digest_size=8).digest()
        if known_by in seen or pair.id.encode() in taken_down:
            continue
        seen.add(known_by)
        image = None if pair.image is None else bytes(pair.image)
        yield SourcePair(pair.id, pair.caption, image, pair.image_uri, pair.fields, place)
