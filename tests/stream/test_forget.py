"""A pair is taken out in every partition, since nobody can be sure in which one it lies."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest
from confluent_kafka import Message

from stream.errors import TldrError, Unavailable
from stream.forget import forget, read_ids
from stream.kafka import Connection, create_missing, end_offsets, read_partition


def make_topic(kafka: Connection, topic: str) -> None:
    create_missing(kafka, {topic: {}}, 3)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with contextlib.suppress(Unavailable):  # its leaders come a moment later
            end_offsets(kafka, topic, range(3))
            return


def records(kafka: Connection, topic: str) -> dict[int, list[Message]]:
    ends = end_offsets(kafka, topic, range(3))
    return {p: [m for batch in read_partition(kafka, topic, p, 0, end) for m in batch] for p, end in ends.items()}


def test_every_partition_gets_a_null_value_under_each_id(kafka: Connection, name: str) -> None:
    make_topic(kafka, name)

    result = forget(kafka, name, ["https://e.org/katze-🐈.jpg", "b"])

    assert (result.ids, result.partitions, result.records) == (2, 3, 6)
    for messages in records(kafka, name).values():
        assert [(m.key().decode(), m.value()) for m in messages] == [("https://e.org/katze-🐈.jpg", None), ("b", None)]
    assert any("snapshots already exported" in line for line in result.lines())


def test_ids_come_from_the_command_line_and_a_file_each_once(tmp_path: Path) -> None:
    file = tmp_path / "ids"
    file.write_text("b\nc d\n\n a \n")

    assert read_ids(["a"], file) == ["a", "b", "c d"]
    with pytest.raises(TldrError, match="no id given"):
        read_ids([], None)
    with pytest.raises(TldrError, match="cannot read"):
        read_ids([], tmp_path / "absent")


def test_a_topic_that_does_not_exist_is_not_created(kafka: Connection, name: str) -> None:
    with pytest.raises(TldrError, match="does not exist"):
        forget(kafka, name, ["a"])
