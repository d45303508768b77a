"""A stream of real pictures that is reclustered while it runs, from one trained bundle to another, both fetched from URLs."""

from __future__ import annotations

import functools
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.bundle import read_manifest
from models.drift import ERROR, LEAST_PAIRS
from stream.bundles import announce_folder
from stream.explain import explain
from stream.kafka import Connection
from stream.live_bundle import live_bundle
from stream.pair_sources import SourcePair, open_source
from stream.raw_format import raw_reader
from stream.recluster import ReclusterOptions, drift_window, recluster
from stream.report import ReportOptions, report
from stream.stream_view import StreamSource, read_view
from stream.topics import StreamTopics
from stream.verify import models_of, verify
from tests.end_to_end.outcome import Raw, create_topic, processed, send
from tests.end_to_end.worker_process import REPOSITORY, WorkerProcess, until, worker
from tests.stream.other_bundle import SAMPLE, bundle_with_other_centroids
from tests.stream.test_metrics import samples

FIRST = 120  # pairs under the first bundle


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the base class names it so)
        """Nobody reads it."""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and where an ordinary web server has it."""
    folder = tmp_path / "site"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def sample_records() -> list[Raw]:
    """The sample corpus, well mixed, so that nothing drifts."""
    shards = sorted((REPOSITORY / "corpus" / "sample").glob("*.tar"))
    found = [
        Raw(pair.id, pair.caption, pair.image)
        for shard in shards
        for pair in open_source(shard)
        if isinstance(pair, SourcePair) and pair.caption
    ]
    return [found[i] for i in np.random.default_rng(3).permutation(len(found))]


def test_a_stream_that_is_reclustered_goes_on_with_the_new_bundle_and_one_that_is_damaged_changes_nothing(
    kafka: Connection, name: str, tmp_path: Path, site: tuple[Path, str]
) -> None:
    # given
    folder, url = site
    shutil.copytree(SAMPLE, folder / "first")
    create_topic(kafka, name)
    source, records = StreamSource(kafka, StreamTopics(name)), sample_records()
    first = announce_folder(kafka, f"{url}/first", name)
    arguments = [
        "consume", "--topic", name, "--bootstrap-servers", kafka.bootstrap_servers, "--state-dir", str(tmp_path / "state"),
        "--metrics-port", "0", "--ratio", "1/10", "--cell-cap", "3", "--session-timeout-s", "6", "--device", "cpu",
    ]  # fmt: skip
    with worker(arguments, tmp_path / "worker.log") as running:
        send(kafka, name, records[:FIRST])
        until(lambda: processed(kafka, name), "the first pairs are processed")
        assert live_bundle(kafka, read_view(source)).uri == f"{url}/first"
        told = report(ReportOptions(source, name, tmp_path / "report.html", raw_reader(), None, 2))
        assert told.distances == ""

        # when
        foretold = recluster(ReclusterOptions(source, dry_run=True))
        made = recluster(ReclusterOptions(source, out=f"file://{folder}/second"))
        until(lambda: runs_with(source, made.version), "the partitions run with the reclustered bundle")
        harmed = bundle_with_other_centroids(folder / "third", seed=1)
        content = bytearray((harmed / "clusters.safetensors").read_bytes())
        content[-1] ^= 1
        (harmed / "clusters.safetensors").write_bytes(content)
        announce_folder(kafka, f"{url}/third", name)
        send(kafka, name, records[FIRST : FIRST + LEAST_PAIRS + 20])
        until(lambda: processed(kafka, name), "the others are processed")
        until(lambda: metrics_of(running)["tldr_bundle_missing", ""] == 1, "the damaged bundle is refused")
        until(lambda: ("tldr_drift_effect", ERROR) in metrics_of(running), "drift is judged by the new bundle", 20)
        metrics = metrics_of(running)
        running.drain()

    # then
    assert "clusters.safetensors is damaged" in running.log and "Traceback" not in running.log
    assert made.version is not None and runs_with(source, made.version)
    assert read_manifest(folder / "second").version.startswith(made.version)
    assert (foretold.recent, foretold.entries) == (made.recent, made.entries)

    window = drift_window(source, read_view(source), live_bundle(kafka, read_view(source)))
    assert window.pairs >= LEAST_PAIRS
    assert [signal.name for signal in window.look() if signal.alarm] == []
    assert [what for (metric, what), on in metrics.items() if metric == "tldr_drift_alarm" and on] == []

    found = verify(source, name, models_of(source))
    assert (found.differences, found.not_verified) == ([], [])
    assert found.clusters_checked > 0
    decided = [explain(source, record.id).events[0].bundle for record in (records[0], records[FIRST + LEAST_PAIRS])]
    assert decided == [first.version, made.version]


def runs_with(source: StreamSource, version: str | None) -> bool:
    parts = read_view(source).partitions.values()
    return all(part.switches[max(part.switches)].bundle == version for part in parts)


def metrics_of(running: WorkerProcess) -> dict[tuple[str, str], float]:
    return samples(running.get("/metrics")[1])
