"""A pair is taken out in every partition, since nobody can be sure in which one it lies."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

import pytest
from confluent_kafka import Message
from typer.testing import CliRunner, Result

from stream.cli import app
from stream.errors import TldrError, Unavailable
from stream.forget import forget, held_by, read_ids
from stream.kafka import Connection, create_missing, end_offsets, read_partition
from stream.snapshot import snapshot
from stream.stream_view import read_view
from stream.verify import verify
from tests.stream.stream_writer import StreamWriter


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


def test_a_takedown_is_for_good_and_names_the_snapshots_that_still_hold_the_pair(
    kafka: Connection, name: str, tmp_path: Path
) -> None:
    def command(*arguments: str) -> Result:
        kept = ["forget", "--topic", name, "--bootstrap-servers", kafka.bootstrap_servers, *arguments]
        return CliRunner().invoke(app, kept)

    with StreamWriter(kafka, name, tmp_path / "state", partitions=1) as writer:
        writer.feed(f"pair {i}" for i in range(40)).run()
        victim = next(iter(writer.members()))
        snapshot(writer.source, tmp_path / "shards")
        snapshot(writer.source, tmp_path / "names", manifest_only=True)
        counted = read_view(writer.source).totals.counted

        refused = command(victim, "--snapshots", str(tmp_path))
        done = command(
            victim, "--snapshots", str(tmp_path / "shards"), "--snapshots", str(tmp_path / "names"), "--json"
        )
        writer.run().feed([victim]).run()  # the crawl comes again
        snapshot(writer.source, tmp_path / "after")
        found = verify(writer.source, name, lambda version: writer.model)
        totals, members = read_view(writer.source).totals, writer.members()
        records = [m for batch in read_partition(kafka, writer.topics.kept, 0, 0, settled(writer)) for m in batch]

    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert [(Path(one["snapshot"]).name, one["id"], one["file"]) for one in json.loads(done.stdout)["held"]] == [
        ("shards", victim, "part-00000-00000.tar"),
        ("names", victim, None),
    ]
    assert [m.value() for m in records if m.key() == victim.encode()][-1] is None
    assert victim not in members
    assert (totals.counted, totals.removed, totals.forgotten) == (counted, 1, 2)
    assert held_by([tmp_path / "after"], [victim]) == []
    found.raise_for_status()


def settled(writer: StreamWriter) -> int:
    """The end of the kept topic, once the last transaction's marker is there."""
    topic = writer.topics.kept
    while end_offsets(writer.kafka, topic, [0]) != end_offsets(writer.kafka, topic, [0], committed=False):
        time.sleep(0.01)
    return end_offsets(writer.kafka, topic, [0])[0]
