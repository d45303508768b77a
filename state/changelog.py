"""The changelog of a partition, record by record: key and value ⇄ bytes.

The changelog IS the store: the store is these records, materialised. This file knows how they look and nothing about
where they lie; it must never know Kafka or LMDB. Integers are big-endian (keys then sort by number), index vectors
little-endian as they lie in memory; every value that is not JSON begins with the version of its layout.

    S                          settings of the stream, JSON, the first record
    P                          position and totals of the partition, JSON, in every transaction
    W epoch                    the bundle of an epoch, JSON
    C epoch first-cluster      counters of up to 64 cells: a busy transaction touches most of them
    E hash                     an entry of the reservoir; no value: it left
    K first-offset             the ids that one transaction counted; no value: all are out of the dedupe window
    F hash                     an id that was taken down for good
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from state.errors import UnknownRecord
from state.quota import Ratio

Record = tuple[bytes, bytes | None]

SETTINGS = b"S"
POSITION = b"P"
SWITCH, CELL, ENTRY, KNOWN, FORGOTTEN = b"W", b"C", b"E", b"K", b"F"

# 32,768 ids are 393 kB: well under Kafka's default limit of 1 MB for a record.
KNOWN_IDS_MAX = 32_768
# Offsets inside one record are stored as differences of 32 bits.
KNOWN_SPAN_MAX = (1 << 32) - 1

# A record each would be a third of all that a busy worker writes.
CELLS_A_RECORD = 64

_VERSION = 1
# One cell a record was version 1.
_CELLS_VERSION = 2
_u32_key = struct.Struct(">cI")
_u64_key = struct.Struct(">cQ")
_cell_key = struct.Struct(">cII")
_CELL_BYTES = 32
_entry = struct.Struct(">BQIIQHHIH")  # version, offset, epoch, cluster, priority, p, q, bytes of the id, tokens
_HEAD = np.dtype(
    [("version", "u1"), ("offset", ">u8"), ("epoch", ">u4"), ("cluster", ">u4"), ("priority", ">u8"), ("p", ">u2"),
     ("q", ">u2"), ("id_bytes", ">u4"), ("tokens", ">u2")]
)  # fmt: skip
_known = struct.Struct(">BI")
_forgotten = struct.Struct(">BQ")


class Totals(NamedTuple):
    """What became of everything a partition has read, since its stream began.

    read = dead + duplicates + forgotten + below_gate + counted; counted = kept + over_quota + over_cap;
    in the reduced set now = kept - evicted - removed. lost: offsets that the broker had deleted before they were read.
    """

    read: int = 0
    dead: int = 0
    duplicates: int = 0
    forgotten: int = 0
    below_gate: int = 0
    counted: int = 0
    over_quota: int = 0
    over_cap: int = 0
    kept: int = 0
    evicted: int = 0
    removed: int = 0
    lost: int = 0


class Position(NamedTuple):
    """How far a partition is: the next input offset, its epoch, and who said so when (ms since 1970)."""

    next_offset: int
    epoch: int
    wall_clock_ms: int
    instance: str
    totals: Totals


class Switch(NamedTuple):
    """From this input offset on, pairs are counted in this epoch, with this bundle."""

    epoch: int
    bundle: str
    space: str
    input_offset: int


class CellCounts(NamedTuple):
    """Counted pairs, pairs that entered the reservoir, those evicted from it, and those in it now."""

    counted: int
    entered: int
    evicted: int
    size: int


class Entry(NamedTuple):
    """A pair in the reservoir. vector  (tokens,) uint16."""

    pair_id: str
    epoch: int
    cluster: int
    priority: int
    rate: Ratio
    offset: int
    vector: NDArray[np.uint16]


def _strange(what: str, error: Exception | None = None) -> UnknownRecord:
    because = f" ({error})" if error else ""
    return UnknownRecord(
        f"a changelog record of kind {what} cannot be read{because}; it was written by a newer version of tldr-stream "
        "or by something else: upgrade this worker, or look who else writes to the topic"
    )


# -- keys --------------------------------------------------------------------------------------------------------------


def switch_key(epoch: int) -> bytes:
    """Key of the switch that began an epoch."""
    return _u32_key.pack(SWITCH, epoch)


def cells_key(epoch: int, cluster: int) -> bytes:
    """Key of the record that has the counters of this cell and of those beside it."""
    return _cell_key.pack(CELL, epoch, cluster - cluster % CELLS_A_RECORD)


def entry_key(known_hash: int) -> bytes:
    """Key of a reservoir entry."""
    return _u64_key.pack(ENTRY, known_hash)


def known_key(first_offset: int) -> bytes:
    """Key of the ids that one transaction counted, by the first of their offsets."""
    return _u64_key.pack(KNOWN, first_offset)


def forgotten_key(known_hash: int) -> bytes:
    """Key of an id that was taken down."""
    return _u64_key.pack(FORGOTTEN, known_hash)


def number_of(key: bytes) -> int:
    """The number behind the kind: an epoch, a hash or an offset (for cells: epoch · 2^32 + cluster)."""
    return int.from_bytes(key[1:], "big")


# -- values ------------------------------------------------------------------------------------------------------------


def encode_position(position: Position) -> bytes:
    """JSON, so that a person with a console consumer can read it."""
    return json.dumps({**position._asdict(), "totals": position.totals._asdict()}).encode()


def decode_position(value: bytes) -> Position:
    """Inverse of `encode_position`; fields added later are ignored. Raises UnknownRecord."""
    try:
        values = json.loads(value)
        counts = {"lost": 0, **values["totals"]}  # the first streams did not count what they lost
        totals = Totals(**{name: counts[name] for name in Totals._fields})
        return Position(values["next_offset"], values["epoch"], values["wall_clock_ms"], values["instance"], totals)
    except (ValueError, KeyError, TypeError) as error:
        raise _strange("P", error) from error


def encode_switch(switch: Switch) -> bytes:
    """JSON."""
    return json.dumps(switch._asdict()).encode()


def decode_switch(value: bytes) -> Switch:
    """Inverse of `encode_switch`. Raises UnknownRecord."""
    try:
        values = json.loads(value)
        return Switch(values["epoch"], values["bundle"], values["space"], values["input_offset"])
    except (ValueError, KeyError, TypeError) as error:
        raise _strange("W", error) from error


def encode_cells(counts: NDArray[np.int64]) -> bytes:
    """32 bytes a cell, up to the last one that has counted anything.

    counts  (n, 4) counted, entered, evicted, size of the cells from the record's first cluster on, n ≤ 64
    """
    used = np.flatnonzero(counts[:, 0])
    end = int(used[-1]) + 1 if len(used) else 0
    return bytes([_CELLS_VERSION]) + counts[:end].astype(">u8").tobytes()


def decode_cells(value: bytes) -> NDArray[np.int64]:
    """Inverse of `encode_cells`, without the cells behind the last one that has counted. Raises UnknownRecord."""
    count, odd = divmod(len(value) - 1, _CELL_BYTES)
    if odd or count > CELLS_A_RECORD or value[0] != _CELLS_VERSION:
        raise _strange("C")
    return np.frombuffer(value, ">u8", 4 * count, 1).astype(np.int64).reshape(count, 4)


def cells_of(key: bytes, value: bytes) -> list[tuple[int, int, CellCounts]]:
    """(epoch, cluster, counters) of each cell of a C record that has counted anything. Raises UnknownRecord."""
    number = number_of(key)
    epoch, first = number >> 32, number & 0xFFFFFFFF
    rows = decode_cells(value).tolist()
    return [(epoch, first + at, CellCounts(*row)) for at, row in enumerate(rows) if row[0]]


def encode_entry(
    offset: int, epoch: int, cluster: int, priority: int, rate: Ratio, pair_id: bytes, vector: bytes
) -> bytes:
    """35 bytes, the id in UTF-8, and the vector as little-endian uint16."""
    head = _entry.pack(_VERSION, offset, epoch, cluster, priority, rate.p, rate.q, len(pair_id), len(vector) >> 1)
    return head + pair_id + vector


def encode_entries(
    offsets: NDArray[np.int64], epoch: int, clusters: NDArray[np.int32], priorities: NDArray[np.uint64], rate: Ratio,
    pair_ids: Sequence[bytes], vectors: NDArray[np.uint16],
) -> list[bytes]:  # fmt: skip
    """`encode_entry` of many pairs at once, a column for each argument; vectors (n, tokens)."""
    heads = np.empty(len(pair_ids), _HEAD)
    heads["version"], heads["offset"], heads["epoch"], heads["cluster"] = _VERSION, offsets, epoch, clusters
    heads["priority"], heads["p"], heads["q"], heads["tokens"] = priorities, rate.p, rate.q, vectors.shape[1]
    heads["id_bytes"] = list(map(len, pair_ids))
    front, back, width = heads.tobytes(), vectors.astype("<u2", copy=False).tobytes(), 2 * vectors.shape[1]
    return [
        front[at * _entry.size : (at + 1) * _entry.size] + pair_id + back[at * width : (at + 1) * width]
        for at, pair_id in enumerate(pair_ids)
    ]


def decode_entry(value: bytes) -> Entry:
    """Inverse of `encode_entry`. Raises UnknownRecord."""
    try:
        version, offset, epoch, cluster, priority, p, q, id_bytes, tokens = _entry.unpack_from(value)
        start = _entry.size + id_bytes
        if version != _VERSION or len(value) != start + 2 * tokens:
            raise _strange("E")
        pair_id = value[_entry.size : start].decode()
        vector = np.frombuffer(value, "<u2", tokens, start)
    except (struct.error, UnicodeDecodeError) as error:
        raise _strange("E", error) from error
    return Entry(pair_id, epoch, cluster, priority, Ratio(p, q), offset, vector)


class EntryHead(NamedTuple):
    """What an entry says about its place, without id and vector."""

    offset: int
    epoch: int
    cluster: int
    priority: int
    rate: Ratio


def entry_head(value: bytes) -> EntryHead:
    """The fixed part of an entry. Raises UnknownRecord."""
    if len(value) < _entry.size or value[0] != _VERSION:
        raise _strange("E")
    _, offset, epoch, cluster, priority, p, q, _, _ = _entry.unpack_from(value)
    return EntryHead(offset, epoch, cluster, priority, Ratio(p, q))


def entry_offset_bytes(value: bytes) -> bytes:
    """The input offset of an entry as 8 big-endian bytes. Raises UnknownRecord."""
    if len(value) < _entry.size or value[0] != _VERSION:
        raise _strange("E")
    return value[1:9]


def encode_known(hashes: NDArray[np.uint64], offsets: NDArray[np.uint64]) -> list[Record]:
    """The ids that one transaction counted, as records of at most 32,768 ids.

    hashes, offsets  (n,) each, offsets ascending.
    """
    records: list[Record] = []
    start = 0
    while start < len(offsets):
        first = int(offsets[start])
        reach = int(np.searchsorted(offsets, np.uint64(min(first + KNOWN_SPAN_MAX, (1 << 64) - 1)), side="right"))
        end = min(reach, start + KNOWN_IDS_MAX)
        deltas = offsets[start:end] - np.uint64(first)
        value = _known.pack(_VERSION, end - start) + hashes[start:end].astype(">u8").tobytes()
        records.append((known_key(first), value + deltas.astype(">u4").tobytes()))
        start = end
    return records


def known_columns(key: bytes, value: bytes) -> tuple[bytes, bytes]:
    """The hashes and the input offsets of a K record, each as a row of 8-byte big-endian integers.

    Raises UnknownRecord.
    """
    if len(value) < _known.size or value[0] != _VERSION:
        raise _strange("K")
    count = _known.unpack_from(value)[1]
    split = _known.size + 8 * count
    if len(value) != split + 4 * count:
        raise _strange("K")
    offsets = np.frombuffer(value, ">u4", count, split).astype(np.uint64) + np.uint64(number_of(key))
    return value[_known.size : split], offsets.astype(">u8").tobytes()


def encode_forgotten(offset: int) -> bytes:
    """The input offset of the takedown."""
    return _forgotten.pack(_VERSION, offset)


def decode_forgotten(value: bytes) -> int:
    """Inverse of `encode_forgotten`. Raises UnknownRecord."""
    if len(value) != _forgotten.size or value[0] != _VERSION:
        raise _strange("F")
    return int(_forgotten.unpack(value)[1])
