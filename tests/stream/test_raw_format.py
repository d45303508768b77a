"""Raw topics of others are read as pairs, and what is no pair says why."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import fastavro
import pytest

from stream.errors import TldrError
from stream.raw_format import RawRecord, raw_reader
from stream.records import SINGLE_OBJECT_MARKER, Codec, UndecodableRecord, fingerprint
from stream.schema_registry import ConfluentRegistry
from tests.stream.registry_server import registry_server

IMAGE = bytes(range(256))
MAPPING = ["id=url", "image=payload.content", "caption=alt"]
JSON = {"url": "https://e.org/1", "alt": "a cat 🐈", "payload": {"content": base64.b64encode(IMAGE).decode(), "w": 64}}
CRAWL = {
    "type": "record",
    "name": "Crawl",
    "namespace": "acme",
    "fields": [
        {"name": "url", "type": "string"},
        {"name": "alt", "type": ["null", "string"], "default": None},
        {
            "name": "payload",
            "type": {"type": "record", "name": "Payload", "fields": [{"name": "content", "type": "bytes"}]},
        },
        {"name": "seen_at", "type": {"type": "long", "logicalType": "timestamp-millis"}},
    ],
}
AVRO = {"url": "https://e.org/1", "alt": "a cat 🐈", "payload": {"content": IMAGE}, "seen_at": 1_700_000_000_000}


def own(**changes: Any) -> bytes:
    return Codec("RawPair").encode({"id": "a", "caption": "a cat", "image": IMAGE, **changes})


def as_json(**content: Any) -> bytes:
    return json.dumps(content).encode()


def avro_body(content: dict[str, Any] = AVRO) -> bytes:
    out = io.BytesIO()
    fastavro.schemaless_writer(out, fastavro.parse_schema(CRAWL), content)
    return out.getvalue()


def reason_of(reader: Any, value: bytes, key: bytes | None = b"k") -> str:
    with pytest.raises(UndecodableRecord) as raised:
        reader.read(key, value)
    return raised.value.reason


def test_our_own_record_is_read_as_it_was_written() -> None:
    assert raw_reader().read(b"a", own(fields={"x": "1"})) == RawRecord("a", "a cat", IMAGE, None, {"x": "1"})


def test_a_null_key_takes_its_id_from_the_value() -> None:
    assert raw_reader().read(None, own()).id == "a"
    assert raw_reader("json", MAPPING).read(None, as_json(**JSON)).id == "https://e.org/1"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"caption": ""}, "empty-caption"),
        ({"caption": " \n\t "}, "empty-caption"),
        ({"image": None}, "no-image"),
        ({"image": b""}, "no-image"),
    ],
)
def test_our_own_record_without_a_caption_or_an_image_is_refused(changes: dict[str, Any], reason: str) -> None:
    assert reason_of(raw_reader(), own(**changes)) == reason


def test_a_long_caption_and_any_unicode_stay_whole() -> None:
    caption = "𝒜 \u0000 \u202e ﷽ 🐈‍⬛ " * 5_000

    assert raw_reader().read(None, own(caption=caption)).caption == caption
    assert raw_reader("json").read(None, as_json(id="a", caption=caption, image="https://e.org/x")).caption == caption


def test_a_json_topic_is_mapped_with_dotted_paths_and_carries_the_rest_along() -> None:
    raw = raw_reader("json", MAPPING).read(b"k", as_json(**JSON, lang="en", n=3, gone=None))

    assert raw == RawRecord(
        "https://e.org/1",
        "a cat 🐈",
        IMAGE,
        None,
        {"url": "https://e.org/1", "payload": '{"w": 64}', "lang": "en", "n": "3"},
    )


@pytest.mark.parametrize(
    "text",
    [
        base64.b64encode(IMAGE).decode(),
        base64.encodebytes(IMAGE).decode(),
        base64.urlsafe_b64encode(IMAGE).decode().rstrip("="),
        "data:image/png;base64," + base64.b64encode(IMAGE).decode(),
    ],
)
def test_base64_in_any_usual_spelling_is_an_image(text: str) -> None:
    assert raw_reader("json").read(b"k", as_json(caption="c", image=text)).image == IMAGE


def test_a_uri_in_the_images_place_is_a_uri() -> None:
    raw = raw_reader("json", ["image=src"]).read(b"k", as_json(caption="c", src="https://e.org/a.png"))

    assert (raw.image, raw.image_uri, raw.id) == (None, "https://e.org/a.png", "k")


def test_without_id_and_key_the_uri_or_the_content_is_the_id() -> None:
    reader = raw_reader("json")
    content = as_json(caption="c", image=base64.b64encode(IMAGE).decode())

    assert reader.read(None, as_json(caption="c", image_uri="https://e.org/a")).id == "https://e.org/a"
    assert reader.read(None, content).id == reader.read(None, content).id
    assert reader.read(None, content).id.startswith("sha256:")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"\xff\xfe", "damaged-json"),
        (b"{", "damaged-json"),
        (b"[" * 100_000, "damaged-json"),
        (b"[1]", "not-a-record"),
        (as_json(image="https://e.org/x"), "no-caption"),
        (as_json(caption=None, image="https://e.org/x"), "no-caption"),
        (as_json(caption="", image="https://e.org/x"), "empty-caption"),
        (as_json(caption=7, image="https://e.org/x"), "caption-not-text"),
        (as_json(caption="c"), "no-image"),
        (as_json(caption="c", image="not base64!"), "bad-base64"),
        (as_json(caption="c", image="data:text/plain,hello"), "bad-base64"),
        (as_json(caption="c", image=[1, 2]), "bad-image"),
        (b'{"caption": "half a cat \\ud83d", "image": "https://e.org/x"}', "not-unicode"),
    ],
)
def test_json_that_is_no_pair_is_refused_with_the_reason(value: bytes, reason: str) -> None:
    assert reason_of(raw_reader("json"), value) == reason


def test_a_mapped_id_that_is_missing_is_not_replaced_by_another() -> None:
    assert reason_of(raw_reader("json", ["id=uid"]), as_json(caption="c", image="https://e.org/x")) == "no-id"


def test_avro_of_others_is_read_plain_by_fingerprint_or_from_a_container(tmp_path: Path) -> None:
    schemas = tmp_path / "schemas"
    schemas.mkdir()
    file = schemas / "crawl.avsc"
    file.write_text(json.dumps(CRAWL))
    container = io.BytesIO()
    fastavro.writer(container, fastavro.parse_schema(CRAWL), [AVRO])
    single = SINGLE_OBJECT_MARKER + fingerprint(fastavro.parse_schema(CRAWL)) + avro_body()

    read = [
        raw_reader("avro", MAPPING, raw_schema=file).read(b"k", avro_body()),
        raw_reader("avro", MAPPING, schema_folders=[schemas]).read(b"k", single),
        raw_reader("avro", MAPPING).read(b"k", container.getvalue()),
    ]

    fields = {"url": "https://e.org/1", "seen_at": "2023-11-14 22:13:20+00:00"}
    assert read == [RawRecord("https://e.org/1", "a cat 🐈", IMAGE, None, fields)] * 3


def test_avro_that_cannot_be_read_is_refused_with_the_reason(tmp_path: Path) -> None:
    file = tmp_path / "crawl.avsc"
    file.write_text(json.dumps(CRAWL))
    plain = raw_reader("avro", MAPPING, raw_schema=file)
    two = io.BytesIO()
    fastavro.writer(two, fastavro.parse_schema(CRAWL), [AVRO, AVRO])

    assert reason_of(plain, avro_body()[:-5]) == "damaged-avro"
    assert reason_of(plain, avro_body() + b"more") == "damaged-avro"
    assert reason_of(plain, avro_body({**AVRO, "alt": None})) == "no-caption"
    assert reason_of(plain, two.getvalue()) == "several-records"
    assert reason_of(raw_reader("avro", MAPPING), avro_body()) == "unknown-schema"


def test_confluents_wire_format_of_others_is_read_through_the_registry() -> None:
    with registry_server() as server:
        number = server.add(CRAWL)
        reader = raw_reader("confluent", MAPPING, registry=ConfluentRegistry(server.url))

        raw = reader.read(b"k", b"\0" + number.to_bytes(4, "big") + avro_body())
        wrong = [reason_of(reader, value) for value in (b"{}", b"", b"\0\0\0\x12\x67" + avro_body())]

    assert (raw.id, raw.caption, raw.image) == ("https://e.org/1", "a cat 🐈", IMAGE)
    assert wrong == ["not-confluent", "not-confluent", "unknown-schema"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"raw_format": "xml"}, "--raw-format xml"),
        ({"fields": ["id=url"]}, "--field belongs to"),
        ({"raw_format": "json", "fields": ["picture=x"]}, "picture=x"),
        ({"raw_format": "json", "fields": ["id"]}, "target=name"),
        ({"raw_format": "json", "fields": ["id=a", "id=b"]}, "given twice"),
        ({"raw_format": "confluent"}, "--schema-registry"),
        ({"raw_format": "json", "raw_schema": Path("x.avsc")}, "--raw-schema belongs to"),
        ({"raw_format": "avro", "raw_schema": Path("absent.avsc")}, "cannot read schema"),
        ({"raw_format": "avro", "raw_schema": Path(__file__)}, "is not an Avro schema"),
        ({"schema_folders": [Path("absent")]}, "no \\*.avsc there"),
    ],
)
def test_options_that_do_not_go_together_are_one_clear_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TldrError, match=message) as raised:
        raw_reader(**options)

    assert "\n" not in str(raised.value)


def test_a_path_that_the_schema_does_not_have_is_found_before_the_first_record(tmp_path: Path) -> None:
    file = tmp_path / "crawl.avsc"
    file.write_text(json.dumps(CRAWL))

    with pytest.raises(TldrError, match="has no field href"):
        raw_reader("avro", ["id=href"], raw_schema=file)
