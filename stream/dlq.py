"""`dlq list` and `dlq replay`: what could not be processed and why, and how it gets a second chance.

Reads the dead letter topic and nothing of the worker. Replaying is an ordinary produce to the raw topic: the worker that
reads the record again decides about it as about any other.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Message

from models.errors import Reason
from stream.acl import Right
from stream.dead_letters import HEADER_PREFIX, original_headers
from stream.errors import TldrError
from stream.kafka import Connection, partition_count, partition_counts, refused
from stream.progress import Progress
from stream.records import UndecodableRecord
from stream.rights import check_rights
from stream.stream_view import DeadLetterSeen, StreamSource, header_of, read_dead_letters, whole

DELIVERY_TIMEOUT_S = 60.0
DETAIL_CHARACTERS_SHOWN = 100


@dataclass(frozen=True)
class DeadLetterRow:
    """One dead letter. offset  of the raw record; letter_offset  in the dead letter topic; bytes  of the raw value."""

    reason: str
    detail: str
    topic: str
    partition: int
    offset: int
    letter_offset: int
    id: str | None
    bytes: int
    timestamp_ms: int


@dataclass
class DeadLetterList:
    """The newest dead letters, oldest first, and how many there are of each reason."""

    dead_letter_topic: str
    total: int
    by_reason: dict[str, int]
    letters: list[DeadLetterRow] = field(default_factory=list)

    def lines(self) -> Iterable[str]:
        if not self.total:
            yield f"no dead letters in {self.dead_letter_topic}"
            return
        yield f"{self.total:,} dead letters in {self.dead_letter_topic}"
        yield from (f"  {count:>9,}  {reason}" for reason, count in self.by_reason.items())
        if self.letters and len(self.letters) < self.total:
            yield f"the newest {len(self.letters):,} of them (--limit shows more):"
        for letter in self.letters:
            where = f"{letter.topic}/{letter.partition} offset {letter.offset}"
            who = _one_line(letter.id) if letter.id is not None else "no id"
            yield f"{where}  {letter.reason}  {who}  {letter.bytes:,} bytes"
            if letter.detail:
                yield f"    {_one_line(letter.detail)}"


@dataclass
class ReplayResult:
    """What `dlq replay` sent back to the raw topic. repeated  letters of a record that was sent back once already."""

    topic: str
    dead_letter_topic: str
    dry_run: bool
    sent: int = 0
    repeated: int = 0
    sent_bytes: int = 0
    by_reason: dict[str, int] = field(default_factory=dict)

    def lines(self) -> Iterable[str]:
        what = "would be sent" if self.dry_run else "sent"
        yield f"{self.sent:,} dead letters ({self.sent_bytes / 1e6:,.1f} MB) {what} back to {self.topic}"
        yield from (f"  {count:>9,}  {reason}" for reason, count in self.by_reason.items())
        if self.repeated:
            yield f"{self.repeated:,} more are the same records again (replayed before, and dead again): sent once"
        if not self.dry_run and self.sent:
            yield "What is well now counts, and its id is known from then on: replaying it again makes a duplicate, which"
            yield "changes nothing. What is still bad becomes a dead letter again. The old letters stay until they expire."


def list_dead_letters(source: StreamSource, reasons: Sequence[Reason] = (), limit: int = 20) -> DeadLetterList:
    """The newest `limit` dead letters of these reasons (none given: of all), and the count of each reason.

    Raises TldrError where the stream has no dead letter topic.
    """
    check_rights(source.connection, "dlq list", stream=source.name)
    spans = _spans(source)
    newest: list[tuple[int, int, int, DeadLetterRow]] = []  # a heap with the oldest on top
    counts: Counter[str] = Counter()
    raw_codec = source.codec("RawPair")
    with Progress(f"read {source.topics.dead}", _length(spans)) as progress:
        for seen, message in read_dead_letters(source, spans):
            progress.advance()
            if reasons and seen.reason not in reasons:
                continue
            counts[seen.reason] += 1
            row = _row(seen, message, raw_codec)
            heapq.heappush(newest, (row.timestamp_ms, row.partition, row.letter_offset, row))
            if len(newest) > limit:
                heapq.heappop(newest)
    return DeadLetterList(
        source.topics.dead, counts.total(), dict(counts.most_common()), [row for *_, row in sorted(newest)]
    )


def replay(source: StreamSource, topic: str, reasons: Sequence[Reason] = (), *, dry_run: bool = False) -> ReplayResult:
    """Sends dead letters of these reasons (none given: of all) back to where they came from, each record once.

    Original key, bytes and headers, to the original partition: ids are known within a partition, and for a key that sits
    where murmur2 puts it this is the same partition. Letters that arrive meanwhile are left for the next replay.
    Raises TldrError where a topic is missing or the letters are another topic's, Unavailable if one is not delivered.
    """
    check_rights(source.connection, "dlq replay", raw=topic, stream=source.name)
    spans = _spans(source)
    partitions = partition_count(source.connection, topic)
    result = ReplayResult(topic, source.topics.dead, dry_run)
    back = None if dry_run else _WayBack(source.connection, topic)
    counts: Counter[str] = Counter()
    # A record that was replayed and died again lies here twice; sending both would double it with every replay.
    sent: set[bytes] = set()
    with Progress(f"replay {source.topics.dead}", _length(spans)) as progress:
        for seen, message in read_dead_letters(source, spans):
            progress.advance()
            if reasons and seen.reason not in reasons:
                continue
            origin = header_of(message, f"{HEADER_PREFIX}topic")
            if origin != topic or seen.partition >= partitions:
                raise TldrError(
                    f"the dead letters of {source.topics.dead} are records of {origin}/{seen.partition}, not of {topic}: "
                    f"give --topic {origin} --stream {source.name}"
                )
            same = _digest(message)
            if same in sent:
                result.repeated += 1
                continue
            sent.add(same)
            counts[seen.reason] += 1
            result.sent_bytes += len(message.value() or b"")
            if back is not None:
                back.send(message)
        if back is not None:
            back.wait_for_all()
    result.sent, result.by_reason = counts.total(), dict(counts.most_common())
    return result


class _WayBack:
    """The producer to the raw topic; a letter that is not delivered stops it."""

    def __init__(self, connection: Connection, topic: str) -> None:
        self._connection, self._topic = connection, topic
        self._producer = connection.producer(message_timeout_ms=int(DELIVERY_TIMEOUT_S * 1000))
        self._failure: KafkaError | None = None
        self._delivered = 0

    def send(self, letter: Message) -> None:
        headers = original_headers(letter.headers() or [])
        while True:
            try:
                self._producer.produce(
                    self._topic,
                    letter.value(),
                    letter.key(),
                    letter.partition(),
                    headers=headers,
                    on_delivery=self._report,
                )
                break
            except BufferError:  # full: the broker is slower than we read
                self._serve(0.1)
            except KafkaException as error:
                raise self._stopped(error.args[0]) from error
        self._serve(0.0)

    def wait_for_all(self) -> None:
        while len(self._producer):
            self._producer.flush(0.5)
            self._serve(0.0)

    def _serve(self, wait_s: float) -> None:
        self._producer.poll(wait_s)
        if self._failure is not None:
            raise self._stopped(self._failure)

    def _report(self, error: KafkaError | None, message: Any) -> None:
        if error is None:
            self._delivered += 1
        else:
            self._failure = self._failure or error

    def _stopped(self, error: KafkaError) -> TldrError:
        what = (
            f"topic {self._topic} takes no more records: {self._delivered:,} dead letters are back in it; run the same "
            "command again, those that count by then change nothing"
        )
        return refused(self._connection, error, what, Right("Write", "topic", self._topic))


def _spans(source: StreamSource) -> dict[int, tuple[int, int]]:
    """All of the dead letter topic that is committed now."""
    topic = source.topics.dead
    count = partition_counts(source.connection, [topic]).get(topic)
    if count is None:
        raise TldrError(
            f"there is no stream {source.name} at {source.connection.bootstrap_servers} (no topic {topic}): check --stream "
            "and --topic, or start a worker with `tldr-stream consume`"
        )
    return whole(source.connection, topic, range(count), committed=True)


def _length(spans: dict[int, tuple[int, int]]) -> int:
    return sum(end - start for start, end in spans.values())


def _row(seen: DeadLetterSeen, message: Message, raw_codec: Any) -> DeadLetterRow:
    value = message.value() or b""
    return DeadLetterRow(
        seen.reason,
        seen.detail,
        header_of(message, f"{HEADER_PREFIX}topic") or "",
        seen.partition,
        seen.offset,
        seen.letter_offset,
        _id_of(seen.key, value, raw_codec),
        len(value),
        message.timestamp()[1],
    )


def _id_of(key: bytes | None, value: bytes, raw_codec: Any) -> str | None:
    """The key, or the id that the value tells if it can be read after all."""
    if key:
        return key.decode("utf-8", "replace")
    try:
        return str(raw_codec.decode(value)["id"]) or None
    except UndecodableRecord:
        return None


def _digest(message: Message) -> bytes:
    """What makes two letters the same record: partition, key and value."""
    key, value = message.key(), message.value()
    sizes = (-1 if part is None else len(part) for part in (key, value))
    head = b"%d %d %d " % (message.partition(), *sizes)
    return hashlib.blake2b(head + (key or b"") + (value or b""), digest_size=16).digest()


def _one_line(text: str) -> str:
    """Text of unknown origin for a terminal: no line breaks, no control characters, not too long."""
    plain = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))
    return plain if len(plain) <= DETAIL_CHARACTERS_SHOWN else plain[: DETAIL_CHARACTERS_SHOWN - 1] + "…"
