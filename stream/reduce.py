"""Raw records of one batch → what must become visible because of them. Decides; writes nothing.

Knows neither how a message is fetched nor how a transaction is committed. A pair's way through this file: read → known? →
decode → encode → assign → match → decide (quota, reservoir) → caption → refine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.errors import BadImage
from models.model import PairModel, Pixels
from models.refine import refine
from state.partition import Decision, Fate, Partition
from state.priority import hash_id, id_key
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


@dataclass
class CodesColumns:
    """The rows of one partition since the last commit, as columns (schemas/PairCodes.avsc)."""

    ids: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    fates: list[int] = field(default_factory=list)
    clusters: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    priorities: list[int] = field(default_factory=list)
    itms: list[float] = field(default_factory=list)
    vectors: list[bytes] = field(default_factory=list)
    duplicate_of: list[int] = field(default_factory=list)
    removed: list[tuple[str, int]] = field(default_factory=list)

    def add(
        self, pair_id: str, offset: int, decision: Decision, cluster: int, itm: float, vector: bytes | None
    ) -> None:
        fate, position, priority, duplicate_of, removed = decision
        if removed:
            self.removed += [(gone, len(self.ids)) for gone in removed]
        self.ids.append(pair_id)
        self.offsets.append(offset)
        self.fates.append(fate)
        self.clusters.append(cluster)
        self.positions.append(position)
        self.priorities.append(priority)
        self.itms.append(itm)
        if vector is not None:
            self.vectors.append(vector)
        if fate == Fate.DUPLICATE:
            self.duplicate_of.append(duplicate_of)

    def records(self, partition: int, epoch: int, bundle: str, tokens: int, bytes_max: int) -> Iterable[dict[str, Any]]:
        """The columns as PairCodes records of about `bytes_max` bytes each at most (a single row may take more)."""
        clusters = np.array(self.clusters, "<i4")
        fates = np.array(self.fates, np.uint8)
        vectors_before = np.concatenate([[0], np.cumsum(clusters >= 0)])
        duplicates_before = np.concatenate([[0], np.cumsum(fates == Fate.DUPLICATE)])
        weights = np.array([4 * len(pair_id) for pair_id in self.ids]) + (clusters >= 0) * 2 * tokens + CODES_ROW_BYTES
        for gone, row in self.removed:
            weights[row] += 4 * len(gone) + 10
        # The number of whole records' worth of bytes before a row says which record it belongs to.
        part = (np.cumsum(weights) - weights) // bytes_max
        starts = np.flatnonzero(np.diff(part, prepend=-1)).tolist()
        for start, end in pairwise([*starts, len(self.ids)]):
            rows = slice(start, end)
            yield {
                "partition": partition,
                "epoch": epoch,
                "bundle": bundle,
                "tokens": tokens,
                "ids": self.ids[rows],
                "offsets": np.array(self.offsets[rows], "<i8").tobytes(),
                "fates": fates[rows].tobytes(),
                "clusters": clusters[rows].tobytes(),
                "positions": np.array(self.positions[rows], "<i8").tobytes(),
                "priorities": np.array(self.priorities[rows], "<u8").tobytes(),
                "itms": np.array(self.itms[rows], "<f4").tobytes(),
                "vectors": b"".join(self.vectors[vectors_before[start] : vectors_before[end]]),
                "duplicate_of": np.array(
                    self.duplicate_of[duplicates_before[start] : duplicates_before[end]], "<i8"
                ).tobytes(),
                "removed": [
                    {"id": gone, "row": row - start} for gone, row in self.removed if start <= row < end
                ],
            }  # fmt: skip


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


class _Seen(NamedTuple):
    """An image that was looked at: its pixels for the encoder, and its bytes for the kept pair."""

    pixels: Pixels
    image: bytes


class _Step(NamedTuple):
    """A raw record on its way: what it says, its id's hashes, or why it is dead. A takedown has neither."""

    message: Message
    raw: RawRecord | None
    hashes: tuple[int, int]
    trouble: BadImage | UndecodableRecord | None


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
    # An id that is known already needs no image; the rest is decoded by all cores and encoded in fixed batches.
    wanted = [i for i, step in enumerate(steps) if step.raw is not None and _unseen(step, partitions)]
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
    for i, step in enumerate(steps):
        number, offset = step.message.partition(), step.message.offset()
        partition = partitions[number]
        codes = out.codes.setdefault(number, CodesColumns())
        out.records += 1
        row = row_of.get(i, -1)
        trouble = step.trouble
        if row < 0 and i in looked_at and _unseen(step, partitions):
            found = looked_at[i]
            trouble = found if isinstance(found, BadImage) else None
        if trouble is not None:
            partition.dead(offset)
            out.dead.append(DeadLetter(step.message, trouble.reason, trouble.detail))
            out.value_bytes += len(step.message.value() or b"")
            continue
        if step.raw is None:
            pair_id = (step.message.key() or b"").decode("utf-8", "replace")
            decision = partition.take_down(offset, pair_id)
        elif row < 0:
            pair_id = step.raw.id
            decision = partition.duplicate(offset, pair_id, step.hashes)
        else:
            pair_id = step.raw.id
            vector = vectors[row].tobytes()
            decision = partition.decide(offset, pair_id, clusters[row], itms[row], vector, step.hashes)
        if decision.fate in _IMAGE_NOT_NEEDED:
            codes.add(pair_id, offset, decision, NO_CLUSTER, np.nan, None)
        else:
            codes.add(pair_id, offset, decision, clusters[row], itms[row], vector)
        if decision.fate == Fate.KEPT:
            # Its record needs the caption, which is generated for the whole batch below; the order is settled here.
            to_keep.append((i, row, decision, len(out.kept)))
            out.kept.append(Effect(number, b"", None, []))
        for gone in decision.removed:
            out.kept.append(Effect(number, gone.encode(), None, [("cause", b"%d" % offset)]))
    lap("decide")

    if to_keep:
        rows = [row for _, row, _, _ in to_keep]
        generated = using.model.caption(vectors[rows])
        captions = [
            refine(_raw(steps[i]).caption, text, using.joiner) for (i, *_), text in zip(to_keep, generated, strict=True)
        ]
        refined_itms = using.model.match(vectors[rows], captions).tolist()
        for at, (i, row, decision, place) in enumerate(to_keep):
            pair = _kept_pair(steps[i], seen[i].image, decision, clusters[row], itms[row], vectors[row])
            pair |= {
                "generated_caption": generated[at],
                "refined_caption": captions[at],
                "itm_refined": refined_itms[at],
                "rate": using.rate,
                "source_topic": using.topic,
            }
            out.kept[place] = _kept_effect(pair, steps[i].message, partitions, using)
            out.value_bytes += len(seen[i].image)
        out.captions += len(rows)
        out.itm_refined += refined_itms
        lap("caption")


_IMAGE_NOT_NEEDED = frozenset({Fate.DUPLICATE, Fate.FORGOTTEN})


def _read(messages: Sequence[Message], partitions: dict[int, Partition], using: Reduction) -> list[_Step]:
    key = id_key(using.seed)
    steps = []
    for message in messages:
        partition = partitions.get(message.partition())
        if partition is None or message.offset() < (partition.next_offset or 0):
            continue
        value = message.value()
        if value is None:
            nobody = None if message.key() else UndecodableRecord("no-id", "neither a key nor a value")
            steps.append(_Step(message, None, NO_HASHES, nobody))
            continue
        try:
            raw = using.reader.read(message.key(), value)
            _refuse_what_cannot_be_kept(raw, using.kept_bytes_max)
            steps.append(_Step(message, raw, hash_id(key, raw.id), None))
        except UndecodableRecord as error:
            steps.append(_Step(message, None, NO_HASHES, error))
    return steps


def _unseen(step: _Step, partitions: dict[int, Partition]) -> bool:
    return partitions[step.message.partition()].fate_if_seen(step.hashes[0], step.message.offset()) is None


def _raw(step: _Step) -> RawRecord:
    if step.raw is None:
        raise ValueError("a dead letter or a takedown has no pair")
    return step.raw


def _refuse_what_cannot_be_kept(raw: RawRecord, kept_bytes_max: int) -> None:
    """Raises UndecodableRecord for a pair whose kept form might not fit its topic: after counting it is too late."""
    if len(raw.id.encode()) > ID_BYTES_MAX:
        raise UndecodableRecord(
            "id-too-long", f"an id of {len(raw.id.encode())} bytes; at most {ID_BYTES_MAX} are possible"
        )
    fields = sum(len(key) + len(value) for key, value in raw.fields.items()) * 4
    # T_o stands in it twice, as itself and inside T; up to four bytes a character.
    weight = len(raw.image or b"") + 2 * len(raw.caption.encode()) + fields + KEPT_OVERHEAD_BYTES
    if weight > kept_bytes_max:
        raise UndecodableRecord(
            "too-large", f"its kept form may take {weight} bytes and the topic takes {kept_bytes_max}"
        )


def _look_at_all(wanted: list[int], steps: list[_Step], using: Reduction) -> dict[int, _Seen | BadImage]:
    """What the images of the steps `wanted` look like, in that order; each thread takes one share of them."""
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
        raise BadImage("uri-not-allowed", "the record has an image_uri and this worker fetches none: see --fetch-allow")
    image = using.fetch(raw.image_uri or "")
    if len(image) + 2 * len(raw.caption.encode()) + KEPT_OVERHEAD_BYTES > using.kept_bytes_max:
        raise BadImage("too-large", f"its kept form may not fit {using.kept_bytes_max} bytes")
    return image


def _kept_pair(
    step: _Step, image: bytes, decision: Decision, cluster: int, itm: float, vector: NDArray[np.uint16]
) -> dict[str, Any]:
    raw = _raw(step)
    return {
        "id": raw.id,
        "image": image,
        "caption": raw.caption,
        "cluster": cluster,
        "position": decision.position,
        "index_vector": vector.astype("<u2", copy=False).tobytes(),
        "priority": decision.priority.to_bytes(8, "little"),
        "itm_original": itm,
        "source_partition": step.message.partition(),
        "source_offset": step.message.offset(),
        "source_timestamp_ms": step.message.timestamp()[1],
        "image_uri": raw.image_uri,
        "fields": raw.fields,
    }


def _kept_effect(pair: dict[str, Any], message: Message, partitions: dict[int, Partition], using: Reduction) -> Effect:
    partition = partitions[message.partition()]
    pair |= {"epoch": partition.epoch, "bundle": partition.bundle}
    headers = [
        ("cause", b"%d" % message.offset()),
        ("epoch", b"%d" % partition.epoch),
        ("cluster", b"%d" % pair["cluster"]),
        ("priority", b"%d" % int.from_bytes(pair["priority"], "little")),
        ("rate", using.rate.encode()),
    ]
    return Effect(message.partition(), pair["id"].encode(), using.kept_codec.encode(pair), headers)
