"""A checker that cannot fail proves nothing: every anomaly is planted once in a real stream, and found under its name."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from confluent_kafka import Producer

from state.changelog import CELL, KNOWN
from stream.broker import LocalBroker
from stream.kafka import Connection
from stream.records import Codec
from tests.end_to_end.checker import (
    KEPT,
    NO_ANOMALY,
    OUTPUTS,
    Batch,
    Findings,
    Place,
    StoreContent,
    check,
    examine_log,
    read_log,
    read_topic,
)
from tests.end_to_end.history import History, Observer, events, sent_in, visible_in
from tests.end_to_end.worker_process import until
from tests.stream.stream_writer import StreamWriter, raw

PAIRS = 90


@pytest.fixture
def writer(kafka: Connection, name: str, tmp_path: Path) -> Iterator[StreamWriter]:
    """A stream of one partition with duplicates, a takedown, a dead letter and a cap, not reduced yet."""
    with StreamWriter(kafka, name, tmp_path, partitions=1, cap=12) as stream:
        images = [{"image": b"BAD"} if n == 50 else {} for n in range(PAIRS)]
        stream.feed(raw(f"pair-{n}", **image) for n, image in enumerate(images))  # type: ignore[arg-type]
        stream.feed(["pair-1", "pair-2", ("pair-3", None), "last"])
        yield stream


def found_in(writer: StreamWriter, broker: LocalBroker) -> dict[str, int]:
    """The anomalies that are there at all."""
    return {name: count for name, count in looked_at(writer, broker).anomalies.items() if count}


def looked_at(writer: StreamWriter, broker: LocalBroker, **more: object) -> Findings:
    return check(broker.bootstrap_servers, writer.name, log_folder=broker.data / "logs", **more)  # type: ignore[arg-type]


def not_the_last(message: object) -> bool:
    return message.key() == b"last"  # type: ignore[attr-defined, no-any-return]


def contents(writer: StreamWriter) -> list[StoreContent]:
    return [
        StoreContent(p, store.changelog_position or 0, dict(store.items()), store.known_offset)
        for p, store in enumerate(writer.stores)
    ]


def test_a_stream_without_fault_has_no_anomaly(writer: StreamWriter, broker: LocalBroker, tmp_path: Path) -> None:
    # given
    history = History(tmp_path / "history.jsonl")
    observer = Observer(broker.bootstrap_servers, writer.name, [0], history)

    # when
    writer.run()
    topics = [f"{writer.name}.{kind}" for kind in OUTPUTS]
    written = sum(len(read_topic(broker.bootstrap_servers, topic)[0]) for topic in topics)
    until(lambda: observer.count == written, "the observer has seen it all")
    observer.close()
    history.close()

    # then
    visible = list(visible_in(history.path))
    assert len(visible) == written > PAIRS
    assert looked_at(writer, broker, visible=visible, stores=contents(writer)).anomalies == NO_ANOMALY


def test_a_record_without_a_trace_is_lost(writer: StreamWriter, broker: LocalBroker) -> None:
    writer.run(skip=lambda message: message.key() == b"pair-7")
    assert found_in(writer, broker) == {"lost": 1}


def test_an_acknowledged_record_that_the_topic_lacks_is_lost(writer: StreamWriter, broker: LocalBroker) -> None:
    writer.run()
    assert looked_at(writer, broker, sent=[(0, 10_000)]).anomalies == NO_ANOMALY | {"lost": 1}


def test_a_kept_pair_without_its_record_is_lost(writer: StreamWriter, broker: LocalBroker) -> None:
    writer.run(skip=not_the_last)
    plant_row(writer, fate=0, position=0)
    assert found_in(writer, broker)["lost"] == 1  # and it differs from the batch, of course


def test_a_second_trace_of_a_record_is_counted_twice(writer: StreamWriter, broker: LocalBroker) -> None:
    writer.run()
    writer.plant(writer.topics.dead, "pair-7", b"", **{"tldr.offset": "7", "tldr.partition": "0", "tldr.reason": "x"})
    assert found_in(writer, broker) == {"counted_twice": 1}


def test_a_second_caption_is_captioned_twice(writer: StreamWriter, broker: LocalBroker) -> None:
    # given
    writer.run()
    codec = Codec("KeptPair")
    kept = [record for record in read_topic(broker.bootstrap_servers, writer.topics.kept)[0] if record.value]
    gone = {record.key for record in read_topic(broker.bootstrap_servers, writer.topics.kept)[0] if not record.value}
    one = next(record for record in kept if record.key not in gone)

    # when
    pair = codec.decode(one.value or b"") | {"generated_caption": "another"}
    headers = {name: value.decode() for name, value in one.headers.items()}
    writer.plant(writer.topics.kept, (one.key or b"").decode(), codec.encode(pair), **headers)

    # then
    assert found_in(writer, broker) == {"captioned_twice": 1}


def test_a_reader_that_is_shown_an_aborted_record_is_noticed(
    writer: StreamWriter, broker: LocalBroker, tmp_path: Path
) -> None:
    # given: an observer that sees what it must not see, as one of a broken broker would
    writer.run()
    history = History(tmp_path / "history.jsonl")
    observer = Observer(broker.bootstrap_servers, writer.name, [0], history, "read_uncommitted")

    # when
    producer = Producer({"bootstrap.servers": broker.bootstrap_servers, "transactional.id": f"{writer.name}-zombie"})
    producer.init_transactions(10)
    producer.begin_transaction()
    producer.produce(writer.topics.kept, b"a caption that never was", b"pair-5", 0)
    producer.flush()
    until(
        lambda: any(event["key"] == "pair-5" for event in events(history.path, "visible")), "the observer has seen it"
    )
    producer.abort_transaction(10)
    observer.close()
    history.close()

    # then: and the broker's own files say so too
    visible = list(visible_in(history.path))
    assert looked_at(writer, broker, visible=visible).anomalies == NO_ANOMALY | {"aborted_but_visible": 1}
    place = next(place for place, crc in visible if crc == zlib.crc32(b"a caption that never was"))
    folder = broker.data / "logs" / f"{writer.topics.kept}-0"
    until(lambda: examine_log(read_log(folder)).has_uncommitted(place.offset), "the marker is in the file")
    assert place == Place(f"{writer.name}.{KEPT}", 0, place.offset)


def test_a_transaction_that_goes_back_is_written_after_fencing(writer: StreamWriter, broker: LocalBroker) -> None:
    # given: what a zombie would commit, that does not know of the later transactions
    writer.run()
    positions = [r.value for r in read_topic(broker.bootstrap_servers, writer.topics.changelog)[0] if r.key == b"P"]
    writer.plant(writer.topics.changelog, "P", positions[0])
    assert found_in(writer, broker) == {"written_after_fencing": 1}


def test_a_batch_of_an_epoch_that_is_over_is_written_after_fencing() -> None:
    # given: producer 7 is fenced by its successor, and writes all the same
    def data(at: int, epoch: int) -> Batch:
        return Batch(at, at, 7, epoch, transactional=True, control=None)

    log = [data(0, 3), Batch(1, 1, 7, 4, True, 0), data(2, 4), data(3, 3)]
    assert examine_log(log).fenced == 1
    assert examine_log(log[:3]).fenced == 0


def test_records_without_a_marker_are_not_committed() -> None:
    def data(at: int, producer: int) -> Batch:
        return Batch(at, at + 1, producer, 0, transactional=True, control=None)

    log = [data(0, 1), data(2, 2), Batch(4, 4, 1, 0, True, 1), Batch(5, 5, 2, 0, True, 0), data(6, 1)]
    assert examine_log(log).uncommitted == [(2, 3), (6, 7)]


def test_a_fate_that_the_batch_reference_does_not_have_is_found(writer: StreamWriter, broker: LocalBroker) -> None:
    writer.run(skip=not_the_last)
    plant_row(writer, fate=2, position=-1)  # below the gate of a stream that has none
    assert found_in(writer, broker).keys() == {"differs_from_batch"}


@pytest.mark.parametrize("kind", [CELL, KNOWN], ids=["a-cell", "known-ids"])
def test_a_store_that_is_not_its_changelog_is_found(writer: StreamWriter, broker: LocalBroker, kind: bytes) -> None:
    # given
    writer.run()
    store = writer.stores[0]
    key = next(key for key, _ in store.items() if key[:1] == kind)

    # when: a record is taken away that the changelog has
    store.apply([(key, None)], store.changelog_position or 0)

    # then
    findings = looked_at(writer, broker, stores=contents(writer)).anomalies
    assert findings["store_differs_from_changelog"] >= 1
    assert findings == NO_ANOMALY | {"store_differs_from_changelog": findings["store_differs_from_changelog"]}


def test_a_history_tells_what_was_sent(tmp_path: Path) -> None:
    history = History(tmp_path / "history.jsonl")
    history.append("sent", id="a", partition=1, offset=5)
    history.append("fault", fault="kill", worker=2)
    history.close()
    assert list(sent_in(history.path)) == [(1, 5)]


def plant_row(writer: StreamWriter, *, fate: int, position: int) -> None:
    """A row of pair-codes about the raw record `last`, in a cell of its own, that no worker wrote."""
    record = {
        "partition": 0, "epoch": 0, "bundle": writer.model.version, "tokens": writer.model.tokens, "ids": ["last"],
        "offsets": np.array([PAIRS + 3], "<i8").tobytes(), "fates": bytes([fate]),
        "clusters": np.array([999], "<i4").tobytes(), "positions": np.array([position], "<i8").tobytes(),
        "priorities": np.array([1], "<u8").tobytes(), "itms": np.array([0.5], "<f4").tobytes(),
        "vectors": bytes(2 * writer.model.tokens), "duplicate_of": b"", "removed": [],
    }  # fmt: skip
    writer.plant(writer.topics.codes, "", Codec("PairCodes").encode(record))
