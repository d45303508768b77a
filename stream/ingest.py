"""`ingest`: image-text pairs from files into the raw topic, once each, however often it is stopped and started again.

An idempotent producer partitions them by murmur2 of the id, as Java does. What the broker has acknowledged is written to a
journal (stream/ingest_journal.py), and what a killed run had sent without writing it is looked for in the topic first.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Producer

from stream.acl import Right
from stream.errors import TldrError, Unavailable
from stream.ingest_journal import FinishedShard, Journal, Mark, RepeatedImage, short_hash
from stream.kafka import RECORD_BYTES_MAX as PRODUCER_BYTES_MAX
from stream.kafka import (
    Connection,
    create_missing,
    end_offsets,
    partition_counts,
    read_partition,
    refused,
    start_offsets,
    topic_id,
    topic_setting,
)
from stream.pair_sources import BadEntry, Shard, SourcePair, shards_of
from stream.progress import Progress
from stream.raw_format import parse_fields
from stream.records import Codec, Registry
from stream.rights import check_rights

DEFAULT_PARTITIONS = 4
# Room for one raw record in a topic that we create: a large image and its caption.
RECORD_BYTES_MAX = 8 * 1024 * 1024
# Kafka's own default of max.message.bytes.
DEFAULT_TOPIC_RECORD_BYTES = 1_048_588
# A record batch has 61 bytes of header, a record a few varints: what a record weighs beside its key and value.
RECORD_OVERHEAD_BYTES = 128
# What may wait in the producer: the job's memory.
QUEUE_KBYTES = 64 * 1024
LINGER_MS = 20
DELIVERY_TIMEOUT_S = 120.0
# How often acknowledged entries go to the journal; a killed run has to be looked for in this much of the topic.
JOURNAL_INTERVAL_S = 1.0
JOURNAL_ENTRIES = 5_000
# A killed run's last request may still be on its way into the log.
SETTLE_S = 1.0
LEADERS_TIMEOUT_S = 10.0
BAD_SHOWN = 10
# An image under so many ids is likely a placeholder ("image not available").
IDS_OF_A_PLACEHOLDER = 5
IMAGES_SHOWN = 10


@dataclass(frozen=True)
class IngestOptions:
    """The options of `ingest`; `tldr-stream ingest --help` says what each one means."""

    connection: Connection
    source: str
    topic: str
    partitions: int | None = None
    fields: Sequence[str] = ()
    again: bool = False
    journal: Path | None = None
    bad_entries: Path | None = None
    registry: Registry | None = None


@dataclass
class IngestResult:
    """What a run of `ingest` did. bad counts the entries of the whole source that are no pairs, this run's and older."""

    source: str
    topic: str
    partitions: int
    topic_created: bool
    sent: int = 0
    sent_bytes: int = 0
    already_there: int = 0
    bad: int = 0
    bad_by_reason: dict[str, int] = field(default_factory=dict)
    first_bad: list[BadEntry] = field(default_factory=list)
    bad_entries_file: Path | None = None
    repeated_images: list[RepeatedImage] = field(default_factory=list)
    seconds: float = 0.0

    def lines(self) -> Iterable[str]:
        created = ", created" if self.topic_created else ""
        yield f"{self.source} -> {self.topic} ({self.partitions} partitions{created})"
        rate = self.sent / self.seconds if self.seconds else 0.0
        yield (
            f"{self.sent:,} pairs sent ({self.sent_bytes / 1e6:,.1f} MB) in {self.seconds:.1f} s, {rate:,.0f} a second; "
            f"{self.already_there:,} were there already"
        )
        if self.bad:
            yield f"{self.bad:,} entries are no pairs: " + ", ".join(
                f"{n:,} {r}" for r, n in self.bad_by_reason.items()
            )
            yield from (f"  {entry.place}: {entry.reason} ({entry.detail})" for entry in self.first_bad)
            if self.bad_entries_file is not None:
                yield f"  all of them in {self.bad_entries_file}"
        if self.repeated_images:
            yield "images that stand under many ids (placeholders?):"
            yield from (f"  {image.ids:,} ids: {image.place}" for image in self.repeated_images)


def ingest(options: IngestOptions) -> IngestResult:
    """Sends every pair of the source that this topic does not have from it yet; bad entries are listed, never fatal.

    Raises TldrError for a source that cannot be read or a topic that does not fit, Unavailable if the broker is not
    there or stops answering; the same command then goes on where this one stopped.
    """
    began = time.monotonic()
    shards = shards_of(options.source, parse_fields(options.fields))
    codec = Codec("RawPair", registry=options.registry)
    result = _topic_for(options)
    file = _journal_file(options)
    with Journal(file) as journal:
        if options.again:
            journal.forget()
        _begin(journal, options.connection, result)
        room = topic_setting(options.connection, options.topic, "max.message.bytes") or DEFAULT_TOPIC_RECORD_BYTES
        sender = _Sender(options.connection, options.topic, journal, codec, min(int(room), PRODUCER_BYTES_MAX))
        kilobytes = sum(shard.bytes_total for shard in shards) // 1000
        try:
            with Progress(f"ingest {options.topic}", kilobytes, "kB") as progress:
                for shard in shards:
                    _ingest_shard(shard, journal, sender, result, progress)
                sender.wait_for_all()
        finally:
            # Also on Ctrl-C: what is acknowledged need not be looked for.
            sender.write_journal()
            result.sent, result.sent_bytes = sender.sent, sender.sent_bytes
        journal.end()
        _report(journal, options, result)
    result.seconds = time.monotonic() - began
    return result


def _topic_for(options: IngestOptions) -> IngestResult:
    """Creates the topic if it is missing."""
    check_rights(options.connection, "ingest", raw=options.topic)
    found = partition_counts(options.connection, [options.topic]).get(options.topic)
    if found is None:
        count = options.partitions or DEFAULT_PARTITIONS
        settings = {"max.message.bytes": str(RECORD_BYTES_MAX)}
        create_missing(options.connection, {options.topic: settings}, count)
        return IngestResult(options.source, options.topic, count, topic_created=True)
    if options.partitions not in (None, found):
        raise TldrError(
            f"topic {options.topic} has {found} partitions, not {options.partitions}: leave --partitions out, or use "
            "another topic"
        )
    return IngestResult(options.source, options.topic, found, topic_created=False)


def _journal_file(options: IngestOptions) -> Path:
    """One file for a source and a topic; a topic that was deleted and made again has another id and starts anew."""
    home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    folder = options.journal or home / "tldr-stream-ingest"
    source = options.source if "://" in options.source else os.path.abspath(options.source)
    name = hashlib.sha256(f"{source}\n{topic_id(options.connection, options.topic)}".encode()).hexdigest()[:16]
    readable = "".join(c if c.isalnum() else "-" for c in Path(source).name)[:40]
    return folder / f"{options.topic}.{readable}.{name}.journal"


def _begin(journal: Journal, connection: Connection, result: IngestResult) -> None:
    """Finds what a killed run had sent without writing it to the journal."""
    partitions = range(result.partitions)
    unwritten = journal.next_offsets
    if unwritten:
        time.sleep(SETTLE_S)
    ends = _ends_of(connection, result.topic, partitions)
    found: Counter[bytes] = Counter()
    if unwritten:
        starts = start_offsets(connection, result.topic, partitions)
        total = sum(max(0, ends[p] - max(starts[p], unwritten.get(p, 0))) for p in partitions)
        with Progress("look for what the last run had sent", total) as progress:
            for p in partitions:
                start = max(starts[p], unwritten.get(p, 0))
                for messages in read_partition(connection, result.topic, p, start, ends[p]):
                    found.update(short_hash(key) for m in messages if (key := m.key()) and m.value() is not None)
                    progress.advance(len(messages))
    journal.begin(ends, found)


def _ends_of(connection: Connection, topic: str, partitions: Iterable[int]) -> dict[int, int]:
    """End offsets; a topic that was made a moment ago may not have its leaders yet."""
    deadline = time.monotonic() + LEADERS_TIMEOUT_S
    while True:
        try:
            return end_offsets(connection, topic, partitions)
        except Unavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _ingest_shard(shard: Shard, journal: Journal, sender: _Sender, result: IngestResult, progress: Progress) -> None:
    fingerprint = shard.fingerprint()
    finished = journal.finished_shard(shard.name)
    if finished is not None and fingerprint is not None and finished.fingerprint == fingerprint:
        result.already_there += finished.pairs
        progress.advance(shard.bytes_total // 1000)
        return
    journal.begin_shard(shard.name)
    pairs, shown = 0, 0
    for entry in shard.read():
        bad = entry if isinstance(entry, BadEntry) else _send(entry, shard.name, journal, sender, result)
        if bad is None:
            pairs += 1
        else:
            journal.add_bad(shard.name, bad)
        if shard.bytes_read // 1000 > shown:
            progress.advance(shard.bytes_read // 1000 - shown)
            shown = shard.bytes_read // 1000
    if shard.complete and fingerprint is not None:
        sender.finished(FinishedShard(shard.name, fingerprint, pairs))


def _send(pair: SourcePair, shard: str, journal: Journal, sender: _Sender, result: IngestResult) -> BadEntry | None:
    """Sends the pair unless it is there; what is wrong with it if it cannot be sent."""
    try:
        mark = Mark.of(pair)
        if journal.has(mark) or journal.take_over(mark):
            result.already_there += 1
            return None
        return sender.send(pair, mark, shard)
    except UnicodeEncodeError as error:  # JSON's \ud83d without its other half
        return BadEntry(pair.place, "not-unicode", str(error))


class _Sender:
    """The producer and what it has in flight; delivery reports are gathered here and written to the journal."""

    def __init__(
        self, connection: Connection, topic: str, journal: Journal, codec: Codec, record_bytes_max: int
    ) -> None:
        self.sent = 0
        self.sent_bytes = 0
        self._connection, self._topic = connection, topic
        self._journal = journal
        self._codec = codec
        self._record_bytes_max = record_bytes_max
        # librdkafka fills a batch up to batch.size whatever the topic takes: a full one would be refused as a whole.
        self._producer: Producer = connection.producer(
            linger_ms=LINGER_MS,
            batch_size=min(1_000_000, record_bytes_max),
            queue_buffering_max_kbytes=QUEUE_KBYTES,
            message_timeout_ms=int(DELIVERY_TIMEOUT_S * 1000),
        )
        self._acknowledged: list[Mark] = []
        self._next_offsets: dict[int, int] = {}
        self._in_flight: Counter[str] = Counter()  # by shard
        self._read_to_end: dict[str, FinishedShard] = {}
        self._refused: list[tuple[str, BadEntry]] = []
        self._failure: KafkaError | None = None
        self._written_at = time.monotonic()

    def send(self, pair: SourcePair, mark: Mark, shard: str) -> BadEntry | None:
        """Hands the pair to the producer, waiting while that is full. Raises Unavailable if deliveries fail."""
        key = pair.id.encode()
        value = self._codec.encode(
            {
                "id": pair.id,
                "caption": pair.caption,
                "image": pair.image,
                "image_uri": pair.image_uri,
                "fields": pair.fields,
            }
        )
        weight = len(key) + len(value) + RECORD_OVERHEAD_BYTES
        if weight > self._record_bytes_max:
            return BadEntry(
                pair.place, "record-too-large", f"{weight} bytes; topic {self._topic} takes {self._record_bytes_max}"
            )
        delivered = partial(self._delivered, mark, shard, len(value))
        self._in_flight[shard] += 1
        while True:
            try:
                self._producer.produce(self._topic, value, key, on_delivery=delivered)
                break
            except BufferError:  # full: the broker is slower than the source
                self._serve(0.1)
            except KafkaException as error:
                raise self._stopped(error.args[0]) from error
        self._serve(0.0)
        return None

    def finished(self, shard: FinishedShard) -> None:
        """The shard is read to its end; once nothing of it is in flight it goes to the journal."""
        self._read_to_end[shard.name] = shard

    def wait_for_all(self) -> None:
        """Waits until everything is delivered. Raises Unavailable if it cannot be."""
        while len(self._producer):
            self._producer.flush(0.5)
            self._after_reports()
        self._after_reports()

    def write_journal(self) -> None:
        """Writes what is acknowledged by now."""
        finished = [done for name, done in self._read_to_end.items() if not self._in_flight[name]]
        for shard, entry in self._refused:
            self._journal.add_bad(shard, entry)
        self._journal.acknowledge(self._acknowledged, self._next_offsets, finished)
        for done in finished:
            del self._read_to_end[done.name]
            del self._in_flight[done.name]
        self._acknowledged, self._next_offsets, self._refused = [], {}, []
        self._written_at = time.monotonic()

    def _serve(self, wait_s: float) -> None:
        self._producer.poll(wait_s)
        self._after_reports()

    def _after_reports(self) -> None:
        if self._failure is not None:
            raise self._stopped(self._failure)
        late = time.monotonic() - self._written_at > JOURNAL_INTERVAL_S
        if late or len(self._acknowledged) >= JOURNAL_ENTRIES:
            self.write_journal()

    def _delivered(self, mark: Mark, shard: str, value_bytes: int, error: KafkaError | None, message: Any) -> None:
        # Never raises: an exception in a delivery report turns into a SystemError in poll().
        self._in_flight[shard] -= 1
        if error is None:
            self._acknowledged.append(mark)
            self._next_offsets[message.partition()] = message.offset() + 1
            self.sent += 1
            self.sent_bytes += value_bytes
        elif error.code() in (KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.INVALID_RECORD):
            self._refused.append((shard, BadEntry(mark.place, "record-refused", error.str())))
        else:
            self._failure = self._failure or error

    def _stopped(self, error: KafkaError) -> TldrError:
        what = (
            f"topic {self._topic} takes no more records: {self.sent:,} pairs are acknowledged, run the same command again "
            "and it goes on from there"
        )
        return refused(self._connection, error, what, Right("Write", "topic", self._topic))


def _report(journal: Journal, options: IngestOptions, result: IngestResult) -> None:
    result.bad_by_reason = journal.bad_reasons()
    result.bad = sum(result.bad_by_reason.values())
    result.repeated_images = journal.repeated_images(IDS_OF_A_PLACEHOLDER, IMAGES_SHOWN)
    if not result.bad:
        return
    result.bad_entries_file = options.bad_entries or journal.file.with_suffix(".bad-entries.tsv")
    try:
        with result.bad_entries_file.open("w") as out:
            for number, entry in enumerate(journal.bad_entries()):
                if number < BAD_SHOWN:
                    result.first_bad.append(entry)
                detail = " ".join(entry.detail.split())
                out.write(f"{entry.place}\t{entry.reason}\t{detail}\n")
    except OSError as error:
        raise TldrError(f"cannot write {result.bad_entries_file}: {error.strerror}; the pairs are sent") from error
