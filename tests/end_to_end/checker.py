"""A checker for sceptics: reads a stream's topics and the broker's own log files, and counts each anomaly by name.

Imports nothing of the worker: not its records, its changelog, its store nor its view of a stream; only Kafka's client,
Avro, and the batch reference, which knows nothing of the worker either. What a worker wrote is read as the documents say
that it looks (schemas/*.avsc, "S", "P", "W" of the changelog), so that one mistake cannot hide itself twice.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import fastavro
import fastavro.schema
import numpy as np
from confluent_kafka import Consumer, KafkaError, TopicPartition
from confluent_kafka.admin import AdminClient

from stream.batch_tldr import Outcome, Row, reduce_partition

SCHEMAS = Path(__file__).resolve().parents[2] / "stream" / "schemas"
HEADER_BYTES = 10  # of Avro's single-object encoding
FATES = ("kept", "over quota", "below gate", "over cap", "duplicate", "forgotten")  # schemas/PairCodes.avsc
COUNTED = frozenset({"kept", "over quota", "over cap"})
KEPT, CODES, DEAD, CHANGELOG = "kept-pairs", "pair-codes", "dlq", "reservoir-changelog"
OUTPUTS = (KEPT, CODES, DEAD, CHANGELOG)

ANOMALIES = {
    "lost": "an acknowledged raw record without a trace, a kept pair or a removal that nobody can see",
    "counted_twice": "a raw record with two traces, or an id that counted twice",
    "captioned_twice": "a kept pair with two visible captions",
    "aborted_but_visible": "a record that a read_committed reader saw, and that was never committed",
    "written_after_fencing": "a record of a producer that was fenced, or of one that did not know what stood there already",
    "differs_from_batch": "a fate, or a pair of the reduced set, that the batch reference does not have so",
    "store_differs_from_changelog": "a record or a known id of a local store that its changelog does not have so",
}
NO_ANOMALY = dict.fromkeys(ANOMALIES, 0)


class Place(NamedTuple):
    """Where a record lies."""

    topic: str
    partition: int
    offset: int


class Seen(NamedTuple):
    """A record as a reader sees it."""

    offset: int
    key: bytes | None
    value: bytes | None
    headers: dict[str, bytes]


class StoreContent(NamedTuple):
    """What a closed local store says of itself. position  the changelog offset up to which (exclusively) it reaches."""

    partition: int
    position: int
    items: Mapping[bytes, bytes]
    known_offset: Callable[[int], int | None]


# -- topics ------------------------------------------------------------------------------------------------------------


def read_topic(bootstrap_servers: str, topic: str, isolation: str = "read_committed") -> dict[int, list[Seen]]:
    """All that a reader sees in a topic up to its present end, by partition; nothing where there is no such topic."""
    settings = {"bootstrap.servers": bootstrap_servers}
    found = AdminClient(settings).list_topics(timeout=10).topics.get(topic)
    if found is None:
        return {}
    consumer = Consumer(
        settings
        | {"group.id": "checker", "enable.auto.commit": False, "isolation.level": isolation, "fetch.wait.max.ms": 20,
           "enable.partition.eof": True, "auto.offset.reset": "error"}
    )  # fmt: skip
    seen: dict[int, list[Seen]] = {p: [] for p in found.partitions}
    open_ends = set(seen)
    try:
        starts = {p: consumer.get_watermark_offsets(TopicPartition(topic, p), timeout=10)[0] for p in seen}
        consumer.assign([TopicPartition(topic, p, start) for p, start in starts.items()])
        while open_ends:
            for message in consumer.consume(1000, 0.1):
                error = message.error()
                if error is None:
                    headers = dict(message.headers() or [])
                    seen[message.partition()].append(Seen(message.offset(), message.key(), message.value(), headers))
                elif error.code() == KafkaError._PARTITION_EOF:
                    open_ends.discard(message.partition())
                elif not error.retriable():
                    raise RuntimeError(f"cannot read {topic}: {error.str()}")
    finally:
        consumer.close()
    return seen


class Avro:
    """Decodes one kind of record by its schema file."""

    def __init__(self, record: str) -> None:
        self.schema = fastavro.schema.parse_schema(json.loads((SCHEMAS / f"{record}.avsc").read_text()))

    def __call__(self, value: bytes) -> dict[str, Any]:
        body = io.BytesIO(value)
        body.seek(HEADER_BYTES)
        decoded = fastavro.schemaless_reader(body, self.schema, None)
        if not isinstance(decoded, dict):
            raise TypeError("not a record")
        return decoded


class CodesRow(NamedTuple):
    """A row of pair-codes, as far as it is checked. at  offset of its record in the codes topic."""

    at: int
    offset: int
    id: str
    fate: str
    epoch: int
    cluster: int
    position: int
    itm: float
    duplicate_of: int
    vector: bytes | None
    removed: tuple[str, ...]


def codes_rows(at: int, record: Mapping[str, Any]) -> Iterator[CodesRow]:
    """The rows of a PairCodes record."""
    vectors, width = record["vectors"], 2 * record["tokens"]
    duplicates = iter(np.frombuffer(record["duplicate_of"], "<i8").tolist())
    removed: dict[int, list[str]] = defaultdict(list)
    for removal in record["removed"]:
        removed[removal["row"]].append(removal["id"])
    looked_at = 0
    for n, (pair_id, offset, fate, cluster, position, itm) in enumerate(
        zip(
            record["ids"],
            np.frombuffer(record["offsets"], "<i8").tolist(),
            record["fates"],
            np.frombuffer(record["clusters"], "<i4").tolist(),
            np.frombuffer(record["positions"], "<i8").tolist(),
            np.frombuffer(record["itms"], "<f4").tolist(),
            strict=True,
        )
    ):
        vector = None
        if cluster >= 0:
            vector, looked_at = vectors[looked_at * width : (looked_at + 1) * width], looked_at + 1
        first = next(duplicates) if FATES[fate] == "duplicate" else -1
        yield CodesRow(
            at, offset, pair_id, FATES[fate], record["epoch"], cluster, position, itm, first, vector, tuple(removed[n])
        )


# -- the broker's own log files ----------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """The head of a record batch (KIP-98). control  None: data; else the marker's type, 0 abort, 1 commit."""

    first: int
    last: int
    producer: int
    epoch: int
    transactional: bool
    control: int | None


_batch_head = struct.Struct(">qiibIhiqqqhii")  # first offset … number of records, 61 bytes
_TRANSACTIONAL, _CONTROL = 1 << 4, 1 << 5


def read_log(folder: Path) -> Iterator[Batch]:
    """The heads of all record batches of a partition, from its segment files; a torn tail ends it."""
    for segment in sorted(folder.glob("*.log")):
        data, at = segment.read_bytes(), 0
        while at + _batch_head.size <= len(data):
            first, length, _, magic, _, attributes, span, _, _, producer, epoch, _, _ = _batch_head.unpack_from(
                data, at
            )
            if magic != 2 or at + 12 + length > len(data):
                break
            control = _marker_type(data, at + _batch_head.size) if attributes & _CONTROL else None
            yield Batch(first, first + span, producer, epoch, bool(attributes & _TRANSACTIONAL), control)
            at += 12 + length


def _marker_type(data: bytes, at: int) -> int:
    """The type in the key of a control record: length, attributes, two deltas, length of the key, version, type."""
    _, at = _varint(data, at)
    at += 1
    for _ in range(3):
        _, at = _varint(data, at)
    return int.from_bytes(data[at + 2 : at + 4], "big")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, at
        shift += 7


@dataclass
class LogFindings:
    """What the batches of a partition say. uncommitted  spans of transactional records that no commit marker covers."""

    uncommitted: list[tuple[int, int]] = field(default_factory=list)
    fenced: int = 0  # data batches with a lower epoch than one before them of the same producer

    def has_uncommitted(self, offset: int) -> bool:
        return any(first <= offset <= last for first, last in self.uncommitted)


def examine_log(batches: Iterable[Batch]) -> LogFindings:
    """Which records were never committed, and which were written with an epoch that was over."""
    found = LogFindings()
    open_spans: dict[int, list[tuple[int, int]]] = defaultdict(list)
    epochs: dict[int, int] = {}
    for batch in batches:
        if batch.producer < 0:
            continue
        if batch.control is None:
            found.fenced += batch.epoch < epochs.get(batch.producer, -1)
            if batch.transactional:
                open_spans[batch.producer].append((batch.first, batch.last))
        else:
            spans = open_spans.pop(batch.producer, [])
            if batch.control == 0:
                found.uncommitted += spans
        epochs[batch.producer] = max(batch.epoch, epochs.get(batch.producer, -1))
    for spans in open_spans.values():
        found.uncommitted += spans
    return found


# -- the check ---------------------------------------------------------------------------------------------------------


@dataclass
class Findings:
    """How often each anomaly was found, with a few examples of each."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, anomaly: str, example: str, count: int = 1) -> None:
        if count:
            self.counts[anomaly] += count
            if len(self.examples[anomaly]) < 5:
                self.examples[anomaly].append(example)

    @property
    def anomalies(self) -> dict[str, int]:
        """Every anomaly by name, `NO_ANOMALY` if there is none."""
        return {name: self.counts[name] for name in ANOMALIES}

    def lines(self) -> list[str]:
        """`name: count` for each anomaly, and what was found under it."""
        lines = []
        for name, count in self.anomalies.items():
            lines.append(f"{name}: {count}")
            lines += [f"    {example}" for example in self.examples.get(name, [])]
        return lines


@dataclass
class _PartitionFacts:
    """All that a partition has visible."""

    raw: list[Seen]
    rows: list[CodesRow]
    kept: list[Seen]
    dead: list[Seen]
    changelog: list[Seen]

    @property
    def positions(self) -> list[tuple[int, int, bool]]:
        """(offset in the changelog, next input offset, whether a switch stands right before it) of every P record."""
        return [
            (record.offset, json.loads(record.value)["next_offset"], (before.key or b"")[:1] == b"W")
            for before, record in zip([Seen(-1, None, None, {}), *self.changelog], self.changelog, strict=False)
            if record.key == b"P" and record.value is not None
        ]


def check(
    bootstrap_servers: str,
    raw_topic: str,
    *,
    stream: str | None = None,
    log_folder: Path | None = None,
    sent: Iterable[tuple[int, int]] = (),
    visible: Iterable[tuple[Place, int]] = (),
    stores: Sequence[StoreContent] = (),
    assign_of: Mapping[str, Callable[[Any], Any]] | None = None,
) -> Findings:
    """Reads all there is, and counts the anomalies.

    log_folder  the broker's log.dirs, for what only its files tell (epochs, markers)
    sent        (partition, offset) of the raw records that a producer was told to be safe
    visible     what a read_committed reader was shown while it happened, with the CRC-32 of its value
    stores      local stores of workers that have ended
    assign_of   of a stream with a cap and switches: bundle version → what gives index vectors their clusters
    Compacted topics are checked as they are: run it before the cleaner has been there.
    """
    name = stream or raw_topic
    findings = Findings()
    raw = read_topic(bootstrap_servers, raw_topic, "read_uncommitted")
    outputs = {kind: read_topic(bootstrap_servers, f"{name}.{kind}") for kind in OUTPUTS}
    settings = _settings(outputs[CHANGELOG])
    for partition, offset in sent:
        if offset >= len(raw[partition]):
            findings.add("lost", f"raw {partition}/{offset} was acknowledged and is not there")
    pair_codes = Avro("PairCodes")
    for partition in raw:
        facts = _PartitionFacts(
            raw[partition],
            [
                row
                for record in outputs[CODES].get(partition, [])
                for row in codes_rows(record.offset, pair_codes(record.value or b""))
            ],
            outputs[KEPT].get(partition, []),
            outputs[DEAD].get(partition, []),
            outputs[CHANGELOG].get(partition, []),
        )
        _check_traces(findings, partition, facts, settings)
        _check_order(findings, partition, facts)
        if settings:
            _check_batch(findings, partition, facts, settings, assign_of or {})
        for store in stores:
            if store.partition == partition:
                _check_store(findings, store, facts, settings)
    _check_visible(findings, name, outputs, visible, log_folder)
    return findings


def _settings(changelog: Mapping[int, list[Seen]]) -> dict[str, Any]:
    for records in changelog.values():
        for record in records:
            if record.key == b"S" and record.value is not None:
                settings: dict[str, Any] = json.loads(record.value)
                return settings
    return {}


def _check_traces(findings: Findings, partition: int, facts: _PartitionFacts, settings: Mapping[str, Any]) -> None:
    """Every raw record leaves exactly one trace, and every trace of a kept pair or a removal one visible record."""
    dead = [int(record.headers["tldr.offset"]) for record in facts.dead]
    traces = Counter([row.offset for row in facts.rows] + dead)
    for record in facts.raw:
        if record.offset not in traces:
            findings.add("lost", f"raw {partition}/{record.offset} ({record.key!r}) left no trace")
    for offset, count in traces.items():
        findings.add("counted_twice", f"raw {partition}/{offset} left {count} traces", count - 1)
    if settings.get("dedupe_window") is None:
        counted = Counter(row.id for row in facts.rows if row.fate in COUNTED)
        for pair_id, count in counted.items():
            findings.add("counted_twice", f"{pair_id} counted {count} times in partition {partition}", count - 1)
    causes = Counter(int(r.headers["cause"]) for r in facts.kept if r.value is not None)
    removals = {(int(r.headers["cause"]), (r.key or b"").decode()) for r in facts.kept if r.value is None}
    for offset, count in causes.items():
        findings.add("captioned_twice", f"raw {partition}/{offset} has {count} captions", count - 1)
    kept = {row.offset for row in facts.rows if row.fate == "kept"}
    for row in facts.rows:
        if row.fate == "kept" and row.offset not in causes:
            findings.add("lost", f"{row.id} of raw {partition}/{row.offset} is kept and has no record")
        for gone in row.removed:
            if (row.offset, gone) not in removals:
                findings.add("lost", f"{gone} left by raw {partition}/{row.offset} and has no tombstone")
    recorded = {(row.offset, gone) for row in facts.rows for gone in row.removed}
    for offset in causes.keys() - kept:
        findings.add("aborted_but_visible", f"a kept pair of raw {partition}/{offset}, which nothing says is kept")
    for offset, gone in removals - recorded:
        findings.add("aborted_but_visible", f"a tombstone of {gone}, which nothing says left by {partition}/{offset}")


def _check_order(findings: Findings, partition: int, facts: _PartitionFacts) -> None:
    """A committed transaction goes on where the one before it in the log ended; else its writer was a zombie.

    One that holds nothing but a switch stands still.
    """
    reached = -1
    for at, next_offset, switches in facts.positions:
        if next_offset <= reached - switches:
            findings.add(
                "written_after_fencing",
                f"changelog {partition}/{at} goes back to input offset {next_offset} from {reached}",
            )
        reached = max(reached, next_offset)
    last, record = -1, -1
    for row in facts.rows:
        if row.offset <= last and row.at != record:
            findings.add(
                "written_after_fencing", f"pair-codes {partition}/{row.at} goes back to {row.offset} from {last}"
            )
        last, record = max(last, row.offset), row.at


def _check_batch(
    findings: Findings, partition: int, facts: _PartitionFacts, settings: Mapping[str, Any],
    assign_of: Mapping[str, Callable[[Any], Any]],
) -> None:  # fmt: skip
    """What the batch reference makes of the recorded rows, against what is recorded and what is visible."""
    kept_pair, raw_pair = Avro("KeptPair"), Avro("RawPair")
    p, q = map(int, settings["ratio"].split("/"))
    raw = {record.offset: record for record in facts.raw}
    written = [
        json.loads(record.value)
        for record in facts.changelog
        if (record.key or b"")[:1] == b"W" and record.value is not None
    ]
    switches = {switch["epoch"]: switch["input_offset"] for switch in written}
    if len(switches) != len(written):
        findings.add("counted_twice", f"partition {partition} has an epoch that began twice")
    bundles = {switch["epoch"]: switch["bundle"] for switch in written}
    rows = {row.offset: row for row in sorted(facts.rows, key=lambda row: row.offset)}

    def cluster_in(epoch: int, offset: int) -> int:
        vector = np.frombuffer(rows[offset].vector or b"", "<u2")
        return int(assign_of[bundles[epoch]](vector[None])[0])

    for row in rows.values():
        if (
            row.vector is not None
            and bundles.get(row.epoch) in assign_of
            and cluster_in(row.epoch, row.offset) != row.cluster
        ):
            findings.add(
                "differs_from_batch", f"raw {partition}/{row.offset} is in another cluster than its bundle says"
            )
    reduced, outcomes = reduce_partition(
        [
            # only a duplicate's cluster is not recorded, and it cannot matter
            Row(row.offset, row.id, None if raw[row.offset].value is None else row.cluster, row.itm)
            for row in rows.values()
            if row.offset in raw
        ],
        seed=settings["seed"],
        partition=partition,
        p=p,
        q=q,
        cap=settings["cell_cap"],
        window=settings["dedupe_window"],
        gate=settings["gate"],
        switches=[(offset, epoch) for epoch, offset in switches.items()] or [(0, 0)],
        cluster_in=cluster_in,
    )
    for row in rows.values():
        expected = outcomes.get(row.offset, Outcome("nothing: there is no such raw record"))
        if (row.fate, row.position, row.duplicate_of) != (expected.fate, expected.position, expected.duplicate_of):
            findings.add("differs_from_batch", f"raw {partition}/{row.offset}: {row.fate}, and {expected} in a batch")
        if row.offset in raw and not _may_be_called(raw[row.offset], row.id, raw_pair):
            findings.add("differs_from_batch", f"raw {partition}/{row.offset} is recorded as {row.id}")
    newest = {record.key: record for record in facts.kept}
    visible = {(key or b"").decode() for key, record in newest.items() if record.value is not None}
    for pair_id in visible ^ reduced.keys():
        there = "the reduced set" if pair_id in visible else "the batch"
        findings.add("differs_from_batch", f"{pair_id} of partition {partition} is in {there} only")
    for record in facts.kept:
        if record.value is None:
            continue
        pair, cause = kept_pair(record.value), int(record.headers["cause"])
        row_of, source = rows.get(cause), raw.get(cause)
        if row_of is None or source is None or source.value is None:
            continue  # it has its own name already
        given = raw_pair(source.value)
        same = (
            (pair["id"], pair["caption"], pair["index_vector"], pair["cluster"], pair["position"])
            == (row_of.id, given["caption"], row_of.vector, row_of.cluster, row_of.position)
            and pair["image"] == given["image"]
            and (pair["source_partition"], pair["source_offset"]) == (partition, cause)
        )  # fmt: skip
        if not same:
            findings.add("differs_from_batch", f"the kept pair of raw {partition}/{cause} is not what was sent")


def _may_be_called(record: Seen, pair_id: str, raw_pair: Avro) -> bool:
    """Whether a raw record has that id: its value's, else its key's. Nobody else's records are read, so their ids are not."""
    key = (record.key or b"").decode()
    return key == pair_id or (record.value is not None and (raw_pair(record.value)["id"] or key) == pair_id)


def _check_store(findings: Findings, store: StoreContent, facts: _PartitionFacts, settings: Mapping[str, Any]) -> None:
    """The newest record of every key in the changelog, up to where the store reaches, against the store's content."""
    newest: dict[bytes, bytes] = {}
    next_offset = 0
    for record in facts.changelog:
        if record.offset >= store.position or record.key is None:
            continue
        if record.value is None:
            newest.pop(record.key, None)
        else:
            newest[record.key] = record.value
        if record.key == b"P" and record.value is not None:
            next_offset = json.loads(record.value)["next_offset"]
    for key in newest.keys() | store.items.keys():
        if newest.get(key) != store.items.get(key):
            findings.add(
                "store_differs_from_changelog",
                f"partition {store.partition} at changelog offset {store.position}: key {key.hex()}",
            )
    if settings.get("dedupe_window") is not None:
        return
    seed = struct.pack(">Q", settings["seed"]) if settings else b""
    for row in facts.rows:
        if row.fate in COUNTED and row.offset < next_offset:
            digest = hashlib.blake2b(row.id.encode(), digest_size=16, key=seed).digest()
            if store.known_offset(int.from_bytes(digest[:8], "big")) != row.offset:
                findings.add("store_differs_from_changelog", f"partition {store.partition} does not know {row.id}")


def _check_visible(
    findings: Findings,
    name: str,
    outputs: Mapping[str, Mapping[int, list[Seen]]],
    visible: Iterable[tuple[Place, int]],
    log_folder: Path | None,
) -> None:
    """What readers were shown, then and now, against what the log files say was committed."""
    now = {
        Place(f"{name}.{kind}", p, record.offset): zlib.crc32(record.value or b"")
        for kind, partitions in outputs.items()
        for p, records in partitions.items()
        for record in records
    }
    for place, crc in visible:
        if now.get(place) != crc:
            findings.add(
                "aborted_but_visible", f"{place.topic} {place.partition}/{place.offset} was shown, and is gone"
            )
    if log_folder is None:
        return
    for kind, partitions in outputs.items():
        for p, records in partitions.items():
            found = examine_log(read_log(log_folder / f"{name}.{kind}-{p}"))
            findings.add("written_after_fencing", f"{kind}-{p} has batches of an epoch that was over", found.fenced)
            for record in records:
                if found.has_uncommitted(record.offset):
                    findings.add("aborted_but_visible", f"{kind}-{p} offset {record.offset} was never committed")
