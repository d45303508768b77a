"""`bundle announce`: what it refuses, in one line that says what to do; nothing of it is announced."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from models.bundle import load_model, read_files, write_bundle
from stream.broker import LocalBroker, free_port
from stream.bundles import announced
from stream.cli import app
from stream.kafka import Connection
from tests.stream.other_bundle import SAMPLE
from tests.stream.stream_writer import StreamWriter, raw


def picture() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(out, "PNG")
    return out.getvalue()


def nowhere(folder: Path) -> str:
    return str(folder / "none")


def without_clusters(folder: Path) -> str:
    manifest, contents = read_files(SAMPLE)
    about = {k: v for k, v in manifest.data.items() if k not in ("format", "space", "files", "version")}
    write_bundle(folder / "bare", {k: v for k, v in contents.items() if k != "clusters.safetensors"}, about)
    return str(folder / "bare")


def of_text(folder: Path) -> str:
    manifest, contents = read_files(SAMPLE)
    about = {k: v for k, v in manifest.data.items() if k not in ("format", "space", "files", "version")}
    about["clustering"] = about["clustering"] | {"feature": "text"}
    write_bundle(folder / "text", contents, about)
    return str(folder / "text")


def damaged(folder: Path) -> str:
    shutil.copytree(SAMPLE, folder / "damaged")
    with (folder / "damaged" / "clusters.safetensors").open("ab") as file:
        file.write(b"more")
    return str(folder / "damaged")


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (nowhere, "is no model bundle"),
        (without_clusters, "run `tldr-stream bootstrap`"),
        (of_text, "run `tldr-stream bootstrap --feature codes`"),
        (damaged, "clusters.safetensors is damaged"),
        (lambda folder: f"http://127.0.0.1:{free_port()}/bundle", "manifest.json cannot be fetched"),
        (lambda folder: "nothing://bundle", "cannot be read"),
        (lambda folder: "null:x", "give null:SEED or null:SEED/CLUSTERS"),
        (lambda folder: str(SAMPLE), "start another --stream on the same raw topic"),  # to a stream of the null model
    ],
)
def test_what_cannot_be_switched_to_is_refused_and_not_announced(
    broker: LocalBroker, kafka: Connection, name: str, tmp_path: Path, made: Callable[[Path], str], says: str
) -> None:
    with StreamWriter(kafka, name, tmp_path / "stores", partitions=1) as writer:
        writer.feed([raw("pair")]).run()
    before = announced(kafka)

    refused = CliRunner().invoke(
        app,
        ["bundle", "announce", made(tmp_path), "--stream", name, "--bootstrap-servers", broker.bootstrap_servers],
    )

    assert refused.exit_code == 2, refused.output
    assert says in refused.output and "Traceback" not in refused.output
    assert announced(kafka) == before


def test_an_announcement_to_any_stream_names_those_that_cannot_switch_and_no_other(
    broker: LocalBroker, kafka: Connection, name: str, tmp_path: Path
) -> None:
    ours, null = f"{name}-ours", f"{name}-null"
    with StreamWriter(kafka, null, tmp_path / "null", partitions=1) as writer:
        writer.feed([raw("pair")]).run()
    with StreamWriter(kafka, ours, tmp_path / "ours", partitions=1, model=load_model(SAMPLE, "cpu")) as writer:  # type: ignore[arg-type]
        writer.feed([raw("pair", image=picture())]).run()

    done = CliRunner().invoke(
        app, ["bundle", "announce", str(SAMPLE), "--json", "--bootstrap-servers", broker.bootstrap_servers]
    )

    assert done.exit_code == 0, done.output
    (said,) = (line for line in done.stderr.splitlines() if "stay as they are" in line)
    named = said.rpartition(": ")[2].split(", ")
    assert null in named and ours not in named
    assert json.loads(done.stdout)["stream"] == ""
