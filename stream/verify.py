"""`verify`: the committed stream against the batch reference, for a sceptic.

Replays the rows of `pair-codes` through stream/batch_tldr.py, which shares no line with state/, and compares what it picks
with what the kept topic and the changelog hold; recomputes clusters from the recorded vectors; and looks for raw records
that left no trace. A partition at a time, since the reference holds a partition's ids in memory.

With `--from SNAPSHOT` the replay begins at the snapshot's cut, with the state that was recorded there. That proves: if the
state at that cut was right, all that came after is; so what was verified before each snapshot is proven for ever, from
snapshot to snapshot, whatever has expired since.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import lmdb
import numpy as np
from numpy.typing import NDArray

from models.errors import BundleError
from state.changelog import (
    ENTRY,
    FORGOTTEN,
    KNOWN,
    CellCounts,
    Entry,
    Totals,
    decode_entry,
    decode_forgotten,
    known_columns,
    number_of,
)
from state.partition import Fate
from state.priority import hash_id, id_key
from stream.batch_tldr import Before, Kept, Outcome, Row, reduce_partition
from stream.bundle_fetch import fetch
from stream.bundles import NULL, announced, known_to
from stream.cut import codes_position, first_row_offset, written
from stream.errors import Differs, NotVerified, TldrError
from stream.kafka import partition_counts, start_offsets, topic_id
from stream.kept_index import KeptIndex, Live
from stream.progress import Progress
from stream.rights import check_rights
from stream.snapshot_state import ROW_TOTALS, Hashes, PartitionState, TakenState
from stream.stream_view import (
    ChangelogFollower,
    ChangelogRecord,
    CodesRow,
    KeptRecord,
    StreamSource,
    StreamView,
    read_codes,
    read_dead_letters,
    read_kept,
    read_spans,
    whole,
)

if TYPE_CHECKING:
    from models.model import PairModel

log = logging.getLogger(__name__)

# A difference is shown up to this often a kind; `--json` has them all.
SHOWN = 20
ASSIGN_ROWS = 4096
# Gaps nearer than this are read in one go: a seek costs more than these many records.
GAP_SPAN = 500
SPANS_MAX = 50

NAMES = {
    Fate.KEPT: "kept",
    Fate.OVER_QUOTA: "over quota",
    Fate.OVER_CAP: "over cap",
    Fate.BELOW_GATE: "below gate",
    Fate.DUPLICATE: "duplicate",
    Fate.FORGOTTEN: "forgotten",
}
COUNTED = frozenset({Fate.KEPT, Fate.OVER_QUOTA, Fate.OVER_CAP})

# What can differ, in the order in which it is shown, and what it means.
KINDS = {
    "missing": "picked by the batch reference, not in the kept topic",
    "extra": "in the kept topic, not picked by the batch reference",
    "missing_in_changelog": "picked by the batch reference, no entry in the changelog",
    "extra_in_changelog": "an entry in the changelog, not picked by the batch reference",
    "fate_differs": "recorded with another fate, position or original than the batch reference's",
    "cluster_differs": "recorded in another cluster than the bundle assigns to its vector",
    "unaccounted": "a raw record that left neither a row nor a dead letter",
    "counted_twice": "a raw record that left more than one row or dead letter",
    "captioned_twice": "a pair that was made visible twice",
    "cell_differs": "a cell's counters in the changelog are not those of the reference",
    "known_differs": "an id that the changelog knows or has forgotten and the reference has not, or the other way round",
    "totals_differ": "the changelog's totals are not the sum of the rows",
}


HEADLINE = ("missing", "extra", "cluster_differs", "unaccounted")


@dataclass(frozen=True)
class Difference:
    """One thing that is not as it should be. offset: of the raw topic, -1 where nothing tells it."""

    kind: str
    partition: int
    offset: int
    id: str
    detail: str


@dataclass
class Verified:
    """What `verify` found.

    verified_from  by partition: the input offset from which on rows were there to replay
    not_verified   what could not be checked, and why; nothing of it is in the counts
    complete       whether everything was checked: only then a count of 0 says that there is none
    snapshot       SHA-256 of the manifest that the replay began from; None: it began with the stream, or with what is left
    """

    stream: str
    cut: dict[int, int]
    verified_from: dict[int, int]
    rows: int = 0
    dead_letters: int = 0
    pairs: int = 0
    captions_visible: int = 0
    clusters_checked: int = 0
    missing: int = 0
    extra: int = 0
    missing_in_changelog: int = 0
    extra_in_changelog: int = 0
    fate_differs: int = 0
    cluster_differs: int = 0
    unaccounted: int = 0
    counted_twice: int = 0
    captioned_twice: int = 0
    cell_differs: int = 0
    known_differs: int = 0
    totals_differ: int = 0
    complete: bool = True
    snapshot: str | None = None
    differences: list[Difference] = field(default_factory=list)
    not_verified: list[str] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """How often each kind of difference was found."""
        return {kind: getattr(self, kind) for kind in KINDS}

    def lines(self) -> Iterator[str]:
        """The result for a person: what differs first, what was compared last."""
        for kind, meaning in KINDS.items():
            found = [d for d in self.differences if d.kind == kind]
            if found:
                yield f"{kind}: {meaning}"
            for d in found[:SHOWN]:
                yield f"  partition {d.partition} offset {d.offset} id {d.id or '(none)'}: {d.detail}"
            if len(found) > SHOWN:
                yield f"  … and {len(found) - SHOWN} more (--json lists them)"
        yield f"{self.stream} at {written(self.cut)}: {self.rows:,} rows, {self.dead_letters:,} dead letters,"
        yield f"{self.pairs:,} pairs in the set, {self.clusters_checked:,} clusters recomputed"
        if self.snapshot is not None:
            yield f"since the cut {written(self.verified_from)}, from the state of the snapshot {self.snapshot}"
        if self.not_verified:  # then a "0 missing" would say more than was looked at
            counts = [f"{count:,} {kind.replace('_', ' ')}" for kind, count in self.counts.items() if count]
            yield f"in the part that could be verified: {', '.join(counts) or 'nothing differs'}"
        else:
            yield ", ".join(f"{self.counts[kind]:,} {kind.replace('_', ' ')}" for kind in HEADLINE)
            rest = sum(count for kind, count in self.counts.items() if kind not in HEADLINE)
            yield f"{rest:,} differences of other kinds"
        for reason in self.not_verified:
            yield f"NOT VERIFIED: {reason}"

    def raise_for_status(self) -> None:
        """Raises Differs (exit status 5) or NotVerified (4) unless everything was compared and equal."""
        if self.differences:
            found = ", ".join(f"{count} {kind}" for kind, count in self.counts.items() if count)
            raise Differs(f"the stream {self.stream} differs from the batch reference: {found}")
        if self.not_verified:
            raise NotVerified(f"the stream {self.stream} was verified in part: {self.not_verified[0]}")

    def add(self, kind: str, partition: int, offset: int, pair_id: str, detail: str) -> None:
        setattr(self, kind, getattr(self, kind) + 1)
        self.differences.append(Difference(kind, partition, offset, pair_id, detail))


def verify(
    source: StreamSource,
    raw_topic: str,
    model_of: Callable[[str], PairModel | None],
    *,
    taken: TakenState | None = None,
    workspace: Path | None = None,
) -> Verified:
    """Compares the stream with the batch reference at its newest cut.

    taken      a snapshot to start from: rows before its cut are not needed, and not looked at
    model_of   the model of a bundle version, None where it cannot be had (clusters are then not verified)
    workspace  folder for temporary indexes; default: the system's
    """
    check_rights(source.connection, "verify", raw=raw_topic, stream=source.name)
    folder = Path(tempfile.mkdtemp(prefix="tldr-verify-", dir=workspace))
    try:
        with _Changelog(folder / "changelog") as changelog, KeptIndex(folder / "kept") as index:
            # To the true end: a kept pair that is visible already must not be ahead of the changelog that we compare with.
            view = ChangelogFollower(source).advance(changelog.take, wait=True)
            changelog.flush()
            out = Verified(source.name, view.cut, {}, snapshot=taken.sha256 if taken else None)
            if taken is not None:
                taken.refuse_another_stream(view)
            raw_from = _raw_from(source, raw_topic, view, out)
            spans = whole(source.connection, source.topics.kept, view.partitions)
            with Progress("reading kept pairs", sum(end - start for start, end in spans.values())) as progress:
                index.fill(_advancing(read_kept(source, spans), progress), view.cut)
            out.captions_visible = index.visible
            for repeated in index.repeated:
                out.add(
                    "captioned_twice", -1, repeated.cause, repeated.id, f"again at kept offset {repeated.kept_offset}"
                )
            clusters = _Clusters(model_of, out)
            for p in sorted(view.partitions):
                at = taken.partition(p) if taken else None
                _Partition(source, raw_topic, raw_from, view, p, changelog, index, clusters, out, at).verify()
            clusters.conclude()
            out.complete = not out.not_verified
            return out
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _advancing(batches: Iterator[list[KeptRecord]], progress: Progress) -> Iterator[list[KeptRecord]]:
    for batch in batches:
        yield batch
        progress.advance(len(batch))


def _raw_from(source: StreamSource, raw_topic: str, view: StreamView, out: Verified) -> dict[int, int] | None:
    """The first raw offset that is still there, by partition; None where the raw topic is gone."""
    found = partition_counts(source.connection, [raw_topic])
    if raw_topic not in found:
        out.not_verified.append(
            f"the raw topic {raw_topic} does not exist, so gaps in the rows cannot be looked up in it"
        )
        return None
    if topic_id(source.connection, raw_topic) != view.settings.raw_topic_id:
        raise TldrError(
            f"{raw_topic} is not the raw topic of the stream {source.name}, or was recreated: give its --topic"
        )
    return start_offsets(source.connection, raw_topic, view.partitions)


def models_of(
    source: StreamSource, bundle: str | None = None, *, null: bool = False
) -> Callable[[str], PairModel | None]:
    """Where `verify` finds the model of a bundle version: in the folder `bundle`, or else where it was announced to be.

    null  the stream began with `consume --model null`
    """

    def find(version: str) -> PairModel | None:
        from models.bundle import load_model, read_manifest
        from models.null import NullModel

        if bundle is not None and read_manifest(bundle).version.startswith(version):
            return load_model(bundle, matching=False)
        if null and NullModel().version == version:
            return NullModel()
        announcement = known_to(announced(source.connection), source.name).get(version)
        if announcement is None:
            return None
        uri = announcement.uri
        if uri.startswith(NULL):
            return NullModel.at(uri)
        with tempfile.TemporaryDirectory(prefix="tldr-bundle-") as folder:
            try:
                return load_model(fetch(uri, version, Path(folder)), matching=False)
            except BundleError as error:
                log.warning("bundle %s cannot be loaded: %s", version[:12], error)
                return None

    return find


# -- one partition -----------------------------------------------------------------------------------------------------


class _Partition:
    """The comparison of one partition."""

    def __init__(
        self,
        source: StreamSource,
        raw_topic: str,
        raw_from: Mapping[int, int] | None,
        view: StreamView,
        number: int,
        changelog: _Changelog,
        index: KeptIndex,
        clusters: _Clusters,
        out: Verified,
        taken: PartitionState | None,
    ) -> None:
        self.taken = taken
        self.source, self.raw_topic, self.raw_from = source, raw_topic, raw_from
        self.settings, self.head, self.number = view.settings, view.partitions[number], number
        self.changelog, self.index, self.clusters, self.out = changelog, index, clusters, out
        self.recorded = _Recorded()
        self.vectors: dict[int, int] = {}  # offset of a kept pair → hash of its vector
        self.removed_by: list[tuple[int, str]] = []
        self.evicted: Counter[tuple[int, int]] = Counter()
        self.regrouped: _Regrouped

    def verify(self) -> None:
        """Everything about this partition, into the result."""
        cut, begin = self.head.cut, self.head.begin
        span = whole(self.source.connection, self.source.topics.codes, [self.number])[self.number]
        start = self._taken_from(span, cut) if self.taken else self._verifiable_from(span, begin, cut)
        self.out.verified_from[self.number] = start
        exact = (
            start == begin
        )  # whether all that the rows came upon is known, and not only what the changelog still says
        before = None
        if self.taken is not None and start == self.taken.offset:
            exact, before = True, self._state_taken(self.taken)
            span = self._narrowed(span, start, cut)
        elif start > begin:
            before = self._state_before(span, start)
        letters, letters_expired = self._dead_letters(start)
        gaps = _Gaps(self.number, start, cut, letters, self.out)
        regrouped = self._regrouping(before, span, start)
        if regrouped is None:
            self._pass_over(span, gaps, letters, letters_expired)
            return
        self.regrouped = regrouped
        reduced, outcomes = reduce_partition(
            self._rows(span, gaps),
            seed=self.settings.seed,
            partition=self.number,
            p=self.settings.ratio.p,
            q=self.settings.ratio.q,
            cap=self.settings.cell_cap,
            window=self.settings.dedupe_window,
            gate=self.settings.gate,
            switches=[(switch.input_offset, epoch) for epoch, switch in sorted(self.head.switches.items())] or [(0, 0)],
            cluster_in=regrouped.cluster_in,
            before=before,
        )
        self.clusters.settle()
        if regrouped.unknown:
            self.out.not_verified.append(
                f"partition {self.number}: {regrouped.unknown} pairs from before offset {start} that left since came through "
                "a switch, and nothing tells their clusters in between: cells that had their cap may show differences"
            )
        gaps.end()
        self.out.rows += len(self.recorded.ids)
        self.out.dead_letters += len(letters)
        self.out.pairs += self.index.live_count(self.number)
        self._compare_fates(outcomes, start, exact)
        self._compare_takedowns(start, cut)
        self._compare_membership(reduced, outcomes, start)
        self._compare_known(outcomes, before, start, exact)
        if exact:
            self._compare_cells(outcomes, reduced)
        self._look_up(gaps, letters_expired)
        if start == begin and not letters_expired:
            self._compare_totals(len(letters))
        elif exact:
            self._compare_totals(None)

    def _regrouping(self, before: Before | None, span: tuple[int, int], start: int) -> _Regrouped | None:
        """What tells the clusters of pairs in later epochs than their own; None: a bundle for that cannot be had."""
        switches = self.head.switches
        if self.settings.cell_cap is None or len(switches) < 2:
            return _Regrouped({})
        models = {epoch: self.clusters.model(switch.bundle) for epoch, switch in switches.items() if epoch > 0}
        if missing := sorted({switches[epoch].bundle for epoch, model in models.items() if model is None}):
            self.out.not_verified.append(
                f"partition {self.number}: with a cap, who leaves after a switch depends on the bundle "
                f"{', '.join(version[:12] for version in missing)}, which is neither announced nor given: give --bundle FOLDER"
            )
            return None
        regrouped = _Regrouped({epoch: model for epoch, model in models.items() if model is not None})
        if before is not None:
            offsets = {pair_id: kept.offset for pair_id, kept in before.reduced.values()}
            for pair_id, offset, epoch, vector in self.changelog.vectors(self.number):
                if offsets.get(pair_id) == offset:
                    regrouped.add(offset, epoch, vector)
            for row in read_codes(self.source, {self.number: span}, below={self.number: self.head.cut}):
                for gone in row.removed if row.offset >= start and row.fate in COUNTED else ():
                    if gone in offsets:
                        regrouped.say(row.epoch, offsets[gone], row.cluster)
        return regrouped

    def _pass_over(self, span: tuple[int, int], gaps: _Gaps, letters: Mapping[int, int], letters_expired: bool) -> None:
        """What can be said without the reference: clusters, and raw records without a trace."""
        self.regrouped = _Regrouped({})
        for _ in self._rows(span, gaps):
            pass
        self.clusters.settle()
        gaps.end()
        self.out.rows += len(self.recorded.ids)
        self.out.dead_letters += len(letters)
        self.out.pairs += self.index.live_count(self.number)
        self._look_up(gaps, letters_expired)

    def _verifiable_from(self, span: tuple[int, int], begin: int, cut: int) -> int:
        """The input offset from which on all rows are still there."""
        if begin >= cut or span[0] == 0:
            return begin
        first = first_row_offset(self.source, self.number, *span)
        if first is not None and first <= begin:
            return begin
        start = cut if first is None else min(first, cut)
        if start == cut:
            self.out.not_verified.append(f"partition {self.number}: all pair-codes have expired; nothing was replayed")
        else:
            self.out.not_verified.append(
                f"partition {self.number}: pair-codes before input offset {start} have expired (the stream began at "
                f"{begin}); from there on every fate was replayed, beginning with the counters that the rows carry and the "
                "pairs of the changelog; of older pairs only that kept topic and changelog agree"
            )
        return start

    def _rows(self, span: tuple[int, int], gaps: _Gaps) -> Iterator[Row]:
        """The recorded rows as the reference reads them; notes what else is to be compared, on the way."""
        total = self.head.cut - self.head.begin
        with Progress(f"replaying partition {self.number}", total, "rows") as progress:
            for row in read_codes(self.source, {self.number: span}, below={self.number: self.head.cut}):
                progress.advance()
                if not gaps.row(row):
                    continue
                self.recorded.add(row)
                if row.fate == Fate.KEPT and row.vector is not None:
                    self.vectors[row.offset] = hash(row.vector.tobytes())
                    self.regrouped.add(row.offset, row.epoch, row.vector)
                self.removed_by += [(row.offset, gone) for gone in row.removed]
                if row.fate in COUNTED:
                    self.evicted[row.epoch, row.cluster] += len(row.removed)
                self.clusters.check(row)
                yield _as_row(row)

    def _dead_letters(self, start: int) -> tuple[dict[int, int], bool]:
        """The raw offsets of the partition's dead letters, and whether some of them may have expired."""
        span = whole(self.source.connection, self.source.topics.dead, [self.number])[self.number]
        letters: dict[int, int] = {}
        for letter, _ in read_dead_letters(self.source, {self.number: span}):
            if not start <= letter.offset < self.head.cut:
                continue
            if letter.offset in letters:
                self.out.add(
                    "counted_twice", self.number, letter.offset, _text(letter.key),
                    f"dead letters at {letters[letter.offset]} and {letter.letter_offset}",
                )  # fmt: skip
            letters[letter.offset] = letter.letter_offset
        return letters, span[0] > 0

    # -- what is compared ----------------------------------------------------------------------------------------------

    def _compare_fates(self, outcomes: Mapping[int, Outcome], start: int, exact: bool) -> None:
        for pair_id, offset, fate, position, duplicate_of in self.recorded:
            expected = outcomes[offset]
            got = f"{NAMES[fate]}"
            wanted = expected.fate
            if fate in COUNTED:
                got, wanted = f"{got} at position {position}", f"{wanted} at position {expected.position}"
            elif fate == Fate.DUPLICATE and (exact or expected.duplicate_of >= start):
                got, wanted = f"{got} of {duplicate_of}", f"{wanted} of {expected.duplicate_of}"
            if got != wanted:
                self.out.add("fate_differs", self.number, offset, pair_id, f"recorded {got}, reference {wanted}")

    def _compare_takedowns(self, start: int, cut: int) -> None:
        """The first row that says `forgotten` is the takedown's own; the changelog remembers it by its offset."""
        key = id_key(self.settings.seed)
        taken_down = self.changelog.forgotten.get(self.number, {})
        seen = set()
        for pair_id, offset, fate, _, _ in self.recorded:
            if fate != Fate.FORGOTTEN or pair_id in seen:
                continue
            seen.add(pair_id)
            at = taken_down.get(hash_id(key, pair_id)[0])
            if at is None or (at != offset and start <= at < cut):
                why = "nobody took it down" if at is None else f"it was taken down at {at}"
                self.out.add("fate_differs", self.number, offset, pair_id, f"recorded forgotten, and {why}")

    def _compare_membership(self, reduced: Mapping[str, Kept], outcomes: Mapping[int, Outcome], start: int) -> None:
        number, out = self.number, self.out
        rest = dict(reduced)
        for live in self.index.live(number):
            expected = rest.pop(live.id, None)
            where = f"at kept offset {live.kept_offset}"
            if expected is None:
                out.add(
                    "extra", number, -1 if live.cause is None else live.cause, live.id, f"{where}, {self._why(live)}"
                )
            elif (live.cause, live.epoch, live.cluster) != (expected.offset, expected.epoch, expected.cluster):
                got = f"cause {live.cause}, epoch {live.epoch}, cluster {live.cluster}"
                wanted = f"{expected.offset}, {expected.epoch}, {expected.cluster}"
                out.add(
                    "missing", number, expected.offset, live.id, f"{where} stands another record: {got}; not {wanted}"
                )
        for pair_id, kept in rest.items():
            out.add("missing", number, kept.offset, pair_id, f"epoch {kept.epoch}, cluster {kept.cluster}")
        rest = dict(reduced)
        for pair_id, offset, epoch, cluster, vector in self.changelog.entries(number):
            expected = rest.pop(pair_id, None)
            if expected is None:
                out.add("extra_in_changelog", number, offset, pair_id, f"epoch {epoch}, cluster {cluster}")
            elif (offset, epoch, cluster) != (expected.offset, expected.epoch, expected.cluster):
                wanted = f"{expected.offset}, {expected.epoch}, {expected.cluster}"
                out.add("missing_in_changelog", number, expected.offset, pair_id,
                        f"its entry says offset {offset}, epoch {epoch}, cluster {cluster}; not {wanted}")  # fmt: skip
            elif offset >= start and self.vectors.get(offset) != vector:
                out.add(
                    "missing_in_changelog", number, offset, pair_id, "its entry has another index vector than its row"
                )
        for pair_id, kept in rest.items():
            out.add("missing_in_changelog", number, kept.offset, pair_id, f"epoch {kept.epoch}, cluster {kept.cluster}")

    def _why(self, live: Live) -> str:
        if live.cause is None:
            return "no worker wrote it (it has no cause)"
        at = self.recorded.fate_at(live.cause)
        if at is None:
            return "its cause left no row"
        pair_id, fate = at
        return f"its cause was recorded {NAMES[fate]}" + ("" if pair_id == live.id else f" for {pair_id}")

    def _compare_known(self, outcomes: Mapping[int, Outcome], before: Before | None, start: int, exact: bool) -> None:
        """The K and F records against what was counted and taken down: by them a worker knows an id again."""
        key, window = id_key(self.settings.seed), self.settings.dedupe_window
        since = 0 if exact else start
        known = dict(before.known) if before else {}
        taken_down = self.changelog.forgotten.get(self.number, {})
        if exact:
            forgotten = self.taken.forgotten.as_dict() if self.taken else {}
        else:
            forgotten = {name: at for name, at in taken_down.items() if at < start}
        names: dict[int, str] = {}
        for pair_id, offset, fate, *_ in self.recorded:
            if fate == Fate.FORGOTTEN:
                name = hash_id(key, pair_id)[0]
                names[name] = pair_id
                forgotten.setdefault(name, offset)
            elif outcomes[offset].position >= 0:
                name = hash_id(key, pair_id)[0]
                names[name] = pair_id
                known[name] = offset
        # What is out of the window may have left the changelog, and may still be there.
        inside = since if window is None else max(since, self.head.cut - window)
        for what, ours, theirs, first in (
            ("known", known, self.changelog.known.get(self.number, {}), inside),
            ("forgotten", forgotten, taken_down, since),
        ):
            for name in sorted(ours.keys() | theirs.keys()):
                wanted, got = ours.get(name), theirs.get(name)
                if wanted != got and max(wanted or 0, got or 0) >= first:
                    detail = f"{what} since {got}, not {wanted}, by its hash {name:016x}"
                    at = wanted if wanted is not None else got
                    self.out.add("known_differs", self.number, -1 if at is None else at, names.get(name, ""), detail)

    def _compare_cells(self, outcomes: Mapping[int, Outcome], reduced: Mapping[str, Kept]) -> None:
        counted: Counter[tuple[int, int]] = Counter()
        entered: Counter[tuple[int, int]] = Counter()
        before = self.taken.cells if self.taken else {}
        for offset, cluster in zip(self.recorded.offsets, self.recorded.clusters, strict=True):
            outcome = outcomes[offset]
            if outcome.position >= 0:
                counted[outcome.epoch, cluster] += 1
                entered[outcome.epoch, cluster] += outcome.fate == "kept"
        size = Counter((kept.epoch, kept.cluster) for kept in reduced.values())
        for cell in sorted(before.keys() | counted.keys() | self.head.cells.keys()):
            then = before.get(cell, CellCounts(0, 0, 0, 0))
            wanted = CellCounts(
                then.counted + counted[cell],
                then.entered + entered[cell],
                then.evicted + self.evicted[cell],
                size[cell],
            )
            got = self.head.cells.get(cell, CellCounts(0, 0, 0, 0))
            if got != wanted:
                columns = zip(CellCounts._fields, got, wanted, strict=True)
                detail = ", ".join(f"{name} {there}, not {right}" for name, there, right in columns if there != right)
                detail = f"epoch {cell[0]}, cluster {cell[1]}: {detail}"
                self.out.add("cell_differs", self.number, -1, "", detail)

    def _compare_totals(self, letters: int | None) -> None:
        """letters  the dead letters; None: they are not known since the beginning, and rows tell the rest."""
        fates = self.recorded.counts()
        counted = sum(fates[fate] for fate in COUNTED)
        ours = {
            "duplicates": fates[Fate.DUPLICATE],
            "forgotten": fates[Fate.FORGOTTEN],
            "below_gate": fates[Fate.BELOW_GATE],
            "counted": counted,
            "over_quota": fates[Fate.OVER_QUOTA],
            "over_cap": fates[Fate.OVER_CAP],
            "kept": fates[Fate.KEPT],
        }
        if letters is not None:
            ours |= {"read": len(self.recorded.ids) + letters, "dead": letters}
        then = self.taken.totals if self.taken else dict.fromkeys(ROW_TOTALS, 0)
        ours |= {name: count + then[name] for name, count in ours.items() if name in then}
        theirs: Totals = self.head.totals
        different = [
            f"{name} {getattr(theirs, name)}, not {count}"
            for name, count in ours.items()
            if getattr(theirs, name) != count
        ]
        gone = theirs.evicted + theirs.removed - then["evicted"] - then["removed"]
        if gone != len(self.removed_by):
            different.append(f"evicted and removed {gone}, not {len(self.removed_by)}")
        if different:
            self.out.add("totals_differ", self.number, -1, "", "; ".join(different))

    # -- raw records without a trace -----------------------------------------------------------------------------------

    def _look_up(self, gaps: _Gaps, letters_expired: bool) -> None:
        """A gap is a raw record without a trace unless it is none: a transaction's marker, or compacted away."""
        if self.raw_from is None:
            return
        first = self.raw_from[self.number]
        gone = sum(min(end, first) - start for start, end in gaps.found if start < first)
        if gone:
            lost = self.head.totals.lost
            counted = f" ({lost} were counted as lost before a worker read them, --on-data-loss)" if lost else ""
            self.out.not_verified.append(
                f"partition {self.number}: {gone} offsets below {first} left no row and no dead letter; the raw topic's "
                f"retention has taken them, so it cannot be told whether they were records{counted}"
            )
        there = [(max(start, first), end) for start, end in gaps.found if end > first]
        untraced = [
            message
            for span in _merged(there)
            for messages in read_spans(self.source.connection, self.raw_topic, {self.number: span})
            for message in messages
            if any(start <= message.offset() < end for start, end in there)
        ]
        if untraced and letters_expired:
            self.out.not_verified.append(
                f"partition {self.number}: {len(untraced)} raw records (the first at offset {untraced[0].offset()}) left no "
                "row; dead letters have expired, so it cannot be told whether these were some"
            )
            return
        for message in untraced:
            self.out.add(
                "unaccounted", self.number, message.offset(), _text(message.key()), "neither row nor dead letter"
            )

    # -- from a snapshot on --------------------------------------------------------------------------------------------

    def _taken_from(self, span: tuple[int, int], cut: int) -> int:
        """The snapshot's cut if all rows since then are there, else the input offset from which on they are."""
        wanted = self.taken.offset if self.taken else 0
        first = first_row_offset(self.source, self.number, *span)
        if span[0] == 0 or wanted == cut or (first is not None and first <= wanted):
            return wanted
        start = cut if first is None else min(first, cut)
        # Dead letters and markers leave no row, so the first one may lie behind the cut and nothing be missing.
        letters, expired = self._dead_letters(wanted)
        there = self.raw_from is not None and self.raw_from[self.number] <= wanted and not expired
        if there and not any(
            message.offset() not in letters
            for messages in read_spans(self.source.connection, self.raw_topic, {self.number: (wanted, start)})
            for message in messages
        ):
            return wanted
        self.out.not_verified.append(
            f"partition {self.number}: pair-codes between the snapshot's cut {wanted} and input offset {start} have "
            "expired: start from a newer snapshot, and take them more often than pair-codes expire"
        )
        return start

    def _narrowed(self, span: tuple[int, int], start: int, cut: int) -> tuple[int, int]:
        """The part of pair-codes that has the rows from `start` on."""
        if start >= cut:
            return span[1], span[1]
        return codes_position(self.source, self.number, start, span), span[1]

    def _state_taken(self, taken: PartitionState) -> Before:
        """What the rows from the snapshot's cut on came upon, as it was recorded there."""
        key, known = id_key(self.settings.seed), taken.known
        if known is None:
            of_changelog = self.changelog.known.get(self.number, {})
            known = Hashes.of({name: at for name, at in of_changelog.items() if at < taken.offset})
            if known.sha256 != taken.known_sha256:
                self.out.add(
                    "known_differs", self.number, -1, "",
                    f"the {len(known.hashes):,} ids that the changelog knows from before offset {taken.offset} are not those "
                    "of the snapshot",
                )  # fmt: skip
        reduced = {
            hash_id(key, pair.id)[0]: (pair.id, Kept(pair.epoch, pair.cluster, -1, pair.offset)) for pair in taken.pairs
        }
        offsets = {name: kept.offset for name, (_, kept) in reduced.items()} | known.as_dict()
        return Before(
            reduced,
            offsets,
            set(taken.forgotten.hashes.tolist()),
            {cell: counts.counted for cell, counts in taken.cells.items()},
        )

    # -- where rows have expired ---------------------------------------------------------------------------------------

    def _state_before(self, span: tuple[int, int], start: int) -> Before:
        """What the rows from `start` on came upon, from what the changelog still says and the rows themselves carry.

        A cell's counter is the position of its first row. In the set were the pairs that are in it now and those that
        were removed since. Known were the ids of the changelog's K records, and those that duplicates refer to.
        """
        key = id_key(self.settings.seed)
        number, cut = self.number, self.head.cut
        counted: dict[tuple[int, int], int] = {}
        known = {h: at for h, at in self.changelog.known.get(number, {}).items() if at < start}
        kept_since: set[str] = set()
        gone: dict[str, tuple[int, int]] = {}
        for row in read_codes(self.source, {number: span}, below={number: cut}):
            if row.fate in COUNTED:
                counted.setdefault((row.epoch, row.cluster), row.position)
            if row.fate == Fate.KEPT:
                kept_since.add(row.id)
            if row.fate == Fate.DUPLICATE and row.duplicate_of < start:
                known.setdefault(hash_id(key, row.id)[0], row.duplicate_of)
            for pair_id in row.removed:
                if pair_id not in kept_since:
                    # Who is evicted was in the cell of the pair that took its place; of a takedown nothing tells the cell.
                    gone.setdefault(pair_id, (row.epoch, row.cluster))
        reduced = {
            hash_id(key, pair_id)[0]: (pair_id, Kept(epoch, cluster, -1, offset))
            for pair_id, offset, epoch, cluster, _ in self.changelog.entries(number)
            if offset < start
        }
        for pair_id, (epoch, cluster) in gone.items():
            name = hash_id(key, pair_id)[0]
            reduced[name] = pair_id, Kept(epoch, cluster, -1, known.get(name, -1))
        if self.settings.cell_cap is not None and any(cluster < 0 for _, cluster in gone.values()):
            self.out.not_verified.append(
                f"partition {number}: pairs from before offset {start} were taken down since, and no row tells their "
                "cells: a cell that had its cap may show one eviction as a difference"
            )
        for name, (_, kept) in reduced.items():
            known.setdefault(name, kept.offset)
        taken_down = {h for h, at in self.changelog.forgotten.get(number, {}).items() if at < start}
        return Before(reduced, known, taken_down, counted)


def _as_row(row: CodesRow) -> Row:
    # A forgotten id stays forgotten, so reading each of its rows as a takedown changes nothing.
    return Row(row.offset, row.id, None if row.fate == Fate.FORGOTTEN else row.cluster, row.itm)


def _merged(gaps: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans that cover the gaps: neighbours in one."""
    merged: list[tuple[int, int]] = []
    for start, end in gaps:
        if merged and start - merged[-1][1] < GAP_SPAN:
            merged[-1] = merged[-1][0], end
        else:
            merged.append((start, end))
    return merged if len(merged) <= SPANS_MAX else [(merged[0][0], merged[-1][1])]


def _text(key: bytes | None) -> str:
    return (key or b"").decode("utf-8", "replace")


class _Recorded:
    """The rows' ids, offsets, fates, positions and originals, in columns: a partition of them fits into memory."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.offsets, self.positions, self.duplicate_of = array("q"), array("q"), array("q")
        self.clusters = array("i")
        self.fates = bytearray()

    def add(self, row: CodesRow) -> None:
        self.ids.append(row.id)
        self.offsets.append(row.offset)
        self.positions.append(row.position)
        self.duplicate_of.append(row.duplicate_of)
        self.fates.append(row.fate)
        self.clusters.append(row.cluster)

    def __iter__(self) -> Iterator[tuple[str, int, Fate, int, int]]:
        fates = [Fate(number) for number in range(len(Fate))]
        for i, pair_id in enumerate(self.ids):
            yield pair_id, self.offsets[i], fates[self.fates[i]], self.positions[i], self.duplicate_of[i]

    def fate_at(self, offset: int) -> tuple[str, Fate] | None:
        """The id and fate of the row of this offset."""
        i = int(np.searchsorted(np.frombuffer(self.offsets, np.int64), offset)) if self.ids else 0
        if i < len(self.ids) and self.offsets[i] == offset:
            return self.ids[i], Fate(self.fates[i])
        return None

    def counts(self) -> dict[Fate, int]:
        return {fate: self.fates.count(fate) for fate in Fate}


class _Gaps:
    """Input offsets without a row and without a dead letter, found while the rows pass by; and those with two."""

    def __init__(self, partition: int, start: int, cut: int, letters: Mapping[int, int], out: Verified) -> None:
        self.partition, self.cut, self.letters, self.out = partition, cut, letters, out
        self.found: list[tuple[int, int]] = []
        self._next = start
        self._start = start
        self._pending = sorted(letters)
        self._letter = 0

    def row(self, row: CodesRow) -> bool:
        """Takes note of a row; False: its offset had one already, or it lies before the start."""
        if row.offset < self._start:
            return False
        if row.offset < self._next:
            self.out.add("counted_twice", self.partition, row.offset, row.id, f"another row says {NAMES[row.fate]}")
            return False
        if row.offset in self.letters:
            self.out.add("counted_twice", self.partition, row.offset, row.id, f"a dead letter, and {NAMES[row.fate]}")
        self._pass(row.offset)
        self._next = row.offset + 1
        return True

    def end(self) -> None:
        """The offsets between the last row and the cut."""
        self._pass(self.cut)

    def _pass(self, until: int) -> None:
        while self._letter < len(self._pending) and self._pending[self._letter] < until:
            at = self._pending[self._letter]
            if at > self._next:
                self.found.append((self._next, at))
            self._next = max(self._next, at + 1)
            self._letter += 1
        if until > self._next:
            self.found.append((self._next, until))


class _Clusters:
    """Recomputes the clusters of recorded vectors, a few thousand rows at once, with the bundle that the rows name."""

    def __init__(self, model_of: Callable[[str], PairModel | None], out: Verified) -> None:
        self._model_of, self._out = model_of, out
        self._models: dict[str, PairModel | None] = {}
        self._rows: list[CodesRow] = []
        self._unknown: dict[str, int] = {}

    def check(self, row: CodesRow) -> None:
        if row.vector is None:
            return
        if self._rows and self._rows[0].bundle != row.bundle:
            self.settle()
        self._rows.append(row)
        if len(self._rows) >= ASSIGN_ROWS:
            self.settle()

    def model(self, bundle: str) -> PairModel | None:
        """The model of a bundle, asked for once."""
        if bundle not in self._models:
            self._models[bundle] = self._model_of(bundle)
        return self._models[bundle]

    def settle(self) -> None:
        """Compares the rows that wait."""
        if not self._rows:
            return
        bundle = self._rows[0].bundle
        model = self.model(bundle)
        if model is None:
            self._unknown[bundle] = self._unknown.get(bundle, 0) + len(self._rows)
        else:
            assigned = model.assign(np.array([row.vector for row in self._rows], np.uint16)).tolist()
            self._out.clusters_checked += len(assigned)
            for row, cluster in zip(self._rows, assigned, strict=True):
                if cluster != row.cluster:
                    detail = f"recorded {row.cluster}, bundle {bundle[:12]} says {cluster}"
                    self._out.add("cluster_differs", row.partition, row.offset, row.id, detail)
        self._rows = []

    def conclude(self) -> None:
        for bundle, rows in self._unknown.items():
            self._out.not_verified.append(
                f"{rows} clusters, since the bundle {bundle[:12]} is neither announced nor given: give --bundle FOLDER"
            )


class _Regrouped:
    """The clusters of kept pairs in the epochs after their own, as the bundles of those assign their recorded vectors."""

    def __init__(self, models: Mapping[int, PairModel]) -> None:
        """models  by epoch; empty where nobody asks: without a cap, or without a switch"""
        self._models = models
        self._waiting: list[tuple[int, int, NDArray[np.uint16]]] = []
        self._clusters: dict[tuple[int, int], int] = {}
        self.unknown = 0

    def add(self, offset: int, epoch: int, vector: NDArray[np.uint16]) -> None:
        """A pair that was kept in this epoch."""
        if any(later > epoch for later in self._models):
            self._waiting.append((offset, epoch, vector))
            if len(self._waiting) >= ASSIGN_ROWS:
                self._settle()

    def say(self, epoch: int, offset: int, cluster: int) -> None:
        """What an eviction tells of a pair whose vector is gone: where it was when it left."""
        self._clusters.setdefault((epoch, offset), cluster)

    def cluster_in(self, epoch: int, offset: int) -> int:
        """For the batch reference. Of whom nothing is known stands in a cell of its own."""
        self._settle()
        cluster = self._clusters.get((epoch, offset))
        if cluster is None:
            self.unknown += 1
            return -1 - offset
        return cluster

    def _settle(self) -> None:
        for later, model in self._models.items():
            its = [(offset, vector) for offset, epoch, vector in self._waiting if epoch < later]
            if its:
                assigned = model.assign(np.array([vector for _, vector in its], np.uint16)).tolist()
                self._clusters.update({(later, offset): c for (offset, _), c in zip(its, assigned, strict=True)})
        self._waiting.clear()


class _Changelog:
    """The E records of all partitions on disk; K and F, eight bytes an id, in memory."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._env = lmdb.open(str(folder), map_size=1 << 40, sync=False, metasync=False, lock=False)
        self._pending: dict[bytes, bytes | None] = {}
        self.known: dict[int, dict[int, int]] = {}
        self.forgotten: dict[int, dict[int, int]] = {}

    def __enter__(self) -> _Changelog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._env.close()

    def take(self, record: ChangelogRecord) -> None:
        partition, key, value = record
        kind = key[:1]
        if kind == ENTRY:
            self._pending[partition.to_bytes(4, "big") + key[1:]] = value
            if len(self._pending) >= 50_000:
                self.flush()
        elif kind == KNOWN and value is not None:
            hashes, offsets = known_columns(key, value)
            names, at = np.frombuffer(hashes, ">u8").tolist(), np.frombuffer(offsets, ">u8").tolist()
            self.known.setdefault(partition, {}).update(zip(names, at, strict=True))
        elif kind == FORGOTTEN and value is not None:
            self.forgotten.setdefault(partition, {})[number_of(key)] = decode_forgotten(value)

    def flush(self) -> None:
        with self._env.begin(write=True) as txn:
            for key, value in sorted(self._pending.items()):
                if value is None:
                    txn.delete(key)
                else:
                    txn.put(key, value)
        self._pending.clear()

    def entries(self, partition: int) -> Iterator[tuple[str, int, int, int, int]]:
        """(id, offset, epoch, cluster, hash of the vector) of every entry of a partition."""
        for entry in self._entries(partition):
            yield entry.pair_id, entry.offset, entry.epoch, entry.cluster, hash(entry.vector.tobytes())

    def vectors(self, partition: int) -> Iterator[tuple[str, int, int, NDArray[np.uint16]]]:
        """(id, offset, epoch, index vector) of every entry of a partition."""
        for entry in self._entries(partition):
            yield entry.pair_id, entry.offset, entry.epoch, entry.vector

    def _entries(self, partition: int) -> Iterator[Entry]:
        prefix = partition.to_bytes(4, "big")
        with self._env.begin() as txn, txn.cursor() as cursor:
            if cursor.set_range(prefix):
                for key, value in cursor.iternext():
                    if key[:4] != prefix:
                        return
                    yield decode_entry(value)
