"""What a broker's error means for a worker: the one place that decides. ARCHITECTURE.md has the table, KIP by KIP.

librdkafka repeats by itself what passes by itself (a coordinator that moves or loads, a leader that changes); what reaches
us is judged here. The codes are Kafka's own; its names are in the protocol guide.
"""

from __future__ import annotations

from enum import Enum

from confluent_kafka import KafkaError, KafkaException

from stream.errors import Fenced


class Course(Enum):
    """What a worker does about an error of one of its transactional calls."""

    REPEAT = "the outcome is not known yet: the call is repeated, never given up"
    ABORT = "nothing of the transaction may become visible: abort it, go back to what is committed, do it again"
    REPLACE = "the producer is of no use any more: a new one, and the changelog tells what was committed"
    FENCED = "another worker took over: touch nothing more and leave (exit status 7)"
    STOP = "the same would happen again: abort, and leave with the reason (exit status 6)"


# KIP-98, KIP-588: a newer producer has this transactional id. KIP-345: a newer member has this instance id.
_FENCED = frozenset(
    {
        KafkaError._FENCED,
        KafkaError.PRODUCER_FENCED,
        KafkaError.INVALID_PRODUCER_EPOCH,
        KafkaError.FENCED_INSTANCE_ID,
        KafkaError.UNRELEASED_INSTANCE_ID,
    }
)
# An ACL is missing (KIP-11).
_NO_RIGHT = frozenset(
    {
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.GROUP_AUTHORIZATION_FAILED,
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
        KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
    }
)
# The broker does not let this client in, or this client does not trust the broker.
_NO_ENTRY = frozenset({KafkaError._AUTHENTICATION, KafkaError._SSL, KafkaError.SASL_AUTHENTICATION_FAILED})
# TLS 1.3 tells a client what is wrong with its certificate only once it begins to talk: a transport error to librdkafka.
_TLS_ALERT = "SSL alert number"
# Somebody has to put these right; until then every transaction would fail like this one.
_REFUSED = _NO_RIGHT | frozenset(
    {
        KafkaError.INVALID_TRANSACTION_TIMEOUT,
        KafkaError.UNSUPPORTED_VERSION,
        KafkaError.UNSUPPORTED_FOR_MESSAGE_FORMAT,
        KafkaError.MSG_SIZE_TOO_LARGE,
        KafkaError.RECORD_LIST_TOO_LARGE,
        KafkaError.INVALID_RECORD,
        KafkaError.POLICY_VIOLATION,
        KafkaError.SASL_AUTHENTICATION_FAILED,
        KafkaError._AUTHENTICATION,
    }
)


def course_of(error: KafkaError) -> Course:
    """What to do about an error of begin, produce, send offsets or commit.

    KIP-360: a lost or unknown producer id is abortable, the client bumps its epoch. KIP-447: a generation that is over
    (a rebalance) aborts. KIP-890: TRANSACTION_ABORTABLE says so itself. What librdkafka calls fatal ends the producer.
    """
    if says_fenced(error):
        return Course.FENCED
    if error.code() in _REFUSED:
        return Course.STOP
    if error.fatal() or error.code() == KafkaError._FATAL:
        return Course.REPLACE
    if error.retriable() and not error.txn_requires_abort():
        return Course.REPEAT
    return Course.ABORT


def lacks_right(error: KafkaError) -> bool:
    """Whether it means that the broker's ACLs do not allow it."""
    return error.code() in _NO_RIGHT


def refuses_entry(error: KafkaError) -> bool:
    """Whether it means that there will be no connection with these settings; librdkafka tries for ever all the same."""
    return error.code() in _NO_ENTRY or _TLS_ALERT in error.str()


def says_fenced(error: KafkaError) -> bool:
    """Whether it means that another worker has this one's transactional id or instance id."""
    # Once a client has failed for good, every error of it is _FATAL and only its text tells which one it was.
    return error.code() in _FENCED or (error.code() == KafkaError._FATAL and "fenced" in error.str())


def fenced_member(error: KafkaError) -> Fenced:
    """What a worker leaves with when the group says that another member has its instance id.

    The broker says so, too, where librdkafka asks without its member id, as it may once the session has timed out while the
    broker was away (its issue 3437, open; seen with 2.16). What is committed is right in both cases.
    """
    return Fenced(
        f"another worker uses this instance id ({error.str()}): give each its own --instance-id. If none does, the brokers "
        "were away for longer than the session time-out, and this worker only has to be started again"
    )


def kafka_error_of(error: BaseException) -> KafkaError:
    """The broker's error behind what a call of the client raised. Raises `error` itself where there is none.

    A client that has failed for good raises the bare KafkaError from whatever serves its callbacks (confluent-kafka 2.16);
    where that interrupts a callback of ours, a SystemError comes out, with the KafkaError behind it.
    """
    behind: BaseException | None = error
    while behind is not None:
        if isinstance(behind, KafkaError):
            return behind
        if isinstance(behind, KafkaException):
            return behind.args[0]
        behind = behind.__cause__ or behind.__context__
    raise error
