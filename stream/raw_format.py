"""A message of the raw topic → a pair, whatever wrote it: our own Avro records, or JSON and Avro of others.

Must not know what becomes of a pair. Our own records are the hot path: a look at the header, a reader written out, a tuple.
A message that is no pair raises UndecodableRecord, whose reason the worker puts on the dead letter.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import fastavro
import fastavro.schema

from models.errors import Reason
from stream.avro_by_hand import RawValues, read_raw_pair
from stream.errors import TldrError
from stream.pair_sources import TARGETS, content_id, field_text
from stream.plain_pairs import NONE_PLAIN, PlainPairs, read_plain_pairs
from stream.records import (
    CONFLUENT_MAGIC,
    HEADER_BYTES,
    SINGLE_OBJECT_MARKER,
    Codec,
    Registry,
    Schema,
    UndecodableRecord,
    fingerprint,
)

FORMATS = ("tldr", "json", "avro", "confluent")
# Avro specification, "Object Container Files".
CONTAINER_MAGIC = b"Obj\x01"
CONFLUENT_HEADER_BYTES = 5


class RawRecord(NamedTuple):
    """A raw pair. `image` or `image_uri` is set; `image` (a view of the record where it is large) wins where it has both."""

    id: str
    caption: str
    image: bytes | memoryview | None
    image_uri: str | None
    fields: dict[str, str]


class RawReader(Protocol):
    """Reads the messages of one raw topic; raises UndecodableRecord(reason, detail) for one that is no pair.

    grows  whether the texts of a pair may be longer than its message's value
    """

    grows: bool

    def read(self, message_key: bytes | None, value: bytes) -> RawRecord: ...

    def read_plain(self, values: Sequence[bytes], bytes_max: int) -> PlainPairs:
        """Of many values those that can be read at once; the others may be all right, too."""
        return NONE_PLAIN


def raw_reader(
    raw_format: str = "tldr",
    fields: Iterable[str] = (),
    schema_folders: Iterable[Path] = (),
    raw_schema: Path | None = None,
    registry: Registry | None = None,
) -> RawReader:
    """The reader for `raw_format`.

    fields          "target=path" for json, avro and confluent: id, caption, image or image_uri, and the dotted path of
                    the value that it is read from; without one, the value of the target's own name
    schema_folders  *.avsc of the schemas that records may have been written with
    raw_schema      avro: the schema of plain records, which carry neither schema nor fingerprint
    Raises TldrError for an unknown target, options that do not go together, or a schema that cannot be read.
    """
    if raw_format not in FORMATS:
        raise TldrError(f"--raw-format {raw_format}: use one of {', '.join(FORMATS)}")
    paths = parse_fields(fields)
    folders = list(schema_folders)
    schemas = [read_schema(file) for folder in folders for file in _schema_files(folder)]
    if raw_schema is not None and raw_format != "avro":
        raise TldrError(f"--raw-schema belongs to --raw-format avro, not to {raw_format}")
    if raw_format == "tldr":
        if paths:
            raise TldrError(
                "--field belongs to --raw-format json, avro or confluent: our own records have fixed fields"
            )
        return OwnReader(Codec("RawPair", folders, registry))
    if raw_format == "json":
        return JsonReader(paths)
    if raw_format == "confluent":
        if registry is None:
            raise TldrError(
                "--raw-format confluent needs --schema-registry URL: its records carry only a schema's number"
            )
        return ConfluentReader(paths, registry)
    plain = None if raw_schema is None else read_schema(raw_schema)
    if plain is not None:
        _refuse_unknown_paths(paths, plain, raw_schema)
    return AvroReader(paths, schemas, plain)


def parse_fields(fields: Iterable[str], option: str = "--field") -> dict[str, str]:
    """Target → path from "target=path" texts. Raises TldrError for an unknown or repeated target."""
    paths: dict[str, str] = {}
    for text in fields:
        target, _, path = text.partition("=")
        if not path or target not in TARGETS:
            raise TldrError(f"{option} {text}: give target=name with a target of {', '.join(TARGETS)}")
        if target in paths:
            raise TldrError(f"{option} {target} is given twice: {paths[target]} and {path}")
        paths[target] = path
    return paths


def read_schema(file: Path) -> Schema:
    """The Avro schema in `file`, parsed. Raises TldrError."""
    try:
        return fastavro.schema.parse_schema(json.loads(file.read_text()))
    except OSError as error:
        raise TldrError(f"cannot read schema {file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, fastavro.schema.SchemaParseException) as error:
        raise TldrError(f"{file} is not an Avro schema: {error}") from error


def _schema_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.avsc"))
    if not files:
        raise TldrError(f"--schemas {folder}: no *.avsc there")
    return files


def _refuse_unknown_paths(paths: Mapping[str, str], schema: Schema, file: Path | None) -> None:
    names = {field["name"] for field in schema.get("fields", [])} if isinstance(schema, dict) else set()
    for target, path in paths.items():
        if path.split(".")[0] not in names:
            raise TldrError(f"--field {target}={path}: {file} has no field {path.split('.')[0]}")


# -- our own records


class OwnReader(RawReader):
    """RawPair records in either framing, written by this version, an older or a newer one."""

    grows = False

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._header, self._start = codec.header, len(codec.header)

    def read(self, message_key: bytes | None, value: bytes) -> RawRecord:
        try:
            whole = value.startswith(self._header)
            pair = read_raw_pair(value, self._start) if whole else self._any(value)
        except (ValueError, IndexError):  # damaged, or the encoder of another language: fastavro says which
            pair = self._any(value)
        pair_id, caption, image, image_uri, fields = pair
        if not caption or caption.isspace():
            raise UndecodableRecord(Reason.EMPTY_CAPTION, "the caption is empty")
        if not (pair_id and image):
            if not (image or image_uri):
                raise UndecodableRecord(Reason.NO_IMAGE, "neither image bytes nor an image URI")
            pair = (pair_id or _id_of_key(message_key), caption, image or None, image_uri, fields)
        return tuple.__new__(RawRecord, pair)  # RawRecord(*pair) without its Python frame

    def read_plain(self, values: Sequence[bytes], bytes_max: int) -> PlainPairs:
        return read_plain_pairs(values, self._header, bytes_max)

    def _any(self, value: bytes) -> RawValues:
        record = self._codec.decode(value)
        return record["id"], record["caption"], record["image"], record["image_uri"], record["fields"]


def _id_of_key(message_key: bytes | None) -> str:
    if not message_key:
        raise UndecodableRecord(Reason.NO_ID, "neither the record nor its key has an id")
    try:
        return message_key.decode()
    except UnicodeDecodeError as error:
        raise UndecodableRecord(Reason.NO_ID, f"the record has no id and its key is not UTF-8: {error}") from error


# -- records of others


class JsonReader(RawReader):
    """JSON objects in UTF-8. An image is base64 text, a data: URI, or a URI to fetch."""

    grows = True

    def __init__(self, paths: Mapping[str, str]) -> None:
        self._paths = paths

    def read(self, message_key: bytes | None, value: bytes) -> RawRecord:
        try:
            content = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise UndecodableRecord(Reason.DAMAGED_JSON, str(error)) from error
        return _mapped(content, message_key, self._paths)


class AvroReader(RawReader):
    """Avro that is not ours: an object container, single-object encoding, or plain records of one known schema."""

    grows = True

    def __init__(self, paths: Mapping[str, str], schemas: Iterable[Schema], plain: Schema | None) -> None:
        self._paths = paths
        self._plain = plain
        known = [*schemas, *([plain] if plain is not None else [])]
        self._by_fingerprint = {fingerprint(schema): schema for schema in known}

    def read(self, message_key: bytes | None, value: bytes) -> RawRecord:
        return _mapped(self._decode(value), message_key, self._paths)

    def _decode(self, value: bytes) -> Any:
        if value[:4] == CONTAINER_MAGIC:
            return _only_record(value)
        if value[:2] == SINGLE_OBJECT_MARKER and (schema := self._by_fingerprint.get(value[2:HEADER_BYTES])):
            return _datum(value, HEADER_BYTES, schema)
        if self._plain is not None:
            return _datum(value, 0, self._plain)
        raise UndecodableRecord(
            Reason.UNKNOWN_SCHEMA, "no container and no known fingerprint: give --schemas DIR or --raw-schema FILE"
        )


class ConfluentReader(RawReader):
    """Avro in Confluent's wire format: a zero byte, the schema's number in the registry, the record."""

    grows = True

    def __init__(self, paths: Mapping[str, str], registry: Registry) -> None:
        self._paths = paths
        self._registry = registry
        self._schemas: dict[int, Schema] = {}

    def read(self, message_key: bytes | None, value: bytes) -> RawRecord:
        if value[:1] != CONFLUENT_MAGIC or len(value) < CONFLUENT_HEADER_BYTES:
            raise UndecodableRecord(Reason.NOT_CONFLUENT, "the value does not start as Confluent's wire format does")
        number = struct.unpack_from(">I", value, 1)[0]
        schema = self._schemas.get(number)
        if schema is None:
            schema = self._schemas[number] = fastavro.schema.parse_schema(self._registry.schema_of(number))
        return _mapped(_datum(value, CONFLUENT_HEADER_BYTES, schema), message_key, self._paths)


def _datum(value: bytes, start: int, schema: Schema) -> Any:
    body = io.BytesIO(value)
    body.seek(start)
    try:
        content = fastavro.schemaless_reader(body, schema, None)
    except Exception as error:  # fastavro raises whatever the damaged bytes lead it into
        raise UndecodableRecord(Reason.DAMAGED_AVRO, f"{type(error).__name__}: {error}") from error
    if body.tell() != len(value):
        raise UndecodableRecord(Reason.DAMAGED_AVRO, f"{len(value) - body.tell()} bytes are left behind the record")
    return content


def _only_record(value: bytes) -> Any:
    try:
        records = list(fastavro.reader(io.BytesIO(value)))
    except Exception as error:  # as above
        raise UndecodableRecord(Reason.DAMAGED_AVRO, f"{type(error).__name__}: {error}") from error
    if len(records) != 1:
        raise UndecodableRecord(
            Reason.SEVERAL_RECORDS, f"an Avro container of {len(records)} records; a message is one pair"
        )
    return records[0]


def _mapped(content: Any, message_key: bytes | None, paths: Mapping[str, str]) -> RawRecord:
    """The pair in a record of another shape."""
    if not isinstance(content, dict):
        raise UndecodableRecord(Reason.NOT_A_RECORD, f"the value is {type(content).__name__}, not an object")
    caption = _caption(_take(content, paths.get("caption", "caption")), paths)
    image, image_uri = _image(_take(content, paths.get("image", "image")))
    uri = _take(content, paths.get("image_uri", "image_uri"), keep=True)
    if image_uri is None and isinstance(uri, str):
        image_uri = uri or None
    if image is None and image_uri is None:
        raise UndecodableRecord(Reason.NO_IMAGE, f"no image at {paths.get('image', 'image')}")
    pair_id = _id(content, message_key, paths) or image_uri or content_id(image or b"", caption)
    fields = {
        str(name): field_text(value)
        for name, value in content.items()
        if value is not None and value != {} and not isinstance(value, bytes)
    }
    _refuse_half_characters([pair_id, caption, image_uri or "", *fields, *fields.values()])
    return RawRecord(pair_id, caption, image, image_uri, fields)


def _take(content: dict[str, Any], path: str, *, keep: bool = False) -> Any:
    """The value at a dotted path, None if it is not there; taken out, so that it does not come again as a field."""
    if path in content:  # a name may itself have a dot
        return content[path] if keep else content.pop(path)
    first, _, rest = path.partition(".")
    inner = content.get(first)
    return _take(inner, rest, keep=keep) if rest and isinstance(inner, dict) else None


def _caption(value: Any, paths: Mapping[str, str]) -> str:
    if value is None:
        raise UndecodableRecord(Reason.NO_CAPTION, f"no caption at {paths.get('caption', 'caption')}")
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise UndecodableRecord(Reason.CAPTION_NOT_TEXT, str(error)) from error
    if not isinstance(value, str):
        raise UndecodableRecord(Reason.CAPTION_NOT_TEXT, f"the caption is {type(value).__name__}")
    if not value or value.isspace():
        raise UndecodableRecord(Reason.EMPTY_CAPTION, "the caption is empty")
    return value


def _image(value: Any) -> tuple[bytes | None, str | None]:
    if isinstance(value, bytes):
        return value or None, None
    if isinstance(value, str) and value:
        if value.startswith("data:"):
            head, comma, data = value.partition(",")
            if not comma or not head.endswith(";base64"):
                raise UndecodableRecord(Reason.BAD_BASE64, "a data: URI that is not base64")
            return _base64(data), None
        if "://" in value[:32]:
            return None, value
        return _base64(value), None
    if value is None or value == "":
        return None, None
    raise UndecodableRecord(Reason.BAD_IMAGE, f"the image is {type(value).__name__}: give base64 text, bytes or a URI")


def _base64(text: str) -> bytes:
    try:
        # MIME breaks lines; RFC 4648 section 5 has - and _ for + and /.
        plain = "".join(text.split()).translate(str.maketrans("-_", "+/"))
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UndecodableRecord(Reason.BAD_BASE64, f"the image is neither base64 nor a URI: {error}") from error


def _id(content: dict[str, Any], message_key: bytes | None, paths: Mapping[str, str]) -> str | None:
    """The value's id where it has one, else the message's key."""
    value = _take(content, paths.get("id", "id"), keep="id" in paths)
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if value is not None and value != "" and not isinstance(value, (dict, list)):
        return str(value)
    if "id" in paths:
        raise UndecodableRecord(Reason.NO_ID, f"no id at {paths['id']}")
    return _id_of_key(message_key) if message_key else None


def _refuse_half_characters(texts: Iterable[str]) -> None:
    for text in texts:
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:  # JSON's \ud83d without its other half
                raise UndecodableRecord(Reason.NOT_UNICODE, str(error)) from error
