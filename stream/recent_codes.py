"""The newest index vectors of a stream, from `pair-codes`: a window by count or by time, and a uniform sample of it.

Must not know what the vectors are read for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from confluent_kafka import TopicPartition
from numpy.typing import NDArray

from state.partition import Fate
from stream.kafka import partition_counts
from stream.report_data import numbers_of
from stream.stream_view import StreamSource, StreamView, decoded, read_spans, whole

OFFSETS_WAIT_S = 30.0
CODES_BATCH = 10  # records of up to half a megabyte


class Rows(NamedTuple):
    """Pairs of one partition whose image was looked at, in offset order; n rows."""

    partition: int
    epoch: int
    offsets: NDArray[np.int64]
    clusters: NDArray[np.int32]
    itms: NDArray[np.float32]
    vectors: NDArray[np.uint16]
    counted: NDArray[np.bool_]  # False: below the gate, in no cell

    def part(self, of: slice | NDArray[np.bool_]) -> Rows:
        """Some of the rows."""
        columns = (self.offsets[of], self.clusters[of], self.itms[of], self.vectors[of], self.counted[of])
        return Rows(self.partition, self.epoch, *columns)


def rows_of(record: Mapping[str, Any]) -> Rows:
    """The rows of a decoded PairCodes record that have a vector."""
    clusters = np.frombuffer(record["clusters"], "<i4")
    seen = clusters >= 0
    fates = np.frombuffer(record["fates"], np.uint8)[seen]
    return Rows(
        record["partition"],
        record["epoch"],
        np.frombuffer(record["offsets"], "<i8")[seen],
        clusters[seen],
        np.frombuffer(record["itms"], "<f4")[seen],
        np.frombuffer(record["vectors"], "<u2").reshape(-1, max(1, record["tokens"])),
        fates != Fate.BELOW_GATE,
    )


def recent_rows(source: StreamSource, view: StreamView, records: int, since_ms: int | None = None) -> Iterator[Rows]:
    """The rows of the newest `records` raw records (an equal share of each partition), none older than `since_ms`.

    Only what is below the view's cut. A partition's rows come in order, partitions alternate.
    """
    if source.topics.codes not in partition_counts(source.connection, [source.topics.codes]):
        return
    share = -(-records // max(1, len(view.partitions)))
    lowest = {p: cut - share for p, cut in view.cut.items()}
    spans = whole(source.connection, source.topics.codes, view.partitions)
    if since_ms is not None:
        spans = _since(source, spans, since_ms)
    spans = {p: (_start_of(source, p, span, lowest[p]), span[1]) for p, span in spans.items()}
    codec = source.codec("PairCodes")
    for messages in read_spans(source.connection, source.topics.codes, spans, batch=CODES_BATCH):
        for message in messages:
            rows = rows_of(decoded(codec, message))
            wanted = slice(*np.searchsorted(rows.offsets, [lowest[rows.partition], view.cut[rows.partition]]).tolist())
            if rows.offsets[wanted].size:
                yield rows.part(wanted)


def _since(source: StreamSource, spans: Mapping[int, tuple[int, int]], since_ms: int) -> dict[int, tuple[int, int]]:
    reader = source.connection.reader()
    try:
        asked = [TopicPartition(source.topics.codes, p, since_ms) for p in spans]
        found = reader.offsets_for_times(asked, OFFSETS_WAIT_S)
    finally:
        reader.close()
    # no record is so young: the offset of the end, as -1
    starts = {tp.partition: tp.offset if tp.offset >= 0 else spans[tp.partition][1] for tp in found}
    return {p: (max(start, starts[p]), end) for p, (start, end) in spans.items()}


def _start_of(source: StreamSource, partition: int, span: tuple[int, int], lowest: int) -> int:
    """An offset of pair-codes at or before the first row of the input offset `lowest`, found by steps that double."""
    first, end = span
    step = 1
    while end - step > first:
        at = _input_offset_at(source, partition, end - step, end)
        if at is not None and at <= lowest:
            return end - step
        step *= 4
    return first


def _input_offset_at(source: StreamSource, partition: int, offset: int, end: int) -> int | None:
    """The first input offset in the record at `offset` or the next one there is."""
    codec = source.codec("PairCodes")
    for messages in read_spans(source.connection, source.topics.codes, {partition: (offset, end)}, batch=1):
        offsets = np.frombuffer(decoded(codec, messages[0])["offsets"], "<i8")
        return int(offsets[0]) if len(offsets) else None
    return None


@dataclass
class Sample:
    """A uniform sample of at most `size` rows: those with the smallest keyed hash of their place, whatever the order.

    Twice as many are held before they are cut back, so memory is bounded by 2 x size rows of codes.
    """

    size: int
    seed: int

    def __post_init__(self) -> None:
        self._numbers: list[NDArray[np.uint64]] = []
        self._vectors: list[NDArray[np.uint16]] = []
        self._held = 0
        self._limit: np.uint64 | None = None
        self.offered = 0

    def offer(self, rows: Rows) -> None:
        """Takes the counted rows."""
        numbers = numbers_of(self.seed, rows.partition, rows.offsets)
        wanted = rows.counted
        self.offered += int(wanted.sum())
        if self._limit is not None:
            wanted = wanted & (numbers < self._limit)
        self._numbers.append(numbers[wanted])
        self._vectors.append(rows.vectors[wanted])
        self._held += len(self._numbers[-1])
        if self._held >= 2 * self.size:
            self._cut()

    def rows(self) -> NDArray[np.uint16]:
        """(n, L) index vectors, in the order of their numbers: a random one."""
        if not self._held:
            return np.empty((0, 0), np.uint16)
        self._cut()
        return self._vectors[0]

    def _cut(self) -> None:
        numbers, vectors = np.concatenate(self._numbers), np.concatenate(self._vectors)
        order = np.argsort(numbers, kind="stable")[: self.size]
        self._numbers, self._vectors, self._held = [numbers[order]], [vectors[order]], len(order)
        if len(order) == self.size:
            self._limit = self._numbers[0][-1]
