"""How we talk to Kafka: one place for client settings, offsets, topic creation, and reading a partition to its end.

Must not know what the records mean. Settings of the user (`--kafka`, properties file) win over ours unless exactly-once
depends on ours; their values never appear in a message or a log.
"""

from __future__ import annotations

import functools
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, wait
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
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import (
    AdminClient,
    ConfigResource,
    NewTopic,
    OffsetSpec,
    ResourceType,
)

from stream.acl import Right, missing_line, principal_of
from stream.broker_errors import lacks_right, refuses_entry
from stream.errors import TldrError, Unavailable

log = logging.getLogger(__name__)

Config = dict[str, Any]

# "a broker that is not there (within 10 s)": what a command waits for the first answer.
CONNECT_TIMEOUT_S = 8.0
REQUEST_TIMEOUT_S = 30.0
POLL_WAIT_S = 0.2
ANSWER_WAIT_S = 0.05
# One broker of several may have another certificate, or not know a user yet; when all of them refuse, nobody waits.
REFUSAL_GRACE_S = 2.0
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
LEADER_ON_ITS_WAY = {KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.LEADER_NOT_AVAILABLE}
OTHER_EPOCH = {KafkaError.FENCED_LEADER_EPOCH, KafkaError.UNKNOWN_LEADER_EPOCH}
LEADERLESS = LEADER_ON_ITS_WAY | {KafkaError.UNKNOWN_TOPIC_OR_PART}

# What stands in librdkafka's texts beside the matter: the broker's address in front, the time it took behind.
_ADDRESS = re.compile(r"^\S+/\S+: ")
_TOOK = re.compile(r" \(after \d+ms in state .*$")


class MissingRight(TldrError):
    """The broker's ACLs do not allow what has to be done; the message has the command that adds the one that is missing."""

    @classmethod
    def of(cls, connection: Connection, rights: Iterable[Right]) -> MissingRight:
        return cls(missing_line(connection.bootstrap_servers, principal_of(connection.settings), rights))


class NoEntry(TldrError):
    """The broker does not let this client in, or this client does not trust the broker."""


class Admin(AdminClient):  # type: ignore[misc]
    """The admin client. `said`: what its connections have met since the last answer; its requests only time out."""

    def __init__(self, config: Config, **more: Any) -> None:
        self.said: list[KafkaError] = []
        super().__init__({**config, "error_cb": self.said.append}, **more)


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
    def admin(self) -> Admin:
        """The admin client, one a connection: its futures die with it, and a new one takes a tenth of a second to connect."""
        return self.new_admin()

    def new_admin(self) -> Admin:
        """An admin client that knows nothing yet. Raises TldrError where librdkafka refuses a setting."""
        try:
            return Admin(self.config(), logger=_quiet)
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


def answer(connection: Connection, admin: Admin, asked: Future[Any]) -> Any:
    """What a request comes to. Raises its KafkaException; NoEntry as soon as no broker lets this client in."""
    began = time.monotonic()
    while not wait([asked], ANSWER_WAIT_S).done:
        admin.poll(0)
        refused = next((error for error in admin.said if refuses_entry(error)), None)
        all_refuse = any(error.code() == KafkaError._ALL_BROKERS_DOWN for error in admin.said)
        if refused is not None and (all_refuse or time.monotonic() - began > REFUSAL_GRACE_S):
            raise no_entry(connection, refused)
    done = asked.result()
    admin.said.clear()
    return done


def _answering(connection: Connection) -> Admin:
    """The admin client; where its connections failed since the last answer, once a broker answers again.

    A request that needs a broker which is away takes a whole core in librdkafka (2.16) until it times out; one for metadata
    just waits (docs/tried.md). Raises Unavailable, NoEntry.
    """
    admin = connection.admin
    admin.poll(0)
    if admin.said:
        try:
            admin.list_topics(timeout=CONNECT_TIMEOUT_S)
        except KafkaException as error:
            admin.poll(0)
            refused = next((said for said in admin.said if refuses_entry(said)), None)
            raise no_entry(connection, refused) if refused else _away(connection, admin, error.args[0]) from error
        admin.said.clear()
    return admin


def no_entry(connection: Connection, error: KafkaError) -> NoEntry:
    """The line for a connection that is refused, by either side."""
    said, where = _plain(error), "in the file of --kafka-properties"
    if error.code() in (KafkaError._AUTHENTICATION, KafkaError.SASL_AUTHENTICATION_FAILED):
        remedy = f"put sasl.username, sasl.password and sasl.mechanism right {where}"
    elif "alert" in said:
        remedy = (
            "it wants a certificate of this client that is valid and signed by an authority that it trusts: give "
            f"ssl.keystore.location, or ssl.certificate.location and ssl.key.location, {where}"
        )
    else:
        remedy = f"name the authority that has signed the broker's certificate with ssl.ca.location {where}"
    return NoEntry(f"no connection to Kafka at {connection.bootstrap_servers} ({said}): {remedy}")


def _plain(error: KafkaError) -> str:
    return _TOOK.sub("", _ADDRESS.sub("", error.str()))


def _away(connection: Connection, admin: Admin, error: KafkaError) -> Unavailable:
    """The line for a broker that does not answer, with what the connections have met if they said anything."""
    met = [each for each in admin.said if each.code() != KafkaError._ALL_BROKERS_DOWN]
    return Unavailable(
        f"no Kafka broker answers at {connection.bootstrap_servers} ({_plain(met[-1] if met else error)}): start one, or "
        "give --bootstrap-servers"
    )


def refused(connection: Connection, error: KafkaError, what: str, *rights: Right) -> TldrError:
    """The line for a request that failed: the ACLs to add where these rights are what is missing, else `what` and why."""
    if lacks_right(error):
        return MissingRight.of(connection, rights)
    return Unavailable(f"{what}: {error.str()}")


def reach(connection: Connection) -> None:
    """Connects anew. Raises NoEntry where no broker lets this client in, Unavailable where none answers."""
    admin = connection.new_admin()
    try:
        answer(connection, admin, admin.describe_cluster(request_timeout=CONNECT_TIMEOUT_S))
    except KafkaException as error:
        raise _away(connection, admin, error.args[0]) from error


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
    """Partitions of each of `topics` that exists.

    Raises Unavailable if no broker answers within CONNECT_TIMEOUT_S, MissingRight for a topic that may not be looked at.
    """
    return {topic: len(described.partitions) for topic, described in _existing(connection, topics).items()}


def _existing(connection: Connection, topics: Iterable[str]) -> dict[str, Any]:
    """Kafka's description of each of `topics` that exists. Raises as `partition_counts`."""
    seen = _describe(connection, topics)
    if hidden := [topic for topic, described in seen.items() if described is False]:
        raise MissingRight.of(connection, [Right("Describe", "topic", topic) for topic in hidden])
    return {topic: described for topic, described in seen.items() if described}


def allowed_operations(connection: Connection, topics: Iterable[str]) -> dict[str, set[str]]:
    """What this client may do to each of `topics`, as kafka-acls.sh names it; nothing is said of one that does not exist."""
    seen = _describe(connection, topics, operations=True)
    allowed: dict[str, set[str]] = {}
    for topic, described in seen.items():
        if described is False:  # nor anything that implies Describe; DescribeConfigs is the one that does not
            allowed[topic] = {"DescribeConfigs"} if _shows_settings(connection, topic) else set()
        # A broker that does not tell (KIP-430) leaves it to the requests themselves.
        if described and described.authorized_operations:
            names = (operation.name for operation in described.authorized_operations)
            allowed[topic] = {"".join(part.title() for part in name.split("_")) for name in names}
    return allowed


def _shows_settings(connection: Connection, topic: str) -> bool:
    try:
        topic_setting(connection, topic, "max.message.bytes")
    except MissingRight:
        return False
    return True


def _describe(connection: Connection, topics: Iterable[str], *, operations: bool = False) -> dict[str, Any]:
    """Kafka's description of each topic: None where it does not exist (yet), False where the ACLs hide whether it does."""
    wanted = dict.fromkeys(topics)
    if not all(wanted):
        raise TldrError("a topic needs a name")
    if not wanted:
        return {}
    admin = _answering(connection)
    asked = admin.describe_topics(
        TopicCollection(list(wanted)), include_authorized_operations=operations, request_timeout=CONNECT_TIMEOUT_S
    )
    found: dict[str, Any] = {}
    for topic, future in asked.items():
        try:
            found[topic] = answer(connection, admin, future)
        except KafkaException as error:
            code = error.args[0].code()
            if code == KafkaError.TOPIC_AUTHORIZATION_FAILED:
                found[topic] = False
            elif code in LEADERLESS:
                found[topic] = None
            elif code == KafkaError.TOPIC_EXCEPTION:
                raise TldrError(f"no topic can be called {topic!r}: {error.args[0].str()}") from error
            else:
                raise _away(connection, admin, error.args[0]) from error
    return found


def topic_id(connection: Connection, topic: str) -> str:
    """The id that Kafka gave the topic when it was created: another one means that it was recreated."""
    found = topic_ids(connection, [topic])
    if topic not in found:
        raise TldrError(f"cannot describe topic {topic}: it does not exist")
    return found[topic]


def topic_ids(connection: Connection, topics: Iterable[str]) -> dict[str, str]:
    """`topic_id` of each of `topics` that exists. Raises as `partition_counts`."""
    return {topic: str(described.topic_id) for topic, described in _existing(connection, topics).items()}


def create_missing(
    connection: Connection, topics: Mapping[str, Mapping[str, str]], partitions: int, replication: int | None = None
) -> list[str]:
    """Creates those of `topics` (name → settings) that do not exist; their names. replication  None: the broker's default."""
    existing = partition_counts(connection, topics)
    for name, count in existing.items():
        if count != partitions:
            raise TldrError(
                f"topic {name} has {count} partitions and its raw topic {partitions}: use another --stream, or recreate it"
            )
    missing = [
        NewTopic(name, num_partitions=partitions, replication_factor=replication or -1, config=dict(settings))
        for name, settings in topics.items()
        if name not in existing
    ]
    if not missing:
        return []
    created, forbidden = [], []
    for name, done in _answering(connection).create_topics(missing, request_timeout=REQUEST_TIMEOUT_S).items():
        try:
            answer(connection, connection.admin, done)
            created.append(name)
        except KafkaException as error:
            if lacks_right(error.args[0]):
                forbidden.append(name)
            elif error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:  # another worker was faster
                raise TldrError(f"cannot create topic {name}: {error.args[0].str()}") from error
    if forbidden:
        raise MissingRight.of(connection, [Right("Create", "topic", name) for name in forbidden])
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
        done = _answering(connection).describe_configs([resource], request_timeout=REQUEST_TIMEOUT_S)
        entry = answer(connection, connection.admin, done[resource]).get(name)
    except KafkaException as error:
        what = f"cannot read the settings of topic {topic}"
        if error.args[0].code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
            raise TldrError(f"{what}: {error.args[0].str()}") from error
        raise refused(connection, error.args[0], what, Right("DescribeConfigs", "topic", topic)) from error
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
    admin, began = _answering(connection), time.monotonic()
    while True:
        done = admin.list_offsets(asked, isolation_level=level, request_timeout=CONNECT_TIMEOUT_S)
        try:
            return {tp.partition: answer(connection, admin, result).offset for tp, result in done.items()}
        except KafkaException as error:
            reason = error.args[0]
            moved = reason.code() in LEADER_ON_ITS_WAY | OTHER_EPOCH
            # A topic that was just created, or whose leader moves, has no leader for a moment.
            # A broker that says so is there: on a busy machine it takes a new topic's leadership up late.
            patience_s = REQUEST_TIMEOUT_S if moved else CONNECT_TIMEOUT_S
            if not (moved or reason.retriable()) or time.monotonic() - began > patience_s:
                what = f"cannot list the offsets of {topic}"
                raise refused(connection, reason, what, Right("Describe", "topic", topic)) from error
            time.sleep(0.1)
            if moved:  # an admin client keeps the leader and the epoch that it knew, of a new topic and over a restart
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
                    of_group = error.args[0].code() == KafkaError.GROUP_AUTHORIZATION_FAILED
                    right = Right("Read", "group", group) if of_group else Right("Read", "topic", topic)
                    what = f"cannot read the offsets of group {group}"
                    raise refused(connection, error.args[0], what, right) from error
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
                else:
                    refuse_reading(connection, topic, partition, error)
            if messages:
                yield messages
            elif position < end:
                waiting(position)
                if timeout_s is not None and time.monotonic() - moved_at > timeout_s:
                    raise Unavailable(f"{topic}/{partition} stands at offset {position} of {end} for {timeout_s:.0f} s")
    finally:
        reader.close()


def refuse_reading(connection: Connection, topic: str, partition: int, error: KafkaError) -> None:
    """Raises for an error of a reader that will not pass. That it has no right to its group does not matter: it has none."""
    if error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED:
        raise MissingRight.of(connection, [Right("Read", "topic", topic)])
    if error.fatal():
        raise Unavailable(f"cannot read {topic}/{partition}: {error.str()}")


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
