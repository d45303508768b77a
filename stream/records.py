"""Records ⇄ bytes: Avro by the schemas in stream/schemas/, in single-object encoding or Confluent's wire format.

Must not know what a record means. A reader resolves the schema that a record was written with against its own, so
records of an older or a newer version are read as long as Avro's rules allow it; a newer schema has to be found
somewhere: in a folder (`--schemas`) or in the schema registry.
"""

from __future__ import annotations

import functools
import io
import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import fastavro
import fastavro.schema

from models.errors import Reason

Schema = Any  # fastavro's parsed schema: a dict for a record
Record = dict[str, Any]

SCHEMA_FOLDER = Path(__file__).parent / "schemas"

# Avro specification, "Single-object encoding": two marker bytes, then the CRC-64-AVRO of the canonical schema.
SINGLE_OBJECT_MARKER = b"\xc3\x01"
HEADER_BYTES = 10
CONFLUENT_MAGIC = b"\x00"


class UndecodableRecord(Exception):
    """Bytes that are not the record they should be: the raw record becomes a dead letter with this reason."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class Registry(Protocol):
    """What is needed of a schema registry (stream/schema_registry.py talks to Confluent's)."""

    def schema_of(self, schema_id: int) -> Schema: ...

    def register(self, record: str, schema: Schema) -> int: ...


@functools.cache
def schema_of(record: str) -> Schema:
    """The schema with which this version writes and reads `record`, parsed."""
    parsed: Schema = fastavro.schema.parse_schema(json.loads((SCHEMA_FOLDER / f"{record}.avsc").read_text()))
    return parsed


def fingerprint(schema: Schema) -> bytes:
    """CRC-64-AVRO of the schema's canonical form, 8 bytes little endian (Avro specification)."""
    canonical = fastavro.schema.to_parsing_canonical_form(schema)
    return bytes.fromhex(fastavro.schema.fingerprint(canonical, "CRC-64-AVRO"))


class Codec:
    """Encodes and decodes one kind of record.

    schema_folders  more places to look for the schemas that other versions wrote with (*.avsc)
    registry        with one, records are framed in Confluent's wire format; without, in single-object encoding.
    Reading accepts both framings either way, so a stream can change from one to the other.

    header  what stands before every record that this codec writes
    """

    def __init__(self, record: str, schema_folders: Iterable[Path] = (), registry: Registry | None = None) -> None:
        self.record = record
        self.schema = schema_of(record)
        self._registry = registry
        self._written_with: dict[bytes, Schema] = {fingerprint(self.schema): self.schema}
        for folder in schema_folders:
            for file in sorted(folder.glob("*.avsc")):
                other = fastavro.schema.parse_schema(json.loads(file.read_text()))
                self._written_with[fingerprint(other)] = other
        self._written_by_id: dict[int, Schema] = {}
        if registry is None:
            self.header = SINGLE_OBJECT_MARKER + fingerprint(self.schema)
        else:
            schema_json = json.loads((SCHEMA_FOLDER / f"{record}.avsc").read_text())
            self.header = CONFLUENT_MAGIC + struct.pack(">I", registry.register(record, schema_json))

    def encode(self, value: Mapping[str, Any]) -> bytes:
        """The record's bytes, framed."""
        out = io.BytesIO()
        out.write(self.header)
        fastavro.schemaless_writer(out, self.schema, value)
        return out.getvalue()

    def decode(self, data: bytes) -> Record:
        """The record that `data` holds. Raises UndecodableRecord with the reason."""
        if data[:2] == SINGLE_OBJECT_MARKER:
            written_with = self._written_with.get(data[2:HEADER_BYTES])
            if written_with is None:
                raise UndecodableRecord(
                    Reason.UNKNOWN_SCHEMA,
                    f"no schema with fingerprint {data[2:HEADER_BYTES].hex()}: add it with --schemas DIR",
                )
            start = HEADER_BYTES
        elif data[:1] == CONFLUENT_MAGIC and len(data) > 5:
            written_with = self._by_id(struct.unpack_from(">I", data, 1)[0])
            start = 5
        else:
            raise UndecodableRecord(Reason.NOT_AVRO, "neither Avro single-object encoding nor Confluent's wire format")
        body = io.BytesIO(data)
        body.seek(start)
        reader_schema = None if written_with is self.schema else self.schema
        try:
            value = fastavro.schemaless_reader(body, written_with, reader_schema)
        except Exception as error:  # fastavro raises whatever the damaged bytes lead it into
            raise UndecodableRecord(Reason.DAMAGED_AVRO, f"{type(error).__name__}: {error}") from error
        if not isinstance(value, dict):
            raise UndecodableRecord(Reason.DAMAGED_AVRO, "not a record")
        return value

    def _by_id(self, schema_id: int) -> Schema:
        if schema_id not in self._written_by_id:
            if self._registry is None:
                raise UndecodableRecord(
                    Reason.NO_REGISTRY, f"written with schema {schema_id}: give --schema-registry URL"
                )
            parsed = fastavro.schema.parse_schema(self._registry.schema_of(schema_id))
            self._written_by_id[schema_id] = parsed
        return self._written_by_id[schema_id]
