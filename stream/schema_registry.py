"""Schemas from and to a Confluent Schema Registry, through Confluent's own client (extra `registry`).

Must not know what a record means. Credentials (in the URL or in a properties file) appear in no message and no log.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

import fastavro.schema

from models.errors import Reason
from stream.errors import TldrError, Unavailable
from stream.records import Schema, UndecodableRecord

# A worker that meets a new schema waits for the registry at most (RETRIES + 1) × TIMEOUT_S + RETRIES × RETRY_WAIT_MS.
TIMEOUT_S = 5.0
RETRIES = 3
RETRY_WAIT_MS = 300
NOT_FOUND = 404
CONFLICT = 409
REJECTED = {401, 403}
DEFAULTS = {
    "timeout": TIMEOUT_S,
    "max.retries": RETRIES,
    "retries.wait.ms": RETRY_WAIT_MS,
    "retries.max.wait.ms": 5 * RETRY_WAIT_MS,
}


class ConfluentRegistry:
    """A stream.records.Registry. Subjects are named after the record (RecordNameStrategy): one a kind, not a topic.

    url         http(s)://[user:password@]host[:port]
    properties  the client's own settings (ssl.ca.location, basic.auth.user.info, …); secrets belong here
    Raises TldrError where the extra is missing or a setting is wrong, Unavailable where nothing answers at the URL.
    """

    def __init__(self, url: str, properties: Mapping[str, str] | None = None) -> None:
        self.shown_url = without_credentials(url)
        try:
            from confluent_kafka.schema_registry import SchemaRegistryClient
            from confluent_kafka.schema_registry.error import SchemaRegistryError
        except ImportError as error:
            raise TldrError(
                f"--schema-registry needs {error.name}: install it with `pip install 'tldr-stream[registry]'`"
            ) from error
        self._unreachable = _http_errors()
        self._refused: type[Any] = SchemaRegistryError
        settings = {**DEFAULTS, **_typed(properties or {}), "url": self.shown_url}
        if (user := _user_of(url)) is not None:
            # Not in the URL, which httpx writes to the log with every request.
            if "basic.auth.user.info" in settings:
                raise TldrError(f"schema registry {self.shown_url}: credentials in the URL and in the properties")
            settings["basic.auth.user.info"] = user
        try:
            self._client = SchemaRegistryClient(settings)
        except (ValueError, TypeError, OSError) as error:
            # Its message may quote a setting.
            raise TldrError(f"schema registry {self.shown_url}: its settings are wrong ({_kind(error)})") from None
        self._check_that_it_is_one()

    def _check_that_it_is_one(self) -> None:
        try:
            self._ask(self._client.get_schema_types, "list its schema types")
        except (_NotFound, ValueError) as error:
            raise TldrError(f"{self.shown_url} answers, but not as a schema registry does") from error

    def schema_of(self, schema_id: int) -> Schema:
        """The parsed Avro schema of this number.

        Raises UndecodableRecord where the registry has none or it is not Avro, Unavailable where it does not answer.
        """
        try:
            found = self._ask(lambda: self._client.get_schema(schema_id), f"read schema {schema_id}")
        except _NotFound as error:
            raise UndecodableRecord(
                Reason.UNKNOWN_SCHEMA, f"schema registry {self.shown_url} has no schema {schema_id}"
            ) from error
        return self._parsed(found, schema_id, {})

    def register(self, record: str, schema: Schema) -> int:
        """The number of `schema` under the record's subject, registered if it is new there.

        Raises TldrError where the registry refuses it (compatibility, rights), Unavailable where it does not answer.
        """
        from confluent_kafka.schema_registry import Schema as RegistrySchema

        subject = f"{schema['namespace']}.{schema['name']}" if schema.get("namespace") else record
        text = json.dumps(schema)
        number: int = self._ask(
            lambda: self._client.register_schema(subject, RegistrySchema(text, "AVRO")), f"register {subject}"
        )
        return number

    def _parsed(self, found: Any, schema_id: int, named: dict[str, Any]) -> Schema:
        if (found.schema_type or "AVRO") != "AVRO":
            raise UndecodableRecord(Reason.UNKNOWN_SCHEMA, f"schema {schema_id} is {found.schema_type}, not Avro")
        try:
            for reference in found.references or []:
                inner = self._ask(
                    lambda r=reference: self._client.get_version(r.subject, r.version), f"read {reference.subject}"
                )
                self._parsed(inner.schema, inner.schema_id, named)
            return fastavro.schema.parse_schema(json.loads(found.schema_str), named_schemas=named)
        except (ValueError, KeyError, TypeError, fastavro.schema.SchemaParseException) as error:
            raise UndecodableRecord(Reason.UNKNOWN_SCHEMA, f"schema {schema_id} cannot be parsed: {error}") from error

    def _ask(self, request: Any, what: str) -> Any:
        try:
            return request()
        except self._unreachable as error:
            raise Unavailable(f"schema registry {self.shown_url} does not answer ({_kind(error)})") from None
        except self._refused as error:
            status = error.http_status_code
            said = str(error.error_message).splitlines()[0][:300] if error.error_message else ""
            if status == NOT_FOUND:
                raise _NotFound(said) from None
            if status in REJECTED:
                raise TldrError(f"schema registry {self.shown_url} refuses the credentials (HTTP {status})") from None
            if status == CONFLICT:
                raise TldrError(
                    f"schema registry {self.shown_url} cannot {what}, it is not compatible with what is there: {said}"
                ) from None
            raise Unavailable(f"schema registry {self.shown_url} cannot {what}: HTTP {status} {said}") from None


class _NotFound(TldrError):
    """The registry answers, and has no such thing."""


def _http_errors() -> tuple[type[Exception], ...]:
    """The client takes httpx2 where it is installed, and httpx elsewhere; their errors have no common base."""
    found = []
    for module in ("httpx2", "httpx"):
        with contextlib.suppress(ImportError):
            found.append(importlib.import_module(module).HTTPError)
    return tuple(found)


def open_registry(url: str | None, properties: Path | None = None) -> ConfluentRegistry | None:
    """The registry of `--schema-registry` and `--schema-registry-properties`; None without a URL."""
    if url is None:
        if properties is not None:
            raise TldrError("--schema-registry-properties needs --schema-registry URL")
        return None
    return ConfluentRegistry(url, {} if properties is None else _read_properties(properties))


def without_credentials(url: str) -> str:
    """`url` as it may be shown: user and password left out, in each of several URLs."""
    return ",".join(_stripped(part.strip()) for part in url.split(","))


def _stripped(url: str) -> str:
    try:
        parts = urlsplit(url)
    except ValueError:
        return "(not a URL)"
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _user_of(url: str) -> str | None:
    """user:password of the first of several URLs that has them."""
    for part in url.split(","):
        with contextlib.suppress(ValueError):
            parts = urlsplit(part.strip())
            if parts.username is not None:
                return f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return None


def _kind(error: BaseException) -> str:
    return type(error).__name__


def _typed(properties: Mapping[str, str]) -> dict[str, Any]:
    """Numbers as numbers: the client refuses them as text."""
    return {key: float(value) if key in DEFAULTS and _is_number(value) else value for key, value in properties.items()}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _read_properties(file: Path) -> dict[str, str]:
    try:
        lines = [line.strip() for line in file.read_text().splitlines()]
    except OSError as error:
        raise TldrError(f"cannot read {file}: {error.strerror}") from error
    pairs = [line.partition("=") for line in lines if line and line[0] not in "#!"]
    if any(not equals for _, equals, _ in pairs):
        raise TldrError(f"{file}: a setting reads key=value (the line is not shown here)")
    return {key.strip(): value.strip() for key, _, value in pairs}
