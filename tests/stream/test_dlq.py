"""Dead letters: listed with their reason, and sent back as they came."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import fastavro
import pytest
from typer.testing import CliRunner

from models.errors import Reason
from stream.cli import app, commands
from stream.dlq import list_dead_letters, replay
from stream.errors import TldrError
from stream.kafka import Connection, end_offsets, read_partition
from stream.records import SCHEMA_FOLDER, SINGLE_OBJECT_MARKER, fingerprint
from stream.stream_view import StreamSource, read_view
from stream.topics import StreamTopics
from tests.stream.small_stream import Raw, SmallStream, pair, picture

# As a letter of another stream looks: a header of its own has one of our names.
JUNK = Raw(b"junk", b"no Avro at all", (("source", b"crawl 7"), ("tldr.reason", b"mine"), ("source", b"again")), 1)
REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "reference.md"


@pytest.fixture
def small(kafka: Connection, name: str, tmp_path: Path) -> SmallStream:
    return SmallStream(kafka, name, tmp_path / "state")


@pytest.fixture
def dead(small: SmallStream) -> SmallStream:
    """Ten good pairs, three dead letters of three reasons: one with a foreign key, one without a key."""
    small.produce([pair(f"id-{i}", f"caption {i}", picture(i)) for i in range(10)])
    small.produce([JUNK, pair("mute", " ", picture(11)), pair("keyless", "a caption", b"BAD", key=False)])
    small.run()
    return small


def raw_records(small: SmallStream, start: dict[int, int]) -> list[Raw]:
    ends = end_offsets(small.kafka, small.topic, start)
    return [
        Raw(message.key(), message.value(), tuple(message.headers() or ()), p)
        for p in start
        for messages in read_partition(small.kafka, small.topic, p, start[p], ends[p])
        for message in messages
    ]


def newer_raw_schema(folder: Path) -> tuple[Path, bytes]:
    """A RawPair schema with one field more, in a folder of its own, and a pair written with it."""
    schema = json.loads((SCHEMA_FOLDER / "RawPair.avsc").read_text())
    schema = schema | {"fields": [*schema["fields"], {"name": "later", "type": "string", "default": ""}]}
    folder.mkdir()
    (folder / "RawPair.avsc").write_text(json.dumps(schema))
    parsed = fastavro.parse_schema(schema)
    out = io.BytesIO(SINGLE_OBJECT_MARKER + fingerprint(parsed))
    out.seek(0, 2)
    record: dict[str, Any] = {
        "id": "new",
        "caption": "a caption",
        "image": picture(1),
        "image_uri": None,
        "fields": {},
        "later": "x",
    }
    fastavro.schemaless_writer(out, parsed, record)
    return folder, out.getvalue()


def test_a_dead_letter_is_listed_with_its_reason_its_origin_and_its_id(dead: SmallStream) -> None:
    found = list_dead_letters(dead.source)

    by_id = {letter.id: letter for letter in found.letters}
    assert {key: letter.reason for key, letter in by_id.items()} == {
        "junk": "not-avro",
        "mute": "empty-caption",
        "keyless": "not-an-image",
    }
    assert (by_id["junk"].topic, by_id["junk"].partition, by_id["junk"].bytes) == (
        dead.topic,
        1,
        len(JUNK.value or b""),
    )
    assert by_id["junk"].detail
    assert found.by_reason == {"not-avro": 1, "empty-caption": 1, "not-an-image": 1}


def test_the_newest_are_shown_and_all_are_counted(dead: SmallStream) -> None:
    found = list_dead_letters(dead.source, limit=1)

    assert (found.total, len(found.letters)) == (3, 1)


def test_a_reason_leaves_the_others_out(dead: SmallStream) -> None:
    found = list_dead_letters(dead.source, [Reason.NOT_AVRO])

    assert [letter.id for letter in found.letters] == ["junk"]
    assert found.total == 1


def test_a_replay_brings_back_the_original_bytes_key_and_headers_in_the_original_partition(dead: SmallStream) -> None:
    before = end_offsets(dead.kafka, dead.topic, range(2))

    result = replay(dead.source, dead.topic, [Reason.NOT_AVRO])

    assert (result.sent, result.by_reason) == (1, {"not-avro": 1})
    assert raw_records(dead, before) == [JUNK]


def test_a_dry_run_counts_and_sends_nothing(dead: SmallStream) -> None:
    before = end_offsets(dead.kafka, dead.topic, range(2))

    result = replay(dead.source, dead.topic, dry_run=True)

    assert result.sent == 3
    assert end_offsets(dead.kafka, dead.topic, range(2)) == before


def test_a_record_that_died_again_is_sent_back_once(dead: SmallStream) -> None:
    replay(dead.source, dead.topic)
    dead.run()

    again = replay(dead.source, dead.topic)

    assert list_dead_letters(dead.source).total == 6
    assert (again.sent, again.repeated) == (3, 3)


def test_a_letter_that_is_replayed_twice_after_its_cause_is_put_right_counts_once(
    small: SmallStream, tmp_path: Path
) -> None:
    folder, value = newer_raw_schema(tmp_path / "schemas")
    small.produce([Raw(b"new", value)])
    small.run()
    assert list_dead_letters(small.source).by_reason == {"unknown-schema": 1}

    replay(small.source, small.topic)
    replay(small.source, small.topic)
    small.run(schemas=[folder])

    totals = read_view(small.source).totals
    assert (totals.read, totals.dead, totals.counted, totals.duplicates) == (3, 1, 1, 1)


def test_letters_of_another_topic_are_not_replayed_into_this_one(dead: SmallStream, name: str) -> None:
    other = SmallStream(dead.kafka, f"{name}-other", dead.state)
    other.produce([])

    with pytest.raises(TldrError, match=f"give --topic {dead.topic}"):
        replay(dead.source, other.topic)


def test_a_stream_that_does_not_exist_is_said(kafka: Connection, name: str) -> None:
    with pytest.raises(TldrError, match=f"there is no stream {name}"):
        list_dead_letters(StreamSource(kafka, StreamTopics(name)))


def test_a_reason_that_does_not_exist_is_refused_and_not_taken_for_none_found() -> None:
    for command in ("list", "replay"):
        done = CliRunner().invoke(app, ["dlq", command, "--topic", "t", "--reason", "truncatd"])

        assert done.exit_code == 2
        assert done.stderr.startswith(
            "error: --reason truncatd: there is none of that name; use not-an-image, truncated,"
        )


def test_the_reference_lists_every_reason_with_its_meaning() -> None:
    section = REFERENCE.read_text().split("## Reasons of dead letters")[1].split("\n## ")[0]

    assert [line for line in section.splitlines() if line.startswith("| `")] == [
        f"| `{reason}` | {reason.meaning} |" for reason in Reason
    ]


def test_the_executables_know_the_subcommands(kafka: Connection, name: str, tmp_path: Path) -> None:
    assert "dlq" in commands()
    for executable in (["typer", "stream"], ["tldr-stream"]):
        command = [str(Path(sys.executable).parent / executable[0]), *executable[1:], "dlq", "list", "--topic", name]
        done = subprocess.run(
            [*command, "--bootstrap-servers", kafka.bootstrap_servers],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: there is no stream {name}")
        assert done.stderr.count("\n") == 1
