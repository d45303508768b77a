"""The state of a stream at a snapshot's cut, beside the snapshot: what `verify --from` starts from when the rows before the
cut have expired.

The manifest has the cells' counters, the totals, and for each partition the digests of the reduced set and of the known
ids; files beside it have the pairs of the set (with the shard that holds each) and the ids that were taken down. Known ids
stay in the changelog for ever, so their digest is enough; with a dedupe window they expire there, and those inside the
window are written here. Must not know how a snapshot's pairs are chosen, nor what is compared with this.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import fastavro
import numpy as np
from numpy.typing import NDArray

from state.changelog import FORGOTTEN, KNOWN, CellCounts, Totals, decode_forgotten, known_columns, number_of
from stream.errors import TldrError
from stream.records import schema_of
from stream.shards import PARTIAL, sync_folder
from stream.stream_view import ChangelogRecord, StreamView

MANIFEST = "manifest.json"
FORMAT_VERSION = 2
ROWS_A_BLOCK = 10_000
# Of the totals, those that rows of pair-codes prove.
ROW_TOTALS = (
    "duplicates", "forgotten", "below_gate", "counted", "over_quota", "over_cap", "kept", "evicted", "removed",
)  # fmt: skip
_ID_COLUMNS = {"known": "Q", "known_offsets": "q", "forgotten": "Q", "forgotten_offsets": "q"}
# Avro draws it at random otherwise, and the same state would not have the same bytes.
_SYNC_MARKER = b"tldr-stream-sync"


class SetPair(NamedTuple):
    """A pair of the reduced set at the cut. shard  its number within the partition, -1: the snapshot did not take it."""

    id: str
    offset: int
    epoch: int
    cluster: int
    shard: int


class Hashes(NamedTuple):
    """Ids by their hash, and an input offset for each: (n,) uint64 and (n,) int64, sorted by offset, then hash."""

    hashes: NDArray[np.uint64]
    offsets: NDArray[np.int64]

    @classmethod
    def of(cls, found: Mapping[int, int]) -> Hashes:
        return cls._sorted(np.fromiter(found, np.uint64, len(found)), np.fromiter(found.values(), np.int64, len(found)))

    @classmethod
    def _sorted(cls, hashes: NDArray[np.uint64], offsets: NDArray[np.int64]) -> Hashes:
        order = np.lexsort((hashes, offsets))
        return cls(hashes[order], offsets[order])

    @property
    def sha256(self) -> str:
        columns = (self.hashes.astype("<u8").tobytes(), self.offsets.astype("<i8").tobytes())
        return hashlib.sha256(b"".join(columns)).hexdigest()

    def between(self, start: int, end: int) -> Hashes:
        """Those with an offset in [start, end)."""
        inside = slice(*np.searchsorted(self.offsets, [start, end]).tolist())
        return Hashes(self.hashes[inside], self.offsets[inside])

    def as_dict(self) -> dict[int, int]:
        return dict(zip(self.hashes.tolist(), self.offsets.tolist(), strict=True))


class KnownIds:
    """The K and F records of a changelog, gathered while it is read: 16 bytes a known id."""

    def __init__(self) -> None:
        self._known: dict[int, dict[int, tuple[NDArray[np.uint64], NDArray[np.int64]]]] = {}
        self._forgotten: dict[int, dict[int, int]] = {}

    def take(self, record: ChangelogRecord) -> None:
        partition, key, value = record
        if key[:1] == KNOWN:
            of_partition = self._known.setdefault(partition, {})
            if value is None:
                of_partition.pop(number_of(key), None)
                return
            hashes, offsets = known_columns(key, value)
            of_partition[number_of(key)] = (
                np.frombuffer(hashes, ">u8").astype(np.uint64),
                np.frombuffer(offsets, ">u8").astype(np.int64),
            )
        elif key[:1] == FORGOTTEN and value is not None:
            self._forgotten.setdefault(partition, {})[number_of(key)] = decode_forgotten(value)

    def known(self, partition: int) -> Hashes:
        """The known ids; one that was counted again after the window has its last offset."""
        columns = sorted(self._known.get(partition, {}).items())
        if not columns:
            return Hashes.of({})
        hashes = np.concatenate([hashes for _, (hashes, _) in columns])[::-1]
        offsets = np.concatenate([offsets for _, (_, offsets) in columns])[::-1]
        _, last = np.unique(hashes, return_index=True)
        return Hashes._sorted(hashes[last], offsets[last])

    def forgotten(self, partition: int) -> Hashes:
        return Hashes.of(self._forgotten.get(partition, {}))


# -- writing -----------------------------------------------------------------------------------------------------------


def write_state(
    folder: Path,
    partition: int,
    pairs: Iterable[SetPair],
    totals: Totals,
    known: Hashes,
    forgotten: Hashes,
    window: bool,
) -> dict[str, Any]:
    """Writes the state of one partition; what the manifest says of it.

    pairs  in any order that the set alone determines; window  whether known ids must be written, since the changelog
           will forget them
    """
    name = f"state-{partition:05d}.avro"
    count, digest = 0, hashlib.sha256()
    partial = folder / (name + PARTIAL)

    def blocks() -> Iterator[dict[str, Any]]:
        nonlocal count
        rest = iter(pairs)
        while some := tuple(islice(rest, ROWS_A_BLOCK)):
            count += len(some)
            for pair in some:
                digest.update(_line(pair))
            yield _block(partition, some, Hashes.of({}), Hashes.of({}))
        yield _block(partition, (), known if window else Hashes.of({}), forgotten)

    with partial.open("wb") as file:
        fastavro.writer(file, schema_of("SnapshotState"), blocks(), codec="deflate", sync_marker=_SYNC_MARKER)
    partial.replace(folder / name)
    sync_folder(folder)
    data = (folder / name).read_bytes()
    return {
        "file": name,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "totals": {field: getattr(totals, field) for field in ROW_TOTALS},
        "set": {"pairs": count, "sha256": digest.hexdigest()},
        "known": {"ids": len(known.hashes), "sha256": known.sha256},
        "forgotten": {"ids": len(forgotten.hashes), "sha256": forgotten.sha256},
    }


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with the digest of all the rest of it."""
    return {**manifest, "sha256": _seal(manifest)}


def _seal(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _line(pair: SetPair) -> bytes:
    return b"%d %d %d %s\n" % (pair.offset, pair.epoch, pair.cluster, pair.id.encode())


def _block(partition: int, pairs: tuple[SetPair, ...], known: Hashes, forgotten: Hashes) -> dict[str, Any]:
    return {
        "partition": partition,
        "ids": [pair.id for pair in pairs],
        "offsets": np.array([pair.offset for pair in pairs], "<i8").tobytes(),
        "epochs": np.array([pair.epoch for pair in pairs], "<i4").tobytes(),
        "clusters": np.array([pair.cluster for pair in pairs], "<i4").tobytes(),
        "shards": np.array([pair.shard for pair in pairs], "<i4").tobytes(),
        "known": known.hashes.astype("<u8").tobytes(),
        "known_offsets": known.offsets.astype("<i8").tobytes(),
        "forgotten": forgotten.hashes.astype("<u8").tobytes(),
        "forgotten_offsets": forgotten.offsets.astype("<i8").tobytes(),
    }


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass
class PartitionState:
    """One partition at the cut. known  None: the changelog has them, and `known_sha256` tells whether all of them."""

    offset: int
    pairs: list[SetPair]
    known: Hashes | None
    known_sha256: str
    forgotten: Hashes
    totals: dict[str, int]
    cells: dict[tuple[int, int], CellCounts] = field(default_factory=dict)


@dataclass(frozen=True)
class TakenState:
    """A snapshot whose manifest is whole. sha256  of the manifest: whoever has noted it elsewhere knows which one it was."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def sha256(self) -> str:
        return str(self.manifest["sha256"])

    @property
    def offsets(self) -> dict[int, int]:
        """The cut."""
        return {int(p): offset for p, offset in self.manifest["offsets"].items()}

    def pairs(self, partition: int) -> Iterator[SetPair]:
        """The reduced set at the cut. Raises TldrError where its file is not the one of the manifest."""
        for block in self._blocks(partition):
            yield from _pairs(block)

    def shard_name(self, partition: int, shard: int) -> str | None:
        """The file of the snapshot that holds a pair; None: it has none."""
        start = f"part-{partition:05d}-{shard:05d}."
        return next((file["name"] for file in self.manifest["files"] if file["name"].startswith(start)), None)

    def partition(self, number: int) -> PartitionState:
        """All that is known of a partition at the cut. Raises TldrError where file and manifest do not agree."""
        about = self.manifest["state"][str(number)]
        pairs: list[SetPair] = []
        columns = {name: array(kind) for name, kind in _ID_COLUMNS.items()}
        digest = hashlib.sha256()
        for block in self._blocks(number):
            for pair in _pairs(block):
                digest.update(_line(pair))
                pairs.append(pair)
            for name, column in columns.items():
                column.frombytes(block[name])
        windowed = self.manifest["settings"]["dedupe_window"] is not None
        hashes, offsets, gone, gone_at = (np.array(column) for column in columns.values())
        known = Hashes(hashes, offsets) if windowed else None
        forgotten = Hashes(gone, gone_at)
        agrees = (digest.hexdigest(), forgotten.sha256) == (about["set"]["sha256"], about["forgotten"]["sha256"])
        if not agrees or (known is not None and known.sha256 != about["known"]["sha256"]):
            raise TldrError(
                f"{self.folder / about['file']} does not hold the set that {MANIFEST} speaks of: {_REFUSED}"
            )
        cells = {
            (epoch, cluster): CellCounts(counted, entered, evicted, size)
            for p, epoch, cluster, counted, entered, evicted, size, _ in self.manifest["cells"]["rows"]
            if p == number
        }
        offset = self.offsets[number]
        return PartitionState(offset, pairs, known, about["known"]["sha256"], forgotten, about["totals"], cells)

    def refuse_another_stream(self, view: StreamView) -> None:
        """Raises TldrError unless this is a snapshot of the stream that `view` shows, at a cut that it has passed."""
        name, place = view.topics.name, self.folder / MANIFEST
        if (self.manifest["stream"], self.manifest["settings"]) != (name, json.loads(view.settings.to_json())):
            raise TldrError(
                f"{place} is a snapshot of the stream {self.manifest['stream']} with settings of its own, not of this "
                f"{name}: give one that was taken of it"
            )
        for p, offset in self.offsets.items():
            if offset > view.cut[p]:
                raise TldrError(
                    f"{place} was taken at offset {offset} of partition {p}, and the stream is at {view.cut[p]}: it was set "
                    "back since, or this is another Kafka"
                )
        for epoch in self.manifest["epochs"]:
            for p, begins in epoch["begins"].items():
                switch = view.partitions[int(p)].switches.get(epoch["epoch"])
                if switch is None or (switch.bundle, switch.input_offset) != (epoch["bundle"], begins):
                    raise TldrError(
                        f"{place} has epoch {epoch['epoch']} of partition {p} begin at offset {begins} with bundle "
                        f"{epoch['bundle'][:12]}, and the changelog says otherwise: one of them was changed, or a version that "
                        "named an epoch by its number alone took it of partitions that had switched in different ways"
                    )

    def _blocks(self, partition: int) -> Iterator[dict[str, Any]]:
        about = self.manifest["state"][str(partition)]
        path = self.folder / about["file"]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise TldrError(
                f"cannot read {path} ({error.strerror}): it belongs to the snapshot, copy it there"
            ) from error
        if hashlib.sha256(data).hexdigest() != about["sha256"]:
            raise TldrError(f"{path} is not the file that {MANIFEST} speaks of: {_REFUSED}")
        with path.open("rb") as file:
            for block in fastavro.reader(file, schema_of("SnapshotState")):
                if isinstance(block, dict):
                    yield block


_REFUSED = "it was changed or damaged, so nothing can be proven from it"


def _pairs(block: Mapping[str, Any]) -> Iterator[SetPair]:
    columns = (
        np.frombuffer(block["offsets"], "<i8"),
        np.frombuffer(block["epochs"], "<i4"),
        np.frombuffer(block["clusters"], "<i4"),
        np.frombuffer(block["shards"], "<i4"),
    )
    yield from map(SetPair, block["ids"], *(column.tolist() for column in columns))


def read_state(place: Path) -> TakenState:
    """The state of the snapshot in a folder (or of its manifest). Raises TldrError where it is not whole or has none."""
    folder = place if place.is_dir() else place.parent
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        whole = manifest["sha256"] == _seal(manifest)
    except OSError as error:
        raise TldrError(f"cannot read {path} ({error.strerror}): give the folder of a finished snapshot") from error
    except (ValueError, KeyError, TypeError) as error:
        raise TldrError(f"{path} is no manifest of a snapshot, or one of an older version: take a new one") from error
    if not whole:
        raise TldrError(f"{path} is not as `snapshot` wrote it: {_REFUSED}")
    if manifest["format_version"] != FORMAT_VERSION:
        raise TldrError(f"{path} has format {manifest['format_version']} and this version reads {FORMAT_VERSION}")
    if manifest["state"] is None:
        raise TldrError(
            f"{path} has no state: its cut was not the newest, and with a dedupe window the known ids of then have "
            "expired; take a snapshot without --cut"
        )
    return TakenState(folder, manifest)
