"""What a stream has committed, read consistently: its changelog's head, and its kept pairs, codes and dead letters.

Reads topics and nothing else: no store, no group, no worker is needed, and nothing is written. A *cut* is a vector of
input offsets, one a partition; since every effect carries the input offset that caused it, and a transaction is visible
as a whole, everything below the cut is a consistent state of the stream, whatever the workers do meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from confluent_kafka import KafkaError, Message, TopicPartition
from numpy.typing import NDArray

from state.changelog import (
    CELL,
    POSITION,
    SETTINGS,
    SWITCH,
    CellCounts,
    Position,
    Switch,
    Totals,
    cells_of,
    decode_position,
    decode_switch,
)
from state.partition import Fate
from state.quota import Ratio
from state.settings import StreamSettings
from stream.dead_letters import HEADER_PREFIX
from stream.errors import TldrError, Unavailable
from stream.kafka import Connection, end_offsets, partition_counts, refuse_reading, start_offsets
from stream.records import Codec, Registry, UndecodableRecord
from stream.topics import StreamTopics

# The longest that a transaction may hold readers back (librdkafka's transaction.timeout.ms), and as much again.
OPEN_TRANSACTION_WAIT_S = 120.0
# What a reader prefetches; the default of 64 MB a consumer is more than a job that walks a topic once needs.
PREFETCH_KB = 16 * 1024
POLL_WAIT_S = 0.25

ChangelogRecord = tuple[int, bytes, bytes | None]  # partition, key, value


@dataclass(frozen=True)
class StreamSource:
    """Where a stream is, and with which further schemas its records are read."""

    connection: Connection
    topics: StreamTopics
    schema_folders: tuple[Path, ...] = ()
    registry: Registry | None = None

    @property
    def name(self) -> str:
        return self.topics.name

    def codec(self, record: str) -> Codec:
        return Codec(record, self.schema_folders, self.registry)


# -- any topic ---------------------------------------------------------------------------------------------------------


def read_spans(
    connection: Connection,
    topic: str,
    spans: Mapping[int, tuple[int, int]],
    *,
    batch: int = 1000,
    waiting: Callable[[dict[int, int]], None] = lambda positions: None,
    timeout_s: float | None = OPEN_TRANSACTION_WAIT_S,
) -> Iterator[list[Message]]:
    """The committed records of [start, end) of several partitions, in batches, each partition's in offset order.

    Ends when the reader's position has reached every end, which may lie behind a transaction's marker or inside an open
    transaction: that one is waited for, with `waiting(positions)` called meanwhile.
    Raises Unavailable if nothing moves for `timeout_s`, TldrError where an offset is no longer on the broker.
    """
    positions = {p: start for p, (start, end) in spans.items() if start < end}
    if not positions:
        return
    reader = connection.reader(queued_max_messages_kbytes=PREFETCH_KB)
    try:
        reader.assign([TopicPartition(topic, p, start) for p, start in positions.items()])
        moved_at = time.monotonic()
        while positions:
            # `consume(n, t)` waits for n records or the whole of t; `poll` returns with the first.
            first = reader.poll(POLL_WAIT_S)
            arrived = [] if first is None else [first, *reader.consume(batch - 1, 0)]
            messages = []
            for message in arrived:
                p = message.partition()
                if p not in positions:
                    continue
                error = message.error()
                if error is None:
                    if message.offset() < spans[p][1]:
                        messages.append(message)
                    positions[p], moved_at = message.offset() + 1, time.monotonic()
                elif error.code() == KafkaError._PARTITION_EOF:
                    if message.offset() > positions[p]:
                        positions[p], moved_at = message.offset(), time.monotonic()
                elif error.code() in (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE):
                    raise TldrError(f"offset {positions[p]} of {topic}/{p} is no longer on the broker")
                else:
                    refuse_reading(connection, topic, p, error)
            if messages:
                yield messages
                moved_at = time.monotonic()  # what the caller did with them is not our waiting
            done = [p for p, position in positions.items() if position >= spans[p][1]]
            for p in done:
                del positions[p]
            if done and positions:
                reader.incremental_unassign([TopicPartition(topic, p) for p in done])
            if not arrived and positions:
                waiting(dict(positions))
                if timeout_s is not None and time.monotonic() - moved_at > timeout_s:
                    p, position = next(iter(positions.items()))
                    raise Unavailable(
                        f"{topic}/{p} stands at offset {position} of {spans[p][1]} for {timeout_s:.0f} s: a "
                        "transaction is open (look at the worker that writes there), or the broker does not answer"
                    )
    finally:
        reader.close()


def whole(
    connection: Connection, topic: str, partitions: Iterable[int], *, committed: bool = False
) -> dict[int, tuple[int, int]]:
    """Spans of all that a topic has now.

    committed  False: up to the true end, so that a commit whose markers are still on their way is waited for.
               True: up to where a reader gets without waiting.
    """
    numbers = list(partitions)
    ends = end_offsets(connection, topic, numbers, committed=committed)
    starts = start_offsets(connection, topic, numbers)
    return {p: (starts[p], ends[p]) for p in numbers}


def decoded(codec: Codec, message: Message) -> dict[str, Any]:
    """The record that a message of ours holds. Raises TldrError for one that cannot be read."""
    try:
        return codec.decode(message.value())
    except UndecodableRecord as error:
        raise TldrError(f"{message.topic()}/{message.partition()} offset {message.offset()}: {error}") from error


def header_of(message: Message, name: str) -> str | None:
    """The last header of that name as text; None without one."""
    for key, value in reversed(message.headers() or []):
        if key == name:
            return None if value is None else value.decode("utf-8", "replace")
    return None


# -- the changelog's head ----------------------------------------------------------------------------------------------


@dataclass
class PartitionView:
    """The newest P, W and C records of one partition. cells: by (epoch, cluster)."""

    partition: int
    position: Position | None = None
    switches: dict[int, Switch] = field(default_factory=dict)
    cells: dict[tuple[int, int], CellCounts] = field(default_factory=dict)

    @property
    def cut(self) -> int:
        """The input offset below which everything is committed; 0 before the first transaction."""
        return self.position.next_offset if self.position else 0

    @property
    def begin(self) -> int:
        """The first input offset that the stream looked at."""
        return self.switches[0].input_offset if 0 in self.switches else self.cut

    @property
    def totals(self) -> Totals:
        return self.position.totals if self.position else Totals()


@dataclass
class StreamView:
    """What a stream has committed, as its changelog says."""

    topics: StreamTopics
    settings: StreamSettings
    partitions: dict[int, PartitionView]

    @property
    def cut(self) -> dict[int, int]:
        """The newest cut: the next input offset of each partition."""
        return {p: view.cut for p, view in self.partitions.items()}

    @property
    def running(self) -> dict[int, Switch]:
        """The newest switch of each partition that has one: the epoch that it is in, and the bundle that it runs with."""
        return {p: part.switches[max(part.switches)] for p, part in self.partitions.items() if part.switches}

    def epochs_with(self, bundle: str) -> dict[int, int]:
        """The present epoch of each partition that runs with this bundle.

        A partition counts its own switches: one that passed over a bundle is in another epoch than its neighbours, with the
        same bundle, for good. So what is asked of a bundle is asked of (partition, epoch), never of an epoch's number alone.
        """
        return {p: switch.epoch for p, switch in self.running.items() if switch.bundle == bundle}

    @property
    def totals(self) -> Totals:
        """The sum over all partitions."""
        return Totals(*map(sum, zip(*(view.totals for view in self.partitions.values()), strict=True)))


class NothingCommitted(TldrError):
    """No worker has committed anything to these partitions."""


class ChangelogFollower:
    """The head of a stream's changelog, kept up to date by `advance`; only what is new is read again.

    partitions  which of so many partitions to follow: all of them unless given
    Raises TldrError where the stream does not exist.
    """

    def __init__(self, source: StreamSource, partitions: Callable[[int], Iterable[int]] = range) -> None:
        self.connection, self.topics = source.connection, source.topics
        connection, topics = source.connection, source.topics
        count = partition_counts(connection, [topics.changelog]).get(topics.changelog)
        if count is None:
            raise TldrError(
                f"there is no stream {topics.name} at {connection.bootstrap_servers} (no topic {topics.changelog}): "
                "check --stream and --topic, or start a worker with `tldr-stream consume`"
            )
        self._views = {p: PartitionView(p) for p in partitions(count)}
        self._next: dict[int, int] = {}
        self._settings: StreamSettings | None = None

    def advance(self, on_record: Callable[[ChangelogRecord], None] | None = None, *, wait: bool = False) -> StreamView:
        """Reads what was committed since the last call.

        on_record  is given the records of the other kinds (E, K, F), oldest first
        wait       True: reads to the true end, waiting for open transactions; False: to the last stable offset
        Raises NothingCommitted if no worker has committed anything yet.
        """
        spans = whole(self.connection, self.topics.changelog, self._views, committed=not wait)
        for p, position in self._next.items():
            spans[p] = (max(spans[p][0], position), spans[p][1])
        for messages in read_spans(self.connection, self.topics.changelog, spans):
            for message in messages:
                self._take(message, on_record)
        self._next = {p: max(self._next.get(p, 0), end) for p, (_, end) in spans.items()}
        if self._settings is None:
            raise NothingCommitted(f"the stream {self.topics.name} has committed nothing yet: start a worker, or wait")
        return StreamView(self.topics, self._settings, self._views)

    def _take(self, message: Message, on_record: Callable[[ChangelogRecord], None] | None) -> None:
        key, value, view = message.key(), message.value(), self._views[message.partition()]
        kind = key[:1] if key else b""
        if kind == POSITION and value is not None:
            view.position = decode_position(value)
        elif kind == SWITCH and value is not None:
            switch = decode_switch(value)
            view.switches[switch.epoch] = switch
        elif kind == CELL and value is not None:
            view.cells |= {(epoch, cluster): counts for epoch, cluster, counts in cells_of(key, value)}
        elif kind == SETTINGS and value is not None:
            self._settings = StreamSettings.from_json(value)
        elif on_record is not None:
            on_record((message.partition(), key, value))


def stored_settings(connection: Connection, topics: StreamTopics) -> StreamSettings | None:
    """The settings of a stream: the first record of its changelog. None: no worker has committed anything yet."""
    count = partition_counts(connection, [topics.changelog]).get(topics.changelog, 0)
    spans = whole(connection, topics.changelog, range(count), committed=True)
    for p, span in spans.items():
        for messages in read_spans(connection, topics.changelog, {p: span}, batch=10):
            for message in messages:
                if message.key() == SETTINGS and message.value() is not None:
                    return StreamSettings.from_json(message.value())
            break  # it is the first that a partition has
    return None


def read_view(source: StreamSource) -> StreamView:
    """What the stream has committed by now. Raises TldrError where there is none.

    A commit that its producer was told of counts, even if its markers are still on their way: they are waited for.
    """
    return ChangelogFollower(source).advance(wait=True)


# -- kept pairs --------------------------------------------------------------------------------------------------------


class KeptRecord(NamedTuple):
    """A record of the kept topic. cause None: no worker wrote it; value None: the pair is removed.

    epoch, cluster, priority and rate are of a kept pair; -1, -1, 0 and 1/1 for a removal or where a header is missing.
    """

    partition: int
    offset: int
    key: bytes
    cause: int | None
    epoch: int
    cluster: int
    priority: int
    rate: Ratio
    value: bytes | None

    @property
    def id(self) -> str:
        return self.key.decode("utf-8", "replace")


def kept_record(message: Message) -> KeptRecord:
    """A message of the kept topic, read from its key and headers; the value is not decoded."""
    headers = dict(message.headers() or [])

    def number(name: str, otherwise: int) -> int:
        text = headers.get(name) or b""
        return int(text) if text.isdigit() else otherwise

    cause = number("cause", -1)
    p, slash, q = (headers.get("rate") or b"").partition(b"/")
    rate = Ratio(int(p), int(q)) if slash and p.isdigit() and q.isdigit() else Ratio(1, 1)
    return KeptRecord(
        message.partition(),
        message.offset(),
        message.key() or b"",
        None if cause < 0 else cause,
        number("epoch", -1),
        number("cluster", -1),
        number("priority", 0),
        rate,
        message.value(),
    )


def read_kept(
    source: StreamSource, spans: Mapping[int, tuple[int, int]], *, batch: int = 500
) -> Iterator[list[KeptRecord]]:
    """The kept topic's records in these spans (see `whole`), in batches."""
    for messages in read_spans(source.connection, source.topics.kept, spans, batch=batch):
        yield [kept_record(message) for message in messages]


# -- codes -------------------------------------------------------------------------------------------------------------


class CodesRow(NamedTuple):
    """What became of one raw record. vector None where the image was not looked at; removed: ids that left by it."""

    partition: int
    offset: int
    id: str
    fate: Fate
    epoch: int
    bundle: str
    cluster: int
    position: int
    priority: int
    itm: float
    duplicate_of: int
    removed: tuple[str, ...]
    vector: NDArray[np.uint16] | None


_FATES = {int(fate): fate for fate in Fate}


def codes_rows(record: Mapping[str, Any]) -> Iterator[CodesRow]:
    """The rows of a decoded PairCodes record, in offset order."""
    tokens = record["tokens"]
    vectors = np.frombuffer(record["vectors"], "<u2").reshape(-1, tokens) if tokens else None
    duplicates = iter(np.frombuffer(record["duplicate_of"], "<i8").tolist())
    removed: dict[int, list[str]] = {}
    for removal in record["removed"]:
        removed.setdefault(removal["row"], []).append(removal["id"])
    columns = zip(
        record["ids"],
        np.frombuffer(record["offsets"], "<i8").tolist(),
        np.frombuffer(record["fates"], np.uint8).tolist(),
        np.frombuffer(record["clusters"], "<i4").tolist(),
        np.frombuffer(record["positions"], "<i8").tolist(),
        np.frombuffer(record["priorities"], "<u8").tolist(),
        np.frombuffer(record["itms"], "<f4").tolist(),
        strict=True,
    )
    looked_at = 0
    for row, (pair_id, offset, number, cluster, position, priority, itm) in enumerate(columns):
        vector = None
        if cluster >= 0 and vectors is not None:
            vector, looked_at = vectors[looked_at], looked_at + 1
        fate = _FATES[number]
        yield CodesRow(
            record["partition"],
            offset,
            pair_id,
            fate,
            record["epoch"],
            record["bundle"],
            cluster,
            position,
            priority,
            itm,
            next(duplicates) if fate == Fate.DUPLICATE else -1,
            tuple(removed.get(row, ())),
            vector,
        )


def read_codes(
    source: StreamSource, spans: Mapping[int, tuple[int, int]], *, below: Mapping[int, int]
) -> Iterator[CodesRow]:
    """The rows of the codes topic in these spans, those of input offsets under `below`; each partition's in order.

    Raises TldrError for a record that is not ours.
    """
    codec = source.codec("PairCodes")
    for messages in read_spans(source.connection, source.topics.codes, spans, batch=50):
        for message in messages:
            for row in codes_rows(decoded(codec, message)):
                if row.offset < below[message.partition()]:
                    yield row


# -- dead letters ------------------------------------------------------------------------------------------------------


class DeadLetterSeen(NamedTuple):
    """A dead letter, without its bytes. offset: of the raw record; letter_offset: in the dead letter topic."""

    partition: int
    offset: int
    letter_offset: int
    key: bytes | None
    reason: str
    detail: str


def read_dead_letters(
    source: StreamSource, spans: Mapping[int, tuple[int, int]]
) -> Iterator[tuple[DeadLetterSeen, Message]]:
    """The dead letters in these spans, each with its record; those that no worker wrote are passed over."""
    for messages in read_spans(source.connection, source.topics.dead, spans, batch=200):
        for message in messages:
            at = header_of(message, f"{HEADER_PREFIX}offset")
            partition = header_of(message, f"{HEADER_PREFIX}partition")
            if at is None or not at.isdigit() or partition != str(message.partition()):
                continue
            reason = header_of(message, f"{HEADER_PREFIX}reason") or "unknown"
            detail = header_of(message, f"{HEADER_PREFIX}detail") or ""
            seen = DeadLetterSeen(message.partition(), int(at), message.offset(), message.key(), reason, detail)
            yield seen, message
