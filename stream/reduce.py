"""Raw records of one batch → what must become visible because of them. Decides; writes nothing.

Knows neither how a message is fetched nor how a transaction is committed. A pair's way through this file: read → known? →
decode → encode → assign → match → decide (quota, reservoir) → caption → refine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from models.errors import BadImage, Reason
from models.model import PairModel, Pixels
from models.refine import refine
from state.partition import DUPLICATE, FORGOTTEN, KEPT, Decision, Fate, Partition
from state.priority import hash_id, id_key
from stream.avro_by_hand import write_kept_pair
from stream.dead_letters import DeadLetter
from stream.raw_format import RawReader, RawRecord
from stream.records import Codec, UndecodableRecord
from stream.topics import KEPT_OVERHEAD_BYTES

Message = Any  # confluent_kafka.Message

# A cluster of -1: nobody looked at the image.
NO_CLUSTER = -1
# A row of pair-codes takes its id, its vector, and this much more.
CODES_ROW_BYTES = 60
# Far above any URL, far below what a changelog record can hold.
ID_BYTES_MAX = 8192
# Greater than every offset.
NEVER = 1 << 63


class Effect(NamedTuple):
    """A record for the kept topic; value None is a tombstone."""

    partition: int
    key: bytes
    value: bytes | None
    headers: list[tuple[str, bytes]]


class CodesRow(NamedTuple):
    """What became of one input offset. cluster -1: nobody looked at the image."""

    id: str
    offset: int
    decision: Decision
    cluster: int
    itm: float


_row = partial(tuple.__new__, CodesRow)  # CodesRow(*row) without its Python frame: one a record


@dataclass
class CodesColumns:
    """The rows of one partition since the last commit; columns are made of them (schemas/PairCodes.avsc) once a commit."""

    rows: list[CodesRow] = field(default_factory=list)
    vectors: list[bytes] = field(default_factory=list)  # of the rows with a cluster, in their order

    @property
    def offsets(self) -> list[int]:
        return [row.offset for row in self.rows]

    @property
    def fates(self) -> list[Fate]:
        return [row.decision.fate for row in self.rows]

    @property
    def removed(self) -> list[tuple[str, int]]:
        """(id that left the reduced set, row that caused it)."""
        return [(gone, at) for at, row in enumerate(self.rows) for gone in row.decision.removed]

    def records(self, partition: int, epoch: int, bundle: str, tokens: int, bytes_max: int) -> Iterable[dict[str, Any]]:
        """The columns as PairCodes records of about `bytes_max` bytes each at most (a single row may take more)."""
        if not self.rows:
            return
        ids, offsets, decisions, cluster_column, itms = zip(*self.rows, strict=True)
        fate_column, positions, priorities, duplicate_of, removed_by_row = zip(*decisions, strict=True)
        removed = [(gone, row) for row, its in enumerate(removed_by_row) if its for gone in its]
        clusters = np.array(cluster_column, "<i4")
        fates = np.array(fate_column, np.uint8)
        vectors_before = np.concatenate([[0], np.cumsum(clusters >= 0)])
        weights = np.array([4 * len(pair_id) for pair_id in ids]) + (clusters >= 0) * 2 * tokens + CODES_ROW_BYTES
        for gone, row in removed:
            weights[row] += 4 * len(gone) + 10
        # The number of whole records' worth of bytes before a row says which record it belongs to.
        part = (np.cumsum(weights) - weights) // bytes_max
        starts = np.flatnonzero(np.diff(part, prepend=-1)).tolist()
        for start, end in pairwise([*starts, len(ids)]):
            rows = slice(start, end)
            duplicates = np.array(duplicate_of[rows], "<i8")[fates[rows] == Fate.DUPLICATE]
            yield {
                "partition": partition,
                "epoch": epoch,
                "bundle": bundle,
                "tokens": tokens,
                "ids": ids[rows],
                "offsets": np.array(offsets[rows], "<i8").tobytes(),
                "fates": fates[rows].tobytes(),
                "clusters": clusters[rows].tobytes(),
                "positions": np.array(positions[rows], "<i8").tobytes(),
                "priorities": np.array(priorities[rows], "<u8").tobytes(),
                "itms": np.array(itms[rows], "<f4").tobytes(),
                "vectors": b"".join(self.vectors[vectors_before[start] : vectors_before[end]]),
                "duplicate_of": duplicates.tobytes(),
                "removed": [{"id": gone, "row": row - start} for gone, row in removed if start <= row < end],
            }


@dataclass
class Effects:
    """What the batches since the last commit must make visible, in the order of each partition."""

    kept: list[Effect] = field(default_factory=list)
    dead: list[DeadLetter] = field(default_factory=list)
    codes: dict[int, CodesColumns] = field(default_factory=dict)
    records: int = 0
    value_bytes: int = 0  # of the kept pairs and the dead letters: what a transaction must carry
    itm_raw: list[float] = field(default_factory=list)
    itm_refined: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # by stage
    images: int = 0
    captions: int = 0

    @property
    def empty(self) -> bool:
        return self.records == 0


@dataclass(frozen=True)
class Reduction:
    """What a batch is reduced with: the model, how raw records are read, and what a kept pair may weigh."""

    model: PairModel
    reader: RawReader
    kept_codec: Codec
    fetch: Callable[[str], bytes] | None
    pool: ThreadPoolExecutor
    threads: int
    seed: int
    rate: str
    joiner: str
    kept_bytes_max: int
    topic: str
    clock: Callable[[], float] = time.monotonic
    caption_tokens: int | None = None  # words of a refined caption that a trainer reads, None: all


class _Seen(NamedTuple):
    """An image that was looked at: its pixels for the encoder, and its bytes for the kept pair."""

    pixels: Pixels
    image: bytes


class _Step(NamedTuple):
    """A raw record on its way: what it says, its id's hashes, or why it is dead. A takedown has neither."""

    message: Message
    partition: int
    offset: int
    raw: RawRecord | None
    hashes: tuple[int, int]
    trouble: BadImage | UndecodableRecord | None


_step = partial(tuple.__new__, _Step)


class _Told(NamedTuple):
    """What the model said of a kept pair."""

    cluster: int
    itm: float
    vector: bytes
    generated: str
    refined: str
    itm_refined: float


NO_HASHES = (0, 0)


class Cancelled(Exception):
    """The batch was given up between two stages; the caller aborts the partitions' open transactions."""


def reduce_batch(
    messages: Sequence[Message],
    partitions: dict[int, Partition],
    using: Reduction,
    out: Effects,
    given_up: Callable[[], bool] = lambda: False,
) -> None:
    """Adds to `out` what `messages` (each partition's in offset order) cause, and to the partitions' open transactions.

    A message of a partition that is not in `partitions` (it was revoked meanwhile) is passed over.
    Raises Cancelled once `given_up` says so, and whatever the model raises: nothing counted may become a dead letter, so
    the caller aborts and stops.
    """

    started = using.clock()

    def lap(stage: str) -> None:
        nonlocal started
        now = using.clock()
        out.seconds[stage] = out.seconds.get(stage, 0.0) + now - started
        started = now
        if given_up():
            raise Cancelled

    steps = _read(messages, partitions, using)
    asked: dict[int, list[int]] = {number: [] for number in partitions}
    for step in steps:
        if step.raw is not None:
            asked[step.partition].append(step.hashes[0])
    for number, hashes_of_ids in asked.items():
        partitions[number].look_up(hashes_of_ids)
    # An id that is known already needs no image; the rest is decoded by all cores and encoded in fixed batches.
    fate_if_seen = {number: partition.fate_if_seen for number, partition in partitions.items()}
    wanted = [
        i
        for i, step in enumerate(steps)
        if step.raw is not None and fate_if_seen[step.partition](step.hashes[0], step.offset) is None
    ]
    lap("read")
    looked_at = _look_at_all(wanted, steps, using)
    lap("decode")

    seen = {i: found for i, found in looked_at.items() if isinstance(found, _Seen)}
    row_of = {i: row for row, i in enumerate(seen)}
    vectors = using.model.encode([found.pixels for found in seen.values()])
    clusters = using.model.assign(vectors).tolist()
    lap("encode")
    itms = using.model.match(vectors, [_raw(steps[i]).caption for i in seen]).tolist()
    out.images += len(seen)
    out.itm_raw += itms
    lap("match")

    to_keep: list[tuple[int, int, Decision, int]] = []  # step, row, decision, place in out.kept
    codes_of = {number: out.codes.setdefault(number, CodesColumns()) for number in {step.partition for step in steps}}
    out.records += len(steps)
    row_bytes = vectors.shape[1] * 2
    all_vectors = vectors.astype("<u2", copy=False).tobytes()
    for i, (message, number, offset, raw, hashes, trouble) in enumerate(steps):
        partition, codes = partitions[number], codes_of[number]
        row = row_of.get(i, -1)
        if row >= 0 and raw is not None:
            vector = all_vectors[row * row_bytes : (row + 1) * row_bytes]
            decision = partition.decide(offset, raw.id, clusters[row], itms[row], vector, hashes)
            pair_id = raw.id
        else:
            if row < 0 and i in looked_at and _unseen(steps[i], partitions):
                found = looked_at[i]
                trouble = found if isinstance(found, BadImage) else None
            if trouble is not None:
                partition.dead(offset)
                out.dead.append(DeadLetter(message, trouble.reason, trouble.detail))
                out.value_bytes += len(message.value() or b"")
                continue
            if raw is None:
                pair_id = (message.key() or b"").decode("utf-8", "replace")
                decision = partition.take_down(offset, pair_id)
            else:
                pair_id = raw.id
                decision = partition.duplicate(offset, pair_id, hashes)
        became = decision.fate
        if became is DUPLICATE or became is FORGOTTEN:  # the image was not needed
            codes.rows.append(_row((pair_id, offset, decision, NO_CLUSTER, np.nan)))
        else:
            codes.rows.append(_row((pair_id, offset, decision, clusters[row], itms[row])))
            codes.vectors.append(vector)
        if became is KEPT:
            # Its record needs the caption, which is generated for the whole batch below; the order is settled here.
            to_keep.append((i, row, decision, len(out.kept)))
            out.kept.append(Effect(number, b"", None, []))
        if decision.removed:
            for gone in decision.removed:
                out.kept.append(Effect(number, gone.encode(), None, [("cause", b"%d" % offset)]))
    lap("decide")

    if to_keep:
        rows = [row for _, row, _, _ in to_keep]
        generated = using.model.caption(vectors[rows])
        captions = [
            refine(_raw(steps[i]).caption, text, using.joiner, using.caption_tokens)
            for (i, *_), text in zip(to_keep, generated, strict=True)
        ]
        refined_itms = using.model.match(vectors[rows], captions).tolist()
        for at, (i, row, decision, place) in enumerate(to_keep):
            image, vector = seen[i].image, all_vectors[row * row_bytes : (row + 1) * row_bytes]
            told = _Told(clusters[row], itms[row], vector, generated[at], captions[at], refined_itms[at])
            out.kept[place] = _kept_effect(steps[i], image, decision, told, partitions[steps[i].partition], using)
            out.value_bytes += len(image)
        out.captions += len(rows)
        out.itm_refined += refined_itms
        lap("caption")


def _read(messages: Sequence[Message], partitions: dict[int, Partition], using: Reduction) -> list[_Step]:
    key, read, kept_bytes_max = id_key(using.seed), using.reader.read, using.kept_bytes_max
    first_wanted = {number: partition.next_offset or 0 for number, partition in partitions.items()}
    steps: list[_Step] = []
    for message in messages:
        number, offset = message.partition(), message.offset()
        if offset < first_wanted.get(number, NEVER):
            continue
        value = message.value()
        if value is None:
            nobody = None if message.key() else UndecodableRecord(Reason.NO_ID, "neither a key nor a value")
            steps.append(_step((message, number, offset, None, NO_HASHES, nobody)))
            continue
        try:
            raw = read(message.key(), value)
            _refuse_what_cannot_be_kept(raw, kept_bytes_max)
            steps.append(_step((message, number, offset, raw, hash_id(key, raw.id), None)))
        except UndecodableRecord as error:
            steps.append(_step((message, number, offset, None, NO_HASHES, error)))
    return steps


def _unseen(step: _Step, partitions: dict[int, Partition]) -> bool:
    return partitions[step.partition].fate_if_seen(step.hashes[0], step.offset) is None


def _raw(step: _Step) -> RawRecord:
    if step.raw is None:
        raise ValueError("a dead letter or a takedown has no pair")
    return step.raw


def _refuse_what_cannot_be_kept(raw: RawRecord, kept_bytes_max: int) -> None:
    """Raises UndecodableRecord for a pair whose kept form might not fit its topic: after counting it is too late."""
    # A character has four bytes at most: lengths are at hand, encoding a text takes its time.
    if 4 * len(raw.id) > ID_BYTES_MAX and len(raw.id.encode()) > ID_BYTES_MAX:
        raise UndecodableRecord(
            Reason.ID_TOO_LONG, f"an id of {len(raw.id.encode())} bytes; at most {ID_BYTES_MAX} are possible"
        )
    weight = len(raw.image or b"") + KEPT_OVERHEAD_BYTES
    for key, value in raw.fields.items():
        weight += 4 * (len(key) + len(value))
    if weight + 8 * len(raw.caption) <= kept_bytes_max:
        return
    weight += 2 * len(raw.caption.encode())  # T_o stands in it twice, as itself and inside T
    if weight > kept_bytes_max:
        raise UndecodableRecord(
            Reason.TOO_LARGE, f"its kept form may take {weight} bytes and the topic takes {kept_bytes_max}"
        )


def _look_at_all(wanted: list[int], steps: list[_Step], using: Reduction) -> dict[int, _Seen | BadImage]:
    """What the images of the steps `wanted` look like, in that order; each thread takes one share of them."""
    if using.threads == 1:
        return {i: _look_at(steps[i].raw, using) for i in wanted}
    shares = [wanted[first :: using.threads] for first in range(using.threads)]
    done = using.pool.map(lambda share: [(i, _look_at(steps[i].raw, using)) for i in share], shares)
    found = {i: seen for share in done for i, seen in share}
    return {i: found[i] for i in wanted}


def _look_at(raw: RawRecord | None, using: Reduction) -> _Seen | BadImage:
    if raw is None:
        raise ValueError("only a pair has an image")
    try:
        image = raw.image if raw.image is not None else _fetched(raw, using)
        return _Seen(using.model.decode(image), image)
    except BadImage as error:
        return error


def _fetched(raw: RawRecord, using: Reduction) -> bytes:
    if using.fetch is None:
        raise BadImage(
            Reason.URI_NOT_ALLOWED, "the record has an image_uri and this worker fetches none: see --fetch-allow"
        )
    image = using.fetch(raw.image_uri or "")
    if len(image) + 2 * len(raw.caption.encode()) + KEPT_OVERHEAD_BYTES > using.kept_bytes_max:
        raise BadImage(Reason.TOO_LARGE, f"its kept form may not fit {using.kept_bytes_max} bytes")
    return image


def _kept_effect(
    step: _Step, image: bytes, decision: Decision, told: _Told, partition: Partition, using: Reduction
) -> Effect:
    raw, offset, priority = _raw(step), step.offset, decision.priority
    cluster, itm, vector, generated, refined, itm_refined = told
    value = using.kept_codec.header + write_kept_pair(
        raw.id, image, raw.caption, generated, refined, partition.epoch, cluster, decision.position, vector,
        partition.bundle or "", priority.to_bytes(8, "little"), using.rate, itm, itm_refined, using.topic, step.partition,
        offset, step.message.timestamp()[1], raw.image_uri, raw.fields,
    )  # fmt: skip
    headers = [
        ("cause", b"%d" % offset),
        ("epoch", b"%d" % partition.epoch),
        ("cluster", b"%d" % cluster),
        ("priority", b"%d" % priority),
        ("rate", using.rate.encode()),
    ]
    return Effect(step.partition, raw.id.encode(), value, headers)
