"""`recluster`: new centroids from a stream's newest index vectors, and what a switch to them will do before it is done.

The encoder, the codebook and the gate stay, so that a worker can switch while the stream runs; ITM and code baselines are
carried over, and the occupancy's is the window that was fitted.
"""

from __future__ import annotations

import math
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from state.changelog import ENTRY, decode_entry
from stream.allocator import bound_holes, give_all_back
from stream.arithmetic import in_the_set
from stream.bundle_fetch import store
from stream.bundles import announce_folder, announced, told
from stream.errors import TldrError
from stream.live_bundle import LiveBundle, live_bundle
from stream.recent_codes import Sample, recent_rows
from stream.report_data import Draw
from stream.rights import check_rights
from stream.stream_view import ChangelogFollower, ChangelogRecord, StreamSource, StreamView

if TYPE_CHECKING:
    from models.clustering import Clustering, Foretold
    from models.drift import DriftWindow, Signal

RECORDS = 1_000_000
MEMORY_MB = 1024
# Rows that are not fitted, to predict by and to measure the error by: a fifth, and no more than a point is known by.
HELD_OUT_SHARE = 5
HELD_OUT_MAX = 20_000
ENTRY_BYTES = 1000  # of an entry while it is drawn: its vector and Python's own
ENTRY_COPIES = 4  # of an entry's partition, cell and clusters afterwards
HOLES_MAX = 8 << 20  # bytes; the parts in which rows are looked at have less, what is sampled and fitted has more
MOVERS_SHOWN = 5
Z_95 = 1.96
MARGIN_WANTED = 0.02  # a ± of more is said to be wide

NOTHING_TO_DO = 9

_SINCE = re.compile(r"(\d+)\s*(min|h|d)")
_MINUTES = {"min": 1, "h": 60, "d": 1440}


@dataclass(frozen=True)
class ReclusterOptions:
    """The options of `recluster`; `tldr-stream recluster --help` says what each one means."""

    source: StreamSource
    bundle: str | None = None
    out: str | None = None
    records: int = RECORDS
    since: str | None = None
    memory_mb: int = MEMORY_MB
    seed: int = 0
    dry_run: bool = False
    if_drift: bool = False


@dataclass(frozen=True)
class Shift:
    """A cluster's share of the pairs, which is its share of the quota, before and after."""

    cluster: int
    before: float
    after: float


@dataclass(frozen=True)
class Coming:
    """What a switch does to pairs to come, if they are like those of the window. moved  the share whose cluster is another
    one than it would have been, ± margin at 95 %; quota_moved  the share of the quota that goes to other clusters.
    """

    moved: float
    margin: float
    quota_moved: float

    def lines(self) -> Iterator[str]:
        """For a person."""
        yield (
            f"pairs to come, if they are like these: {self.moved:.1%} (± {self.margin:.1%}) change cluster; "
            f"{self.quota_moved:.1%} of the quota moves"
        )
        if self.margin > MARGIN_WANTED:
            yield "  take a longer window (--records, --since) to know it better"


@dataclass(frozen=True)
class Churn:
    """What a switch does to pairs that are there. moved  the share that change cluster, ± at 95 %; cells  (partition, cluster).

    pairs  that were looked at, of so many.
    """

    pairs: int
    of: int
    moved: float
    margin: float
    cells_before: int
    cells_emptied: int
    cells_made: int
    quota_moved: float
    shifts: list[Shift]

    def lines(self, what: str) -> Iterator[str]:
        """For a person."""
        known = "" if self.pairs == self.of else f" (± {self.margin:.1%}, by {self.pairs:,} of them)"
        yield f"{self.of:,} {what}: {self.moved:.1%}{known} change cluster"
        yield (
            f"  cells: {self.cells_before:,} now, {self.cells_emptied:,} emptied, {self.cells_made:,} made; "
            f"{self.quota_moved:.1%} of the quota moves"
        )
        for shift in self.shifts:
            yield f"  cluster {shift.cluster}: {shift.before:.2%} → {shift.after:.2%}"


@dataclass
class ReclusterResult:
    """done: announced, predicted (--dry-run) or nothing (--if-drift without drift)."""

    done: str
    live: str
    because: str
    version: str | None = None
    uri: str | None = None
    clusters: int = 0
    window_pairs: int = 0
    rows_fitted: int = 0
    error_before: float = 0.0
    error_after: float = 0.0
    warning: str | None = None
    recent: Churn | None = None
    entries: Churn | None = None
    coming: Coming | None = None
    drift: list[Signal] = field(default_factory=list)

    @property
    def exit_status(self) -> int:
        """0 where something was done, NOTHING_TO_DO where not."""
        return NOTHING_TO_DO if self.done == "nothing" else 0

    def lines(self) -> Iterator[str]:
        """For a person."""
        for signal in self.drift:
            yield f"{'drift' if signal.alarm else 'quiet'}: {signal.words} (p {signal.p_value:.2g})"
        if self.because:
            yield self.because
        if self.done == "nothing":
            yield f"nothing was done: bundle {self.live[:12]} stays"
            return
        yield (
            f"{self.clusters:,} clusters fitted to {self.rows_fitted:,} of {self.window_pairs:,} pairs of the window, from the "
            f"centroids of bundle {self.live[:12]}"
        )
        change = self.error_after / self.error_before - 1 if self.error_before else 0.0
        yield f"quantisation error of pairs that were not fitted: {change:+.1%}"
        if self.recent is not None:
            yield from self.recent.lines("pairs of the window")
        if self.entries is not None:
            yield from self.entries.lines("entries of the reduced set")
        if self.coming is not None:
            yield from self.coming.lines()
        if self.warning:
            yield f"warning: {self.warning}"
        if self.version is None:
            yield "nothing was written: this is what a switch would do"
        else:
            yield f"announced bundle {self.version[:12]} at {self.uri}"


def recluster(options: ReclusterOptions, say: Callable[[str], None] = lambda line: None) -> ReclusterResult:
    """Fits, predicts, and unless it is a dry run writes a bundle and announces it.

    Raises TldrError where there is no stream, bundle or enough rows, ModelError for a damaged bundle.
    """
    source = options.source
    since_ms = _since_ms(options.since, time.time())
    if options.out is not None and Path(options.out).exists():
        raise TldrError(f"{options.out} exists: a bundle is never changed, give another --out")
    bound_holes(HOLES_MAX)
    check_rights(source.connection, "recluster --dry-run" if options.dry_run else "recluster", stream=source.name)
    view, entries = _read(source, options.memory_mb << 20)
    live = live_bundle(source.connection, view, options.bundle)
    result = ReclusterResult("nothing", live.version, "", clusters=len(live.clustering.centroids))
    if options.if_drift and not _drifted(options, view, live, result):
        return result
    tokens = view.settings.tokens
    sample = sample_within(options.memory_mb << 20, live.clustering, tokens, entries, options.seed)
    for rows in recent_rows(source, view, options.records, since_ms):
        sample.offer(rows)
    _refuse_too_few(options, sample.offered, len(live.clustering.centroids))
    new, vectors, errors = refitted(live.clustering, sample, entries, options.seed, result, say)
    if options.dry_run:
        result.done = "predicted"
        return result
    uri = _write(options, view, live, new, vectors, errors)
    announcement = announce_folder(source.connection, uri, source.name)
    result.done, result.version, result.uri = "announced", announcement.version, announcement.uri
    return result


class Entries(NamedTuple):
    """A uniform sample of the reduced set. vectors (n, L), partitions (n,); of  so many in all."""

    vectors: NDArray[np.uint16]
    partitions: NDArray[np.int64]
    of: int


def sample_within(memory_bytes: int, live: Clustering, tokens: int, entries: Entries | None, seed: int) -> Sample:
    """An empty sample of so many rows that they can be fitted in this memory, which the entries share.

    Raises TldrError where they would be too few for the clusters.
    """
    from models.clustering import memory_for, rows_within

    give_all_back()  # what the drawing of entries has left
    there = 0 if entries is None else entries.vectors.nbytes + ENTRY_COPIES * entries.partitions.nbytes
    rows, least = rows_within(memory_bytes - there, live, tokens), _least_rows(len(live.centroids))
    if rows < least:
        enough = -(-(memory_for(least, live, tokens) + there) >> 20)
        raise TldrError(
            f"--memory-mb {memory_bytes >> 20} has no room to fit {len(live.centroids):,} clusters: give {enough:,} or more"
        )
    return Sample(rows, seed)


def refitted(
    live: Clustering,
    sample: Sample,
    entries: Entries | None,
    seed: int,
    result: ReclusterResult,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Clustering, NDArray[np.uint16], NDArray[np.float64]]:
    """(clusters fitted to the sample, its vectors, errors of those that were not fitted); fills in what was seen."""
    from models.clustering import foretell, refit, too_small

    vectors = sample.rows()
    give_all_back()
    say(f"{sample.offered:,} pairs in the window, {len(vectors):,} sampled")
    clusters = len(live.centroids)
    apart, fitted = _held_out(vectors, clusters)
    fit = refit(live, fitted, apart, seed)
    new = fit.clustering
    say("fitted; looking at what changes")
    errors = new.errors(apart, new.assign(apart))
    result.window_pairs, result.rows_fitted = sample.offered, len(fitted)
    result.error_before = float(live.errors(apart, live.assign(apart)).mean())
    result.error_after = float(errors.mean())
    result.warning = too_small(len(fitted), clusters)
    nowhere = np.zeros(len(vectors), np.int64)
    result.recent = churn(live.assign(vectors), new.assign(vectors), clusters, nowhere, sample.offered)
    result.coming = coming(foretell(live, fit, fitted, apart, seed))
    if entries is not None:
        were, are = live.assign(entries.vectors), new.assign(entries.vectors)
        result.entries = churn(were, are, clusters, entries.partitions, entries.of)
    return new, vectors, errors


def churn(
    were: NDArray[np.int32], are: NDArray[np.int32], clusters: int, partitions: NDArray[np.int64], of: int
) -> Churn:  # fmt: skip
    """What becomes of pairs that were in these clusters and will be in those; they stand for `of` pairs."""
    n = len(were)
    moved = float((were != are).mean())
    before, after = np.bincount(were, minlength=clusters) / n, np.bincount(are, minlength=clusters) / n
    cells, cells_after = (set(np.unique(partitions * clusters + of_all).tolist()) for of_all in (were, are))
    largest = np.argsort(-np.abs(after - before), kind="stable")[:MOVERS_SHOWN].tolist()
    shifts = [Shift(c, float(before[c]), float(after[c])) for c in largest if before[c] != after[c]]
    quota = float(np.abs(after - before).sum()) / 2
    return Churn(
        n,
        of,
        moved,
        margin_of(moved, n, of),
        len(cells),
        len(cells - cells_after),
        len(cells_after - cells),
        quota,
        shifts,
    )


def coming(told: Foretold) -> Coming:
    """What is foretold, with its ±."""
    quota = float(np.abs(told.after - told.before).sum()) / 2
    return Coming(told.moved, margin_of(told.moved, told.rows), quota)


def margin_of(share: float, n: int, of: float = math.inf) -> float:
    """The ± at 95 % of a share of `n` pairs, drawn from `of` (Wilson's interval: none is not known to be never)."""
    if n >= of:
        return 0.0
    rows = n / (1 - n / of)
    middle = (share + Z_95**2 / (2 * rows)) / (1 + Z_95**2 / rows)
    half = Z_95 / (1 + Z_95**2 / rows) * math.sqrt(share * (1 - share) / rows + Z_95**2 / (4 * rows**2))
    return max(middle + half - share, share - middle + half)


def reclustered_manifest(
    live: LiveBundle, new: Clustering, window: NDArray[np.uint16], errors: NDArray[np.float64], seed: int, about: dict[str, Any]
) -> dict[str, Any]:  # fmt: skip
    """What the manifest of the reclustered bundle says.

    window  (n, L) the sample of the window: the baseline of occupancy; errors  of its rows that were not fitted.
    """
    from models.drift import error_baseline

    data = {k: v for k, v in live.manifest.data.items() if k not in ("version", "space", "files", "format")}
    baselines = dict(data.get("baselines", {}))
    baselines.pop("quantisation_error", None)
    occupancy = np.bincount(new.assign(window), minlength=len(new.centroids))
    baselines |= {"cluster_occupancy": occupancy.tolist(), "occupancy_pairs": len(window)}
    if (of_errors := error_baseline(errors)) is not None:
        baselines["quantisation_error"] = of_errors
    clustering = dict(data["clustering"])
    clustering.pop("inertia", None)  # of the bootstrap shard; the error's baseline says it of this window
    return data | {
        "baselines": baselines,
        "clustering": clustering | {"seed": seed, "reclustered_from": live.version},
        "reclustered": about,
    }


# -- steps -------------------------------------------------------------------------------------------------------------


def _read(source: StreamSource, memory_bytes: int) -> tuple[StreamView, Entries | None]:
    """What the stream has committed, and of its reduced set so many entries as half of the memory holds for a moment."""
    drawn: Draw[tuple[int, bytes], NDArray[np.uint16]] = Draw(memory_bytes // (4 * ENTRY_BYTES))
    view = ChangelogFollower(source).advance(lambda record: _take_entry(record, drawn), wait=True)
    return view, taken(drawn, in_the_set(view.totals))


def taken(drawn: Draw[tuple[int, bytes], NDArray[np.uint16]], of: int) -> Entries | None:
    """The drawn entries, which stand for `of`; None where there are none."""
    held = drawn.items_with_keys()
    if not held:
        return None
    return Entries(np.stack([vector for _, vector in held]), np.array([p for (p, _), _ in held], np.int64), of)


def _take_entry(record: ChangelogRecord, entries: Draw[tuple[int, bytes], NDArray[np.uint16]]) -> None:
    partition, key, value = record
    if key[:1] != ENTRY:
        return
    if value is None:
        entries.take_out((partition, key))
    else:
        # an entry's key is a keyed hash of its id: the smallest ones are a uniform draw
        entries.offer((partition, key), int.from_bytes(key[1:9], "big"), lambda v=value: decode_entry(v).vector.copy())  # type: ignore[misc]


def _drifted(options: ReclusterOptions, view: StreamView, live: LiveBundle, result: ReclusterResult) -> bool:
    """Whether a signal that reclustering cures alarms; fills in what was seen."""
    from models.drift import CURED_BY_RECLUSTERING, LEAST_PAIRS

    if pending := _pending(options.source, live):
        result.because = f"bundle {pending[:12]} is announced already and no worker has switched to it yet"
        if options.bundle is not None:
            result.because += " (one that was given --bundle never does)"
        return False
    missing = [name for name in CURED_BY_RECLUSTERING if name in live.baseline.missing]
    if len(missing) == len(CURED_BY_RECLUSTERING):
        raise TldrError(
            f"bundle {live.version[:12]} has no baseline of occupancy or quantisation error: run `recluster` once without "
            "--if-drift, which makes a bundle that has both"
        )
    window = drift_window(options.source, view, live)
    result.drift = [s for s in window.look() if s.name in CURED_BY_RECLUSTERING] if window.pairs else []
    if window.pairs < LEAST_PAIRS:
        result.because = (
            f"{window.pairs:,} pairs with bundle {live.version[:12]} are too few to judge drift by ({LEAST_PAIRS})"
        )
        return False
    if missing:
        result.because = f"no baseline of {missing[0]} in this bundle: judged without it"
    return any(signal.alarm for signal in result.drift)


def drift_window(source: StreamSource, view: StreamView, live: LiveBundle, size: int | None = None) -> DriftWindow:
    """The newest pairs since their partitions switched to this bundle as a models.drift.DriftWindow."""
    from models.drift import WINDOW_PAIRS, DriftWindow

    window = DriftWindow(live.baseline, live.clustering, view.settings.tokens, size or WINDOW_PAIRS)
    epochs = view.epochs_with(live.version)
    for rows in recent_rows(source, view, 2 * window.size):
        if epochs.get(rows.partition) == rows.epoch:
            window.add(rows.itms, rows.clusters, rows.vectors)
    return window


def _pending(source: StreamSource, live: LiveBundle) -> str | None:
    """A bundle that was announced to this stream after its live one, and could replace it.

    Workers that were given --bundle begin with one that was never announced. It is older than all that this stream was told
    of by name, as by an earlier `recluster`; what was announced to any stream may have been there before.
    """
    fitting = [
        one for one in told(announced(source.connection), source.name).values() if one.space == live.manifest.space
    ]
    at = next((i for i, one in enumerate(fitting) if one.version == live.version), None)
    after = [one for one in fitting if one.stream] if at is None else fitting[at + 1 :]
    return after[-1].version if after else None


def _refuse_too_few(options: ReclusterOptions, rows: int, clusters: int) -> None:
    if rows == 0:
        raise TldrError(
            f"{options.source.topics.codes} has no index vectors in that window: let a worker run, or take a longer one "
            "(--records, --since)"
        )
    if rows < _least_rows(clusters):
        raise TldrError(
            f"{rows:,} pairs of the window cannot make {clusters:,} clusters: take a longer window (--records, --since)"
        )


def _least_rows(clusters: int) -> int:
    return clusters + max(1, clusters // HELD_OUT_SHARE)


def _held_out(vectors: NDArray[np.uint16], clusters: int) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """(rows apart, rows to fit); the sample's order is random already."""
    apart = min(len(vectors) // HELD_OUT_SHARE, HELD_OUT_MAX, len(vectors) - clusters)
    return vectors[:apart], vectors[apart:]


def _write(
    options: ReclusterOptions,
    view: StreamView,
    live: LiveBundle,
    new: Clustering,
    window: NDArray[np.uint16],
    errors: NDArray[np.float64],
) -> str:
    """Where the new bundle lies: at --out, else beside the live one, named by its stream and version."""
    from models.bundle import write_bundle
    from models.errors import BundleError
    from models.loaded import clusters_content

    about = {
        "from": live.version,
        "stream": options.source.name,
        "records": options.records,
        "since": options.since,
        "rows": len(window),
        "cut": {str(p): cut for p, cut in sorted(view.cut.items())},
    }
    contents = dict(live.contents) | {"clusters.safetensors": clusters_content(new)}
    manifest = reclustered_manifest(live, new, window, errors, options.seed, about)
    beside = str(options.out or live.uri)
    remote = "://" in beside
    near = None if remote else Path(beside).absolute().parent
    if near is not None:
        near.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".reclustered-", dir=near) as made:
        folder = Path(made) / "bundle"
        written = write_bundle(folder, contents, manifest)
        if written.space != live.manifest.space:
            raise BundleError(
                f"{live.uri} was made by another version of this software: its bundle {written.space[:12]} differs"
            )
        name = f"{options.source.name}-{written.version[:12]}"
        out = options.out or f"{near or beside.rstrip('/').rpartition('/')[0]}/{name}"
        if remote:
            store(folder, out)
        elif Path(out).exists():
            raise TldrError(
                f"{out} exists: the same window was reclustered with the same seed before; announce that one"
            )
        else:
            folder.rename(out)
    return out


def _since_ms(since: str | None, now_s: float) -> int | None:
    if since is None:
        return None
    found = _SINCE.fullmatch(since.strip())
    if found is None:
        raise TldrError(f"--since {since}: give a time like 30min, 12h or 7d")
    return int((now_s - 60 * int(found[1]) * _MINUTES[found[2]]) * 1000)
