"""Schemas come from a registry, and what goes wrong with one is a line without secrets."""

from __future__ import annotations

import builtins
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stream.errors import TldrError, Unavailable
from stream.records import CONFLUENT_MAGIC, Codec, UndecodableRecord
from stream.schema_registry import ConfluentRegistry, open_registry, without_credentials
from tests.stream.registry_server import RegistryServer, registry_server

PAIR = {"id": "a", "caption": "a cat", "image": b"x"}
SCHEMA = {"type": "record", "name": "Cat", "namespace": "zoo", "fields": [{"name": "name", "type": "string"}]}


@pytest.fixture
def server() -> Iterator[RegistryServer]:
    with registry_server() as running:
        yield running


def test_records_are_written_and_read_in_confluents_wire_format(server: RegistryServer) -> None:
    written = Codec("RawPair", registry=ConfluentRegistry(server.url)).encode(PAIR)

    read = Codec("RawPair", registry=ConfluentRegistry(server.url)).decode(written)

    assert written[:1] == CONFLUENT_MAGIC
    assert (read["id"], read["image"]) == ("a", b"x")
    assert list(server.subjects) == ["tldr.RawPair"]


def test_a_schema_that_is_there_is_not_registered_twice(server: RegistryServer) -> None:
    numbers = {ConfluentRegistry(server.url).register("Cat", SCHEMA) for _ in range(3)}

    assert len(numbers) == 1
    assert len(server.schemas) == 1


def test_an_unknown_number_and_a_schema_that_is_not_avro_make_a_record_undecodable(server: RegistryServer) -> None:
    registry = ConfluentRegistry(server.url)
    json_schema = server.add({"type": "object"}, "JSON")

    for number in (4711, json_schema):
        with pytest.raises(UndecodableRecord) as raised:
            registry.schema_of(number)
        assert raised.value.reason == "unknown-schema"


def test_a_registry_that_stumbles_is_asked_again(server: RegistryServer) -> None:
    number = server.add(SCHEMA)
    registry = ConfluentRegistry(server.url, {"retries.wait.ms": "1", "retries.max.wait.ms": "1"})
    server.failing = 2

    assert registry.schema_of(number)["name"] == "zoo.Cat"


def test_a_registry_that_does_not_answer_is_unavailable_and_not_a_dead_letter(server: RegistryServer) -> None:
    quick = {"retries.wait.ms": "1", "retries.max.wait.ms": "1"}
    registry = ConfluentRegistry(server.url, quick)
    server.failing = 100

    with pytest.raises(Unavailable, match="HTTP 500"):
        registry.schema_of(1)
    with pytest.raises(Unavailable, match="does not answer"):
        ConfluentRegistry("http://127.0.0.1:1", quick)


def test_credentials_are_used_and_never_shown(
    server: RegistryServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server.user = "me:s3cret"
    host = server.url.removeprefix("http://")
    (tmp_path / "registry.properties").write_text("# ours\nbasic.auth.user.info = me:s3cret\n")

    ConfluentRegistry(f"http://me:s3cret@{host}")
    open_registry(server.url, tmp_path / "registry.properties")
    with pytest.raises(TldrError) as refused:
        ConfluentRegistry(f"http://me:wr0ng@{host}")
    with pytest.raises(TldrError) as clash:
        ConfluentRegistry(f"http://me:s3cret@{host}", {"basic.auth.user.info": "me:s3cret"})

    assert "refuses the credentials" in str(refused.value)
    shown = str(refused.value) + str(clash.value) + caplog.text + repr(clash.value.__cause__)
    assert "s3cret" not in shown
    assert "wr0ng" not in shown
    assert without_credentials("https://u:p@a:1,https://u:p@b/x") == "https://a:1,https://b/x"


def test_an_incompatible_schema_is_one_clear_line(server: RegistryServer) -> None:
    registry = ConfluentRegistry(server.url)
    registry.register("Cat", SCHEMA)

    with pytest.raises(TldrError, match=r"zoo\.Cat.*not compatible"):
        registry.register("Cat", {**SCHEMA, "doc": "incompatible"})


def test_a_missing_extra_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_httpx(module: str, *rest: Any) -> Any:
        if module.startswith("confluent_kafka.schema_registry"):
            raise ModuleNotFoundError("No module named 'httpx'", name="httpx")
        return real(module, *rest)

    monkeypatch.setattr(builtins, "__import__", without_httpx)

    with pytest.raises(TldrError, match=r"pip install 'tldr-stream\[registry\]'"):
        ConfluentRegistry("http://127.0.0.1:1")
