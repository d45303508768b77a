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
from functools import lru_cache, partial
from itertools import chain, compress, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.errors import BadImage, Reason
from models.model import PairModel, Picture, Vectors
from models.refine import refine
from state.partition import DEAD, DUPLICATE, KEPT, NOT_KNOWN, Kind, Partition, Rows
from state.priority import hash_ids, id_key
from stream.avro_by_hand import KeptColumns, write_kept_pairs, write_tail
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


class Effect(NamedTuple):
    """A record for the kept topic; value None is a tombstone."""

    partition: int
    key: bytes
    value: bytes | None
    headers: list[tuple[str, bytes]]


_effect = partial(tuple.__new__, Effect)  # Effect(*fields) without its Python frame
_NO_HASHES = np.empty(0, np.uint64)
_TO_COME = Effect(-1, b"", None, [])  # in the place of a kept pair whose caption is not there yet


class CodesRows(NamedTuple):
    """What became of some input offsets, in their order; n rows. A cluster of -1: nobody looked at the image."""

    names: list[bytes]  # the ids as UTF-8
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
        names, offsets, fates, clusters, positions, priorities, itms, duplicate_of, vectors, removed = zip(
            *self.batches, strict=True
        )
        before = np.cumsum([0, *map(len, names)]).tolist()
        yield CodesRows(
            list(chain.from_iterable(names)),
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
    weights = (
        4 * np.fromiter(map(len, rows.names), np.int64, len(rows.names)) + looked_at * 2 * tokens + CODES_ROW_BYTES
    )
    for row, gone in rows.removed:
        weights[row] += 4 * len(gone) + 10
    # The number of whole records' worth of bytes before a row says which record it belongs to.
    part = (np.cumsum(weights) - weights) // bytes_max
    starts = np.flatnonzero(np.diff(part, prepend=-1)).tolist()
    for start, end in pairwise([*starts, len(rows.names)]):
        its = slice(start, end)
        vectors = np.ascontiguousarray(rows.vectors[vectors_before[start] : vectors_before[end]], "<u2")
        duplicates = rows.duplicate_of[its][rows.fates[its] == DUPLICATE]
        yield {
            "partition": partition,
            "epoch": epoch,
            "bundle": bundle,
            "tokens": tokens,
            "ids": rows.names[its],
            "offsets": rows.offsets[its].astype("<i8").tobytes(),
            "fates": rows.fates[its].tobytes(),
            "clusters": rows.clusters[its].astype("<i4").tobytes(),
            "positions": rows.positions[its].astype("<i8").tobytes(),
            "priorities": rows.priorities[its].astype("<u8").tobytes(),
            "itms": rows.itms[its].astype("<f4").tobytes(),
            "vectors": vectors.reshape(-1).view(np.uint8).data,  # the largest column: not copied before it is written
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
    # an array a batch
    itm_raw: list[NDArray[np.float32]] = field(default_factory=list)
    itm_kept: list[NDArray[np.float32]] = field(default_factory=list)  # of the original captions of what is kept
    itm_refined: list[NDArray[np.float32]] = field(default_factory=list)
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
    """The raw records of a batch, a column for each thing that is known of them; "", None where there is nothing.

    names     the ids as UTF-8; known, priorities  the halves of their hashes
    tails     how a KeptPair of it ends, where its record told already
    raws      row → pair, of those that were read by themselves
    kinds     state.partition.Kind
    troubles  row → why it is dead
    """

    messages: list[Message]
    numbers: NDArray[np.int64]
    offsets: NDArray[np.int64]
    names: list[bytes]
    captions: list[str]
    images: list[bytes | memoryview | None]
    tails: list[bytes | None]
    raws: dict[int, RawRecord]
    kinds: NDArray[np.uint8]
    troubles: dict[int, BadImage | UndecodableRecord]
    known: NDArray[np.uint64]
    priorities: NDArray[np.uint64]

    def tail(self, row: int) -> bytes:
        """How the KeptPair of this row ends."""
        return self.tails[row] or write_tail(self.raws[row].image_uri, self.raws[row].fields)


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
    starts = np.flatnonzero(np.diff(batch.numbers, prepend=-1)).tolist()
    rows_of = {int(batch.numbers[start]): slice(start, end) for start, end in pairwise([*starts, len(batch.messages)])}
    # An id that is known already needs no image; the rest is decoded by all cores and encoded in fixed batches.
    firsts = np.full(len(batch.messages), NOT_KNOWN)
    for number, rows in rows_of.items():
        named = rows.start + np.flatnonzero(batch.kinds[rows] != Kind.DEAD)
        firsts[named] = partitions[number].look_up(batch.known[named])
        known = partitions[number].is_known(firsts[named], batch.offsets[named])
        batch.kinds[named[known & (batch.kinds[named] == Kind.PAIR)]] = Kind.KNOWN
    lap("read")
    fetched, pictures, vectors = _look_at_all(np.flatnonzero(batch.kinds == Kind.PAIR).tolist(), batch, using, lap)
    pairs = np.flatnonzero(batch.kinds == Kind.PAIR)
    clusters = np.empty(len(pairs), np.int32)
    for model, its in _by_model(batch.numbers[pairs], partitions, using):
        clusters[its] = model.assign(vectors[its])
    lap("encode")
    itms = using.model.match(vectors, _of(batch.captions, pairs), pictures)
    out.images += len(pairs)
    out.itm_raw.append(itms)
    lap("match")

    kept = _Kept([], [], [], [], [])
    out.records += len(batch.messages)
    for number, rows in rows_of.items():
        _decide(batch, rows, firsts, number, partitions[number], (pairs, clusters, itms, vectors), out, kept)
    lap("decide")

    if kept.rows:
        _caption(batch, kept, fetched, (clusters, itms, vectors), pictures, partitions, using, out)
        lap("caption")


def _of(column: list[Any], rows: NDArray[np.int64]) -> list[Any]:
    """These rows of a column."""
    return [column[row] for row in rows.tolist()]


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
    # What is no larger can always be kept: see `_refuse_what_cannot_be_kept`, where a byte counts eight times at most.
    small = (using.kept_bytes_max - KEPT_OVERHEAD_BYTES) // 8
    wanted = list(messages)
    numbers = np.array([message.partition() for message in wanted], np.int64)
    offsets = np.array([message.offset() for message in wanted], np.int64)
    here = np.zeros(len(wanted), bool)
    for number, partition in partitions.items():
        here |= (numbers == number) & (offsets >= (partition.next_offset or 0))
    # Each partition's in one piece. They often come so, and all of them are wanted.
    if not here.all() or (np.diff(numbers) < 0).any():
        order = np.argsort(numbers, kind="stable")
        order = order[here[order]]
        wanted, numbers, offsets = _of(wanted, order), numbers[order], offsets[order]
    count = len(wanted)
    plain = using.reader.read_plain([message.value() or b"" for message in wanted], small)
    names, captions, others = plain.ids, plain.captions, list[int]()
    images: list[bytes | memoryview | None] = [*plain.images]
    tails: list[bytes | None] = [*plain.tails]
    if len(plain.rows) < count:
        names, captions, images, tails = [b""] * count, [""] * count, [None] * count, [None] * count
        for row, name, caption, image, tail in zip(*plain, strict=True):
            names[row], captions[row], images[row], tails[row] = name, caption, image, tail
        others = sorted(set(range(count)).difference(plain.rows))
    batch = _Batch(
        wanted, numbers, offsets, names, captions, images, tails, {}, np.full(count, Kind.PAIR, np.uint8), {},
        _NO_HASHES, _NO_HASHES,
    )  # fmt: skip
    for row in others:
        _read_alone(row, batch, using, small)
    batch.known, batch.priorities = hash_ids(id_key(using.seed), names)
    return batch


def _read_alone(row: int, batch: _Batch, using: Reduction, small: int) -> None:
    """Reads what is not plain: a takedown, a large record, one of another format or one that is none."""
    key, value = batch.messages[row].key(), batch.messages[row].value()
    try:
        if value is None:
            if not key:
                raise UndecodableRecord(Reason.NO_ID, "neither a key nor a value")
            batch.names[row] = key.decode("utf-8", "replace").encode()
            batch.kinds[row] = Kind.TAKEDOWN
            return
        raw = using.reader.read(key, value)
        name = raw.id.encode()
        if using.reader.grows or len(value) > small or len(name) > ID_BYTES_MAX:
            _refuse_what_cannot_be_kept(raw, using.kept_bytes_max)
    except UndecodableRecord as error:
        batch.troubles[row] = error
        batch.kinds[row] = Kind.DEAD
        return
    batch.names[row], batch.captions[row], batch.images[row], batch.raws[row] = name, raw.caption, raw.image, raw


def _decide(
    batch: _Batch,
    rows: slice,
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
    here = slice(*np.searchsorted(seen[0], (rows.start, rows.stop)).tolist())
    pairs, clusters, itms, vectors = seen[0][here] - rows.start, seen[1][here], seen[2][here], seen[3][here]
    names, offsets, priorities = batch.names[rows], batch.offsets[rows], batch.priorities[rows]
    fates, positions, duplicate_of, removed = partition.decide_all(
        Rows(
            offsets, names, batch.kinds[rows], firsts[rows], batch.known[rows], priorities, clusters, itms, vectors
        )
    )  # fmt: skip
    pair_of = np.full(len(names), -1)
    pair_of[pairs] = np.arange(len(pairs))
    # What the model said of a duplicate's image does not count.
    needed = fates[pairs] < DUPLICATE
    if not needed.all():
        pairs, clusters, itms, vectors = pairs[needed], clusters[needed], itms[needed], vectors[needed]
    row_clusters, row_itms = np.full(len(names), NO_CLUSTER, np.int32), np.full(len(names), np.nan, np.float32)
    row_clusters[pairs], row_itms[pairs] = clusters, itms
    out.value_bytes += 2 * vectors.shape[1] * len(vectors)
    columns: list[Any] = [offsets, fates, row_clusters, positions, priorities, row_itms, duplicate_of]
    alive, place = fates != DEAD, range(len(names))
    if not alive.all():
        for row in np.flatnonzero(~alive).tolist():
            trouble, message = batch.troubles[rows.start + row], batch.messages[rows.start + row]
            out.dead.append(DeadLetter(message, trouble.reason, trouble.detail))
            out.value_bytes += len(message.value() or b"")
        names, columns = list(compress(names, alive.tolist())), [column[alive] for column in columns]
        place = (np.cumsum(alive) - 1).tolist()
    codes = out.codes.setdefault(number, CodesColumns())
    if names:
        codes.batches.append(CodesRows._make([names, *columns, vectors, [(place[row], gone) for row, gone in removed]]))
    came = np.flatnonzero(fates == KEPT)
    kept.rows.extend((rows.start + came).tolist())
    kept.pairs.extend((here.start + pair_of[came]).tolist())
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
            out.kept.append(Effect(number, gone.encode(), None, [("cause", b"%d" % offsets[row])]))


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
    originals = [batch.captions[row] for row in kept.rows]
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
    refined_itms = using.model.match(vectors, refined, shown)
    out.captions += len(refined)
    out.itm_kept.append(seen[1][kept.pairs])
    out.itm_refined.append(refined_itms)
    names = [batch.names[row] for row in kept.rows]
    images = [fetched[row] if (image := batch.images[row]) is None else image for row in kept.rows]
    out.value_bytes += sum(map(len, images))
    clusters, itms = seen[0][kept.pairs].tolist(), np.stack([seen[1][kept.pairs], refined_itms], axis=1)
    offsets, priorities = batch.offsets[kept.rows].tolist(), batch.priorities[kept.rows]
    timestamps_ms = [batch.messages[row].timestamp()[1] for row in kept.rows]
    tails = [batch.tails[row] or batch.tail(row) for row in kept.rows]
    rate = "rate", using.rate.encode()
    starts = np.flatnonzero(np.diff(kept.numbers, prepend=-1)).tolist()
    for start, end in pairwise([*starts, len(names)]):
        its, number = slice(start, end), kept.numbers[start]
        partition = partitions[number]
        columns = KeptColumns(
            names[its], images[its], originals[its], generated[its], refined[its], clusters[its], kept.positions[its],
            vectors[its], priorities[its], itms[its], offsets[its], timestamps_ms[its], tails[its],
        )  # fmt: skip
        epoch = "epoch", b"%d" % partition.epoch
        values = write_kept_pairs(
            using.kept_codec.header, columns, partition.epoch, partition.bundle or "", using.rate, using.topic, number
        )
        for place, name, value, offset, cluster, priority in zip(
            kept.places[its], names[its], values, offsets[its], clusters[its], priorities[its].tolist(), strict=True
        ):
            headers = [
                ("cause", b"%d" % offset),
                epoch,
                _cluster_header(cluster),
                ("priority", b"%d" % priority),
                rate,
            ]
            out.kept[place] = _effect((number, name, value, headers))


@lru_cache(1 << 14)
def _cluster_header(cluster: int) -> tuple[str, bytes]:
    return "cluster", b"%d" % cluster


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


def _look_at_all(
    wanted: list[int], batch: _Batch, using: Reduction, lap: Callable[[str], None]
) -> tuple[dict[int, bytes], list[Picture], Vectors]:
    """The images of the rows `wanted` that had to be fetched; what the model sees of each row, and its index vector, in that
    order.

    As many as the encoder takes at once are encoded while the next are decoded: a GPU would wait otherwise. A row whose image
    cannot be had or decoded becomes UNSEEN, and is not among them.
    """
    fetched: dict[int, bytes] = {}
    decode, images, threads = using.model.decode, batch.images, using.threads

    def look_at(rows: list[int]) -> list[Picture | None]:
        pictures: list[Picture | None] = []
        for row in rows:
            try:
                if (image := images[row]) is None:
                    image = fetched[row] = _fetched(batch.raws[row], using)
                pictures.append(decode(image))
            except BadImage as error:
                batch.kinds[row] = Kind.UNSEEN
                batch.troubles[row] = error
                pictures.append(None)
        return pictures

    def begin(rows: list[int]) -> Callable[[], list[Picture | None]]:
        if threads == 1:
            return lambda: look_at(rows)
        shares = [using.pool.submit(look_at, rows[first::threads]) for first in range(threads)]

        def end() -> list[Picture | None]:
            looked_at: list[Picture | None] = [None] * len(rows)
            for first, share in enumerate(shares):
                looked_at[first::threads] = share.result()
            return looked_at

        return end

    parts = [wanted[first : first + using.model.batch] for first in range(0, len(wanted), using.model.batch)] or [[]]
    pictures: list[Picture] = []
    vectors: list[Vectors] = []
    end = begin(parts[0])
    for following in [*parts[1:], None]:
        seen = [picture for picture in end() if picture is not None]
        if following is not None:
            end = begin(following)
        lap("decode")
        vectors.append(using.model.encode(seen))
        pictures += seen
        lap("encode")
    return fetched, pictures, vectors[0] if len(vectors) == 1 else np.concatenate(vectors)


def _fetched(raw: RawRecord, using: Reduction) -> bytes:
    if using.fetch is None:
        raise BadImage(
            Reason.URI_NOT_ALLOWED, "the record has an image_uri and this worker fetches none: see --fetch-allow"
        )
    image = using.fetch(raw.image_uri or "")
    if len(image) + 2 * len(raw.caption.encode()) + KEPT_OVERHEAD_BYTES > using.kept_bytes_max:
        raise BadImage(Reason.TOO_LARGE, f"its kept form may not fit {using.kept_bytes_max} bytes")
    return image
