"""A cut of a stream: a vector of input offsets, and what the reduced set and its cells looked like there.

The newest cut is what the changelog says now. An older one is reached by going back from there: the rows of `pair-codes`
between the cut and now say what has been counted, kept and removed since. That gives the number of pairs that must be
found in the kept topic; if compaction has taken one of them, fewer are found, since it never takes a tombstone before
the record under it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from confluent_kafka import KafkaError, TopicPartition

from state.changelog import CellCounts, Totals
from state.partition import Fate
from stream.errors import TldrError, Unavailable
from stream.kafka import refuse_reading
from stream.stream_view import (
    OPEN_TRANSACTION_WAIT_S,
    POLL_WAIT_S,
    StreamSource,
    StreamView,
    codes_rows,
    decoded,
    read_codes,
    whole,
)

COUNTED = frozenset({Fate.KEPT, Fate.OVER_QUOTA, Fate.OVER_CAP})
# What a row of this fate added one to.
_TOTALS_OF = {
    Fate.KEPT: ("counted", "kept"),
    Fate.OVER_QUOTA: ("counted", "over_quota"),
    Fate.OVER_CAP: ("counted", "over_cap"),
    Fate.BELOW_GATE: ("below_gate",),
    Fate.DUPLICATE: ("duplicates",),
    Fate.FORGOTTEN: ("forgotten",),
}
# Below this many records a bisection of the codes topic costs more than reading them.
BISECTION_END = 32


@dataclass
class Cut:
    """offsets  next input offset by partition; in_set  pairs of the reduced set; cells  by partition and (epoch, cluster).

    The cells' `size` is that of now, which a takedown may have changed since; counted, entered and evicted are the cut's.
    The totals' `read`, `dead` and `lost` are those of now too: rows do not tell them.
    """

    offsets: dict[int, int]
    in_set: dict[int, int] = field(default_factory=dict)
    cells: dict[int, dict[tuple[int, int], CellCounts]] = field(default_factory=dict)
    totals: dict[int, Totals] = field(default_factory=dict)


def parse_cut(text: str) -> dict[int, int]:
    """`0:120,1:96`, or the path of a snapshot's manifest. Raises TldrError for anything else."""
    if re.fullmatch(r"\s*\d+:\d+(\s*,\s*\d+:\d+)*\s*", text):
        return {int(p): int(offset) for p, offset in (part.split(":") for part in text.split(","))}
    try:
        offsets = json.loads(Path(text).read_text())["offsets"]
        return {int(p): int(offset) for p, offset in offsets.items()}
    except OSError as error:
        raise TldrError(
            f"--cut {text}: neither offsets (0:120,1:96) nor a readable manifest ({error.strerror})"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TldrError(f"--cut {text} is not a snapshot's manifest: it has no offsets by partition") from error


def written(offsets: Mapping[int, int]) -> str:
    """A cut as `--cut` reads it."""
    return ",".join(f"{p}:{offset}" for p, offset in sorted(offsets.items()))


def newest_cut(view: StreamView) -> Cut:
    """What the changelog says now."""
    totals = {p: part.totals for p, part in view.partitions.items()}
    return Cut(
        view.cut,
        {p: total.kept - total.evicted - total.removed for p, total in totals.items()},
        {p: dict(part.cells) for p, part in view.partitions.items()},
        totals,
    )


def cut_at(source: StreamSource, view: StreamView, offsets: Mapping[int, int]) -> Cut:
    """The cut at these offsets. Raises TldrError where the stream is not there yet, or where nothing tells any more."""
    if offsets.keys() != view.partitions.keys():
        raise TldrError(
            f"the cut names the partitions {', '.join(map(str, sorted(offsets)))} and the stream has "
            f"{len(view.partitions)}: give every partition's offset, as in --cut {written(view.cut)}"
        )
    for p, offset in sorted(offsets.items()):
        if offset > view.cut[p]:
            raise TldrError(
                f"the cut lies beyond what is committed: offset {offset} of partition {p}, and the stream is at "
                f"{view.cut[p]}; the newest cut is --cut {written(view.cut)}"
            )
    cut = newest_cut(view)
    cut.offsets = dict(offsets)
    back = [p for p in offsets if offsets[p] < view.cut[p]]
    spans = whole(source.connection, source.topics.codes, back)
    for p in back:
        _refuse_expired(source, p, offsets[p], spans[p], view)
        spans[p] = (codes_position(source, p, offsets[p], spans[p]), spans[p][1])
    for row in read_codes(source, spans, below=view.cut):
        if row.offset >= offsets[row.partition]:
            _undo(cut, row.partition, (row.epoch, row.cluster), row.fate, len(row.removed))
    for p in back:
        cut.cells[p] = {cell: counts for cell, counts in cut.cells[p].items() if counts.counted}
    return cut


def _undo(cut: Cut, partition: int, cell: tuple[int, int], fate: Fate, removed: int) -> None:
    kept = int(fate == Fate.KEPT)
    field = "evicted" if fate in COUNTED else "removed"
    totals = cut.totals[partition]
    totals = totals._replace(**{field: getattr(totals, field) - removed})
    for name in _TOTALS_OF[fate]:
        totals = totals._replace(**{name: getattr(totals, name) - 1})
    cut.totals[partition] = totals
    cut.in_set[partition] += removed - kept
    if fate in COUNTED:
        counts = cut.cells[partition].get(cell, CellCounts(0, 0, 0, 0))
        cut.cells[partition][cell] = counts._replace(
            counted=counts.counted - 1,
            entered=counts.entered - kept,
            evicted=counts.evicted - removed,
        )


def _refuse_expired(
    source: StreamSource, partition: int, input_offset: int, span: tuple[int, int], view: StreamView
) -> None:
    """Raises TldrError where rows from `input_offset` on may have expired."""
    first = first_row_offset(source, partition, *span)
    if span[0] > 0 and (first is None or first > input_offset):
        since = "all of them" if first is None else f"those before input offset {first}"
        raise TldrError(
            f"the cut at offset {input_offset} of partition {partition} cannot be checked: its pair-codes have "
            f"expired ({since}); the newest cut is --cut {written(view.cut)}"
        )


def codes_position(source: StreamSource, partition: int, input_offset: int, span: tuple[int, int]) -> int:
    """An offset of the codes topic from which on every row of `input_offset` and later that is there is found."""
    low, end = span
    high = end
    while high - low > BISECTION_END:
        middle = (low + high) // 2
        at = first_row_offset(source, partition, middle, end)
        if at is not None and at <= input_offset:
            low = middle
        else:
            high = middle
    return low


def first_row_offset(source: StreamSource, partition: int, start: int, end: int) -> int | None:
    """The input offset of the first row at or behind `start` of the codes topic; None where there is none."""
    if start >= end:
        return None
    codec = source.codec("PairCodes")
    reader = source.connection.reader()
    try:
        reader.assign([TopicPartition(source.topics.codes, partition, start)])
        for _ in range(int(OPEN_TRANSACTION_WAIT_S / POLL_WAIT_S)):
            message = reader.poll(POLL_WAIT_S)
            if message is None:
                continue
            error = message.error()
            if error is not None and error.code() == KafkaError._PARTITION_EOF:
                return None
            if error is not None:
                refuse_reading(source.connection, source.topics.codes, partition, error)
                continue
            for row in codes_rows(decoded(codec, message)):
                return row.offset
    finally:
        reader.close()
    raise Unavailable(f"{source.topics.codes}/{partition} does not answer at offset {start}")
