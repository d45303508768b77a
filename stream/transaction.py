"""Effects → Kafka, then LMDB: one batch of effects becomes visible as a whole, or not at all.

Writes; decides nothing. The transaction is begun only when everything that goes into it is known, so its life is that of a
flush and a commit, and a slow model cannot outlive `transaction.timeout.ms`. It goes in four steps, `seal`, `send`, `write` and
`keep`, of which `send` and `write` may run in a thread of their own while the next batches are decided; `commit` is all four.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, NoReturn

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition

from state.changelog import Record
from state.partition import Partition
from stream.avro_by_hand import write_pair_codes
from stream.broker_errors import Course, course_of, kafka_error_of, lacks_right
from stream.dead_letters import headers_of
from stream.errors import Fenced, RightLost, Stopped
from stream.records import Codec
from stream.reduce import Effects
from stream.topics import CODES_RECORD_BYTES, StreamTopics

log = logging.getLogger(__name__)

STORES_AT_ONCE = 8


class Aborted(Exception):
    """The transaction was aborted: nothing of it is visible. The caller goes back to the last committed offsets."""


class Undelivered(Aborted):
    """Aborted, since records did not reach their topic; the client does not say why, so the broker has to be asked."""


class ProducerLost(Exception):
    """The producer is of no use any more (a broker that died in mid-transaction does that), and what became of the
    transaction is not known here: the changelog tells. The caller makes a new producer and restores its partitions."""


class Outlet(NamedTuple):
    """Where effects go: the transactional producer, the stream's topics, and who is writing.

    attempt_timeout_s      one attempt of a call ends after this long, and is repeated where its outcome is unknown. All of
                           them are bounded by transaction.timeout.ms on the broker's side, into which it should fit twice.
    transaction_timeout_s  after which the broker ends a transaction by itself, as it fences: by a new epoch
    """

    producer: Producer
    consumer: Consumer
    topics: StreamTopics
    raw_topic: str
    codes_codec: Codec
    instance: str
    partition_count: int
    attempt_timeout_s: float = 5.0
    transaction_timeout_s: float = 10.0
    wall_clock: Callable[[], float] = time.time


class Sealed(NamedTuple):
    """All that goes into one transaction: nothing of it changes while later batches are decided."""

    effects: Effects
    changes: dict[int, list[Record]]  # partition → changelog records
    codes: list[
        tuple[int, Iterable[dict[str, Any]]]
    ]  # partition, PairCodes records, which are made while they are sent
    offsets: list[TopicPartition]
    group: Any  # who we are in the group now: once it has changed, the broker refuses the offsets
    ends: dict[int, int]  # partition → end of its changelog, as far as it is known


def seal(effects: Effects, partitions: Mapping[int, Partition], outlet: Outlet) -> Sealed:
    """Closes the open transaction of the partitions that `effects` touch. At a batch boundary, by whoever decides."""
    touched = sorted(effects.codes.keys() | effects.switched | {letter.message.partition() for letter in effects.dead})
    group = outlet.consumer.consumer_group_metadata()
    codes = [
        (
            p,
            columns.records(
                p, partitions[p].epoch, partitions[p].bundle or "", partitions[p].settings.tokens, CODES_RECORD_BYTES
            ),
        )
        for p, columns in effects.codes.items()
    ]
    now_ms = int(outlet.wall_clock() * 1000)
    return Sealed(
        effects=effects,
        changes={p: partitions[p].changes(outlet.instance, now_ms) for p in touched},
        codes=codes,
        offsets=[TopicPartition(outlet.raw_topic, p, partitions[p].next_offset) for p in touched],
        group=group,
        # To stand further back than the end is harmless: a restore applies the same records again.
        ends={p: partitions[p].store.changelog_position or 0 for p in touched},
    )


def send(sealed: Sealed, outlet: Outlet) -> None:
    """Makes a sealed transaction visible as a whole, or not at all.

    1. begin  2. produce kept pairs and tombstones, codes, dead letters, changelog, and flush  3. add the consumed offsets
    4. commit Kafka. A crash before 4 leaves nothing; between 4 and the end of `write` it costs the replay of one transaction.

    Raises Aborted (nothing happened; abort the partitions, go back and do it again), Fenced (another worker owns what this one
    wrote to; touch nothing more), ProducerLost (ask the changelog what happened) or Stopped (the same would happen again).
    """
    producer, attempt_s = outlet.producer, outlet.attempt_timeout_s
    try:
        producer.begin_transaction()  # 1
        _produce_all(sealed, outlet)  # 2
        # Everything lies at the brokers before the offsets are pending: a successor that finds no pending offsets of this
        # group can rely on the changelog's end (restore.py asks in this order).
        while producer.flush(attempt_s):
            log.warning("%d records of the transaction are not at the brokers yet", len(producer))
        # Once only: repeated after a time-out it may hang for ever (librdkafka 2.16, a broker killed in between). To abort is
        # safe as long as nobody was asked to commit.
        producer.send_offsets_to_transaction(sealed.offsets, sealed.group, attempt_s)  # 3
        _until_done(lambda: producer.commit_transaction(attempt_s), "committing")  # 4
    except (KafkaException, KafkaError, SystemError) as error:
        _abort(outlet, error)


def write(sealed: Sealed, partitions: Mapping[int, Partition]) -> None:
    """Writes what was sent to the stores.

    To several stores at once, since half of the time is spent on waiting for the disk. Raises StateError once all are done.
    """
    with ThreadPoolExecutor(min(len(sealed.changes), STORES_AT_ONCE) or 1, "write") as pool:
        for written in [pool.submit(partitions[p].write, sealed.ends[p]) for p in sealed.changes]:
            written.result()


def keep(sealed: Sealed, partitions: Mapping[int, Partition]) -> None:
    """Reads from now on what was written. By whoever decides, at a batch boundary. Raises StateError."""
    for p in sealed.changes:
        partitions[p].commit(sealed.ends[p])


def commit(effects: Effects, partitions: Mapping[int, Partition], outlet: Outlet) -> None:
    """`seal`, `send`, `write`, `keep`, one after the other. Raises as they do; at Aborted the partitions are aborted, too."""
    sealed = seal(effects, partitions, outlet)
    try:
        send(sealed, outlet)
    except Aborted:
        for partition in partitions.values():
            partition.abort()
        raise
    write(sealed, partitions)
    keep(sealed, partitions)


# topic, value, key, partition, callback, on_delivery, timestamp, headers: as `produce` takes them by place, which costs half of
# taking them by name. (Two names for one thing: where the first is None, the second is not asked.)
_Record = tuple[Any, ...]


def _records(sealed: Sealed, outlet: Outlet) -> Iterable[_Record]:
    topics = outlet.topics
    kept, changelog = topics.kept, topics.changelog  # names are made anew each time
    for number, key, value, headers in sealed.effects.kept:
        yield kept, value, key, number, None, None, 0, headers
    for p, its in sealed.codes:
        for record in its:
            yield topics.codes, write_pair_codes(outlet.codes_codec.header, record), None, p
    for letter in sealed.effects.dead:
        message = letter.message
        yield topics.dead, message.value(), message.key(), message.partition(), None, None, 0, headers_of(letter)
    for p, (*changes, (last_key, last)) in sealed.changes.items():
        for changed, entry in changes:
            yield changelog, entry, changed, p
        # Records of a partition are written in their order, so the last one tells the end.
        told = partial(_remember_end, partition=p, ends=sealed.ends)
        yield changelog, last, last_key, p, told


def _produce_all(sealed: Sealed, outlet: Outlet) -> None:
    produce = outlet.producer.produce
    for record in _records(sealed, outlet):
        while True:
            try:
                produce(*record)
                break
            except BufferError:  # librdkafka's queue is full: let it send
                outlet.producer.poll(0.1)


def _remember_end(error: KafkaError | None, message: Any, partition: int, ends: dict[int, int]) -> None:
    # Raising here would end as a SystemError; a failed delivery makes the commit fail by itself. A record that a broker has
    # already (DUPLICATE_SEQUENCE_NUMBER) is delivered without an offset.
    if error is None and message.offset() is not None:
        ends[partition] = max(ends[partition], message.offset() + 1)


def _until_done(call: Callable[[], None], what: str) -> None:
    """Repeats a call whose outcome is unknown: it may have happened, so it must not be given up."""
    began = time.monotonic()
    while True:
        try:
            call()
            return
        except KafkaException as error:
            reason = kafka_error_of(error)
            if course_of(reason) is not Course.REPEAT:
                raise
            log.warning("%s goes on for %.0f s: %s", what, time.monotonic() - began, reason.str())


def _abort(outlet: Outlet, error: BaseException) -> NoReturn:
    """Ends a failed transaction as the error's course says."""
    attempts = 0

    def abort() -> None:
        nonlocal attempts
        attempts += 1
        outlet.producer.abort_transaction(outlet.attempt_timeout_s)

    reason = kafka_error_of(error)
    if reason.code() == KafkaError._FATAL:
        # `produce` does not say what it was; a transactional call, which is refused, does.
        try:
            outlet.producer.abort_transaction(outlet.attempt_timeout_s)
        except (KafkaException, KafkaError, SystemError) as told:
            reason = kafka_error_of(told)
    course = course_of(reason)
    if course is Course.FENCED:
        raise Fenced(
            f"another worker took over ({reason.str()}): give each worker its own --instance-id and --state-dir"
        ) from error
    if course is Course.REPLACE:
        raise ProducerLost(reason.str()) from error
    try:
        if not reason.fatal():
            _until_done(abort, "aborting")
    except (KafkaException, KafkaError, SystemError) as second:
        refused = kafka_error_of(second)
        # Attempts that all timed out for longer than a transaction may last: the broker was away and has ended it since. (Who
        # was frozen for as long and has a successor comes here after one or two attempts, and the group fences it as well.)
        if (attempts - 1) * outlet.attempt_timeout_s >= outlet.transaction_timeout_s:
            raise ProducerLost(refused.str()) from second
        if course_of(refused) is Course.FENCED:
            raise Fenced(f"the transaction could not be aborted: {refused.str()}") from second
        if course is not Course.STOP:
            raise ProducerLost(refused.str()) from second
    if lacks_right(reason):
        raise RightLost(f"Kafka refuses the transaction: {reason.str()}", reason) from error
    if course is Course.STOP:
        raise Stopped(
            f"Kafka refuses the transaction: {reason.str()}; nothing of it is visible. Put that right and start again"
        ) from error
    kind = Undelivered if reason.code() == KafkaError._INCONSISTENT else Aborted
    raise kind(reason.str()) from error
