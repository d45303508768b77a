"""`snapshot`: the reduced set at one cut of the committed stream, frozen into files that a training run reads.

Two passes over the kept topic: the first fills an index on disk (kept_index.py), the second streams the chosen pairs into
shards. The same cut gives the same bytes, whenever it is taken; a run that was interrupted goes on where it stopped. Several
processes may share the partitions (snapshot_parts.py).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmdb

from state.quota import Ratio
from stream.cut import Cut, cut_at, newest_cut, written
from stream.errors import TldrError
from stream.kept_index import KeptIndex
from stream.progress import Progress
from stream.rights import check_rights
from stream.shards import FORMATS, PARTIAL, Format, Shard, ShardFile, write_whole
from stream.snapshot_parts import Part, missing_parts, put_together, remove_reports, reports
from stream.snapshot_state import FORMAT_VERSION, MANIFEST, KnownIds, SetPair, sealed, write_state
from stream.stream_view import ChangelogFollower, NothingCommitted, StreamSource, StreamView, read_kept, whole

SHARD_PAIRS = 10_000
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# LMDB reports a short write on a full disk as EIO.
_NO_ROOM_FOR_LMDB = _NO_ROOM | {errno.EIO}


@dataclass(frozen=True)
class SnapshotTaken:
    """What `snapshot` made. files: none where only the manifest was asked for. parts_missing: the manifest waits for them."""

    folder: Path
    manifest: Path
    manifest_sha256: str
    stream: str
    format: str
    offsets: dict[int, int]
    ratio: str
    sampled: str
    in_set: int
    pairs: int
    files: list[ShardFile]
    bytes: int
    reused_files: int
    part: str = ""
    parts_missing: int = 0

    def lines(self) -> Iterator[str]:
        """The result for a person."""
        yield f"snapshot of {self.stream} in {self.folder} ({self.format})"
        yield f"  cut        {written(self.offsets)}"
        yield f"  pairs      {self.pairs:,} of {self.in_set:,} in the set (ratio {self.ratio} of {self.sampled} kept)"
        kept = f", {self.reused_files} of them from an earlier run" if self.reused_files else ""
        if self.files:
            yield f"  files      {len(self.files):,}, {self.bytes / 1e6:,.1f} MB{kept}"
        if self.parts_missing:
            yield f"  part       {self.part}; the last of the {self.parts_missing} others to finish writes the manifest"
        else:
            yield f"  manifest   {self.manifest}, sha256 {self.manifest_sha256}"


@dataclass(frozen=True)
class _Wanted:
    """What makes a snapshot this snapshot: a run into the same folder goes on only if all of it is equal."""

    stream: str
    format: str
    ratio: str
    shard_pairs: int
    manifest_only: bool
    offsets: dict[int, int]

    def as_json(self) -> dict[str, Any]:
        return {**self.__dict__, "offsets": {str(p): offset for p, offset in sorted(self.offsets.items())}}


@dataclass(frozen=True)
class _Place:
    """Where a snapshot, or a part of one, is written; a part's own files have its number in their names."""

    out: Path
    scratch: Path
    part: Part | None

    def _named(self, start: str, end: str = "") -> str:
        return f"{start}{self.part.suffix if self.part else ''}{end}"

    @property
    def state(self) -> Path:
        return self.out / self._named("unfinished", ".json")

    @property
    def lock(self) -> Path:
        return self.out / self._named(".lock")

    @property
    def index(self) -> Path:
        return self.scratch / self._named(".index")

    @property
    def report(self) -> Path:
        """What says that all is done: the manifest, or the part's share of it."""
        return self.out / (self.part.report() if self.part else MANIFEST)

    def allows(self, name: str) -> bool:
        """Whether a file may lie in a folder that holds no snapshot yet."""
        own = (self.index.name, self.lock.name, self.state.name + PARTIAL)
        return name in own or (self.part is not None and self.part.allows(name))


def snapshot(
    source: StreamSource,
    out: Path,
    *,
    format: str = "webdataset",  # noqa: A002
    ratio: Ratio | None = None,
    cut: Mapping[int, int] | None = None,
    manifest_only: bool = False,
    shard_pairs: int = SHARD_PAIRS,
    part: Part | None = None,
    scratch: Path | None = None,
) -> SnapshotTaken:
    """Freezes the reduced set at `cut` (None: the newest, or the one that an unfinished run in `out` began with).

    ratio    share of the counted pairs, at most the stream's own (None: all of the set)
    part     take these partitions only; the last part to finish in `out` writes the manifest of all
    scratch  folder of the temporary index (None: `out`)
    Raises TldrError: another snapshot in `out`, a cut that is not committed yet or that compaction has eaten, a full disk.
    """
    if format not in FORMATS:
        raise TldrError(f"there is no format {format}: give {' or '.join(FORMATS)}")
    check_rights(source.connection, "snapshot", stream=source.name)
    ids = KnownIds()
    view = _view_of(source, ids, part)
    sampled = view.settings.ratio
    wanted_ratio = ratio or sampled
    if wanted_ratio.share > sampled.share:
        raise TldrError(
            f"the stream keeps {sampled} of what it counts, so --ratio {wanted_ratio} cannot be taken from it"
        )
    place = _Place(out, scratch or out, part)
    with _full_disk_explained(out), _locked(place):
        before = _before(place, view)
        if cut is not None and part is not None:
            cut = {p: offset for p, offset in cut.items() if p in view.partitions}
        offsets = dict(cut) if cut is not None else _offsets_of(before) or view.cut
        wanted = _Wanted(source.name, format, str(wanted_ratio), shard_pairs, manifest_only, offsets)
        _refuse_another(out, before, wanted)
        if before is not None and before["finished"]:
            return _finished(place, len(before["files"]))
        files = {file.name: file for file in _still_there(out, before)}
        at = cut_at(source, view, offsets) if offsets != view.cut else newest_cut(view)
        return _take(source, view, at, ids, place, wanted, wanted_ratio, files)


def _view_of(source: StreamSource, ids: KnownIds, part: Part | None) -> StreamView:
    """What the partitions of this part have committed; the settings may have to come from another one's."""
    if part is None:
        return ChangelogFollower(source).advance(ids.take, wait=True)
    try:
        return ChangelogFollower(source, part.partitions).advance(ids.take, wait=True)
    except NothingCommitted:
        view = ChangelogFollower(source).advance(wait=True)
        mine = part.partitions(len(view.partitions))
        return StreamView(view.topics, view.settings, {p: view.partitions[p] for p in mine})


def _take(
    source: StreamSource,
    view: StreamView,
    cut: Cut,
    ids: KnownIds,
    place: _Place,
    wanted: _Wanted,
    ratio: Ratio,
    done: dict[str, ShardFile],
) -> SnapshotTaken:
    settings, out = view.settings, place.out
    _note(place, wanted, done.values())
    _clear(place, done, view)
    with KeptIndex(place.index) as index:
        fill_index(source, index, view, cut)
        refuse_an_eaten_cut(source, index, view, cut)
        plan = {
            p: index.choose(p, ratio, settings.ratio, settings.seed, wanted.shard_pairs)
            for p in sorted(view.partitions)
        }
        reused = len(done)
        if not wanted.manifest_only:
            with Progress("writing shards", sum(sum(pairs) for _, pairs in plan.values()), "pairs") as progress:
                for p, (_, pairs) in plan.items():
                    _write_partition(
                        source, index, p, len(pairs), FORMATS[wanted.format], place, wanted, done, progress
                    )
        manifest = _manifest(view, cut, wanted, plan, sorted(done.values()), epoch_pairs(index, view)) | {
            "state": _write_states(out, view, cut, ids, index)
        }
        write_whole(place.report, _as_bytes(manifest if place.part else sealed(manifest)))
    _clear(place, done, view)
    place.state.unlink(missing_ok=True)
    return _finished(place, reused)


def _as_bytes(manifest: Mapping[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()


def _finished(place: _Place, reused: int) -> SnapshotTaken:
    """The result of a snapshot that is whole, or of a part; the last part makes the whole of all."""
    out, part = place.out, place.part
    if part is None:
        return _result(out, json.loads(place.report.read_text()), reused)
    missing = missing_parts(out, part)
    if missing and not (out / MANIFEST).exists():
        own = json.loads(place.report.read_text())
        return _result(out, {**own, "sha256": ""}, reused, str(part), len(missing))
    with contextlib.suppress(FileNotFoundError):  # another part was as fast, and has removed the reports
        if not (out / MANIFEST).exists():
            write_whole(out / MANIFEST, _as_bytes(sealed(put_together(reports(out, part)))))
    remove_reports(out, part)
    return _result(out, json.loads((out / MANIFEST).read_text()), reused, str(part))


# -- the set at the cut ------------------------------------------------------------------------------------------------


def fill_index(source: StreamSource, index: KeptIndex, view: StreamView, cut: Cut) -> None:
    """Reads the kept topic up to its present end, which lies behind everything that the view knows to be committed."""
    spans = whole(source.connection, source.topics.kept, view.partitions)
    with Progress("reading kept pairs", sum(end - start for start, end in spans.values()), "records") as progress:

        def counted() -> Iterator[Any]:
            for batch in read_kept(source, spans):
                yield batch
                progress.advance(len(batch))

        index.fill(counted(), cut.offsets)


def refuse_an_eaten_cut(source: StreamSource, index: KeptIndex, view: StreamView, cut: Cut) -> None:
    """Raises TldrError where the kept topic no longer holds the set of this cut, naming the newest possible one."""
    for p, expected in sorted(cut.in_set.items()):
        found = index.live_count(p)
        if found == expected:
            continue
        if found < expected and cut.offsets[p] < view.cut[p]:
            raise TldrError(
                f"compaction has eaten the cut at offset {cut.offsets[p]} of partition {p}: of its {expected} pairs "
                f"{expected - found} are gone; the newest possible cut is --cut {written(view.cut)}"
            )
        raise TldrError(
            f"{source.topics.kept}/{p} holds {found} pairs at the cut and the changelog says {expected}: "
            "`tldr-stream verify` tells which ones differ"
        )


def epoch_pairs(index: KeptIndex, view: StreamView) -> Counter[tuple[int, int]]:
    """How many pairs of the set were kept in each (partition, epoch)."""
    return Counter((p, pair.epoch) for p in view.partitions for pair in index.live(p))


def _write_states(
    out: Path, view: StreamView, cut: Cut, ids: KnownIds, index: KeptIndex
) -> dict[str, dict[str, Any]] | None:
    """The files from which `verify --from` starts; None where the known ids of the cut may have expired since."""
    window = view.settings.dedupe_window
    if window is not None and cut.offsets != view.cut:
        return None
    states = {}
    for p, offset in sorted(cut.offsets.items()):
        pairs = (
            SetPair(pair.id, -1 if pair.cause is None else pair.cause, pair.epoch, pair.cluster, shard)
            for pair, shard in index.taken(p)
        )
        since = 0 if window is None else max(0, offset - window)
        known, forgotten = ids.known(p).between(since, offset), ids.forgotten(p).between(0, offset)
        states[str(p)] = write_state(out, p, pairs, cut.totals[p], known, forgotten, window is not None)
    return states


# -- shards ------------------------------------------------------------------------------------------------------------


def _write_partition(
    source: StreamSource,
    index: KeptIndex,
    partition: int,
    shards: int,
    form: Format,
    place: _Place,
    wanted: _Wanted,
    done: dict[str, ShardFile],
    progress: Progress,
) -> None:
    """Writes the shards of a partition that are not there yet, so many at once as may be open."""
    names = [f"part-{partition:05d}-{shard:05d}.{form.extension}" for shard in range(shards)]
    progress.advance(sum(done[name].pairs for name in names if name in done))
    missing = [shard for shard, name in enumerate(names) if name not in done]
    for start in range(0, len(missing), form.open_max):
        group = missing[start : start + form.open_max]
        with contextlib.ExitStack() as discarding:
            open_shards: dict[int, Shard] = {}
            for shard in group:
                open_shards[shard] = form.shard(place.out, names[shard], partition)
                discarding.callback(open_shards[shard].discard)
            _fill_shards(source, index, partition, open_shards, progress)
            for shard in group:
                done[names[shard]] = open_shards[shard].finish()
            discarding.pop_all()
        _note(place, wanted, done.values())


def _fill_shards(
    source: StreamSource, index: KeptIndex, partition: int, shards: Mapping[int, Shard], progress: Progress
) -> None:
    """One pass over the partition: its chosen pairs, in the topic's order, each into its shard."""
    codec = source.codec("KeptPair")
    places = ((offset, shard) for offset, shard in index.places(partition) if shard in shards)
    offset, shard = next(places, (None, -1))
    if offset is None:
        return
    end = max(at for at, number in index.places(partition) if number in shards) + 1
    for batch in read_kept(source, {partition: (offset, end)}):
        for record in batch:
            if offset is not None and record.offset > offset:
                raise TldrError(
                    f"the record at offset {offset} of {source.topics.kept}/{partition} was compacted away while the "
                    "snapshot was written: run the same command again"
                )
            if record.offset == offset:
                shards[shard].add(codec.decode(record.value or b""))
                progress.advance()
                offset, shard = next(places, (None, -1))


# -- manifest and state ------------------------------------------------------------------------------------------------


def _manifest(
    view: StreamView,
    cut: Cut,
    wanted: _Wanted,
    plan: Mapping[int, tuple[dict[tuple[int, int], tuple[int, int]], list[int]]],
    files: list[ShardFile],
    pairs_by_epoch: Mapping[tuple[int, int], int],
) -> dict[str, Any]:
    """Everything that says which pairs these are. The cut alone decides it, so that it is the same whenever it is taken."""
    settings = json.loads(view.settings.to_json())
    rows = []
    for p, cells in sorted(cut.cells.items()):
        for (epoch, cluster), counts in sorted(cells.items()):
            size, taken = plan[p][0].get((epoch, cluster), (0, 0))
            rows.append([p, epoch, cluster, counts.counted, counts.entered, counts.evicted, size, taken])
    counted, entered, evicted, size, taken = (sum(row[i] for row in rows) for i in range(3, 8))
    return {
        "format_version": FORMAT_VERSION,
        **wanted.as_json(),
        "sampled": str(view.settings.ratio),
        "seed": view.settings.seed,
        "rule": view.settings.rule,
        "settings": settings,
        "epochs": _epochs(view, cut, pairs_by_epoch, rows),
        "counts": {
            "counted": counted,
            "kept": entered,
            "evicted": evicted,
            "taken_down": entered - evicted - size,
            "in_set": size,
            "pairs": taken,
        },
        "cells": {
            "columns": ["partition", "epoch", "cluster", "counted", "entered", "evicted", "size", "taken"],
            "rows": rows,
        },
        "files": [file._asdict() for file in files],
    }


def _epochs(
    view: StreamView, cut: Cut, pairs: Mapping[tuple[int, int], int], rows: list[list[int]]
) -> list[dict[str, Any]]:
    """Every epoch and its bundle: where it begins, and how many pairs of the set and of the snapshot were counted in it.

    A partition counts its own switches, so an epoch is told once for each bundle that partitions have in it; it is that of
    the partitions in `begins` alone.
    """
    taken: Counter[tuple[int, int]] = Counter()
    for row in rows:
        taken[row[0], row[1]] += row[-1]
    epochs: dict[tuple[int, str], dict[str, Any]] = {}
    for p, part in sorted(view.partitions.items()):
        for epoch, switch in sorted(part.switches.items()):
            if switch.input_offset > cut.offsets[p] or (epoch and switch.input_offset == cut.offsets[p]):
                continue
            known = epochs.setdefault(
                (epoch, switch.bundle),
                {
                    "epoch": epoch,
                    "bundle": switch.bundle,
                    "space": switch.space,
                    "pairs": 0,
                    "taken": 0,
                    "begins": {},
                },
            )
            known["begins"][str(p)] = switch.input_offset
            known["pairs"] += pairs.get((p, epoch), 0)
            known["taken"] += taken[p, epoch]
    return [epochs[name] for name in sorted(epochs)]


def _result(
    out: Path, manifest: Mapping[str, Any], reused: int, part: str = "", parts_missing: int = 0
) -> SnapshotTaken:
    files = [ShardFile(**file) for file in manifest["files"]]
    return SnapshotTaken(
        folder=out,
        manifest=out / MANIFEST,
        manifest_sha256=manifest["sha256"],
        stream=manifest["stream"],
        format=manifest["format"],
        offsets={int(p): offset for p, offset in manifest["offsets"].items()},
        ratio=manifest["ratio"],
        sampled=manifest["sampled"],
        in_set=manifest["counts"]["in_set"],
        pairs=manifest["counts"]["pairs"],
        files=files,
        bytes=sum(file.bytes for file in files),
        reused_files=reused,
        part=part,
        parts_missing=parts_missing,
    )


def _before(place: _Place, view: StreamView) -> dict[str, Any] | None:
    """What an earlier run in this folder wanted and finished; None: the folder is empty. Raises TldrError for others."""
    out = place.out
    for path in (out / MANIFEST, place.report, place.state):
        if path.exists():
            try:
                found: dict[str, Any] = json.loads(path.read_text())
                wanted = {k: found[k] for k in _FIELDS}
                if place.part is not None:
                    mine = {str(p) for p in view.partitions}
                    wanted["offsets"] = {p: offset for p, offset in wanted["offsets"].items() if p in mine}
                return {"finished": path != place.state, "wanted": wanted, "files": found["files"]}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise TldrError(f"{path} is not a snapshot's: give an empty folder") from error
    if strange := sorted(path.name for path in out.iterdir() if not place.allows(path.name)):
        raise TldrError(f"{out} is not empty ({strange[0]}) and holds no snapshot: give an empty or a new folder")
    return None


_FIELDS = tuple(_Wanted.__dataclass_fields__)


def _offsets_of(before: Mapping[str, Any] | None) -> dict[int, int] | None:
    return {int(p): offset for p, offset in before["wanted"]["offsets"].items()} if before else None


def _refuse_another(out: Path, before: Mapping[str, Any] | None, wanted: _Wanted) -> None:
    if before is None:
        return
    now = wanted.as_json()
    for name in _FIELDS:
        if before["wanted"][name] != now[name]:
            state = "a finished" if before["finished"] else "an unfinished"
            raise TldrError(
                f"{out} holds {state} snapshot with {name} {_short(before['wanted'][name])}, not {_short(now[name])}: "
                "give another folder, or the same options to go on"
            )


def _short(value: Any) -> str:
    return written({int(p): offset for p, offset in value.items()}) if isinstance(value, dict) else str(value)


def _still_there(out: Path, before: Mapping[str, Any] | None) -> Iterator[ShardFile]:
    """The finished files of an earlier run that lie there as they were written."""
    for fields in before["files"] if before else ():
        file = ShardFile(**fields)
        path = out / file.name
        if path.exists() and path.stat().st_size == file.bytes:
            yield file


def _note(place: _Place, wanted: _Wanted, files: Iterable[ShardFile]) -> None:
    state = {**wanted.as_json(), "files": [file._asdict() for file in sorted(files)]}
    write_whole(place.state, json.dumps(state).encode())


def _clear(place: _Place, done: Mapping[str, ShardFile], view: StreamView) -> None:
    """Removes the index and whatever an interrupted run left half-written; of a part, what belongs to its partitions."""
    shutil.rmtree(place.index, ignore_errors=True)
    patterns = ["part-*"] if place.part is None else [f"part-{p:05d}-*" for p in view.partitions]
    for path in (path for pattern in patterns for path in place.out.glob(pattern)):
        if path.name not in done:
            path.unlink()


@contextlib.contextmanager
def _locked(place: _Place) -> Iterator[None]:
    """One snapshot at a time in a folder, or one process for a part."""
    out = place.out
    out.mkdir(parents=True, exist_ok=True)
    with place.lock.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TldrError(
                f"another snapshot is being written into {out}: wait for it, or give another folder"
            ) from error
        yield
        place.lock.unlink(missing_ok=True)


@contextlib.contextmanager
def _full_disk_explained(out: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, lmdb.Error) as error:
        number = error.errno if isinstance(error, OSError) else error.code
        if number in (_NO_ROOM if isinstance(error, OSError) else _NO_ROOM_FOR_LMDB):
            raise TldrError(
                f"no room left for the snapshot in {out} ({os.strerror(number or 0)}): make room and run the same "
                "command again; finished shards stay"
            ) from error
        if isinstance(error, OSError):
            raise TldrError(f"cannot write the snapshot into {out}: {error.strerror or error}") from error
        raise
