"""Promises of `snapshot`: one consistent cut, the same bytes every time, loadable by those who train."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from stream.kafka import Connection
from stream.snapshot import snapshot
from tests.stream.stream_writer import StreamWriter, raw


@pytest.fixture
def writer(kafka: Connection, name: str, tmp_path: Path) -> Iterator[StreamWriter]:
    with StreamWriter(kafka, name, tmp_path / "state", cap=30) as stream:
        stream.feed(raw(f"http://x/{i}.png", f"caption {i}", url=f"http://x/{i}.png") for i in range(400))
        stream.feed([("http://x/3.png", None), ("http://x/5.png", None)])
        stream.feed(f"http://x/{i}.png" for i in range(0, 400, 7))
        yield stream.run()


def ids_of(folder: Path) -> dict[str, int]:
    """id → input offset of every pair in a WebDataset snapshot."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    about = json.loads((tar.extractfile(member) or io.BytesIO()).read())
                    found[about["id"]] = about["source_offset"]
    return found


def test_a_snapshot_is_the_reduced_set(writer: StreamWriter, tmp_path: Path) -> None:
    taken = snapshot(writer.source, tmp_path / "out", shard_pairs=30)

    assert ids_of(tmp_path / "out") == writer.members()
    assert taken.pairs == len(writer.members()) == taken.in_set
    assert len(taken.files) > 4
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["counts"]["in_set"] == taken.pairs
    assert manifest["counts"]["evicted"] > 0
