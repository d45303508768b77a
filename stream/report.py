"""`report OUT.html`: pictures of what a stream did, in one file that needs nothing else, not even a network.

What is shown is gathered in report_data.py, drawn in plots.py, and laid out in templates/report.html, which escapes every
text: captions come from anywhere.
"""

from __future__ import annotations

import datetime
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from markupsafe import Markup

import stream
from models.drift import LEAST_PAIRS
from stream.arithmetic import Sum, in_the_set, sums_of
from stream.errors import TldrError
from stream.kafka import partition_count, start_offsets
from stream.live_bundle import LiveBundle, live_bundle, running_bundle
from stream.raw_format import RawReader
from stream.recent_codes import rows_of
from stream.report_data import ReportData, gather, pictures
from stream.report_drift import DriftWalk, ReportDrift, drift_of
from stream.results import ranges
from stream.rights import check_rights
from stream.stream_view import StreamSource, StreamView, read_view

if TYPE_CHECKING:
    from models.clustering import Clustering

BYTES_MAX = 15_000_000
PARTITIONS_LISTED = 200


@dataclass(frozen=True)
class ReportOptions:
    """The options of `report`; `tldr-stream report --help` says what each one means."""

    source: StreamSource
    topic: str
    out: Path
    reader: RawReader
    bundle: str | None = None
    clusters: int = 12
    seed: int = 0


@dataclass
class ReportResult:
    """The report that was written. pictures_missing  pairs whose raw record is gone or no picture."""

    report: Path
    bytes: int
    clusters: int
    pictures: int
    pictures_missing: int
    adds_up: bool
    distances: str

    def lines(self) -> Iterable[str]:
        yield f"{self.report}: {self.bytes / 1e6:.1f} MB, {self.clusters} clusters, {self.pictures} pictures"
        if self.pictures_missing:
            yield f"{self.pictures_missing} pairs are shown without their picture"
        if self.distances:
            yield f"no distances to the centroids: {self.distances}"
        if not self.adds_up:
            yield "the totals do not add up: see the report's sums, and run `tldr-stream verify`"


def report(options: ReportOptions) -> ReportResult:
    """Writes the report, as a whole or not at all.

    Raises TldrError where topic or stream do not exist, the file cannot be written, or the bundle that was named is not
    the stream's.
    """
    source, out = options.source, options.out
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise TldrError(f"{out} cannot be written: give a file in a folder that exists")
    check_rights(source.connection, "report", raw=options.topic, stream=source.name)
    partition_count(source.connection, options.topic)
    view = read_view(source)
    live, no_distances = _live(options, view)
    bundle = running_bundle(source.connection, view) if live is None else live.version
    walk = DriftWalk(view, bundle, options.seed)
    data = gather(
        source,
        view,
        bundle,
        options.topic,
        options.reader,
        options.clusters,
        options.seed,
        lambda codes: walk.add(rows_of(codes)),
    )
    drift = None
    if live is not None:
        _measure(data, live.clustering)
        drift = drift_of(source, view, live, walk)
    sums = sums_of(view)
    html = _page(options, data, sums, bundle, no_distances, drift)
    if len(html) > BYTES_MAX:
        raise TldrError(f"the report would take {len(html):,} bytes, over {BYTES_MAX:,}: give fewer --clusters")
    _write(out, html)
    shown, missing = pictures(data.clusters)
    adds_up = all(one.holds for one in sums)
    return ReportResult(out, len(html), len(data.clusters), shown, missing, adds_up, no_distances)


# -- distances ---------------------------------------------------------------------------------------------------------


def _live(options: ReportOptions, view: StreamView) -> tuple[LiveBundle | None, str]:
    """The bundle of the stream, or why there is none. Raises TldrError for a named bundle of another stream."""
    from models.errors import ModelError

    try:
        return live_bundle(options.source.connection, view, options.bundle), ""
    except (TldrError, ModelError) as error:
        if options.bundle is not None:
            raise
        return None, str(error)


def _measure(data: ReportData, clustering: Clustering) -> None:
    """Mean distance of each shown cluster's vectors to its centroid, in units of the mean over all clusters."""
    if not data.vectors_of_all:
        return
    vectors = np.stack([vector for vector, _ in data.vectors_of_all])
    usual = _distance(clustering, vectors, np.array([cluster for _, cluster in data.vectors_of_all]))
    for shown in data.clusters:
        if (drawn := data.vectors.get(shown.cluster)) and usual:
            shown.distance = _distance(clustering, np.stack(drawn), np.full(len(drawn), shown.cluster)) / usual


def _distance(clustering: Clustering, vectors: Any, clusters: Any) -> float:
    difference = clustering.features(vectors) - clustering.centroids[clusters]
    return float(np.sqrt((difference**2).sum(1)).mean())


# -- the page ----------------------------------------------------------------------------------------------------------


def _page(
    options: ReportOptions,
    data: ReportData,
    sums: list[Sum],
    bundle: str,
    no_distances: str,
    drift: ReportDrift | None,
) -> bytes:
    from stream import plots

    view, settings = data.view, data.view.settings
    totals = view.totals
    names = jinja2.Environment(
        loader=jinja2.PackageLoader("stream", "templates"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    names.filters |= {"n": _number, "score": _score, "percent": _percent, "when": _when}
    parts = sorted(view.partitions.values(), key=lambda part: part.partition)
    html = names.get_template("report.html").render(
        stream=options.source.name,
        topic=options.topic,
        data=data,
        totals=totals,
        in_set=in_the_set(totals),
        settings=settings,
        share=float(settings.ratio.share),
        sums=sums,
        parts=parts[:PARTITIONS_LISTED],
        parts_hidden=max(0, len(parts) - PARTITIONS_LISTED),
        starts=start_offsets(options.source.connection, options.topic, [part.partition for part in parts]),
        in_the_set=in_the_set,
        keep_rate=Markup(plots.keep_rate(data.curves, float(settings.ratio.share))),  # noqa: S704 (our own drawing)
        sizes=Markup(plots.cluster_sizes(data.sizes)),  # noqa: S704
        itm=Markup(plots.itm(data.itm_raw, data.itm_original, data.itm_refined)),  # noqa: S704
        drift=drift,
        drift_charts=[Markup(chart) for chart in plots.drift(drift)] if drift is not None else [],  # noqa: S704
        least_pairs=LEAST_PAIRS,
        bundle=bundle,
        runs_with=_runs_with(view),
        no_distances=no_distances,
        made=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=stream.__version__,
        seed=options.seed,
    )
    return html.encode("utf-8", "replace")


def _runs_with(view: StreamView) -> list[tuple[str, int, str]]:
    """(bundle, epoch, partitions) for a person: one where all partitions switched in the same way."""
    groups: dict[tuple[str, int], list[int]] = {}
    for p, switch in view.running.items():
        groups.setdefault((switch.bundle, switch.epoch), []).append(p)
    return [(bundle, epoch, ranges(numbers)) for (bundle, epoch), numbers in sorted(groups.items())]


def _write(out: Path, html: bytes) -> None:
    """As a whole: a reader of an older report never sees half of the new one."""
    try:
        handle, partial = tempfile.mkstemp(prefix=f".{out.name}.", dir=out.absolute().parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(html)
            Path(partial).chmod(0o644)
            os.replace(partial, out)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise TldrError(f"cannot write {out}: {error.strerror}") from error


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %"


def _when(milliseconds: int) -> str:
    return datetime.datetime.fromtimestamp(milliseconds / 1000, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
