"""`topics`: the topics of a stream made before its first worker, with the replication that a production cluster wants.

A worker makes missing output topics by itself; this makes the raw topic, too, and says where what is there is not what a
worker would make. It changes nothing that exists.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from stream.errors import TldrError
from stream.kafka import RECORD_BYTES_MAX, Connection, create_missing, partition_counts, topic_setting
from stream.rights import check_rights
from stream.topics import BUNDLES, KEPT_OVERHEAD_BYTES, StreamTopics


@dataclass(frozen=True)
class TopicOptions:
    """What the topics shall be. None: the brokers' own default."""

    topic: str
    stream: str
    partitions: int
    replication_factor: int | None = None
    min_insync_replicas: int | None = None
    record_bytes: int = 8 * 1024 * 1024
    retention_ms: int = 7 * 24 * 3600 * 1000


@dataclass(frozen=True)
class TopicsMade:
    """What `topics` did. differing  sentences about topics that were there before."""

    created: list[str]
    existing: list[str]
    differing: list[str] = field(default_factory=list)

    def lines(self) -> Iterable[str]:
        yield f"created  {', '.join(self.created) or 'nothing'}"
        if self.existing:
            yield f"there    {', '.join(self.existing)}"
        yield from (f"differs  {line}" for line in self.differing)


def make_topics(connection: Connection, options: TopicOptions) -> TopicsMade:
    """Makes the topics that are missing.

    Raises TldrError for a topic of another partition count, or replicas that the cluster cannot give.
    """
    if (options.min_insync_replicas or 0) > (options.replication_factor or options.min_insync_replicas or 0):
        raise TldrError(
            f"--min-insync-replicas {options.min_insync_replicas} is above --replication-factor "
            f"{options.replication_factor}: no record could be written"
        )
    if options.record_bytes > RECORD_BYTES_MAX:
        raise TldrError(f"--record-bytes {options.record_bytes}: {RECORD_BYTES_MAX} is the most that a worker reads")
    check_rights(connection, "topics", raw=options.topic, stream=options.stream)
    room = min(2 * options.record_bytes + KEPT_OVERHEAD_BYTES, 2 * RECORD_BYTES_MAX)
    raw = {
        "cleanup.policy": "delete",
        "max.message.bytes": str(options.record_bytes),
        "retention.ms": str(options.retention_ms),
    }
    groups: list[tuple[dict[str, dict[str, str]], int]] = [
        ({options.topic: raw, **StreamTopics(options.stream).settings(room)}, options.partitions),
        ({BUNDLES: {"cleanup.policy": "compact"}}, 1),
    ]
    made = TopicsMade([], [])
    for settings, partitions in groups:
        if options.min_insync_replicas is not None:
            for values in settings.values():
                values["min.insync.replicas"] = str(options.min_insync_replicas)
        there = sorted(partition_counts(connection, settings))
        made.created.extend(sorted(create_missing(connection, settings, partitions, options.replication_factor)))
        made.existing.extend(there)
        made.differing.extend(_differences(connection, {name: settings[name] for name in there}))
    return made


def _differences(connection: Connection, wanted: Mapping[str, Mapping[str, str]]) -> Iterable[str]:
    for topic, settings in wanted.items():
        for name, value in settings.items():
            found = topic_setting(connection, topic, name)
            if found != value:
                yield f"{topic} has {name}={found}, not {value}"
