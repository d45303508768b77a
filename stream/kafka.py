"""How we talk to Kafka: one place for client settings, offsets, topic creation, and reading a partition to its end.

Must not know what the records mean. Settings of the user (`--kafka`, properties file) win over ours unless exactly-once
depends on ours; their values never appear in a message or a log.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from confluent_kafka import (
    Consumer,
    IsolationLevel,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicPartition,
)
from confluent_kafka.admin import (
    AdminClient,
    ConfigResource,
    NewTopic,
    OffsetSpec,
    ResourceType,
)

from stream.errors import TldrError, Unavailable

log = logging.getLogger(__name__)

Config = dict[str, Any]

# "a broker that is not there (within 10 s)": what a command waits for the first answer.
CONNECT_TIMEOUT_S = 8.0
REQUEST_TIMEOUT_S = 30.0
POLL_WAIT_S = 0.2
# The largest record we read or write; the broker's own message.max.bytes may be lower.
RECORD_BYTES_MAX = 32 * 1024 * 1024

# What a user may not change, because the promise of exactly once rests on it.
RESERVED = {
    "enable.auto.commit",
    "enable.auto.offset.store",
    "isolation.level",
    "transactional.id",
    "enable.idempotence",
    "group.id",
    "group.instance.id",
    "partition.assignment.strategy",
    "group.protocol",
    "bootstrap.servers",
    "auto.offset.reset",
}

# What a partition answers in the moment after its topic was created, or while its leader moves.
LEADERLESS = {
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.UNKNOWN_TOPIC_OR_PART,
}

# What the user has to put right; all else a broker may answer while it moves or starts.
_NOT_PASSING = {
    KafkaError.UNKNOWN_TOPIC_OR_PART,
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
}


@dataclass(frozen=True)
class Connection:
    """Where Kafka is, and the user's librdkafka settings (they may hold secrets, so repr() leaves them out)."""

    bootstrap_servers: str
    settings: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, bootstrap_servers: str, assignments: Iterable[str] = (), properties: Path | None = None) -> Connection:
        """From `key=value` texts and a properties file; the former win.

        Raises TldrError for a text without `=`, a file that cannot be read, or a setting that is ours to choose.
        """
        settings: dict[str, str] = {}
        if properties is not None:
            try:
                lines = properties.read_text().splitlines()
            except OSError as error:
                raise TldrError(f"cannot read {properties}: {error.strerror}") from error
            settings.update(
                _parse_assignments((x for x in lines if x.strip() and x.lstrip()[0] not in "#!"), properties)
            )
        settings.update(_parse_assignments(assignments, "--kafka"))
        if reserved := sorted(RESERVED & settings.keys()):
            raise TldrError(f"Kafka setting {reserved[0]} cannot be changed: tldr-stream chooses it itself")
        return cls(bootstrap_servers, settings)

    def config(self, tuned: Mapping[str, Any] | None = None, **ours: Any) -> Config:
        """Client settings: defaults and what we `tuned`, then the user's, then `ours` (underscores stand for dots)."""
        defaults: Config = {
            "client.id": "tldr-stream",
            "log.connection.close": False,
            # librdkafka's `rebootstrap` forgets every broker when all are away; after that send_offsets_to_transaction
            # never returns (2.16, a single broker killed and restarted).
            "metadata.recovery.strategy": "none",
        }
        fixed = {key.replace("_", "."): value for key, value in ours.items()}
        return {**defaults, **(tuned or {}), **self.settings, "bootstrap.servers": self.bootstrap_servers, **fixed}

    @functools.cached_property
    def admin(self) -> AdminClient:
        """The admin client, one a connection: its futures die with it, and a new one takes a tenth of a second to connect."""
        return self.new_admin()

    def new_admin(self) -> AdminClient:
        """An admin client that knows nothing yet. Raises TldrError where librdkafka refuses a setting."""
        try:
            return AdminClient(self.config(), logger=_quiet)
        except KafkaException as error:
            raise TldrError(self._without_values(error.args[0].str())) from None  # its text may hold a secret

    def _without_values(self, refusal: str) -> str:
        """What librdkafka has against our settings, told without the value of any of them."""
        if named := [key for key in self.settings if f'"{key}"' in refusal]:
            return f"Kafka setting {named[0]} is unknown or its value impossible (the value is not shown here)"
        for value in sorted(filter(None, self.settings.values()), key=len, reverse=True):
            refusal = refusal.replace(value, "…")
        return f"the Kafka settings do not go together: {refusal}"

    def reader(self, group: str = "tldr-stream-reader", **ours: Any) -> Consumer:
        """A consumer outside any group's life (assign only): committed records, and an event at a partition's end."""
        config = self.config(
            group_id=group,
            enable_auto_commit=False,
            enable_auto_offset_store=False,
            isolation_level="read_committed",
            auto_offset_reset="error",
            enable_partition_eof=True,
            fetch_message_max_bytes=RECORD_BYTES_MAX,
            fetch_wait_max_ms=20,  # the end of a partition is told only after this wait
            # The user's time-outs are a member's; librdkafka refuses those that do not go with its default of the other.
            session_timeout_ms=45_000,
            max_poll_interval_ms=300_000,
            **ours,
        )
        return Consumer(config, logger=_quiet)

    def producer(self, tuned: Mapping[str, Any] | None = None, **ours: Any) -> Producer:
        """An idempotent producer that partitions as Java does (design: murmur2)."""
        ours = {"message_max_bytes": RECORD_BYTES_MAX, **ours}
        return Producer(
            self.config(tuned, enable_idempotence=True, partitioner="murmur2_random", **ours), logger=_quiet
        )


def partition_count(connection: Connection, topic: str) -> int:
    """Partitions of `topic`. Raises Unavailable without a broker, TldrError (with the create command) without the topic."""
    found = partition_counts(connection, [topic])
    if topic not in found:
        raise TldrError(
            f"topic {topic} does not exist: create it with `kafka-topics.sh --bootstrap-server "
            f"{connection.bootstrap_servers} --create --topic {topic} --partitions 4`, or fill it with `tldr-stream ingest`"
        )
    return found[topic]


def partition_counts(connection: Connection, topics: Iterable[str]) -> dict[str, int]:
    """Partitions of each of `topics` that exists. Raises Unavailable if no broker answers within CONNECT_TIMEOUT_S."""
    metadata = _metadata(connection)
    return {
        topic: len(metadata[topic].partitions) for topic in topics if topic in metadata and not metadata[topic].error
    }


def _metadata(connection: Connection) -> dict[str, Any]:
    try:
        topics: dict[str, Any] = connection.admin.list_topics(timeout=CONNECT_TIMEOUT_S).topics
    except KafkaException as error:
        raise Unavailable(
            f"no Kafka broker answers at {connection.bootstrap_servers} ({error.args[0].str()}): start one, or give "
            "--bootstrap-servers"
        ) from error
    return topics


def topic_id(connection: Connection, topic: str) -> str:
    """The id that Kafka gave the topic when it was created: another one means that it was recreated."""
    from confluent_kafka import TopicCollection

    try:
        described = connection.admin.describe_topics(TopicCollection([topic]), request_timeout=REQUEST_TIMEOUT_S)
        return str(described[topic].result().topic_id)
    except KafkaException as error:
        raise TldrError(f"cannot describe topic {topic}: {error.args[0].str()}") from error


def create_missing(connection: Connection, topics: Mapping[str, Mapping[str, str]], partitions: int) -> list[str]:
    """Creates those of `topics` (name → settings) that do not exist; their names. Replication is the broker's default."""
    existing = partition_counts(connection, topics)
    for name, count in existing.items():
        if count != partitions:
            raise TldrError(
                f"topic {name} has {count} partitions and its raw topic {partitions}: use another --stream, or recreate it"
            )
    missing = [
        NewTopic(name, num_partitions=partitions, config=dict(settings))
        for name, settings in topics.items()
        if name not in existing
    ]
    if not missing:
        return []
    created = []
    for name, done in connection.admin.create_topics(missing, request_timeout=REQUEST_TIMEOUT_S).items():
        try:
            done.result()
            created.append(name)
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:  # another worker was faster
                raise TldrError(f"cannot create topic {name}: {error.args[0].str()}") from error
    deadline = time.monotonic() + REQUEST_TIMEOUT_S
    while len(partition_counts(connection, topics)) < len(topics):
        if time.monotonic() > deadline:
            raise Unavailable(f"topics {', '.join(topics)} were created but do not appear: is the broker overloaded?")
        time.sleep(0.1)
    return created


def topic_setting(connection: Connection, topic: str, name: str) -> str | None:
    """One setting of a topic as the broker has it now, None where it has none."""
    resource = ConfigResource(ResourceType.TOPIC, topic)
    try:
        done = connection.admin.describe_configs([resource], request_timeout=REQUEST_TIMEOUT_S)
        entry = done[resource].result().get(name)
    except KafkaException as error:
        kind = TldrError if error.args[0].code() in _NOT_PASSING else Unavailable
        raise kind(f"cannot read the settings of topic {topic}: {error.args[0].str()}") from error
    return None if entry is None else str(entry.value)


def start_offsets(connection: Connection, topic: str, partitions: Iterable[int]) -> dict[int, int]:
    """The first offset of each partition that the broker still has."""
    return _offsets(connection, topic, partitions, OffsetSpec.earliest(), IsolationLevel.READ_UNCOMMITTED)


def end_offsets(
    connection: Connection, topic: str, partitions: Iterable[int], *, committed: bool = True
) -> dict[int, int]:
    """The offset behind the last record of each partition.

    committed  True: the last stable offset, where a read_committed reader ends now. False: the true end, open
               transactions included.
    """
    level = IsolationLevel.READ_COMMITTED if committed else IsolationLevel.READ_UNCOMMITTED
    return _offsets(connection, topic, partitions, OffsetSpec.latest(), level)


def _offsets(
    connection: Connection, topic: str, partitions: Iterable[int], spec: OffsetSpec, level: IsolationLevel
) -> dict[int, int]:
    asked = {TopicPartition(topic, p): spec for p in partitions}
    if not asked:
        return {}
    admin, deadline = connection.admin, time.monotonic() + CONNECT_TIMEOUT_S
    while True:
        done = admin.list_offsets(asked, isolation_level=level, request_timeout=REQUEST_TIMEOUT_S)
        try:
            return {tp.partition: result.result().offset for tp, result in done.items()}
        except KafkaException as error:
            refused = error.args[0]
            moved = refused.code() == KafkaError.FENCED_LEADER_EPOCH
            # A topic that was just created, or whose leader moves, has no leader for a moment.
            if not (moved or refused.retriable()) or time.monotonic() > deadline:
                raise Unavailable(f"cannot list the offsets of {topic}: {refused.str()}") from error
            time.sleep(0.1)
            if moved:  # the broker was restarted, and an admin client never forgets the epoch that it knew before
                admin = connection.new_admin()


def group_offsets(connection: Connection, group: str, topic: str, partitions: Iterable[int]) -> dict[int, int]:
    """The offsets that `group` has committed on `topic`, by partition; partitions without one are left out.

    Waits for transactions that hold offsets of the group (a read_committed consumer asks for stable ones): their outcome
    is the answer. Raises Unavailable if they do not end within REQUEST_TIMEOUT_S.
    """
    # Not AdminClient.list_consumer_group_offsets: librdkafka (2.16) dies of a null pointer in it where the coordinator
    # answers that it is none, as a broker does that has just come back (librdkafka #5040; met in a storm).
    deadline = time.monotonic() + REQUEST_TIMEOUT_S
    asked = [TopicPartition(topic, partition) for partition in partitions]
    reader = connection.reader(group)  # it never subscribes, so it is no member
    try:
        while True:
            try:
                found = reader.committed(asked, REQUEST_TIMEOUT_S)
                if errors := [KafkaException(tp.error) for tp in found if tp.error]:
                    raise errors[0]
                return {tp.partition: tp.offset for tp in found if tp.offset >= 0}
            except KafkaException as error:
                if not error.args[0].retriable() or time.monotonic() > deadline:
                    raise Unavailable(f"cannot read the offsets of group {group}: {error.args[0].str()}") from error
                time.sleep(0.1)
    finally:
        reader.close()


def read_partition(
    connection: Connection,
    topic: str,
    partition: int,
    start: int,
    end: int,
    *,
    batch: int = 1000,
    cancelled: Callable[[], bool] = lambda: False,
    waiting: Callable[[int], None] = lambda position: None,
    timeout_s: float | None = None,
) -> Iterator[list[Message]]:
    """The committed records of [start, end) in batches, until the reader's *position* reaches `end`.

    The end may lie behind a transaction's marker or inside a transaction that is still open, so it is the position that
    counts and not the last record seen; `waiting(position)` is called now and then while it stands still.
    Raises Unavailable if nothing moves for `timeout_s` (None: waits for as long as it takes).
    """
    if start >= end:
        return
    reader = connection.reader()
    try:
        reader.assign([TopicPartition(topic, partition, start)])
        position, moved_at = start, time.monotonic()
        while position < end and not cancelled():
            messages: list[Message] = []
            # consume(n, t) waits for n records or the whole of t; poll returns with the first.
            head = reader.poll(POLL_WAIT_S)
            for message in [] if head is None else [head, *reader.consume(batch - 1, 0)]:
                error = message.error()
                if error is None:
                    if message.offset() < end:
                        messages.append(message)
                    position, moved_at = message.offset() + 1, time.monotonic()
                elif error.code() == KafkaError._PARTITION_EOF:
                    if message.offset() > position:
                        moved_at = time.monotonic()
                    position = max(position, message.offset())
                elif error.code() == KafkaError._AUTO_OFFSET_RESET or error.code() == KafkaError.OFFSET_OUT_OF_RANGE:
                    raise TldrError(f"offset {position} of {topic}/{partition} is no longer on the broker")
                elif error.fatal():
                    raise Unavailable(f"cannot read {topic}/{partition}: {error.str()}")
            if messages:
                yield messages
            elif position < end:
                waiting(position)
                if timeout_s is not None and time.monotonic() - moved_at > timeout_s:
                    raise Unavailable(f"{topic}/{partition} stands at offset {position} of {end} for {timeout_s:.0f} s")
    finally:
        reader.close()


def _parse_assignments(lines: Iterable[str], source: object) -> dict[str, str]:
    parsed = {}
    for line in lines:
        key, equals, value = line.partition("=")
        if not equals or not key.strip():
            raise TldrError(f"{source}: a Kafka setting reads key=value (the value is not shown here)")
        parsed[key.strip()] = value.strip()
    return parsed


# librdkafka logs to stderr unless a logger is given. It repeats itself while a broker is away, and what matters reaches us as
# errors, so its lines are shown with --verbose only (stream/logs.py).
_quiet = logging.getLogger("stream.librdkafka")
_quiet.addHandler(logging.NullHandler())
_quiet.propagate = False
