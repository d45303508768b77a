"""What a broker's error does to a commit: each kind, on each transactional call, has its course (ARCHITECTURE.md).

The mock broker plants the error; the producer, the consumer, the store and `commit` are the real ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from confluent_kafka import Consumer, KafkaError, Producer

from models.null import NullModel
from state.partition import Partition
from state.partition_store import PartitionStore
from state.quota import Ratio
from state.settings import StreamSettings
from stream.broker_errors import fenced_member
from stream.consume import _producer
from stream.errors import Fenced, Stopped, TldrError
from stream.kafka import Connection
from stream.raw_format import raw_reader
from stream.records import Codec
from stream.reduce import Effects, Reduction, reduce_batch
from stream.topics import StreamTopics
from stream.transaction import Aborted, Outlet, ProducerLost, commit
from tests.stream.mock_cluster import MockCluster, mock_cluster
from tests.stream.test_reduce import Message

MODEL = NullModel(tokens=8, codebook_size=50, clusters=3)
TOPICS = StreamTopics("s")

COORDINATOR = (
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
    KafkaError.COORDINATOR_NOT_AVAILABLE,
    KafkaError.NOT_COORDINATOR,
)
EPOCH = (KafkaError.INVALID_PRODUCER_EPOCH, KafkaError.PRODUCER_FENCED)
KIP_890 = (KafkaError.TRANSACTION_ABORTABLE,)
KIP_360 = (KafkaError.INVALID_PRODUCER_ID_MAPPING,)

REPEATED = {
    "AddPartitionsToTxn": (*COORDINATOR, KafkaError.CONCURRENT_TRANSACTIONS, KafkaError.UNKNOWN_TOPIC_OR_PART),
    "Produce": (
        KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.REQUEST_TIMED_OUT, KafkaError.NOT_ENOUGH_REPLICAS,
        KafkaError.DUPLICATE_SEQUENCE_NUMBER,
    ),
    "AddOffsetsToTxn": (*COORDINATOR, KafkaError.CONCURRENT_TRANSACTIONS),
    "TxnOffsetCommit": (*COORDINATOR, KafkaError.REQUEST_TIMED_OUT),
    "EndTxn": (*COORDINATOR, KafkaError.CONCURRENT_TRANSACTIONS),
}  # fmt: skip
ABORTED = {
    "AddPartitionsToTxn": (*KIP_360, *KIP_890),
    "Produce": (KafkaError.UNKNOWN_PRODUCER_ID, *KIP_890),
    "AddOffsetsToTxn": (*KIP_360, *KIP_890),
    "TxnOffsetCommit": (
        KafkaError.ILLEGAL_GENERATION, KafkaError.UNKNOWN_MEMBER_ID, KafkaError.REBALANCE_IN_PROGRESS, *KIP_890,
    ),
    "EndTxn": (*KIP_360, *KIP_890, KafkaError.REQUEST_TIMED_OUT),
}  # fmt: skip
REPLACED = {
    "AddPartitionsToTxn": (KafkaError.INVALID_TXN_STATE,),
    "Produce": (KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER,),
    "AddOffsetsToTxn": (KafkaError.INVALID_TXN_STATE,),
    "TxnOffsetCommit": (KafkaError.INVALID_TXN_STATE, *KIP_360),
    "EndTxn": (KafkaError.INVALID_TXN_STATE,),
}
FENCED = {
    "AddPartitionsToTxn": EPOCH,
    "Produce": EPOCH,
    "AddOffsetsToTxn": EPOCH,
    "TxnOffsetCommit": (*EPOCH, KafkaError.FENCED_INSTANCE_ID),
    "EndTxn": EPOCH,
}
STOPPED = {
    "AddPartitionsToTxn": (
        KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
    ),
    "Produce": (
        KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.INVALID_RECORD,
    ),
    "AddOffsetsToTxn": (KafkaError.GROUP_AUTHORIZATION_FAILED,),
    "TxnOffsetCommit": (KafkaError.GROUP_AUTHORIZATION_FAILED, KafkaError.TOPIC_AUTHORIZATION_FAILED),
    "EndTxn": (KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,),
}  # fmt: skip


def each(errors: dict[str, tuple[int, ...]]) -> pytest.MarkDecorator:
    cases = [(call, code) for call, codes in errors.items() for code in codes]
    return pytest.mark.parametrize(("call", "code"), cases, ids=[f"{c}-{KafkaError(e).name()}" for c, e in cases])


class Worker:
    """What a worker's commit needs, on the mock broker."""

    def __init__(self, cluster: MockCluster, store: PartitionStore, pool: ThreadPoolExecutor) -> None:
        self.cluster = cluster
        settings = StreamSettings(
            partition_count=1, raw_topic_id="raw", seed=7, ratio=Ratio(1, 1), cell_cap=None, dedupe_window=None,
            gate=None, rule="none", space=MODEL.space, tokens=MODEL.tokens,
        )  # fmt: skip
        self.using = Reduction(
            model=MODEL, reader=raw_reader(), kept_codec=Codec("KeptPair"), fetch=None, pool=pool, threads=1, seed=7,
            rate="1/1", joiner=" ", kept_bytes_max=1_000_000, topic="raw",
        )  # fmt: skip
        self.partition = Partition(store, settings, 0)
        for topic in ("raw", TOPICS.kept, TOPICS.changelog, TOPICS.codes, TOPICS.dead):
            cluster.create_topic(topic, 1)
        self.connection = Connection(cluster.bootstrap_servers, {"retry.backoff.ms": "5", "retry.backoff.max.ms": "20"})
        self.consumer: Consumer = self.connection.reader("group")
        self.producer = self.new_producer()

    def new_producer(self) -> Producer:
        return _producer(self.connection, "s-one", 1_000_000, 10.0, lambda error: None)

    def commit(self, attempt_timeout_s: float = 5.0, transaction_timeout_s: float = 10.0, more: int = 0) -> None:
        """A batch of three pairs, two of them the same, and of some more, as one transaction."""
        self.partition.adopt(MODEL.version, MODEL.space, 0)
        effects = Effects()
        messages = [Message(0, "a"), Message(1, "b"), Message(2, "a")]
        messages += [Message(n, f"pair-{n}") for n in range(3, 3 + more)]
        reduce_batch(messages, {0: self.partition}, self.using, effects)
        outlet = Outlet(
            self.producer, self.consumer, TOPICS, "raw", Codec("PairCodes"), "one", 1, attempt_timeout_s,
            transaction_timeout_s,
        )  # fmt: skip
        commit(effects, {0: self.partition}, outlet)

    @property
    def stored(self) -> int | None:
        """The input offset that the store stands at."""
        position = self.partition.store.position()
        return position.next_offset if position else None


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    with mock_cluster() as cluster, PartitionStore(tmp_path / "store") as store, ThreadPoolExecutor(1) as pool:
        made = Worker(cluster, store, pool)
        yield made
        made.consumer.close()


@each(REPEATED)
def test_what_passes_by_itself_is_repeated_until_the_commit_is_through(worker: Worker, call: str, code: int) -> None:
    worker.cluster.answer(call, code, code)

    worker.commit()

    assert worker.stored == 3
    assert worker.cluster.asked(call) >= 3  # both planted answers were given


@each(ABORTED)
def test_what_ends_the_transaction_aborts_it_and_the_batch_is_done_again(worker: Worker, call: str, code: int) -> None:
    worker.cluster.answer(call, code)

    with pytest.raises(Aborted):
        worker.commit()

    assert worker.stored is None  # LMDB never holds what Kafka has aborted
    assert worker.partition.next_offset is None
    for _ in range(2):  # the mock forgets the sequence of an aborted batch: the first attempt may be aborted for it
        try:
            worker.commit()
            break
        except Aborted:
            continue
    assert worker.stored == 3


@each(REPLACED)
def test_what_ends_the_producer_leaves_the_answer_to_the_changelog(worker: Worker, call: str, code: int) -> None:
    worker.cluster.answer(call, code)

    with pytest.raises(ProducerLost):
        worker.commit()

    assert worker.stored is None
    worker.partition.abort()
    worker.producer = worker.new_producer()
    worker.commit()
    assert worker.stored == 3


@each(FENCED)
def test_a_fenced_worker_leaves_and_its_store_is_untouched(worker: Worker, call: str, code: int) -> None:
    worker.cluster.answer(call, code)

    with pytest.raises(Fenced, match="instance-id"):
        worker.commit()

    assert worker.stored is None


def test_a_member_that_is_fenced_is_told_of_both_causes_and_what_to_do() -> None:
    told = str(fenced_member(KafkaError(KafkaError.FENCED_INSTANCE_ID)))

    assert "another worker uses this instance id" in told and "give each its own --instance-id" in told
    assert "brokers were away for longer than the session time-out" in told and "started again" in told
    assert "\n" not in told


def test_an_abort_that_the_broker_has_made_by_itself_meanwhile_is_not_taken_for_a_successor(worker: Worker) -> None:
    # given: an abort whose attempts time out until the transaction is older than it may be, and then is called fenced
    worker.cluster.answer("AddOffsetsToTxn", KafkaError.TRANSACTION_ABORTABLE)
    worker.cluster.answer("EndTxn", *[KafkaError.COORDINATOR_NOT_AVAILABLE] * 30, KafkaError.PRODUCER_FENCED)

    with pytest.raises(ProducerLost):
        worker.commit(attempt_timeout_s=0.05, transaction_timeout_s=0.1)

    worker.partition.abort()
    worker.producer = worker.new_producer()
    worker.commit()
    assert worker.stored == 3


@each(STOPPED)
def test_what_would_happen_again_stops_the_worker_with_the_reason(worker: Worker, call: str, code: int) -> None:
    worker.cluster.answer(call, code)

    with pytest.raises(Stopped) as stopped:
        worker.commit()

    assert not isinstance(stopped.value, Fenced)
    assert "Kafka refuses the transaction" in str(stopped.value)
    assert worker.stored is None


def test_a_fatal_error_that_comes_while_records_are_produced_is_told_by_its_reason(worker: Worker) -> None:
    worker.cluster.answer("AddPartitionsToTxn", KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED)

    with pytest.raises(Stopped, match="Kafka refuses the transaction"):
        worker.commit(more=20_000)


@pytest.mark.parametrize("code", [*COORDINATOR, KafkaError.CONCURRENT_TRANSACTIONS], ids=lambda c: KafkaError(c).name())
def test_a_producer_waits_for_a_coordinator_that_is_not_ready(worker: Worker, code: int) -> None:
    worker.cluster.answer("InitProducerId", code, code)

    worker.producer = worker.new_producer()

    worker.commit()
    assert worker.stored == 3


@pytest.mark.parametrize(
    "code",
    [KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED, KafkaError.INVALID_TRANSACTION_TIMEOUT],
    ids=lambda code: KafkaError(code).name(),
)
def test_a_producer_that_the_broker_refuses_is_an_error_before_the_first_poll(worker: Worker, code: int) -> None:
    worker.cluster.answer("InitProducerId", code)

    with pytest.raises(TldrError, match="grants no transactions to s-one"):
        worker.new_producer()
