"""Status: what it says is what was done, and its sums are checked and not only printed."""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from state.changelog import CellCounts, Position, Totals
from state.quota import Ratio, kept_positions
from state.settings import StreamSettings
from stream.arithmetic import sums_of
from stream.broker import LocalBroker
from stream.errors import TldrError
from stream.kafka import Connection
from stream.results import to_plain
from stream.status import StatusReader, StreamStatus
from stream.stream_view import PartitionView, StreamSource, StreamView
from stream.topics import StreamTopics
from tests.stream.small_stream import Raw, SmallStream, pair, picture

PAIRS, DUPLICATES, DEAD, UNREAD = 60, 4, 3, 5


@pytest.fixture(scope="module")
def small(broker: LocalBroker, tmp_path_factory: pytest.TempPathFactory) -> SmallStream:
    """60 pairs, 4 of them twice, 3 dead letters, one takedown, all read; and 5 pairs that no worker has read."""
    stream = SmallStream(Connection(broker.bootstrap_servers), "status", tmp_path_factory.mktemp("state"))
    pairs = [pair(f"id-{i}", f"caption {i}", picture(i)) for i in range(PAIRS)]
    stream.produce([*pairs, *pairs[:DUPLICATES]])
    stream.produce([Raw(b"x", b"junk"), Raw(b"y", b"junk"), pair("z", " ", picture(99))])
    stream.produce([Raw(b"id-7", None)])
    stream.run()
    stream.produce([pair(f"late-{i}", "a late caption", picture(100 + i)) for i in range(UNREAD)])
    return stream


@pytest.fixture(scope="module")
def status(small: SmallStream) -> StreamStatus:
    return StatusReader(small.source, small.topic).read()


def command(small: SmallStream, *more: str) -> list[str]:
    servers = small.kafka.bootstrap_servers
    return [sys.executable, "-m", "stream", "status", "--topic", small.topic, "--bootstrap-servers", servers, *more]


def test_the_totals_are_what_was_sent_and_every_sum_holds(status: StreamStatus) -> None:
    totals = status.total.totals

    assert totals["read"] == PAIRS + DUPLICATES + DEAD + 1
    assert (totals["dead"], totals["duplicates"], totals["forgotten"]) == (DEAD, DUPLICATES, 1)
    assert totals["counted"] == PAIRS
    assert status.total.in_set == totals["kept"] - totals["removed"]
    assert status.adds_up
    assert [one.holds for one in status.sums] == [True] * 4


def test_lag_is_what_no_worker_has_read(status: StreamStatus) -> None:
    assert status.total.lag == UNREAD
    assert sum(part.lag for part in status.partitions) == UNREAD


def test_dead_letters_are_told_by_reason(status: StreamStatus) -> None:
    assert status.dead_by_reason == {"not-avro": 2, "empty-caption": 1}


def test_each_partition_tells_its_bundle_its_worker_and_its_scores(status: StreamStatus) -> None:
    for part in status.partitions:
        assert (part.instance, part.epoch) == ("worker", 0)
        assert part.bundle
        assert part.cells > 0
        assert part.itm_mean is not None
        assert 0 < part.itm_mean < 1
        assert part.committed_ms is not None
        assert part.committed_ms <= status.at_ms


def test_a_second_look_counts_nothing_twice(small: SmallStream) -> None:
    reader = StatusReader(small.source, small.topic)
    first, second = reader.read(), reader.read()

    assert second.dead_by_reason == first.dead_by_reason
    assert second.total == first.total


@pytest.mark.parametrize("columns", [80, 120])
def test_it_fits_a_terminal(status: StreamStatus, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    busy = dataclasses.replace(status)
    busy.total = dataclasses.replace(
        status.total, lag=123_456_789, in_set=98_765_432, totals=dict.fromkeys(status.total.totals, 400_000_000)
    )

    lines = list(busy.lines())

    assert max(map(len, lines)) <= columns
    table = lines[1:6]
    assert not any("…" in line for line in table)


def test_an_open_transaction_is_shown_with_its_age(small: SmallStream) -> None:
    topic = small.source.topics.changelog
    producer = small.kafka.producer(transactional_id="status-test", transaction_timeout_ms=30_000)
    producer.init_transactions(30)
    producer.begin_transaction()
    before = int(time.time() * 1000)
    producer.produce(topic, b"{}", b"P", 1)
    producer.flush(10)
    try:
        found = StatusReader(small.source, small.topic).read()
    finally:
        producer.abort_transaction(30)

    assert [(one.topic, one.partition) for one in found.open_transactions] == [(topic, 1)]
    since = found.open_transactions[0].since_ms
    assert since is not None
    assert before <= since <= found.at_ms
    assert found.adds_up
    assert StatusReader(small.source, small.topic).read().open_transactions == []


def test_without_a_terminal_it_is_shown_once_and_json_is_json(small: SmallStream, status: StreamStatus) -> None:
    done = subprocess.run(command(small, "--json"), capture_output=True, text=True, check=True)

    assert json.loads(done.stdout)["total"] == to_plain(status.total)


def test_on_a_terminal_it_goes_on_until_ctrl_c(small: SmallStream) -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "50"}
    process = subprocess.Popen(command(small, "--every-s", "0.3"), stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    seen = b""
    deadline = time.monotonic() + 60
    while seen.count(b"read = dead") < 3 and time.monotonic() < deadline:
        seen += os.read(ours, 65536)
    process.send_signal(signal.SIGINT)

    assert process.wait(20) == 0
    assert seen.count(b"read = dead") >= 3
    assert b"Traceback" not in seen
    os.close(ours)


def test_a_stream_that_does_not_exist_is_said(small: SmallStream) -> None:
    with pytest.raises(TldrError, match="topic nowhere does not exist"):
        StatusReader(small.source, "nowhere")
    with pytest.raises(TldrError, match="there is no stream nothing"):
        StatusReader(StreamSource(small.kafka, StreamTopics("nothing")), small.topic)


# -- the sums, by hand -------------------------------------------------------------------------------------------------


def view_of(counted: dict[int, int], ratio: Ratio) -> StreamView:
    """One partition whose cells have counted so many pairs each, kept by the quota's own draw."""
    settings = StreamSettings(1, "id", 3, ratio, None, None, None, "none", "space", 4)
    part = PartitionView(0)
    for cluster, n in counted.items():
        drawn = [kept_positions(3, 0, 0, cluster, at // ratio.q, ratio) >> at % ratio.q & 1 for at in range(n)]
        part.cells[0, cluster] = CellCounts(n, sum(drawn), 0, sum(drawn))
    n, kept = sum(counted.values()), sum(cell.entered for cell in part.cells.values())
    part.position = Position(n, 0, 0, "worker", Totals(read=n, counted=n, over_quota=n - kept, kept=kept))
    return StreamView(StreamTopics("s"), settings, {0: part})


@given(st.dictionaries(st.integers(0, 9), st.integers(1, 60)), st.sampled_from(["1/4", "1/2", "2/7", "100"]))
def test_the_quota_of_any_cells_is_met_to_the_pair(counted: dict[int, int], ratio: str) -> None:
    assert all(one.holds for one in sums_of(view_of(counted, Ratio.parse(ratio))))


@pytest.mark.parametrize(
    ("name", "broken"), [("read", 0), ("over_quota", 1), ("kept", 2), ("counted", 2), ("evicted", 3), ("removed", 3)]
)
def test_a_total_that_is_off_by_one_breaks_its_sum(name: str, broken: int) -> None:
    view = view_of({1: 50, 2: 31}, Ratio(1, 4))
    position = view.partitions[0].position
    assert position is not None
    totals = position.totals._replace(**{name: getattr(position.totals, name) + 1})
    view.partitions[0].position = position._replace(totals=totals)

    assert not sums_of(view)[broken].holds
