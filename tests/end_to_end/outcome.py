"""Raw pairs into a topic, and what a stream made of them, read back from its topics; what may not be, the checker counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.null import NullModel
from state.partition import Fate
from state.partition_store import PartitionStore
from stream.bundles import NULL, announced
from stream.errors import TldrError
from stream.kafka import Connection, create_missing, end_offsets
from stream.murmur2 import partitions_of
from stream.records import Codec
from stream.stream_view import (
    CodesRow,
    DeadLetterSeen,
    KeptRecord,
    StreamSource,
    StreamView,
    read_codes,
    read_dead_letters,
    read_kept,
    read_view,
    whole,
)
from stream.topics import StreamTopics
from tests.end_to_end import checker
from tests.end_to_end.checker import StoreContent, check

NAMES = {
    Fate.KEPT: "kept",
    Fate.OVER_QUOTA: "over quota",
    Fate.OVER_CAP: "over cap",
    Fate.BELOW_GATE: "below gate",
    Fate.DUPLICATE: "duplicate",
    Fate.FORGOTTEN: "forgotten",
}

NO_ANOMALY = checker.NO_ANOMALY


@dataclass(frozen=True)
class Raw:
    """A record of the raw topic; `value` overrides what is encoded from the rest. key None: no key."""

    id: str
    caption: str = "a caption"
    image: bytes | None = None
    image_uri: str | None = None
    key: bytes | None = b"="  # b"=": the id
    value: bytes | None = b"="  # b"=": a RawPair; None: a takedown
    headers: tuple[tuple[str, bytes], ...] = ()
    fields: dict[str, str] = field(default_factory=dict)


def pairs(count: int, pictures: int = 12, prefix: str = "pair") -> list[Raw]:
    """Distinct ids that share a few pictures: the null model then makes as few clusters."""
    return [Raw(f"{prefix}-{i}", f"caption {i}", b"picture %d" % (i * 7 % pictures)) for i in range(count)]


def create_topic(kafka: Connection, topic: str, partitions: int = 2, **settings: str) -> None:
    create_missing(kafka, {topic: {key.replace("_", "."): value for key, value in settings.items()}}, partitions)


def send(kafka: Connection, topic: str, records: Iterable[Raw], partitions: int = 2) -> None:
    """Produces `records` in order, each into its key's murmur2 partition (without a key: into the last one)."""
    codec, producer = Codec("RawPair"), kafka.producer(linger_ms=5)
    for record in records:
        key = record.id.encode() if record.key == b"=" else record.key
        value = record.value
        if value == b"=":
            pair: dict[str, Any] = {
                "id": record.id, "caption": record.caption, "image": record.image, "image_uri": record.image_uri,
                "fields": record.fields,
            }  # fmt: skip
            value = codec.encode(pair)
        number = partitions - 1 if key is None else int(partitions_of([key], partitions)[0])
        while True:
            try:
                producer.produce(topic, value, key, number, headers=list(record.headers))
                break
            except BufferError:
                producer.poll(0.1)
    assert producer.flush(30) == 0


@dataclass
class Outcome:
    """All that a stream has committed."""

    view: StreamView
    rows: list[CodesRow]
    kept: list[KeptRecord]
    dead: list[tuple[DeadLetterSeen, Any]]
    codec: Codec
    kafka: Connection
    raw_topic: str

    @property
    def newest(self) -> dict[tuple[int, str], KeptRecord]:
        """The newest record of each key in the kept topic, removals included."""
        return {(record.partition, record.id): record for record in self.kept}

    @property
    def reduced_set(self) -> dict[str, dict[str, Any]]:
        """What a reader of the kept topic has in the end: id → KeptPair."""
        return {
            pair_id: self.codec.decode(record.value)
            for (_, pair_id), record in self.newest.items()
            if record.value is not None
        }

    def fate(self, pair_id: str) -> list[str]:
        """The fates of every record with this id, in order; a dead letter as `dead: reason`."""
        found = [(row.partition, row.offset, NAMES[row.fate]) for row in self.rows if row.id == pair_id]
        found += [
            (seen.partition, seen.offset, f"dead: {seen.reason}")
            for seen, message in self.dead
            if (message.key() or b"") == pair_id.encode()
        ]
        return [fate for _, _, fate in sorted(found)]

    def anomalies(self) -> dict[str, int]:
        """How often each thing that never may happen has happened (`NO_ANOMALY` if never), as the checker counts it."""
        models = [NullModel(), *(NullModel.at(a.uri) for a in announced(self.kafka) if a.uri.startswith(NULL))]
        assign_of = {model.version: model.assign for model in models}
        name = self.view.topics.name
        return check(self.kafka.bootstrap_servers, self.raw_topic, stream=name, assign_of=assign_of).anomalies


def outcome_of(kafka: Connection, topic: str, stream: str | None = None) -> Outcome:
    """Reads everything that the stream on `topic` has committed."""
    source = StreamSource(kafka, StreamTopics(stream or topic))
    view = read_view(source)
    numbers = list(view.partitions)
    return Outcome(
        view,
        list(read_codes(source, whole(kafka, source.topics.codes, numbers), below=view.cut)),
        [r for batch in read_kept(source, whole(kafka, source.topics.kept, numbers)) for r in batch],
        list(read_dead_letters(source, whole(kafka, source.topics.dead, numbers))),
        source.codec("KeptPair"),
        kafka,
        topic,
    )


def processed(kafka: Connection, topic: str) -> bool:
    """Whether everything in the raw topic is committed."""
    try:
        view = read_view(StreamSource(kafka, StreamTopics(topic)))
    except TldrError:  # nothing is committed yet
        return False
    ends = end_offsets(kafka, topic, view.partitions)
    return all(view.cut[p] == end for p, end in ends.items())


def stores_of(folders: Sequence[Path], partitions: int) -> dict[int, dict[bytes, bytes]]:
    """Every key of the stores that closed workers have left, by partition; the longest one where several have it."""
    found: dict[int, tuple[int, dict[bytes, bytes]]] = {}
    for folder in folders:
        for p in range(partitions):
            path = folder / f"partition-{p}"
            if not path.exists():
                continue
            with PartitionStore(path) as store:
                position = store.changelog_position or 0
                if position >= found.get(p, (0, {}))[0]:
                    found[p] = (position, dict(store.items()))
    return {p: content for p, (_, content) in found.items()}


@contextmanager
def local_stores(folders: Iterable[Path], partitions: int) -> Iterator[list[StoreContent]]:
    """The stores that workers have left in their state directories, open for the checker."""
    contents = []
    with ExitStack() as opened:
        for path in (folder / f"partition-{p}" for folder in folders for p in range(partitions)):
            if path.exists():
                store = opened.enter_context(PartitionStore(path))
                number = int(path.name.rpartition("-")[2])
                contents.append(
                    StoreContent(number, store.changelog_position or 0, dict(store.items()), store.known_offset)
                )
        yield contents
