"""The least rights of each command on a broker with ACLs: the table of docs/reference.md, checked before a command works.

Kafka's own rule: Read and Write on a topic or group imply Describe on it. Must not know what a command does with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from confluent_kafka import KafkaError

from stream.acl import Right
from stream.kafka import Connection, MissingRight, allowed_operations
from stream.topics import BUNDLES, StreamTopics


class Need(NamedTuple):
    """What a command has to do to one resource.

    name  as the table shows it: RAW is the raw topic, S the stream, INSTANCE a worker
    when  "": always. Else the circumstance, and the right is asked for only when it comes
    """

    operations: tuple[str, ...]
    resource: str
    name: str
    when: str = ""


READ, WRITE, DESCRIBE, CREATE = ("Read",), ("Write",), ("Describe",), ("Create",)
IF_MISSING = "where it does not exist yet"
STREAM_TOPICS = ("kept-pairs", "reservoir-changelog", "pair-codes", "dlq")

LEAST_RIGHTS: dict[str, tuple[Need, ...]] = {
    "consume": (
        Need(("Read", "DescribeConfigs"), "topic", "RAW"),
        Need(("Write", "DescribeConfigs"), "topic", "S.kept-pairs"),
        Need(("Read", "Write", "DescribeConfigs"), "topic", "S.reservoir-changelog"),
        Need(WRITE, "topic", "S.pair-codes"),
        Need(("Read", "Write"), "topic", "S.dlq"),
        Need(READ, "group", "S"),
        Need(WRITE, "transactional-id", "S-INSTANCE"),
        *(Need(CREATE, "topic", f"S.{topic}", IF_MISSING) for topic in STREAM_TOPICS),
    ),
    "an announced bundle": (Need(READ, "topic", BUNDLES),),
    "bundle announce": (Need(WRITE, "topic", BUNDLES), Need(CREATE, "topic", BUNDLES, IF_MISSING)),
    "bundle list": (Need(READ, "topic", BUNDLES), Need(READ, "topic", "S.reservoir-changelog", "with `--topic`")),
    "recluster": (
        Need(READ, "topic", "S.reservoir-changelog"),
        Need(READ, "topic", "S.pair-codes"),
        Need(WRITE, "topic", BUNDLES),
        Need(READ, "topic", BUNDLES, "without `--bundle`, and with `--if-drift`"),
        Need(CREATE, "topic", BUNDLES, IF_MISSING),
    ),
    "recluster --dry-run": (
        Need(READ, "topic", "S.reservoir-changelog"),
        Need(READ, "topic", "S.pair-codes"),
        Need(READ, "topic", BUNDLES, "without `--bundle`, and with `--if-drift`"),
    ),
    "topics": tuple(
        need
        for topic in ("RAW", *(f"S.{name}" for name in STREAM_TOPICS), BUNDLES)
        for need in (Need(("Describe", "DescribeConfigs"), "topic", topic), Need(CREATE, "topic", topic, IF_MISSING))
    ),
    "ingest": (
        Need(("Write", "DescribeConfigs"), "topic", "RAW"),
        Need(CREATE, "topic", "RAW", IF_MISSING),
        Need(READ, "topic", "RAW", "after a run that was killed"),
    ),
    "forget": (Need(WRITE, "topic", "RAW"),),
    "status": (
        Need(DESCRIBE, "topic", "RAW"),
        Need(DESCRIBE, "topic", "S.kept-pairs"),
        Need(READ, "topic", "S.reservoir-changelog"),
        Need(READ, "topic", "S.pair-codes"),
        Need(READ, "topic", "S.dlq"),
    ),
    "snapshot": (
        Need(READ, "topic", "S.reservoir-changelog"),
        Need(READ, "topic", "S.kept-pairs"),
        Need(READ, "topic", "S.pair-codes", "with `--cut`"),
    ),
    "verify": (
        Need(READ, "topic", "RAW"),
        Need(READ, "topic", "S.reservoir-changelog"),
        Need(READ, "topic", "S.kept-pairs"),
        Need(READ, "topic", "S.pair-codes"),
        Need(READ, "topic", "S.dlq"),
    ),
    "report": (
        Need(READ, "topic", "RAW"),
        Need(READ, "topic", "S.reservoir-changelog"),
        Need(READ, "topic", "S.kept-pairs"),
        Need(READ, "topic", "S.pair-codes"),
        Need(READ, "topic", "S.dlq"),
    ),
    "explain": (
        Need(READ, "topic", "S.reservoir-changelog"),
        Need(READ, "topic", "S.kept-pairs"),
        Need(READ, "topic", "S.pair-codes"),
        Need(READ, "topic", "S.dlq"),
    ),
    "dlq list": (Need(READ, "topic", "S.dlq"),),
    "dlq replay": (Need(READ, "topic", "S.dlq"), Need(WRITE, "topic", "RAW")),
    "a raw topic to learn from": (Need(READ, "topic", "RAW"),),
    "KeptPairs": (Need(READ, "topic", "S.reservoir-changelog"), Need(READ, "topic", "S.kept-pairs")),
}

# Of which kind of resource each of Kafka's refusals speaks.
_RESOURCE_OF = {
    KafkaError.TOPIC_AUTHORIZATION_FAILED: "topic",
    KafkaError.GROUP_AUTHORIZATION_FAILED: "group",
    KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED: "transactional-id",
}


def least_rights(command: str, *, raw: str = "", stream: str = "", instance: str = "") -> list[Right]:
    """What `command` needs in any case, with the names of this raw topic, stream and worker."""
    return [right for need in LEAST_RIGHTS[command] if not need.when for right in _rights(need, raw, stream, instance)]


def check_rights(connection: Connection, command: str, *, raw: str = "", stream: str = "") -> None:
    """Raises MissingRight where the broker does not allow what `command` will do to topics, with every ACL to add.

    Groups and transactional ids are not asked about: they refuse by themselves, before anything is done.
    """
    needed = [right for right in least_rights(command, raw=raw, stream=stream) if right.resource == "topic"]
    if missing := _missing(connection, needed):
        raise MissingRight.of(connection, missing)


def lost_right(
    connection: Connection, error: KafkaError, command: str, *, raw: str, stream: str, instance: str
) -> MissingRight:
    """What a running command lacks, whose last call was refused with `error`, which does not say what it is about."""
    needed = least_rights(command, raw=raw, stream=stream, instance=instance)
    about = [right for right in needed if right.resource == _RESOURCE_OF.get(error.code())]
    topics = [right for right in about if right.resource == "topic"]
    return MissingRight.of(connection, (topics and _missing(connection, topics)) or about)


def rights_table() -> Iterator[str]:
    """The table of docs/reference.md, line by line."""
    yield "| command | always | at times |"
    yield "|---|---|---|"
    for command, needs in LEAST_RIGHTS.items():
        name = f"`{command}`" if command.split()[0] not in ("a", "an") else command
        always = [_told(need) for need in needs if not need.when]
        at_times = [f"{_told(need)} {need.when}" for need in needs if need.when]
        yield f"| {name} | {'; '.join(always)} | {'; '.join(at_times)} |"


def _told(need: Need) -> str:
    kind = "" if need.resource == "topic" else f"{need.resource} "
    return f"{', '.join(need.operations)} on {kind}`{need.name}`"


def _missing(connection: Connection, needed: Iterable[Right]) -> list[Right]:
    """Those of `needed` (rights on topics) that the broker says this client does not have."""
    wanted = list(needed)
    allowed = allowed_operations(connection, {right.name for right in wanted})
    return [right for right in wanted if right.name in allowed and right.operation not in allowed[right.name]]


def _rights(need: Need, raw: str, stream: str, instance: str) -> Iterator[Right]:
    topics = StreamTopics(stream)
    names = {
        "RAW": raw,
        "S": stream,
        "S-INSTANCE": f"{stream}-{instance}",
        "S.kept-pairs": topics.kept,
        "S.reservoir-changelog": topics.changelog,
        "S.pair-codes": topics.codes,
        "S.dlq": topics.dead,
        BUNDLES: BUNDLES,
    }
    for operation in need.operations:
        yield Right(operation, need.resource, names[need.name])
