"""What a report shows, gathered by one walk over each of a stream's topics, in memory that does not grow with them.

Samples are drawn by keyed hashes, so the same stream and seed give the same report: of the kept pairs those of the
smallest priority (a hash of the id: a uniform draw, and the one that evictions spare), of the dropped ones those of the
smallest hash of their offset. Must not know HTML.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from state.partition import Fate
from stream.cut import COUNTED
from stream.progress import Progress
from stream.raw_format import RawReader
from stream.raw_lookup import records_at
from stream.records import UndecodableRecord
from stream.stream_view import (
    StreamSource,
    StreamView,
    decoded,
    kept_record,
    read_dead_letters,
    read_spans,
    whole,
)
from stream.thumbnails import Thumbnail, thumbnail

PAIRS_SHOWN = 12  # of each cluster, kept and dropped
# A pair that is drawn may be taken down later: so many are drawn that enough are left.
PAIRS_DRAWN = 3 * PAIRS_SHOWN
CURVE_BINS = 48
ITM_BINS = 50
VECTORS_OF_A_CLUSTER = 256
VECTORS_OF_ALL = 1024
EXAMPLES_OF_A_REASON = 3
CODES_BATCH = 10  # records of up to half a megabyte
DUPLICATES_SHOWN = 10
CAPTION_CHARACTERS = 280
ID_CHARACTERS = 120

DROPPED = {Fate.OVER_QUOTA: "over quota", Fate.OVER_CAP: "over cap", Fate.BELOW_GATE: "below gate"}
EVICTED = "evicted"

T = TypeVar("T")
K = TypeVar("K")


class Draw(Generic[K, T]):
    """The `size` items of the smallest numbers among all that are offered and not taken out again."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._items: dict[K, tuple[int, T]] = {}
        self._limit: int | None = None

    def offer(self, key: K, number: int, make: Callable[[], T]) -> None:
        """`make` is called only for an item that is drawn for now."""
        if self._limit is not None and number >= self._limit and key not in self._items:
            return
        self._items[key] = (number, make())
        if len(self._items) >= 2 * self.size:
            smallest = sorted(self._items.items(), key=lambda item: item[1][0])[: self.size]
            self._items, self._limit = dict(smallest), smallest[-1][1][0]

    def may_take(self, numbers: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """(n,) which numbers `offer` would look at."""
        return np.ones(len(numbers), bool) if self._limit is None else numbers < np.uint64(self._limit)

    def take_out(self, key: K) -> None:
        self._items.pop(key, None)

    def items(self) -> list[T]:
        """The drawn items, smallest number first."""
        return [item for _, item in self.items_with_keys()]

    def items_with_keys(self) -> list[tuple[K, T]]:
        """The drawn items, smallest number first, each behind its key."""
        drawn = sorted(self._items.items(), key=lambda item: item[1][0])[: self.size]
        return [(key, item) for key, (_, item) in drawn]


class KeptShown(NamedTuple):
    """A kept pair in the gallery. more  characters of the caption that are not shown."""

    id: str
    caption: str
    more: int
    generated: str
    itm_original: float
    itm_refined: float
    partition: int
    offset: int
    picture: Thumbnail | None


class DroppedShown(NamedTuple):
    """A dropped pair in the gallery. missing  why there is no picture."""

    id: str
    caption: str
    more: int
    itm: float
    why: str
    partition: int
    offset: int
    picture: Thumbnail | None
    missing: str


class DroppedRow(NamedTuple):
    """A dropped pair as pair-codes has it."""

    id: str
    partition: int
    offset: int
    itm: float
    why: str


class DeadExample(NamedTuple):
    """A dead letter as an example of its reason."""

    key: str
    partition: int
    offset: int
    bytes: int
    detail: str


class Duplicate(NamedTuple):
    """A record whose id had counted before, at `first`."""

    id: str
    partition: int
    offset: int
    first: int


@dataclass
class ClusterData:
    """A cluster of the gallery. distance  mean distance to its centroid ÷ that of all clusters, None without a bundle."""

    cluster: int
    counted: int
    in_set: int
    share: float
    drawn: bool
    itm_mean: float | None = None
    distance: float | None = None
    kept: list[KeptShown] = field(default_factory=list)
    dropped: list[DroppedShown] = field(default_factory=list)


@dataclass
class Histogram:
    """Scores in [0, 1]."""

    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(ITM_BINS, np.int64))
    sum: float = 0.0

    def add(self, scores: NDArray[Any]) -> None:
        self.counts += np.histogram(scores, ITM_BINS, (0.0, 1.0))[0]
        self.sum += float(np.sum(scores, dtype=np.float64))

    @property
    def n(self) -> int:
        return int(self.counts.sum())

    @property
    def mean(self) -> float | None:
        return self.sum / self.n if self.n else None


@dataclass
class Curve:
    """Counted and kept pairs of a partition by input offset, in CURVE_BINS stretches of [begin, cut)."""

    partition: int
    begin: int
    cut: int
    counted: NDArray[np.int64] = field(default_factory=lambda: np.zeros(CURVE_BINS, np.int64))
    kept: NDArray[np.int64] = field(default_factory=lambda: np.zeros(CURVE_BINS, np.int64))

    def add(self, offsets: NDArray[np.int64], fates: NDArray[np.uint8]) -> None:
        bins = (offsets - self.begin) * CURVE_BINS // max(1, self.cut - self.begin)
        counted = np.isin(fates, [int(fate) for fate in COUNTED])
        self.counted += np.bincount(bins[counted], minlength=CURVE_BINS)
        self.kept += np.bincount(bins[fates == Fate.KEPT], minlength=CURVE_BINS)


@dataclass
class ReportData:
    """Everything that a report shows, but for what the view says."""

    view: StreamView
    epochs: dict[int, int]  # of the partitions that run with the bundle whose clusters are shown
    clusters: list[ClusterData]
    curves: list[Curve]
    sizes: NDArray[np.int64]  # (clusters, 2) counted and in the set, largest first
    cell_median: float
    itm_raw: Histogram = field(default_factory=Histogram)
    itm_original: Histogram = field(default_factory=Histogram)
    itm_refined: Histogram = field(default_factory=Histogram)
    vectors: dict[int, list[NDArray[np.uint16]]] = field(
        default_factory=dict
    )  # of shown clusters; -1: (vector, cluster)
    vectors_of_all: list[tuple[NDArray[np.uint16], int]] = field(default_factory=list)
    duplicates: list[Duplicate] = field(default_factory=list)
    dead: Counter[str] = field(default_factory=Counter)
    dead_examples: dict[str, list[DeadExample]] = field(default_factory=dict)
    committed_ms: tuple[int, int] | None = None  # first and last transaction whose rows are still there
    source_ms: tuple[int, int] | None = None  # of the kept pairs' raw records
    rows: int = 0
    expired: dict[int, int] = field(default_factory=dict)  # partition → offset before which pair-codes are gone


def gather(
    source: StreamSource,
    view: StreamView,
    bundle: str,
    topic: str,
    reader: RawReader,
    clusters: int,
    seed: int,
    on_codes: Callable[[dict[str, Any]], None] = lambda record: None,
) -> ReportData:
    """Walks over pair-codes, the kept pairs, the dead letters, and the raw records that are shown.

    bundle    whose clusters are shown, of the partitions that run with it now
    on_codes  is given each decoded record of pair-codes as it is read
    """
    data = _begin(view, bundle, clusters, seed)
    dropped, forgotten = _walk_codes(source, data, seed, on_codes)
    _walk_kept(source, data)
    _walk_dead(source, data, forgotten)
    _look_up_dropped(source, data, topic, reader, dropped, forgotten)
    return data


def _begin(view: StreamView, bundle: str, clusters: int, seed: int) -> ReportData:
    """Chooses clusters of the bundle, in the partitions' present epochs: half of them the largest, the others drawn."""
    epochs = view.epochs_with(bundle)
    counted: Counter[int] = Counter()
    in_set: Counter[int] = Counter()
    cells = []
    for p, epoch in epochs.items():
        for (cell_epoch, cluster), cell in view.partitions[p].cells.items():
            if cell_epoch == epoch:
                counted[cluster] += cell.counted
                in_set[cluster] += cell.size
                cells.append(cell.counted)
    order = sorted(counted, key=lambda cluster: (-counted[cluster], cluster))
    largest = order[: (clusters + 1) // 2]
    others = np.array(sorted(set(order) - set(largest)), np.int64)
    drawn = others[np.argsort(numbers_of(seed, 0, others), kind="stable")][: clusters - len(largest)].tolist()
    total = max(1, counted.total())
    shown = [
        ClusterData(cluster, counted[cluster], in_set[cluster], counted[cluster] / total, cluster in drawn)
        for cluster in [*largest, *sorted(drawn, key=lambda cluster: (-counted[cluster], cluster))]
    ]
    sizes = np.array([(counted[cluster], in_set[cluster]) for cluster in order], np.int64).reshape(-1, 2)
    curves = [Curve(part.partition, part.begin, part.cut) for part in view.partitions.values()]
    return ReportData(view, epochs, shown, curves, sizes, float(np.median(cells)) if cells else 0.0)


def numbers_of(seed: int, partition: int, offsets: NDArray[np.int64]) -> NDArray[np.uint64]:
    """(n,) a keyed hash of each offset (the finaliser of splitmix64, Steele et al. 2014); wraps by design."""
    golden = 0x9E3779B97F4A7C15
    start = np.uint64((seed * golden + (partition + 1) * 0xD1B54A32D192ED03) & 0xFFFFFFFFFFFFFFFF)
    x = offsets.astype(np.uint64) * np.uint64(golden) + start
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# -- pair-codes --------------------------------------------------------------------------------------------------------


def _walk_codes(
    source: StreamSource, data: ReportData, seed: int, on_codes: Callable[[dict[str, Any]], None]
) -> tuple[dict[int, Draw[tuple[int, int], DroppedRow]], set[str]]:
    """Curves, scores, duplicates and samples; the dropped pairs drawn for each shown cluster, and what was taken down."""
    walk = _CodesWalk(data, seed)
    codec = source.codec("PairCodes")
    spans = whole(source.connection, source.topics.codes, data.view.partitions)
    first: dict[int, int] = {}
    with Progress(f"read {source.topics.codes}", None, "rows") as progress:
        for messages in read_spans(source.connection, source.topics.codes, spans, batch=CODES_BATCH):
            for message in messages:
                record = decoded(codec, message)
                offsets = np.frombuffer(record["offsets"], "<i8")
                if len(offsets):
                    first.setdefault(message.partition(), int(offsets[0]))
                rows = walk.add(record, offsets, message.timestamp()[1])
                progress.advance(rows)
                on_codes(record)
    data.expired = {p: first.get(p, data.view.cut[p]) for p, (start, _) in spans.items() if start > 0}
    sizes = {shown.cluster: shown for shown in data.clusters}
    for cluster, (total, count) in walk.scores.items():
        sizes[cluster].itm_mean = total / count if count else None
    data.vectors = {cluster: draw.items() for cluster, draw in walk.vectors.items()}
    data.vectors_of_all = walk.vectors_of_all.items()
    data.duplicates = [one for one in walk.duplicates.items() if one.id not in walk.forgotten][:DUPLICATES_SHOWN]
    return walk.dropped, walk.forgotten


class _CodesWalk:
    """One walk over pair-codes."""

    def __init__(self, data: ReportData, seed: int) -> None:
        self.data, self.seed = data, seed
        shown = [one.cluster for one in data.clusters]
        self._shown = np.array(shown, np.int64)
        self._curves = {curve.partition: curve for curve in data.curves}
        self.dropped: dict[int, Draw[tuple[int, int], DroppedRow]] = {c: Draw(PAIRS_DRAWN) for c in shown}
        self.vectors: dict[int, Draw[tuple[int, int], NDArray[np.uint16]]] = {
            c: Draw(VECTORS_OF_A_CLUSTER) for c in shown
        }
        self.vectors_of_all: Draw[tuple[int, int], tuple[NDArray[np.uint16], int]] = Draw(VECTORS_OF_ALL)
        self.scores: dict[int, list[float]] = {c: [0.0, 0] for c in shown}
        self.duplicates: Draw[tuple[int, int], Duplicate] = Draw(3 * DUPLICATES_SHOWN)
        self.forgotten: set[str] = set()
        # Kept pairs of shown clusters that an eviction may still turn into dropped ones; a cap bounds their number.
        self._kept: dict[str, DroppedRow] = {}
        self._kept_cluster: dict[str, int] = {}
        self._capped = data.view.settings.cell_cap is not None

    def add(self, record: dict[str, Any], offsets: NDArray[np.int64], at_ms: int) -> int:
        """Takes the rows of one record that lie below the cut; how many."""
        data, partition = self.data, record["partition"]
        below = int(np.searchsorted(offsets, data.view.cut[partition]))
        if not below:
            return 0
        offsets = offsets[:below]
        fates = np.frombuffer(record["fates"], np.uint8)[:below]
        clusters = np.frombuffer(record["clusters"], "<i4")[:below]
        itms = np.frombuffer(record["itms"], "<f4")[:below]
        self._curves[partition].add(offsets, fates)
        data.itm_raw.add(itms[~np.isnan(itms)])
        data.rows += below
        began = at_ms if data.committed_ms is None else min(data.committed_ms[0], at_ms)
        data.committed_ms = (began, at_ms if data.committed_ms is None else max(data.committed_ms[1], at_ms))
        numbers = numbers_of(self.seed, partition, offsets)
        self._samples(record, offsets, fates, clusters, itms, numbers)
        self._duplicates(record, offsets, fates, numbers)
        self._removals(record, fates, offsets, numbers, below)
        return below

    def _samples(
        self,
        record: dict[str, Any],
        offsets: NDArray[np.int64],
        fates: NDArray[np.uint8],
        clusters: NDArray[np.int32],
        itms: NDArray[np.float32],
        numbers: NDArray[np.uint64],
    ) -> None:
        if record["epoch"] != self.data.epochs.get(record["partition"]) or not record["tokens"]:
            return
        partition, ids = record["partition"], record["ids"]
        vectors = np.frombuffer(record["vectors"], "<u2").reshape(-1, record["tokens"])
        rank = np.cumsum(clusters >= 0) - 1
        wanted = (clusters >= 0) & (np.isin(clusters, self._shown) | self.vectors_of_all.may_take(numbers))
        for row in np.flatnonzero(wanted).tolist():
            place = (partition, int(offsets[row]))
            cluster, number = int(clusters[row]), int(numbers[row])
            vector = vectors[rank[row]]
            self.vectors_of_all.offer(place, number, lambda v=vector, c=cluster: (v.copy(), c))  # type: ignore[misc]
            if cluster not in self.dropped:
                continue
            self.vectors[cluster].offer(place, number, vector.copy)
            score = float(itms[row])
            total = self.scores[cluster]
            total[0], total[1] = total[0] + score, total[1] + 1
            fate = Fate(int(fates[row]))
            seen = DroppedRow(ids[row], *place, score, DROPPED.get(fate, EVICTED))
            if fate in DROPPED:
                self.dropped[cluster].offer(place, number, lambda s=seen: s)  # type: ignore[misc]
            elif fate == Fate.KEPT and self._capped:
                self._kept[seen.id], self._kept_cluster[seen.id] = seen, cluster

    def _duplicates(
        self, record: dict[str, Any], offsets: NDArray[np.int64], fates: NDArray[np.uint8], numbers: NDArray[np.uint64]
    ) -> None:
        firsts = np.frombuffer(record["duplicate_of"], "<i8").tolist()
        for row, first in zip(np.flatnonzero(fates == Fate.DUPLICATE).tolist(), firsts, strict=False):
            found = Duplicate(record["ids"][row], record["partition"], int(offsets[row]), first)
            self.duplicates.offer(found[1:3], int(numbers[row]), lambda f=found: f)  # type: ignore[misc]

    def _removals(
        self,
        record: dict[str, Any],
        fates: NDArray[np.uint8],
        offsets: NDArray[np.int64],
        numbers: NDArray[np.uint64],
        below: int,
    ) -> None:
        """Who was taken down is shown nowhere; who was evicted joins the dropped."""
        self.forgotten.update(record["ids"][row] for row in np.flatnonzero(fates == Fate.FORGOTTEN).tolist())
        for removal in record["removed"]:
            if removal["row"] >= below:
                continue
            seen = self._kept.pop(removal["id"], None)
            if seen is None:
                continue
            cluster = self._kept_cluster.pop(removal["id"])
            if fates[removal["row"]] != Fate.FORGOTTEN:
                number = int(numbers_of(self.seed, seen.partition, np.array([seen.offset]))[0])
                self.dropped[cluster].offer((seen.partition, seen.offset), number, lambda s=seen: s)  # type: ignore[misc]


# -- the other topics --------------------------------------------------------------------------------------------------


def _walk_kept(source: StreamSource, data: ReportData) -> None:
    """Scores of original and refined captions, and the kept pairs of the shown clusters."""
    draws: dict[int, Draw[bytes, KeptShown]] = {one.cluster: Draw(PAIRS_DRAWN) for one in data.clusters}
    codec = source.codec("KeptPair")
    spans = whole(source.connection, source.topics.kept, data.view.partitions)
    with Progress(f"read {source.topics.kept}", None) as progress:
        for messages in read_spans(source.connection, source.topics.kept, spans, batch=100):
            progress.advance(len(messages))
            originals, refined = [], []
            for message in messages:
                record = kept_record(message)
                if record.cause is None or record.cause >= data.view.cut[record.partition]:
                    continue
                if record.value is None:
                    for draw in draws.values():
                        draw.take_out(record.key)
                    continue
                pair = decoded(codec, message)
                originals.append(pair["itm_original"])
                refined.append(pair["itm_refined"])
                at = pair["source_timestamp_ms"]
                low, high = data.source_ms or (at, at)
                data.source_ms = (min(low, at), max(high, at))
                if record.epoch == data.epochs.get(record.partition) and record.cluster in draws:
                    draws[record.cluster].offer(record.key, record.priority, lambda p=pair: _kept_shown(p))  # type: ignore[misc]
            data.itm_original.add(np.array(originals, np.float64))
            data.itm_refined.add(np.array(refined, np.float64))
    for shown in data.clusters:
        shown.kept = draws[shown.cluster].items()[:PAIRS_SHOWN]


def _kept_shown(pair: dict[str, Any]) -> KeptShown:
    caption, more = _cut(pair["caption"])
    return KeptShown(
        pair["id"][:ID_CHARACTERS],
        caption,
        more,
        _cut(pair["generated_caption"])[0],
        pair["itm_original"],
        pair["itm_refined"],
        pair["source_partition"],
        pair["source_offset"],
        thumbnail(pair["image"]),
    )


def _walk_dead(source: StreamSource, data: ReportData, forgotten: set[str]) -> None:
    spans = whole(source.connection, source.topics.dead, data.view.partitions)
    with Progress(f"read {source.topics.dead}", None) as progress:
        for seen, message in read_dead_letters(source, spans):
            progress.advance()
            if seen.offset >= data.view.cut[seen.partition]:
                continue
            data.dead[seen.reason] += 1
            examples = data.dead_examples.setdefault(seen.reason, [])
            key = (seen.key or b"").decode("utf-8", "replace")
            if len(examples) < EXAMPLES_OF_A_REASON and key not in forgotten:
                size = len(message.value() or b"")
                examples.append(DeadExample(key[:ID_CHARACTERS], seen.partition, seen.offset, size, seen.detail))


def _look_up_dropped(
    source: StreamSource,
    data: ReportData,
    topic: str,
    reader: RawReader,
    dropped: dict[int, Draw[tuple[int, int], DroppedRow]],
    forgotten: set[str],
) -> None:
    """The dropped pairs' captions and pictures, from the raw topic."""
    chosen = {
        cluster: [row for row in draw.items() if row.id not in forgotten][:PAIRS_SHOWN]
        for cluster, draw in dropped.items()
    }
    wanted: dict[int, list[int]] = {}
    for row in (row for rows in chosen.values() for row in rows):
        wanted.setdefault(row.partition, []).append(row.offset)
    at = {(row.partition, row.offset): row for rows in chosen.values() for row in rows}
    found: dict[tuple[int, int], DroppedShown] = {}
    with Progress(f"look up {topic}", len(at)) as progress:
        for partition, offset, message in records_at(source.connection, topic, wanted):
            value = None if message is None else message.value()
            key = None if message is None else message.key()
            found[partition, offset] = _dropped_shown(at[partition, offset], key, value, reader)
            progress.advance()
    for shown in data.clusters:
        shown.dropped = [found[row.partition, row.offset] for row in chosen[shown.cluster]]


def _dropped_shown(row: DroppedRow, key: bytes | None, value: bytes | None, reader: RawReader) -> DroppedShown:
    caption, more, picture, missing = "", 0, None, "no longer in the raw topic"
    if value is not None:
        try:
            raw = reader.read(key, value)
        except UndecodableRecord as error:
            missing = error.reason
        else:
            caption, more = _cut(raw.caption)
            picture = thumbnail(bytes(raw.image)) if raw.image is not None else None
            missing = "not a picture" if raw.image is not None else "an image elsewhere, not fetched"
    pair_id = row.id[:ID_CHARACTERS]
    return DroppedShown(pair_id, caption, more, row.itm, row.why, row.partition, row.offset, picture, missing)


def _cut(text: str) -> tuple[str, int]:
    return text[:CAPTION_CHARACTERS], max(0, len(text) - CAPTION_CHARACTERS)


def pictures(clusters: Iterable[ClusterData]) -> tuple[int, int]:
    """How many pairs are shown with and without a picture."""
    found: list[bool] = []
    for one in clusters:
        found += [pair.picture is not None for pair in one.kept]
        found += [pair.picture is not None for pair in one.dropped]
    return sum(found), len(found) - sum(found)
