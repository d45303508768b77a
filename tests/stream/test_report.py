"""The report: one file that needs nothing else, shows what is in the set and what is not, and trusts no caption."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from confluent_kafka import TopicPartition
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from models.clustering import Clustering
from models.drift import ERROR_BINS, SIGNALS, Baseline, Signal, error_baseline
from stream.broker import LocalBroker
from stream.errors import TldrError
from stream.kafka import Connection
from stream.live_bundle import running_bundle
from stream.plots import drift
from stream.raw_format import raw_reader
from stream.report import ReportOptions, ReportResult, _measure, report
from stream.report_data import CURVE_BINS, Draw, ReportData, gather
from stream.report_drift import ReportDrift, Stretch, error_shares
from stream.status import StatusReader
from stream.stream_view import StreamSource, read_view
from stream.thumbnails import SIDE, thumbnail
from stream.topics import StreamTopics
from tests.stream.small_stream import Raw, SmallStream, pair, picture

EVIL = "<script>alert('caption')</script><img src=x onerror=alert(1)>"
PAIRS = 240
TAKEN_DOWN = [f"secret-{i}" for i in range(30)]


@pytest.fixture(scope="module")
def small(broker: LocalBroker, tmp_path_factory: pytest.TempPathFactory) -> SmallStream:
    """Few different images under many ids, so that clusters have many pairs; a cap of 2; dead letters; takedowns."""
    stream = SmallStream(Connection(broker.bootstrap_servers), "report", tmp_path_factory.mktemp("state"))
    records = [pair(f"id-{i}", f"{EVIL} number {i}", picture(i % 6)) for i in range(PAIRS)]
    stream.produce([*records, *records[:7], Raw(b"x<b>", b"junk"), pair("mute", " ", picture(1))])
    stream.produce([pair(name, f"the caption of {name}", picture(i % 6)) for i, name in enumerate(TAKEN_DOWN)])
    stream.produce([Raw(name.encode(), None) for name in TAKEN_DOWN])
    stream.run(cell_cap=2, batch_pairs=50)
    return stream


@pytest.fixture(scope="module")
def data(small: SmallStream) -> ReportData:
    return gathered(small)


def gathered(small: SmallStream, seed: int = 0) -> ReportData:
    view = read_view(small.source)
    return gather(small.source, view, running_bundle(small.kafka, view), small.topic, raw_reader(), 4, seed)


@pytest.fixture(scope="module")
def page(small: SmallStream, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ReportResult]:
    out = tmp_path_factory.mktemp("report") / "report.html"
    result = report(options(small, out))
    return out.read_text(), result


def options(small: SmallStream, out: Path, bundle: str | None = None) -> ReportOptions:
    return ReportOptions(small.source, small.topic, out, raw_reader(), bundle, 4)


class Links(HTMLParser):
    """Every address that a page names, and every element that could run."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.running: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "action", "srcset"):
                self.addresses.append(value or "")
            if name.startswith("on"):
                self.running.append(name)
        if tag in ("script", "iframe", "object", "embed", "link", "base"):
            self.running.append(tag)


def test_the_page_asks_for_nothing_and_runs_nothing(page: tuple[str, ReportResult]) -> None:
    text, result = page
    links = Links()
    links.feed(text)

    assert result.bytes == len(text.encode()) <= 15_000_000
    assert links.running == []
    assert {address[:5] for address in links.addresses} <= {
        "data:",
        *(f"#{x}"[:5] for x in re.findall(r'id="([^"]+)"', text)),
    }
    assert not re.search(r"@import|url\((?!#)", text)


def test_a_caption_is_text_whatever_it_holds(page: tuple[str, ReportResult]) -> None:
    text, _ = page

    assert "<script" not in text
    assert html.escape(EVIL, quote=False).replace("'", "&#39;") in text


def test_headline_and_sums_are_the_streams_own(small: SmallStream, page: tuple[str, ReportResult]) -> None:
    text, result = page
    totals = read_view(small.source).totals

    assert result.adds_up
    assert f"<b>{totals.read:,}</b>" in text
    assert f"<b>{totals.kept - totals.evicted - totals.removed:,}</b>" in text
    assert "not-avro" in text
    assert "empty-caption" in text


def test_the_curves_hold_every_counted_and_every_kept_pair(small: SmallStream, data: ReportData) -> None:
    totals = read_view(small.source).totals

    assert sum(int(curve.counted.sum()) for curve in data.curves) == totals.counted
    assert sum(int(curve.kept.sum()) for curve in data.curves) == totals.kept
    assert {len(curve.counted) for curve in data.curves} == {CURVE_BINS}
    assert data.itm_refined.n == totals.kept
    assert data.dead.total() == totals.dead
    assert len(data.duplicates) == totals.duplicates == 7


def test_a_gallery_shows_what_is_in_the_set_and_what_is_not(small: SmallStream, data: ReportData) -> None:
    in_set = set(ids_in_the_set(small))

    assert len(data.clusters) == 4
    for cluster in data.clusters:
        assert {shown.id for shown in cluster.kept} <= in_set
        assert len(cluster.kept) == min(12, cluster.in_set)
        assert not {shown.id for shown in cluster.dropped} & in_set
        assert len(cluster.dropped) == 12
        assert all(shown.picture for shown in cluster.kept)
        assert all(shown.picture for shown in cluster.dropped)
        assert cluster.itm_mean is not None
    assert "over cap" in {shown.why for cluster in data.clusters for shown in cluster.dropped}


def ids_in_the_set(small: SmallStream) -> list[str]:
    from stream.stream_view import read_kept, whole

    kept: dict[str, bool] = {}
    for records in read_kept(small.source, whole(small.kafka, small.source.topics.kept, range(2))):
        for record in records:
            kept[record.id] = record.value is not None
    return [pair_id for pair_id, here in kept.items() if here]


def test_an_evicted_pair_is_among_the_dropped(small: SmallStream) -> None:
    """Over many draws, since only some of the dropped are shown."""
    whys = {shown.why for seed in range(3) for cluster in gathered(small, seed).clusters for shown in cluster.dropped}

    assert "evicted" in whys


def test_what_was_taken_down_is_shown_nowhere(page: tuple[str, ReportResult]) -> None:
    assert "secret-" not in page[0]


def test_the_same_seed_draws_the_same_pairs(small: SmallStream, data: ReportData) -> None:
    again = gathered(small)

    assert again.clusters == data.clusters


def test_a_grey_tile_stands_where_retention_has_taken_the_record(
    broker: LocalBroker, name: str, tmp_path: Path
) -> None:
    stream = SmallStream(Connection(broker.bootstrap_servers), name, tmp_path / "state", partitions=1)
    stream.produce([pair(f"id-{i}", f"caption {i}", picture(1)) for i in range(40)])
    stream.run()
    for done in stream.kafka.admin.delete_records([TopicPartition(name, 0, 40)]).values():
        done.result()

    result = report(options(stream, tmp_path / "report.html"))

    assert (result.pictures, result.pictures_missing) == (10, 12)
    assert (tmp_path / "report.html").read_text().count('<div class="tile">no longer in the raw topic</div>') == 12


def test_a_stream_of_nothing_but_dead_letters_has_a_report_and_a_status(
    broker: LocalBroker, name: str, tmp_path: Path
) -> None:
    stream = SmallStream(Connection(broker.bootstrap_servers), name, tmp_path / "state")
    stream.produce([Raw(b"key", b"junk", partition=1)])
    stream.run()

    result = report(options(stream, tmp_path / "report.html"))
    status = StatusReader(stream.source, name).read()

    assert (result.clusters, result.adds_up) == (0, True)
    assert (status.total.keep_rate, status.adds_up) == (None, True)
    assert any("never" in line for line in status.lines())


def test_what_cannot_be_is_said(small: SmallStream, tmp_path: Path) -> None:
    with pytest.raises(TldrError, match="give a file in a folder that exists"):
        report(options(small, tmp_path / "no" / "report.html"))
    with pytest.raises(TldrError, match="there is no bundle at nowhere"):
        report(options(small, tmp_path / "report.html", "nowhere"))
    nothing = StreamSource(small.kafka, StreamTopics("nothing"))
    with pytest.raises(TldrError, match="there is no stream nothing"):
        report(dataclasses.replace(options(small, tmp_path / "report.html"), source=nothing))
    assert list(tmp_path.iterdir()) == []


# -- its parts ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 1000), unique=True), st.integers(1, 8))
def test_a_draw_is_the_smallest_numbers_whatever_the_order(numbers: list[int], size: int) -> None:
    draw: Draw[int, int] = Draw(size)
    for number in numbers:
        draw.offer(number, number, lambda n=number: n)  # type: ignore[misc]

    assert draw.items() == sorted(numbers)[:size]


def test_a_thumbnail_is_small_and_keeps_its_proportions() -> None:
    wide = io.BytesIO()
    Image.effect_noise((900, 300), 80).convert("RGB").save(wide, "JPEG")

    made = thumbnail(wide.getvalue())

    assert made is not None
    assert (made.width, made.height) == (SIDE, round(SIDE / 3))
    with Image.open(io.BytesIO(base64.b64decode(made.uri.split(",")[1]))) as opened:
        assert (opened.format, opened.size) == ("JPEG", (made.width, made.height))
    assert thumbnail(b"no image") is None


def test_distances_are_those_of_the_vectors_to_their_centroids(data: ReportData) -> None:
    empty = np.empty((0, 0))
    centroids = np.array([[0.0, 0.0], [160.0, 0.0]])
    clustering = Clustering("raw", centroids, np.zeros((20, 1)), empty, empty)
    first, second = (dataclasses.replace(data.clusters[0], cluster=c, distance=None) for c in (0, 1))
    near, far = np.array([3, 4], np.uint16), np.array([10, 10], np.uint16)  # 16 units of the grid an index: 5 and 10
    made = dataclasses.replace(
        data, clusters=[first, second], vectors={0: [near], 1: [far]}, vectors_of_all=[(near, 0), (far, 1)]
    )

    _measure(made, clustering)

    assert [shown.distance for shown in made.clusters] == [5 / 7.5, 10 / 7.5]


@given(
    st.lists(st.floats(0.1, 1e4), min_size=ERROR_BINS, unique=True),
    st.lists(st.floats(0, 1e6), min_size=1, max_size=50),
)
def test_every_error_has_its_place_beside_the_baselines_quantiles(known: list[float], seen: list[float]) -> None:
    told = error_baseline(np.array(known))
    assert told is not None
    found = error_shares(Baseline.of({"baselines": {"quantisation_error": told}}), np.array(seen))

    assert found is not None
    edges, before, now = found
    assert before.sum() == pytest.approx(1)
    assert now.sum() == pytest.approx(1)
    assert (np.diff(edges) > 0).all()
    inside = np.searchsorted(edges, told["edges"])
    assert edges[inside].tolist() == told["edges"]
    assert before[inside[0] : inside[-1]].sum() == pytest.approx(1)


def test_each_baseline_of_a_bundle_is_drawn_beside_the_newest_pairs_and_no_keyword_is_taken_for_markup() -> None:
    rng = np.random.default_rng(0)
    told = {
        "itm_histogram": [1] * 20,
        "cluster_occupancy": [30, 20, 10],
        "code_usage": rng.integers(1, 90, 1000).tolist(),
        "quantisation_error": error_baseline(rng.gamma(3, 2, 600)),
    }
    codes = rng.integers(0, 90, 1000)
    codes[7] = 9000
    keywords = ["$x_2^3$ <b>&猫" if code == 7 else "" for code in range(1000)]
    signals = [Signal(name, 600, 0.1, 0.2, 1.0, False, "") for name in SIGNALS]
    whole = ReportDrift(
        Baseline.of({"baselines": told}), signals, 600, np.arange(20), np.array([1, 2, 3]), codes,
        rng.gamma(4, 2, 600), keywords, [Stretch(0, 1, signals)],
    )  # fmt: skip

    charts = "".join(drift(whole))

    names = ("itm", "clusters", "codes", "changed-codes", "errors", "time")
    assert [name for name in names if f'id="drift-{name}-' in charts] == list(names)
    assert "$x_2^3$ &lt;b&gt;&amp;猫 (7)" in charts
    assert "codes, the most used of the baseline first, 9 in a bar" in charts
    without = {k: v for k, v in told.items() if k in ("itm_histogram", "cluster_occupancy")}
    fewer = "".join(drift(dataclasses.replace(whole, baseline=Baseline.of({"baselines": without}))))
    assert [name for name in names if f'id="drift-{name}-' in fewer] == ["itm", "clusters", "time"]
