"""`forget`: takes pairs out of the stream again, everywhere and for good, by a null value under their ids.

Must not know what a worker does with one (state/ does: the entry leaves the set, the id stays forgotten).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from confluent_kafka import KafkaError, KafkaException

from stream.acl import Right
from stream.errors import TldrError
from stream.kafka import Connection, partition_count, refused
from stream.rights import check_rights
from stream.snapshot_state import read_state

DELIVERY_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Held:
    """A pair in a snapshot that was taken earlier. file  the shard that has its image, None: only the state names its id."""

    snapshot: str
    id: str
    file: str | None


@dataclass
class ForgetResult:
    """What `forget` wrote: one null value for each id and partition. held  where earlier snapshots have the pairs."""

    topic: str
    ids: int
    partitions: int
    records: int
    snapshots: int = 0
    held: list[Held] = field(default_factory=list)

    def lines(self) -> Iterable[str]:
        what = "1 pair" if self.ids == 1 else f"{self.ids:,} pairs"
        yield f"{what} taken down in {self.topic}: {self.records:,} null values in {self.partitions} partitions"
        yield "Workers remove it from the reduced set when they come to that record, and never count its id again."
        yield "This cannot be undone by sending the pair again."
        yield "Not reached: snapshots already exported, and copies of the raw record until the topics' retention ends."
        if self.snapshots:
            pairs = f"{len(self.held):,} {'copy' if len(self.held) == 1 else 'copies'}"
            yield f"{pairs} in the {self.snapshots:,} snapshots looked at" + (": take them anew" if self.held else "")
        for one in self.held:
            yield f"  {one.snapshot}  {one.file or 'only in its state, no shard'}  {one.id}"


def read_ids(ids: Sequence[str], file: Path | None) -> list[str]:
    """The ids of the command line and of a file (one a line), each once, in order. Raises TldrError without any."""
    lines: list[str] = []
    if file is not None:
        try:
            lines = file.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise TldrError(f"cannot read {file}: {error}") from error
    found = list(dict.fromkeys([*ids, *(line.strip() for line in lines)]))
    found = [pair_id for pair_id in found if pair_id]
    if not found:
        raise TldrError("no id given: name one, or a file of them with --ids-file FILE")
    return found


def held_by(snapshots: Iterable[Path], ids: Sequence[str]) -> list[Held]:
    """Which of `ids` earlier snapshots hold, and in which file. Raises TldrError where a folder holds no whole snapshot.

    Read from the state beside the manifest, so no shard is opened; it has every pair that was in the reduced set at the cut.
    """
    wanted = set(ids)
    return [
        Held(str(folder), pair.id, taken.shard_name(partition, pair.shard))
        for folder, taken in [(folder, read_state(folder)) for folder in snapshots]
        for partition in sorted(taken.offsets)
        for pair in taken.pairs(partition)
        if pair.id in wanted
    ]


def forget(connection: Connection, topic: str, ids: Sequence[str]) -> ForgetResult:
    """Writes a null value under each of `ids` into every partition, and waits until the broker has all of them.

    Every partition, because a pair may sit outside its murmur2 partition and a takedown counts where the pair is.
    Raises TldrError if the topic does not exist, Unavailable if a record is not delivered (the rest may be: run it again).
    """
    check_rights(connection, "forget", raw=topic)
    partitions = partition_count(connection, topic)
    producer = connection.producer(message_timeout_ms=int(DELIVERY_TIMEOUT_S * 1000))
    failures: list[KafkaError] = []

    def delivered(error: KafkaError | None, message: Any) -> None:
        if error is not None:
            failures.append(error)

    for pair_id in ids:
        for partition in range(partitions):
            while True:
                try:
                    producer.produce(
                        topic, None, pair_id.encode("utf-8", "surrogateescape"), partition, on_delivery=delivered
                    )
                    break
                except BufferError:
                    producer.poll(0.1)
                except KafkaException as error:
                    raise _not_delivered(connection, topic, error.args[0]) from error
        producer.poll(0.0)
        if failures:
            break
    while len(producer) and not failures:
        producer.flush(0.5)
    if failures:
        raise _not_delivered(connection, topic, failures[0])
    return ForgetResult(topic, len(ids), partitions, len(ids) * partitions)


def _not_delivered(connection: Connection, topic: str, error: KafkaError) -> TldrError:
    what = f"topic {topic} did not take every takedown, run the same command again"
    return refused(connection, error, what, Right("Write", "topic", topic))
