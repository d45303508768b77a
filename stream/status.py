"""`status`: what a stream is doing now, as one table that adds up; live on a terminal.

Reads the stream's topics and the raw topic's offsets, nothing else: it works without a worker and disturbs none. What is
said about a partition is what its last committed transaction says.
"""

from __future__ import annotations

import io
import shutil
import statistics
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from confluent_kafka import Consumer, KafkaException, TopicPartition
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from models.drift import LEAST_PAIRS, DriftWindow, Signal
from models.errors import ModelError
from state.changelog import Totals
from state.quota import Ratio
from stream.arithmetic import Sum, in_the_set, sums_of
from stream.errors import TldrError, Unavailable
from stream.kafka import end_offsets, partition_count, partition_counts, start_offsets, topic_id
from stream.live_bundle import live_bundle
from stream.recent_codes import Rows, rows_of
from stream.results import ranges
from stream.rights import check_rights
from stream.stream_view import (
    ChangelogFollower,
    PartitionView,
    StreamSource,
    StreamView,
    decoded,
    read_dead_letters,
    read_spans,
)

# The scores of the newest rows of a partition: those in this many offsets of pair-codes, at most so many.
ITM_OFFSETS = 20
ITM_ROWS = 1000
# Dead letters carry their images: so many of a partition's newest are looked at for the reasons.
DEAD_LETTERS_READ = 5000
OPEN_SINCE_WAIT_S = 2.0
WIDE_COLUMNS = 110
# What stands around the table: live, the rest of the terminal's height is for partitions.
LINES_AROUND = 24
ROWS_MIN = 5


@dataclass
class Figures:
    """What is counted for a partition or for all. keep_rate  kept ÷ counted; itm_*  of the newest scored pairs."""

    lag: int
    totals: dict[str, int]
    keep_rate: float | None
    in_set: int
    cells: int
    itm_mean: float | None
    itm_median: float | None


@dataclass
class PartitionStatus(Figures):
    """A partition: next_offset is where the stream goes on, end where the raw topic ends."""

    partition: int
    next_offset: int
    end: int
    epoch: int
    bundle: str | None
    instance: str | None
    committed_ms: int | None


@dataclass(frozen=True)
class OpenTransaction:
    """Records that nobody can read yet. since_ms  when the first of them was written, None where nobody says."""

    topic: str
    partition: int
    committed_end: int
    end: int
    since_ms: int | None


@dataclass(frozen=True)
class DriftStatus:
    """The newest pairs against what the bundle was made on. pairs  in the window; reason  why something is not judged."""

    pairs: int = 0
    signals: list[Signal] = field(default_factory=list)
    reason: str | None = None


@dataclass
class StreamStatus:
    """What a stream is doing. dead_by_reason counts the letters that are still there and were looked at."""

    stream: str
    topic: str
    at_ms: int
    ratio: str
    rule: str
    cell_cap: int | None
    gate: float | None
    seed: int
    total: Figures
    partitions: list[PartitionStatus]
    sums: list[Sum]
    adds_up: bool
    dead_by_reason: dict[str, int]
    dead_looked_at: int
    drift: DriftStatus
    open_transactions: list[OpenTransaction] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> Iterable[str]:
        out = io.StringIO()
        width = shutil.get_terminal_size((80, 24)).columns
        Console(file=out, width=width, color_system=None).print(rendered(self, width))
        yield from (line.rstrip() for line in out.getvalue().rstrip().splitlines())


class StatusReader:
    """Looks at one stream again and again; each look reads only what is new.

    Raises TldrError where the topic or the stream does not exist.
    """

    def __init__(self, source: StreamSource, topic: str, bundle: str | None = None) -> None:
        self._source, self._topic, self._given = source, topic, bundle
        self._judge: _DriftJudge | None = None
        self._present: frozenset[str] = frozenset()  # the bundles that partitions ran with when it was made
        check_rights(source.connection, "status", raw=topic, stream=source.name)
        self._partitions = partition_count(source.connection, topic)
        self._follower = ChangelogFollower(source)
        self._codes = source.codec("PairCodes")
        self._codes_next: dict[int, int] = {}
        self._itms: dict[int, deque[float]] = {}
        self._dead_next: dict[int, int] = {}
        self._reasons: Counter[str] = Counter()
        self._open_since: dict[tuple[str, int, int], int | None] = {}

    def read(self) -> StreamStatus:
        """What the stream has committed by now. Raises TldrError if that is nothing, Unavailable without a broker."""
        view = self._follower.advance()
        numbers = list(view.partitions)
        judge = self._judge_of(view)
        self._read_scores(numbers, judge)
        self._read_dead_letters(numbers)
        raw = [p for p in numbers if p < self._partitions]
        connection = self._source.connection
        ends = end_offsets(connection, self._topic, raw)
        starts = start_offsets(connection, self._topic, raw)
        partitions = [
            self._partition(view, part, starts.get(p, 0), ends.get(p, 0)) for p, part in view.partitions.items()
        ]
        totals = view.totals
        scores = [score for p in numbers for score in self._itms.get(p, ())]
        sums = sums_of(view)
        settings = view.settings
        return StreamStatus(
            stream=view.topics.name,
            topic=self._topic,
            at_ms=int(time.time() * 1000),
            ratio=str(settings.ratio),
            rule=settings.rule,
            cell_cap=settings.cell_cap,
            gate=settings.gate,
            seed=settings.seed,
            total=_figures(
                sum(part.lag for part in partitions), totals, sum(part.cells for part in partitions), scores
            ),
            partitions=partitions,
            sums=sums,
            adds_up=all(one.holds for one in sums),
            dead_by_reason=dict(self._reasons.most_common()),
            dead_looked_at=self._reasons.total(),
            drift=judge.look(),
            open_transactions=self._open_transactions(numbers, raw),
            notes=self._notes(view, starts),
        )

    def _partition(self, view: StreamView, part: PartitionView, start: int, end: int) -> PartitionStatus:
        position = part.position
        next_offset = position.next_offset if position else start
        figures = _figures(
            max(0, end - next_offset), part.totals, len(part.cells), list(self._itms.get(part.partition, ()))
        )
        switch = part.switches.get(position.epoch) if position else None
        return PartitionStatus(
            **vars(figures),
            partition=part.partition,
            next_offset=next_offset,
            end=end,
            epoch=position.epoch if position else 0,
            bundle=switch.bundle if switch else None,
            instance=position.instance if position else None,
            committed_ms=position.wall_clock_ms if position else None,
        )

    def _judge_of(self, view: StreamView) -> _DriftJudge:
        """Another judge once the stream runs with another bundle; until then its window stays, whoever switches."""
        present = frozenset(switch.bundle for switch in view.running.values())
        if self._judge is None or present != self._present:
            judge = _DriftJudge(self._source, view, self._given)
            if self._judge is None or judge.version is None or judge.version != self._judge.version:
                self._judge = judge
            self._present = present
        self._judge.follow(view)
        return self._judge

    def _read_scores(self, numbers: list[int], judge: _DriftJudge) -> None:
        topic = self._source.topics.codes
        ends = self._ends(topic, numbers)
        starts = start_offsets(self._source.connection, topic, ends)
        spans = {p: (max(starts[p], self._codes_next.get(p, 0), end - ITM_OFFSETS), end) for p, end in ends.items()}
        for messages in read_spans(self._source.connection, topic, spans, batch=50):
            for message in messages:
                scores = self._itms.setdefault(message.partition(), deque(maxlen=ITM_ROWS))
                rows = rows_of(decoded(self._codes, message))
                scores.extend(rows.itms[~np.isnan(rows.itms)].tolist())
                judge.take(rows)
        self._codes_next.update(ends)

    def _read_dead_letters(self, numbers: list[int]) -> None:
        topic = self._source.topics.dead
        ends = self._ends(topic, numbers)
        starts = start_offsets(self._source.connection, topic, ends)
        spans = {p: (max(starts[p], self._dead_next.get(p, end - DEAD_LETTERS_READ)), end) for p, end in ends.items()}
        for seen, _ in read_dead_letters(self._source, spans):
            self._reasons[seen.reason] += 1
        self._dead_next.update(ends)

    def _ends(self, topic: str, numbers: list[int]) -> dict[int, int]:
        if topic not in partition_counts(self._source.connection, [topic]):
            return {}
        return end_offsets(self._source.connection, topic, numbers)

    def _open_transactions(self, numbers: list[int], raw: list[int]) -> list[OpenTransaction]:
        """Partitions whose committed end lags the true one: a transaction is open there, and holds readers back."""
        connection, topics = self._source.connection, self._source.topics
        asked = dict.fromkeys((topics.changelog, topics.kept, topics.codes, topics.dead), numbers)
        asked[self._topic] = raw
        existing = partition_counts(connection, asked)
        found, since = [], {}
        for topic, partitions in asked.items():
            if topic not in existing:
                continue
            committed = end_offsets(connection, topic, partitions)
            ends = end_offsets(connection, topic, partitions, committed=False)
            # Two questions, the committed end first: a commit between them shows as one that is open for a moment.
            for p in partitions:
                if committed[p] < ends[p]:
                    place = (topic, p, committed[p])
                    since[place] = self._open_since.get(place) or self._written_at(*place)
                    found.append(OpenTransaction(topic, p, committed[p], ends[p], since[place]))
        self._open_since = since
        return found

    def _written_at(self, topic: str, partition: int, offset: int) -> int | None:
        """When the record at this offset, which is not committed, was written. The last stable offset is such a one."""
        reader = Consumer(
            self._source.connection.config(
                group_id="tldr-stream-status",
                enable_auto_commit=False,
                isolation_level="read_uncommitted",
                auto_offset_reset="error",
            )
        )
        try:
            reader.assign([TopicPartition(topic, partition, offset)])
            message = reader.poll(OPEN_SINCE_WAIT_S)
            return None if message is None or message.error() is not None else int(message.timestamp()[1])
        except KafkaException:
            return None
        finally:
            reader.close()

    def _notes(self, view: StreamView, starts: dict[int, int]) -> list[str]:
        """What an operator has to know beside the figures."""
        notes = []
        if (now := topic_id(self._source.connection, self._topic)) != view.settings.raw_topic_id:
            notes.append(
                f"topic {self._topic} is not the one that this stream began with (id {now}, not "
                f"{view.settings.raw_topic_id}): it was recreated, so start another --stream on it"
            )
        if self._partitions != len(view.partitions):
            notes.append(
                f"topic {self._topic} has {self._partitions} partitions and the stream {len(view.partitions)}: workers "
                "refuse it, so start another --stream on it"
            )
        for p, start in starts.items():
            part = view.partitions[p]
            if part.position is not None and start > part.cut:
                notes.append(f"partition {p}: offsets {part.cut} to {start - 1} have expired before they were read")
            if part.totals.lost:
                notes.append(
                    f"partition {p}: {part.totals.lost:,} offsets expired before they were read, and were passed over"
                )
        return notes


class _DriftJudge:
    """The newest pairs against the baselines of one bundle; or why they cannot be judged."""

    def __init__(self, source: StreamSource, view: StreamView, given: str | None) -> None:
        self.version: str | None = None
        self._epochs: dict[int, int] = {}
        self._window: DriftWindow | None = None
        self._reason: str | None = None
        try:
            live = live_bundle(source.connection, view, given)
        except (TldrError, ModelError) as error:
            if given is not None or isinstance(error, Unavailable):
                raise
            self._reason = str(error)
            return
        self.version = live.version
        self._window = DriftWindow(live.baseline, live.clustering, view.settings.tokens)
        if live.baseline.missing:
            self._reason = f"no baseline in this bundle of {', '.join(live.baseline.missing)}"

    def follow(self, view: StreamView) -> None:
        """From now on, takes the rows of the epochs in which partitions run with this bundle."""
        self._epochs = {} if self.version is None else view.epochs_with(self.version)

    def take(self, rows: Rows) -> None:
        if self._window is not None and self._epochs.get(rows.partition) == rows.epoch and len(rows.clusters):
            self._window.add(rows.itms, rows.clusters, rows.vectors)

    def look(self) -> DriftStatus:
        if self._window is None or not self._window.pairs:
            return DriftStatus(reason=self._reason)
        return DriftStatus(self._window.pairs, self._window.look(), self._reason)


def _figures(lag: int, totals: Totals, cells: int, scores: list[float]) -> Figures:
    return Figures(
        lag=lag,
        totals=totals._asdict(),
        keep_rate=totals.kept / totals.counted if totals.counted else None,
        in_set=in_the_set(totals),
        cells=cells,
        itm_mean=statistics.fmean(scores) if scores else None,
        itm_median=statistics.median(scores) if scores else None,
    )


def watch(reader: StatusReader, every_s: float) -> None:
    """Shows the stream on this terminal until Ctrl-C; a broker that goes away is said, and waited for."""
    console = Console()
    shown = reader.read()
    try:
        with Live(console=console, auto_refresh=False, transient=False) as live:
            while True:
                live.update(rendered(shown, console.width, _rows_max(console)), refresh=True)
                time.sleep(every_s)
                try:
                    shown = reader.read()
                except Unavailable as error:
                    shown.notes = [f"as of {_clock(shown.at_ms)}: {error}"]
    except KeyboardInterrupt:
        return


def _rows_max(console: Console) -> int:
    return max(ROWS_MIN, console.height - LINES_AROUND)


# -- how it looks ------------------------------------------------------------------------------------------------------


def rendered(status: StreamStatus, width: int, rows_max: int | None = None) -> RenderableType:
    """The status for a terminal of `width` columns; of many partitions, the `rows_max` that lag most."""
    parts: list[RenderableType] = [_head(status), _table(status, width >= WIDE_COLUMNS, rows_max)]
    parts += [Text(line, no_wrap=True, overflow="ellipsis") for line in _workers(status)]
    parts += [Text(""), *(_sum(one) for one in status.sums)]
    if status.total.totals["dead"]:
        parts += [Text(""), _dead(status)]
    parts += [Text(""), *_drift(status.drift)]
    for one in status.open_transactions:
        age = "" if one.since_ms is None else f", open for {_age(status.at_ms - one.since_ms)}"
        held = f"{one.end - one.committed_end:,} records wait at {one.committed_end:,}"
        parts.append(Text(f"open transaction: {one.topic}/{one.partition}, {held}{age}", style="yellow"))
    parts += [Text(f"! {note}", style="bold red") for note in status.notes]
    return Group(*parts)


def _head(status: StreamStatus) -> Text:
    text = Text()
    text.append(status.stream, style="bold")
    if status.topic != status.stream:
        text.append(f" of {status.topic}")
    words = [f"M = {status.ratio} = {100 * float(Ratio.parse(status.ratio).share):.1f} %", f"seed {status.seed}"]
    words += [f"rule {status.rule}"] if status.rule != "none" else []
    words += [f"cap {status.cell_cap:,} a cell"] if status.cell_cap is not None else []
    words += [f"gate {status.gate:.3f}"] if status.gate is not None else []
    text.append(f"  {', '.join(words)}  {_clock(status.at_ms)}")
    return text


def _table(status: StreamStatus, wide: bool, rows_max: int | None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True, show_edge=False)
    names = ["part", "lag", "read", "dead"]
    names += ["duplicates", "counted", "kept"] if wide else []
    names += ["keep", "in set", "cells", "ITM mean", "median"]
    names += ["epoch", "committed"] if wide else ["ago"]
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    shown = status.partitions
    if rows_max is not None and len(shown) > rows_max:
        most = sorted(shown, key=lambda part: -part.lag)[:rows_max]
        shown = sorted(most, key=lambda part: part.partition)
    for part in shown:
        ago = _age(status.at_ms - part.committed_ms) if part.committed_ms is not None else "never"
        end = [str(part.epoch), f"{ago} ago" if ago != "never" else ago] if wide else [ago]
        table.add_row(str(part.partition), *_cells_of(part, wide), *end)
    if hidden := len(status.partitions) - len(shown):
        table.add_row("…", *[""] * (len(names) - 2), f"+{hidden}")
    table.add_section()
    table.add_row("all", *_cells_of(status.total, wide), *([""] * (2 if wide else 1)), style="bold")
    return table


def _cells_of(figures: Figures, wide: bool) -> list[str]:
    totals = figures.totals
    cells = [_number(figures.lag), _number(totals["read"]), _number(totals["dead"])]
    if wide:
        cells += [_number(totals["duplicates"]), _number(totals["counted"]), _number(totals["kept"])]
    return [
        *cells,
        "-" if figures.keep_rate is None else f"{100 * figures.keep_rate:.1f} %",
        _number(figures.in_set),
        _number(figures.cells),
        *("-" if score is None else f"{score:.3f}" for score in (figures.itm_mean, figures.itm_median)),
    ]


def _workers(status: StreamStatus) -> list[str]:
    """Who committed last where, and with which bundle."""
    groups: dict[tuple[str, str, int], list[PartitionStatus]] = {}
    for part in status.partitions:
        if part.instance is not None:
            groups.setdefault((part.instance, part.bundle or "?", part.epoch), []).append(part)
    lines = []
    for (instance, bundle, epoch), parts in sorted(groups.items()):
        numbers = ranges([part.partition for part in parts])
        newest = max(part.committed_ms or 0 for part in parts)
        age = _age(status.at_ms - newest)
        lines.append(f"{instance}: bundle {bundle[:12]}, epoch {epoch}, partitions {numbers}, committed {age} ago")
    return lines


def _sum(one: Sum) -> Text:
    style = "" if one.holds else "bold red"
    return Text("\n".join(one.lines()), style=style, no_wrap=True, overflow="ellipsis")


def _dead(status: StreamStatus) -> Text:
    dead = status.total.totals["dead"]
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in status.dead_by_reason.items()) or "none left"
    text = f"dead letters: {dead:,} ({reasons})"
    if status.dead_looked_at < dead:
        text += f"; {dead - status.dead_looked_at:,} of them have expired or are too many to look at"
    return Text(text)


def _drift(drift: DriftStatus) -> list[Text]:
    """A line a signal, those that alarm in red."""
    lines = []
    if drift.pairs:
        few = f", too few to judge ({LEAST_PAIRS:,})" if drift.pairs < LEAST_PAIRS else ""
        lines.append(Text(f"drift, newest {drift.pairs:,} pairs{few}:"))
    for one in drift.signals:
        mark, style = ("!", "bold red") if one.alarm else (" ", "")
        lines.append(Text(f"{mark} {one.words} (p {one.p_value:.1g})", style=style))
    if drift.reason:
        lines.append(Text(f"{'  ' if drift.pairs else 'drift is not judged: '}{drift.reason}"))
    return lines


def _number(value: int) -> str:
    """At most seven characters up to a billion, so that 80 columns are enough."""
    if value < 1_000_000:
        return f"{value:,}"
    return f"{value / 1e6:.1f}M" if value < 1_000_000_000 else f"{value / 1e9:.1f}G"


def _age(milliseconds: int) -> str:
    seconds = max(0, milliseconds) / 1000
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _clock(at_ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at_ms / 1000))
