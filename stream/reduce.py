"""Raw records of one batch → what must become visible because of them. Decides; writes nothing.

Knows neither how a message is fetched nor how a transaction is committed. A pair's way through this file: read → known? →
decode → encode → assign → match → decide (quota, reservoir) → caption → refine. A batch goes that way in columns: what is done
for each record by itself is most of what the engine costs (docs/tried.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import compress, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.errors import BadImage, Reason
from models.model import PairModel, Picture, Vectors
from models.refine import refine
from state.partition import DEAD, DUPLICATE, KEPT, NOT_KNOWN, Kind, Partition, Rows
from state.priority import hash_ids, id_key
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


_effect = partial(tuple.__new__, Effect)  # Effect(*fields) without its Python frame
_TO_COME = Effect(-1, b"", None, [])  # in the place of a kept pair whose caption is not there yet


class CodesRows(NamedTuple):
    """What became of some input offsets, in their order; n rows. A cluster of -1: nobody looked at the image."""

    ids: list[str]
    offsets: NDArray[np.int64]
    fates: NDArray[np.uint8]
    clusters: NDArray[np.int32]
    positions: NDArray[np.int64]
    priorities: NDArray[np.uint64]
    itms: NDArray[np.float32]
    duplicate_of: NDArray[np.int64]
    vectors: Vectors  # of the rows with a cluster
    removed: list[tuple[int, str]]  # (row that caused it, id that left the reduced set)


@dataclass
class CodesColumns:
    """The rows of one partition since the last commit, as columns (schemas/PairCodes.avsc)."""

    batches: list[CodesRows] = field(default_factory=list)

    @property
    def offsets(self) -> list[int]:
        return [offset for batch in self.batches for offset in batch.offsets.tolist()]

    @property
    def fates(self) -> NDArray[np.uint8]:
        return np.concatenate([np.empty(0, np.uint8), *(batch.fates for batch in self.batches)])

    @property
    def removed(self) -> int:
        """How many ids left the reduced set."""
        return sum(len(batch.removed) for batch in self.batches)

    def records(self, partition: int, epoch: int, bundle: str, tokens: int, bytes_max: int) -> Iterable[dict[str, Any]]:
        """The columns as PairCodes records of about `bytes_max` bytes each at most (a single row may take more)."""
        for batch in self._whole():
            yield from _codes_records(batch, partition, epoch, bundle, tokens, bytes_max)

    def _whole(self) -> Iterable[CodesRows]:
        """All batches as one."""
        if not self.batches:
            return
        ids, offsets, fates, clusters, positions, priorities, itms, duplicate_of, vectors, removed = zip(
            *self.batches, strict=True
        )
        before = np.cumsum([0, *map(len, ids)]).tolist()
        yield CodesRows(
            [pair_id for its in ids for pair_id in its],
            np.concatenate(offsets),
            np.concatenate(fates),
            np.concatenate(clusters),
            np.concatenate(positions),
            np.concatenate(priorities),
            np.concatenate(itms),
            np.concatenate(duplicate_of),
            np.concatenate(vectors),
            [(start + row, gone) for start, its in zip(before, removed, strict=False) for row, gone in its],
        )


def _codes_records(
    rows: CodesRows, partition: int, epoch: int, bundle: str, tokens: int, bytes_max: int
) -> Iterable[dict[str, Any]]:
    looked_at = rows.clusters >= 0
    vectors_before = np.concatenate([[0], np.cumsum(looked_at)])
    weights = 4 * np.fromiter(map(len, rows.ids), np.int64, len(rows.ids)) + looked_at * 2 * tokens + CODES_ROW_BYTES
    for row, gone in rows.removed:
        weights[row] += 4 * len(gone) + 10
    # The number of whole records' worth of bytes before a row says which record it belongs to.
    part = (np.cumsum(weights) - weights) // bytes_max
    starts = np.flatnonzero(np.diff(part, prepend=-1)).tolist()
    for start, end in pairwise([*starts, len(rows.ids)]):
        its = slice(start, end)
        duplicates = rows.duplicate_of[its][rows.fates[its] == DUPLICATE]
        yield {
            "partition": partition,
            "epoch": epoch,
            "bundle": bundle,
            "tokens": tokens,
            "ids": rows.ids[its],
            "offsets": rows.offsets[its].astype("<i8").tobytes(),
            "fates": rows.fates[its].tobytes(),
            "clusters": rows.clusters[its].astype("<i4").tobytes(),
            "positions": rows.positions[its].astype("<i8").tobytes(),
            "priorities": rows.priorities[its].astype("<u8").tobytes(),
            "itms": rows.itms[its].astype("<f4").tobytes(),
            "vectors": rows.vectors[vectors_before[start] : vectors_before[end]].astype("<u2", copy=False).tobytes(),
            "duplicate_of": duplicates.astype("<i8").tobytes(),
            "removed": [{"id": gone, "row": row - start} for row, gone in rows.removed if start <= row < end],
        }


@dataclass
class Effects:
    """What the batches since the last commit must make visible, in the order of each partition."""

    kept: list[Effect] = field(default_factory=list)
    dead: list[DeadLetter] = field(default_factory=list)
    codes: dict[int, CodesColumns] = field(default_factory=dict)
    records: int = 0
    value_bytes: int = (
        0  # of images, index vectors and dead letters: what a transaction must carry, and memory until then
    )
    itm_raw: list[float] = field(default_factory=list)
    itm_kept: list[float] = field(default_factory=list)  # of the original captions of what is kept
    itm_refined: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # by stage
    images: int = 0
    captions: int = 0
    switched: set[int] = field(default_factory=set)  # partitions that begin an epoch

    @property
    def empty(self) -> bool:
        return self.records == 0 and not self.switched


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
    models: Mapping[str, PairModel] = field(default_factory=dict)  # of the bundles that partitions run with, by version

    def model_of(self, partition: Partition) -> PairModel:
        """The model of the bundle that a partition runs with: `model`, or one that agrees with it in all but clusters and
        captions."""
        bundle = partition.bundle
        return self.model if bundle is None or bundle == self.model.version else self.models[bundle]


@dataclass
class _Batch:
    """The raw records of a batch, a column for each thing that is known of them.

    raws      what a record says, None for takedowns and for what cannot be read
    ids       "" where there is none; known, priorities  the halves of their hashes
    kinds     state.partition.Kind
    troubles  row → why it is dead
    """

    messages: list[Message]
    numbers: NDArray[np.int64]
    offsets: NDArray[np.int64]
    raws: list[RawRecord | None]
    ids: list[str]
    kinds: NDArray[np.uint8]
    troubles: dict[int, BadImage | UndecodableRecord]
    known: NDArray[np.uint64]
    priorities: NDArray[np.uint64]

    def raw(self, row: int) -> RawRecord:
        raw = self.raws[row]
        if raw is None:
            raise ValueError("a dead letter or a takedown has no pair")
        return raw


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

    batch = _read(messages, partitions, using)
    rows_of = {number: np.flatnonzero(batch.numbers == number) for number in np.unique(batch.numbers).tolist()}
    # An id that is known already needs no image; the rest is decoded by all cores and encoded in fixed batches.
    firsts = np.full(len(batch.messages), NOT_KNOWN)
    for number, rows in rows_of.items():
        named = rows[batch.kinds[rows] != Kind.DEAD]
        firsts[named] = partitions[number].look_up(batch.known[named])
        known = partitions[number].is_known(firsts[named], batch.offsets[named])
        batch.kinds[named[known & (batch.kinds[named] == Kind.PAIR)]] = Kind.KNOWN
    lap("read")
    fetched, pictures = _look_at_all(np.flatnonzero(batch.kinds == Kind.PAIR).tolist(), batch, using)
    lap("decode")

    vectors = using.model.encode(pictures)
    pairs = np.flatnonzero(batch.kinds == Kind.PAIR)
    clusters = np.empty(len(pairs), np.int32)
    for model, its in _by_model(batch.numbers[pairs], partitions, using):
        clusters[its] = model.assign(vectors[its])
    lap("encode")
    raws = batch.raws
    itms = using.model.match(vectors, [raws[row].caption for row in pairs.tolist()], pictures)  # type: ignore[union-attr]
    out.images += len(pairs)
    out.itm_raw += itms.tolist()
    lap("match")

    kept = _Kept([], [], [], [], [])
    out.records += len(batch.messages)
    for number, rows in rows_of.items():
        _decide(batch, rows, firsts, number, partitions[number], (pairs, clusters, itms, vectors), out, kept)
    lap("decide")

    if kept.rows:
        _caption(batch, kept, fetched, (clusters, itms, vectors), pictures, partitions, using, out)
        lap("caption")


def _by_model(
    numbers: NDArray[np.int64], partitions: dict[int, Partition], using: Reduction
) -> Iterable[tuple[PairModel, NDArray[np.int64] | slice]]:
    """Rows, given by the number of their partition, for each model that these run with: more than one around a switch."""
    models = {number: using.model_of(partitions[number]) for number in np.unique(numbers).tolist()}
    different = {model.version: model for model in models.values()}
    if len(different) <= 1:
        yield from ((model, slice(None)) for model in different.values())
        return
    for version, model in different.items():
        its = [number for number, other in models.items() if other.version == version]
        yield model, np.flatnonzero(np.isin(numbers, its))


class _Kept(NamedTuple):
    """The pairs that are kept, a column for each thing that is known of them.

    Their records need captions, which are generated for the whole batch; their places among the effects are settled before.
    """

    rows: list[int]
    pairs: list[int]  # number among those whose image was looked at
    numbers: list[int]  # of the partition
    positions: list[int]
    places: list[int]  # in Effects.kept


def _read(messages: Sequence[Message], partitions: dict[int, Partition], using: Reduction) -> _Batch:
    read, grows, kept_bytes_max = using.reader.read, using.reader.grows, using.kept_bytes_max
    # What is no larger can always be kept: see `_refuse_what_cannot_be_kept`, where a byte counts eight times at most.
    small = (kept_bytes_max - KEPT_OVERHEAD_BYTES) // 8
    first_wanted = {number: partition.next_offset or 0 for number, partition in partitions.items()}
    wanted = list(messages)
    numbers = [message.partition() for message in wanted]
    offsets = [message.offset() for message in wanted]
    here = [offset >= first_wanted.get(number, NEVER) for number, offset in zip(numbers, offsets, strict=True)]
    if not all(here):
        wanted, numbers, offsets = (list(compress(column, here)) for column in (wanted, numbers, offsets))
    raws: list[RawRecord | None] = []
    ids: list[str] = []
    takedowns: list[int] = []
    troubles: dict[int, BadImage | UndecodableRecord] = {}
    for message in wanted:
        raw, pair_id, value = None, "", message.value()
        try:
            if value is None:
                key = message.key()
                if not key:
                    raise UndecodableRecord(Reason.NO_ID, "neither a key nor a value")
                pair_id = key.decode("utf-8", "replace")
                takedowns.append(len(raws))
            else:
                raw = read(message.key(), value)
                pair_id = raw.id
                if grows or len(value) > small or 4 * len(pair_id) > ID_BYTES_MAX:
                    _refuse_what_cannot_be_kept(raw, kept_bytes_max)
        except UndecodableRecord as error:
            raw, pair_id = None, ""
            troubles[len(raws)] = error
        raws.append(raw)
        ids.append(pair_id)
    kinds = np.full(len(wanted), Kind.PAIR, np.uint8)
    kinds[takedowns] = Kind.TAKEDOWN
    kinds[list(troubles)] = Kind.DEAD
    known, priorities = hash_ids(id_key(using.seed), ids)
    return _Batch(
        wanted, np.array(numbers, np.int64), np.array(offsets, np.int64), raws, ids, kinds, troubles, known, priorities
    )


def _decide(
    batch: _Batch,
    rows: NDArray[np.int64],
    firsts: NDArray[np.int64],
    number: int,
    partition: Partition,
    seen: tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32], Vectors],
    out: Effects,
    kept: _Kept,
) -> None:
    """Decides on the rows of one partition, and adds what follows from it to `out` and to `kept`.

    seen  of the pairs whose image was looked at: the row, cluster, ITM and index vector of each
    """
    pairs, clusters, itms, vectors = seen
    here = np.flatnonzero(batch.numbers[pairs] == number)
    fates, positions, duplicate_of, removed = partition.decide_all(
        Rows(
            batch.offsets[rows], [batch.ids[row] for row in rows.tolist()], batch.kinds[rows], firsts[rows], batch.known[rows],
            batch.priorities[rows], clusters[here], itms[here], vectors[here],
        )
    )  # fmt: skip
    for row in rows[fates == DEAD].tolist():
        trouble, message = batch.troubles[row], batch.messages[row]
        out.dead.append(DeadLetter(message, trouble.reason, trouble.detail))
        out.value_bytes += len(message.value() or b"")

    # What the model said of a duplicate's image does not count.
    needed = np.flatnonzero(fates[np.searchsorted(rows, pairs[here])] < DUPLICATE)
    its_row = np.searchsorted(rows, pairs[here[needed]])
    row_clusters, row_itms = np.full(len(rows), NO_CLUSTER, np.int32), np.full(len(rows), np.nan, np.float32)
    row_clusters[its_row], row_itms[its_row] = clusters[here[needed]], itms[here[needed]]
    out.value_bytes += 2 * vectors.shape[1] * len(needed)
    alive = np.flatnonzero(fates != DEAD)
    codes = out.codes.setdefault(number, CodesColumns())
    if len(alive):
        place = np.cumsum(fates != DEAD) - 1
        codes.batches.append(
            CodesRows(
                [batch.ids[row] for row in rows[alive].tolist()], batch.offsets[rows[alive]], fates[alive],
                row_clusters[alive], positions[alive], batch.priorities[rows[alive]], row_itms[alive], duplicate_of[alive],
                vectors[here[needed]], [(int(place[row]), gone) for row, gone in removed],
            )
        )  # fmt: skip
    came = np.flatnonzero(fates == KEPT)
    kept.rows.extend(rows[came].tolist())
    kept.pairs.extend(here[needed[np.searchsorted(its_row, came)]].tolist())
    kept.numbers.extend([number] * len(came))
    kept.positions.extend(positions[came].tolist())
    if not removed:
        kept.places.extend(range(len(out.kept), len(out.kept) + len(came)))
        out.kept.extend([_TO_COME] * len(came))
        return
    left: dict[int, list[str]] = {}
    for row, gone in removed:
        left.setdefault(row, []).append(gone)
    coming = set(came.tolist())
    for row in sorted(coming | left.keys()):
        if row in coming:
            kept.places.append(len(out.kept))
            out.kept.append(_TO_COME)
        for gone in left.get(row, ()):
            out.kept.append(Effect(number, gone.encode(), None, [("cause", b"%d" % batch.offsets[rows[row]])]))


def _caption(
    batch: _Batch,
    kept: _Kept,
    fetched: dict[int, bytes],
    seen: tuple[NDArray[np.int32], NDArray[np.float32], Vectors],
    pictures: Sequence[Picture],
    partitions: dict[int, Partition],
    using: Reduction,
    out: Effects,
) -> None:
    """Generates the captions of the kept pairs, and puts their records where they belong in `out`.

    seen, pictures  of the pairs whose image was looked at: cluster, ITM and index vector of each; what the model decoded
    """
    vectors, shown = seen[2][kept.pairs], [pictures[pair] for pair in kept.pairs]
    originals = [batch.raw(row).caption for row in kept.rows]
    generated = [""] * len(originals)
    for model, its in _by_model(np.array(kept.numbers), partitions, using):
        rows = np.arange(len(generated))[its].tolist()
        texts = model.caption(vectors[its], [shown[at] for at in rows])
        for at, text in zip(rows, texts, strict=True):
            generated[at] = text
    refined = [
        refine(original, text, using.joiner, using.caption_tokens)
        for original, text in zip(originals, generated, strict=True)
    ]
    refined_itms = using.model.match(vectors, refined, shown).tolist()
    out.captions += len(refined)
    out.itm_kept += seen[1][kept.pairs].tolist()
    out.itm_refined += refined_itms
    codes, width = vectors.astype("<u2", copy=False).tobytes(), 2 * vectors.shape[1]
    header, rate, rate_bytes, topic = using.kept_codec.header, using.rate, using.rate.encode(), using.topic
    columns = zip(
        kept.rows, kept.numbers, kept.positions, kept.places, seen[0][kept.pairs].tolist(), seen[1][kept.pairs].tolist(),
        generated, refined,
        refined_itms, batch.offsets[kept.rows].tolist(), batch.priorities[kept.rows].tolist(),
        strict=True,
    )  # fmt: skip
    for at, (row, number, position, place, cluster, itm, text, whole, itm_refined, offset, priority) in enumerate(
        columns
    ):
        raw, partition = batch.raw(row), partitions[number]
        image = fetched[row] if raw.image is None else raw.image
        epoch = partition.epoch
        value = header + write_kept_pair(
            raw.id, image, raw.caption, text, whole, epoch, cluster, position, codes[at * width : (at + 1) * width],
            partition.bundle or "", priority.to_bytes(8, "little"), rate, itm, itm_refined, topic, number, offset,
            batch.messages[row].timestamp()[1], raw.image_uri, raw.fields,
        )  # fmt: skip
        headers = [
            ("cause", b"%d" % offset),
            ("epoch", b"%d" % epoch),
            ("cluster", b"%d" % cluster),
            ("priority", b"%d" % priority),
            ("rate", rate_bytes),
        ]
        out.kept[place] = _effect((number, raw.id.encode(), value, headers))
        out.value_bytes += len(image)


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


def _look_at_all(wanted: list[int], batch: _Batch, using: Reduction) -> tuple[dict[int, bytes], list[Picture]]:
    """The images of the rows `wanted` that had to be fetched, and what the encoder sees of each row, in that order.

    Each thread takes one share. A row whose image cannot be had or decoded becomes UNSEEN, and is not among them.
    """
    fetched: dict[int, bytes] = {}
    decode = using.model.decode

    def look_at(rows: list[int]) -> list[Picture | None]:
        pictures: list[Picture | None] = []
        for row in rows:
            try:
                raw = batch.raw(row)
                if (image := raw.image) is None:
                    image = fetched[row] = _fetched(raw, using)
                pictures.append(decode(image))
            except BadImage as error:
                batch.kinds[row] = Kind.UNSEEN
                batch.troubles[row] = error
                pictures.append(None)
        return pictures

    if using.threads == 1:
        looked_at = look_at(wanted)
    else:
        shares = [wanted[first :: using.threads] for first in range(using.threads)]
        looked_at = [None] * len(wanted)
        for first, seen in enumerate(using.pool.map(look_at, shares)):
            looked_at[first :: using.threads] = seen
    return fetched, [picture for picture in looked_at if picture is not None]


def _fetched(raw: RawRecord, using: Reduction) -> bytes:
    if using.fetch is None:
        raise BadImage(
            Reason.URI_NOT_ALLOWED, "the record has an image_uri and this worker fetches none: see --fetch-allow"
        )
    image = using.fetch(raw.image_uri or "")
    if len(image) + 2 * len(raw.caption.encode()) + KEPT_OVERHEAD_BYTES > using.kept_bytes_max:
        raise BadImage(Reason.TOO_LARGE, f"its kept form may not fit {using.kept_bytes_max} bytes")
    return image
