"""Records survive the way through bytes, and those of older and newer versions are read."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import fastavro
import pytest

from stream.raw_format import raw_reader
from stream.records import SCHEMA_FOLDER, SINGLE_OBJECT_MARKER, Codec, UndecodableRecord, fingerprint
from stream.schema_registry import ConfluentRegistry
from tests.stream.registry_server import registry_server

FIXTURES = Path(__file__).parent / "schemas"
PAIR = {"id": "a", "caption": "a cat 🐈", "image": b"\xff\xd8", "image_uri": None, "fields": {"url": "u"}}
WRITTEN = {
    "older": {"id": "a", "caption": "a cat 🐈", "image": b"\xff\xd8"},
    "newer": {**PAIR, "licence": "CC_BY", "tags": ["cat"]},
}


def written_with(version: str) -> tuple[Any, bytes, bytes]:
    """(schema, header of the single-object encoding, body) of the pair as another version wrote it."""
    content = json.loads((FIXTURES / version / "RawPair.avsc").read_text())
    schema = fastavro.schema.parse_schema(content)
    body = io.BytesIO()
    fastavro.schemaless_writer(body, schema, WRITTEN[version])
    return content, SINGLE_OBJECT_MARKER + fingerprint(schema), body.getvalue()


def test_a_record_is_what_it_was() -> None:
    codec = Codec("RawPair")

    assert codec.decode(codec.encode(PAIR)) == PAIR


@pytest.mark.parametrize("record", sorted(file.stem for file in SCHEMA_FOLDER.glob("*.avsc")))
def test_every_schema_parses_and_has_its_own_fingerprint(record: str) -> None:
    others = [Codec(file.stem) for file in SCHEMA_FOLDER.glob("*.avsc") if file.stem != record]

    assert fingerprint(Codec(record).schema) not in [fingerprint(codec.schema) for codec in others]


@pytest.mark.parametrize("version", ["older", "newer"])
def test_a_record_of_another_version_is_read_with_its_schema_from_a_folder(version: str) -> None:
    _, header, body = written_with(version)

    raw = raw_reader(schema_folders=[FIXTURES / version]).read(b"a", header + body)

    assert (raw.id, raw.caption, raw.image, raw.image_uri) == ("a", "a cat 🐈", b"\xff\xd8", None)
    assert raw.fields == ({} if version == "older" else {"url": "u"})


@pytest.mark.parametrize("version", ["older", "newer"])
def test_a_record_of_another_version_is_read_with_its_schema_from_the_registry(version: str) -> None:
    content, _, body = written_with(version)
    with registry_server() as server:
        number = server.add(content)
        reader = raw_reader(registry=ConfluentRegistry(server.url))

        raw = reader.read(b"a", b"\0" + number.to_bytes(4, "big") + body)

    assert (raw.id, raw.caption, raw.image) == ("a", "a cat 🐈", b"\xff\xd8")


def test_a_stream_may_change_from_one_framing_to_the_other() -> None:
    with registry_server() as server:
        with_registry = Codec("RawPair", registry=ConfluentRegistry(server.url))

        assert with_registry.decode(Codec("RawPair").encode(PAIR)) == PAIR
        with pytest.raises(UndecodableRecord, match="--schema-registry"):
            Codec("RawPair").decode(with_registry.encode(PAIR))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not-avro"),
        (b"\x89PNG\r\n", "not-avro"),
        (SINGLE_OBJECT_MARKER + bytes(8) + b"x", "unknown-schema"),
        (Codec("RawPair").encode(PAIR)[:-3], "damaged-avro"),
        (Codec("RawPair").encode(PAIR)[:10], "damaged-avro"),
        (SINGLE_OBJECT_MARKER + fingerprint(Codec("RawPair").schema) + b"\xff" * 30, "damaged-avro"),
    ],
)
def test_bytes_that_are_no_record_are_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(UndecodableRecord) as raised:
        Codec("RawPair").decode(data)

    assert raised.value.reason == reason
