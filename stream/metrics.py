"""Every metric of a worker, once, with what it means and what a rise tells the person on call; and the server for them.

Names follow Prometheus' conventions: base units, `_total` for counters, no label with unbounded values.
"""

from __future__ import annotations

import errno
import logging
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import numpy as np
from numpy.typing import NDArray
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    Metric,
    ProcessCollector,
    make_wsgi_app,
)
from prometheus_client.core import GaugeHistogramMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from models.errors import Reason
from state.partition import Fate
from stream.errors import TldrError

log = logging.getLogger(__name__)

# Several workers on one machine each take the next free port.
DEFAULT_PORT = 9400
DEFAULT_PORTS = 256

# What a counter may say from the start, so that its first increase is one: a series that appears with 1 has no rate.
FATES = [fate.name.lower() for fate in Fate]
STAGES = ("read", "decode", "encode", "match", "decide", "caption")
OUTCOMES = ("committed", "aborted")

SCORE_BUCKETS = [i / 20 for i in range(21)]
CELL_BUCKETS = [0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 100_000, 1_000_000]
SECONDS_BUCKETS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30]


class Scores(Collector):
    """A histogram of scores in [0, 1] that takes a second's worth at once; Prometheus' own takes them one by one."""

    def __init__(self, name: str, text: str) -> None:
        self._name, self._text = name, text
        # One more than there are bounds: what lies above all of them, NaN included.
        self._counts = np.zeros(len(SCORE_BUCKETS) + 1, np.int64)
        self._sum = 0.0

    def observe(self, scores: Sequence[NDArray[np.float32]]) -> None:
        """Counts each score, an array a batch, under the first bound that is not below it."""
        values = np.concatenate([*scores, np.zeros(0)])  # in float64, as the last of them
        self._counts += np.bincount(np.searchsorted(SCORE_BUCKETS, values), minlength=len(self._counts))
        self._sum += float(values.sum())

    def collect(self) -> Iterator[Metric]:
        bounds = [*map(str, SCORE_BUCKETS), "+Inf"]
        buckets = list(zip(bounds, self._counts.cumsum().tolist(), strict=True))
        yield HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=self._sum)


class CellSizes(Collector):
    """How many cells have how many pairs, now: a distribution in place of a series for each of thousands of clusters."""

    def __init__(self, name: str, text: str) -> None:
        self._name, self._text = name, text
        self._sizes: NDArray[np.int64] = np.zeros(0, np.int64)

    def set(self, sizes: NDArray[np.int64]) -> None:
        """The sizes of all cells of this worker."""
        self._sizes = sizes

    def collect(self) -> Iterator[Metric]:
        sizes = np.sort(self._sizes)
        below = np.searchsorted(sizes, CELL_BUCKETS, side="right").tolist()
        bounds = [*map(str, CELL_BUCKETS), "+Inf"]
        buckets = list(zip(bounds, [*below, len(sizes)], strict=True))
        yield GaugeHistogramMetricFamily(self._name, self._text, buckets=buckets, gsum_value=float(sizes.sum()))


class Metrics:
    """The metrics of one worker, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        # process_*: memory, processor time, open files, and the start, which tells how often a worker was restarted.
        ProcessCollector(registry=registry)

        def counter(name: str, text: str, labels: Iterable[str] = ()) -> Counter:
            return Counter(f"tldr_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, labels: Iterable[str] = ()) -> Gauge:
            return Gauge(f"tldr_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: list[float]) -> Histogram:
            return Histogram(f"tldr_{name}", text, buckets=buckets, registry=registry)

        self.fates = counter(
            "pairs",
            "Raw records by fate, dead ones included. kept / counted off the quota: look at the stream's settings. A rise "
            "of `duplicate`: a crawler repeats itself. A rise of `below_gate`: captions match their images worse.",
            ["fate"],
        )
        self.quota_ratio = gauge(
            "quota_ratio",
            "Share M of each cell that is kept. kept and over_cap / counted: that, within one pair a cell.",
        )
        self.dead_letters = counter(
            "dead_letters",
            "Records that could not be processed, by reason. A rise: a crawler or a producer changed; `tldr-stream dlq`.",
            ["reason"],
        )
        self.dead_share = gauge(
            "dead_share",
            "Share of dead letters among the last 2,000 records of this worker; 0 before there are so many. Above "
            "`--dlq-limit` it stops, and commits nothing of what it was about to throw away.",
        )
        self.removed = counter(
            "removed_pairs", "Pairs that left the reduced set again (evicted by the cap, or taken down)."
        )
        self.misplaced_keys = counter(
            "misplaced_keys",
            "Records outside the murmur2 partition of their key. Any: the producer partitions otherwise, and duplicates "
            "are found only within a partition.",
        )
        self.images = counter("images", "Images encoded. Divided by the encode seconds: the encoder's rate.")
        self.captions = counter(
            "captions", "Captions generated; one for each kept pair, so a rise beside kept is waste."
        )
        self.stage_seconds = counter(
            "stage_seconds",
            "Seconds by stage of a batch, one stage after the other: encode, match and caption are the model's own time, and "
            "during decode it waits for images. decode growing beside encode: the accelerator starves, add cores. The rest "
            "of a second, up to 1: no input, or a commit.",
            ["stage"],
        )
        self.batch_seconds = histogram(
            "batch_seconds", "Seconds a batch takes. A rise: larger images, or a slower device.", SECONDS_BUCKETS
        )
        self.commit_seconds = histogram(
            "commit_seconds",
            "Seconds a transaction takes to commit. A rise: brokers or the local disk are slow.",
            SECONDS_BUCKETS,
        )
        self.transactions = counter(
            "transactions",
            "Transactions by outcome. aborted rising: rebalances or broker trouble; nothing is lost, work is repeated.",
            ["outcome"],
        )
        self.itm_raw = Scores(
            "tldr_itm_raw",
            "Image-text matching of the original captions of all pairs. Sinking: the crawl's captions drift.",
        )
        self.itm_kept = Scores(
            "tldr_itm_kept",
            "Image-text matching of the original captions of the kept pairs. Apart from itm_raw: the choice is not fair.",
        )
        self.itm_refined = Scores(
            "tldr_itm_refined",
            "Image-text matching of the refined captions of the kept pairs. Sinking: the captioner no longer fits.",
        )
        self.cell_counted = CellSizes(
            "tldr_cell_counted_pairs",
            "Cells of the present epoch by the pairs counted in them. A long tail to the right: few clusters take most of "
            "the stream, so recluster.",
        )
        self.cell_reservoir = CellSizes(
            "tldr_cell_reservoir_pairs",
            "Cells of the present epoch by the pairs in their reservoir. All at the cap: the set no longer grows.",
        )
        for collector in (self.itm_raw, self.itm_kept, self.itm_refined, self.cell_counted, self.cell_reservoir):
            registry.register(collector)
        self.largest_cell = gauge(
            "largest_cell_counted_pairs",
            "Pairs counted in the largest cell of the present epoch. Growing faster than the stream: recluster.",
        )
        self.lag = gauge(
            "lag_records", "Raw records of a partition that are not committed yet. Growing: add workers.", ["partition"]
        )
        self.reduced_set = gauge("reduced_set_pairs", "Pairs of a partition in the reduced set now.", ["partition"])
        self.store_bytes = gauge(
            "store_bytes",
            "Bytes of a partition's local store. Grows with known ids and kept pairs; watch the disk.",
            ["partition"],
        )
        self.state_disk_free_bytes = gauge(
            "state_disk_free_bytes",
            "Free bytes on the disk of the state directory. 0: the worker stops, nothing is lost.",
        )
        self.state_disk_size_bytes = gauge("state_disk_size_bytes", "Bytes of the disk of the state directory.")
        self.stream_partitions = gauge(
            "stream_partitions",
            "Partitions of the raw topic. More than all workers run: one is restoring, or belongs to nobody.",
        )
        self.partitions = gauge(
            "partitions",
            "Partitions of this worker by state. restoring for long: a large changelog or an open transaction. "
            "waiting_for_bundle: it runs with a bundle that cannot be loaded here.",
            ["state"],
        )
        self.restore_seconds = histogram(
            "restore_seconds", "Seconds from assignment to running. A rise: stores are rebuilt; is the disk kept?",
            [0.1, 0.5, 1, 5, 10, 30, 60, 300, 900],
        )  # fmt: skip
        self.restored_records = counter("restored_records", "Changelog records replayed while restoring.")
        self.fencings = counter(
            "fencings",
            "Times that a worker on this state directory was fenced and left, restarts included. Rising: two workers share "
            "an instance id.",
        )
        self.lost_records = counter(
            "lost_records",
            "Raw offsets that the broker had deleted before they were processed (--on-data-loss continue). Any: the raw "
            "topic's retention is shorter than the lag.",
        )
        self.received_bytes = counter(
            "received_bytes",
            "Bytes received from the brokers, refetched ones included. Over 1.1 × payload: pauses refetch.",
        )
        self.payload_bytes = counter("payload_bytes", "Bytes of the raw records consumed.")
        self.buffer_bytes = gauge(
            "buffer_bytes", "Bytes of raw records waiting for the model. Full: the model is the limit."
        )
        self.epoch = gauge(
            "partition_epoch",
            "Epoch of a partition: how often its bundle was switched. Partitions differ after one passed over a bundle.",
            ["partition"],
        )
        self.bundle_missing = gauge(
            "bundle_missing",
            "1 while the newest announced bundle cannot be loaded here: the worker keeps the old one, and its log says why.",
        )
        self.switch_seconds = histogram(
            "switch_seconds",
            "Seconds for which a switch of the bundle kept a worker from deciding. A rise: the store's disk is slow.",
            SECONDS_BUCKETS,
        )
        self.drift_effect = gauge(
            "drift_effect",
            "By how much this worker's newest pairs differ from what the bundle was made on: points of median ITM, shares of "
            "pairs (occupancy) or tokens (codes) beyond chance, relative rise of the quantisation error. docs/drift.md.",
            ["signal"],
        )
        self.drift_p_value = gauge(
            "drift_p_value",
            "How likely so much of a difference is by chance alone; read it beside the effect.",
            ["signal"],
        )
        self.drift_alarm = gauge(
            "drift_alarm",
            "1 where effect and p value both pass their thresholds. itm: look at the crawl's captions. occupancy or "
            "quantisation_error: `tldr-stream recluster --dry-run`. codes: other images than the captioner was trained on.",
            ["signal"],
        )
        self.drift_pairs = gauge(
            "drift_window_pairs", "Pairs in the window of the drift figures; 2,000 when it is full."
        )
        self.bundle = Info("tldr_bundle", "Version of the model bundle; more than one in a group: a switch is under way.",
                           registry=registry)  # fmt: skip
        self.build = Info("tldr_build", "Version of the package; more than one in a group: an upgrade is under way.",
                          registry=registry)  # fmt: skip
        self.build.info({"version": _package_version()})
        for fate in FATES:
            self.fates.labels(fate)
        for reason in Reason:
            self.dead_letters.labels(reason)
        for stage in STAGES:
            self.stage_seconds.labels(stage)
        for outcome in OUTCOMES:
            self.transactions.labels(outcome)

    def watch_disk(self, folder: Path) -> None:
        """Looks at the disk of `folder` whenever somebody asks for the metrics."""
        self.state_disk_free_bytes.set_function(lambda: shutil.disk_usage(folder).free)
        self.state_disk_size_bytes.set_function(lambda: shutil.disk_usage(folder).total)


def _package_version() -> str:
    try:
        return version("tldr-stream")
    except PackageNotFoundError:  # run from a folder of sources
        return "unknown"


class HealthServer:
    """`/metrics`, `/healthz` (the loop turns) and `/readyz` (joined, nothing restoring, consuming) over HTTP."""

    def __init__(
        self, metrics: Metrics, host: str, port: int | None, healthy: Callable[[], bool], ready: Callable[[], bool]
    ) -> None:
        """port  None: DEFAULT_PORT or the next free one above; 0: any free one. Raises TldrError if it is taken."""
        exposition = make_wsgi_app(metrics.registry)
        checks = {"/healthz": healthy, "/readyz": ready}

        def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
            check = checks.get(environ.get("PATH_INFO", ""))
            if check is None:
                return exposition(environ, start_response)
            good = check()
            start_response("200 OK" if good else "503 Service Unavailable", [("Content-Type", "text/plain")])
            return [b"ok\n" if good else b"not yet\n"]

        ports = [port] if port is not None else range(DEFAULT_PORT, DEFAULT_PORT + DEFAULT_PORTS)
        for candidate in ports:
            try:
                self._server = make_server(host, candidate, app, _Server, _Quiet)
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE or candidate == ports[-1]:
                    raise TldrError(
                        f"cannot serve metrics on {host}:{candidate} ({error.strerror}): give --metrics-port"
                    ) from error
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the base class names it so)
        """A scrape every few seconds is not news."""
