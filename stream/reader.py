"""`KeptPairs`: the kept topic as a PyTorch dataset, for a training job that reads the stream itself.

Every pair is seen exactly once by any number of ranks and loader workers. The topic is split into blocks of consecutive
offsets, dealt out in turn, so that each worker fetches only what it yields; who is still in the set is read from the
changelog, which is small, before the first pair. Must not know how pairs came to be kept.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from confluent_kafka import KafkaError, Message, TopicPartition
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from state.changelog import ENTRY, entry_head
from stream.errors import TldrError, Unavailable
from stream.kafka import Connection, partition_counts, refuse_reading
from stream.records import Codec
from stream.rights import check_rights
from stream.stream_view import (
    POLL_WAIT_S,
    PREFETCH_KB,
    ChangelogFollower,
    ChangelogRecord,
    StreamSource,
    decoded,
    kept_record,
    whole,
)
from stream.topics import StreamTopics

log = logging.getLogger(__name__)

# Offsets in a block: large enough that a seek pays (8 MB at 30 KB a pair), small enough that workers end together.
BLOCK_OFFSETS = 256
STATE_VERSION = 1
# A broker that does not answer at the beginning is waited for.
PATIENCE_S = 60.0

Sample = dict[str, Any]


class KeptPairs(IterableDataset[Any]):
    """Refined pairs of a stream, straight from its topic.

    kafka       bootstrap servers, or a Connection with further settings
    stream      name of the stream (the raw topic's, unless the workers were given another)
    follow      False: ends at the topic's present end. True: goes on for ever; a pair that is removed after it was yielded
                is yielded again as {"id", "removed": True} if `removals`, else passed over
    rank, world_size   default: those of torch.distributed, else RANK and WORLD_SIZE, else 0 of 1
    transform   applied to each sample before it is yielded
    block_offsets      how finely the topic is split; the same for all ranks and for a resumed run

    A sample is a dict that torch's default collate function takes: id, image (bytes as they were crawled), caption (the
    refined one), original_caption, generated_caption, cluster, epoch, itm_original, itm_refined, fields (JSON), index_vector
    ((L,) int32), partition and offset (of the kept topic).

    Resuming: `state_dict()` says what was yielded. In loader workers the dataset lives in other processes, so that there
    the training loop tells what it has consumed, `dataset.consumed(batch["partition"], batch["offset"])`, or uses torchdata's
    StatefulDataLoader. `load_state_dict` takes the state of one rank, or those of all ranks where their number changes.

    Raises (on iteration) TldrError where there is no such stream, Unavailable where there was no broker for a minute.
    """

    def __init__(
        self,
        kafka: str | Connection,
        stream: str,
        *,
        follow: bool = False,
        removals: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        transform: Callable[[Sample], Any] | None = None,
        block_offsets: int = BLOCK_OFFSETS,
    ) -> None:
        super().__init__()
        given = kafka if isinstance(kafka, Connection) else Connection(kafka)
        self._place_of_kafka = given.bootstrap_servers, dict(given.settings)
        self.topics = StreamTopics(stream)
        self.follow, self.removals, self.transform = follow, removals, transform
        self.block_offsets = block_offsets
        self.rank, self.world_size = _place(rank, world_size)
        # What is done, a layer for each number of slots that has worked on it: slots → slot → partition → next offset.
        self._done: dict[int, dict[int, dict[int, int]]] = {}
        self._ends: dict[int, int] | None = None
        self._resuming = False

    # -- reading -------------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        workers, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
        slots, slot = self.world_size * workers, self.rank * workers + number
        # Made here and not before: a client's threads do not survive the fork that makes a loader worker.
        connection = Connection(*self._place_of_kafka)
        if not self._resuming:
            self.start_over()
        self._resuming = False
        spans = self._spans_patiently(connection)
        ends = self._ends or {p: end for p, (_, end) in spans.items()}
        if not self.follow:
            self._ends = ends
        live = _InTheSet(StreamSource(connection, self.topics))
        codec = Codec("KeptPair")
        for message in self._messages(connection, spans, ends, slots, slot):
            record = kept_record(message)
            # First, so that a state taken while the caller works on this pair has it as done.
            self._mark(slots, slot, record.partition, record.offset + 1)
            if record.value is None:
                if self.removals and record.offset >= ends[record.partition]:
                    yield {"id": record.id, "removed": True, "partition": record.partition, "offset": record.offset}
                continue
            if record.offset < ends[record.partition] and not live.has(record.partition, record.cause):
                continue
            sample = _sample(decoded(codec, message), record.partition, record.offset)
            yield sample if self.transform is None else self.transform(sample)

    def _spans_patiently(self, connection: Connection) -> dict[int, tuple[int, int]]:
        """`_spans`, after a broker that starts or is busy has become ready: over that no training run is to end."""
        began, told = time.monotonic(), False
        while True:
            try:
                return self._spans(connection)
            except Unavailable as error:
                if time.monotonic() - began >= PATIENCE_S:
                    raise
                if not told:
                    told = True
                    log.warning("%s; trying for %.0f s", error, PATIENCE_S)
                time.sleep(0.2)

    def _spans(self, connection: Connection) -> dict[int, tuple[int, int]]:
        """First offset and end of each partition of the kept topic."""
        check_rights(connection, "KeptPairs", stream=self.topics.name)
        count = partition_counts(connection, [self.topics.kept]).get(self.topics.kept)
        if count is None:
            raise TldrError(
                f"there is no stream {self.topics.name} (no topic {self.topics.kept}): start a worker first"
            )
        return whole(connection, self.topics.kept, range(count), committed=True)

    def _messages(
        self,
        connection: Connection,
        spans: Mapping[int, tuple[int, int]],
        ends: Mapping[int, int],
        slots: int,
        slot: int,
    ) -> Iterator[Message]:
        """The messages of this slot's blocks that are not done; blocks of others are stepped over without being fetched."""
        positions = {p: self._own_from(p, start, slots, slot) for p, (start, _) in spans.items()}
        if not self.follow:
            positions = {p: at for p, at in positions.items() if at < ends[p]}
        # Behind the end that was there at the start one cannot seek, so the tail is read whole and others' blocks dropped.
        assigned = {p: min(at, max(ends[p], spans[p][0])) for p, at in positions.items()}
        if not assigned:
            return
        reader = connection.reader(queued_max_messages_kbytes=PREFETCH_KB)
        try:
            reader.assign([TopicPartition(self.topics.kept, p, at) for p, at in assigned.items()])
            while positions:
                first = reader.poll(POLL_WAIT_S)
                for message in [] if first is None else [first, *reader.consume(63, 0)]:
                    p = message.partition()
                    if p not in positions:
                        continue
                    error = message.error()
                    if error is not None:
                        if error.code() == KafkaError._PARTITION_EOF:
                            positions[p] = max(positions[p], message.offset())
                        elif error.code() == KafkaError._AUTO_OFFSET_RESET:
                            raise Unavailable(f"cannot read {self.topics.kept}/{p}: {error.str()}")
                        else:
                            refuse_reading(connection, self.topics.kept, p, error)
                        continue
                    offset = message.offset()
                    if not self.follow and offset >= ends[p]:
                        positions[p] = ends[p]
                        continue
                    positions[p] = max(positions[p], offset + 1)
                    if self._slot_of(p, offset, slots) == slot and not self._is_done(p, offset):
                        yield message
                self._step_over(reader, positions, ends, slots, slot)
        finally:
            reader.close()

    def _step_over(
        self, reader: Any, positions: dict[int, int], ends: Mapping[int, int], slots: int, slot: int
    ) -> None:
        """Leaves partitions that are at their end, and seeks over blocks of others."""
        for p, position in list(positions.items()):
            target = self._own_from(p, position, slots, slot)
            if not self.follow and target >= ends[p]:
                del positions[p]
                reader.incremental_unassign([TopicPartition(self.topics.kept, p)])
            elif position < target < ends[p]:
                reader.seek(TopicPartition(self.topics.kept, p, target))
                positions[p] = target

    # -- who reads what ------------------------------------------------------------------------------------------------

    def _slot_of(self, partition: int, offset: int, slots: int) -> int:
        return (offset // self.block_offsets + partition) % slots

    def _own_from(self, partition: int, offset: int, slots: int, slot: int) -> int:
        """The first offset from `offset` on that is this slot's."""
        done = self._done.get(slots, {}).get(slot, {}).get(partition, 0)
        offset = max(offset, done)
        ahead = (slot - self._slot_of(partition, offset, slots)) % slots
        return offset if not ahead else (offset // self.block_offsets + ahead) * self.block_offsets

    def _is_done(self, partition: int, offset: int) -> bool:
        return any(
            offset < by_slot.get(self._slot_of(partition, offset, slots), {}).get(partition, 0)
            for slots, by_slot in self._done.items()
        )

    def _mark(self, slots: int, slot: int, partition: int, next_offset: int) -> None:
        positions = self._done.setdefault(slots, {}).setdefault(slot, {})
        positions[partition] = max(positions.get(partition, 0), next_offset)

    def start_over(self) -> None:
        """Forgets what is done: the next iteration yields every pair of the set as it is then.

        An iteration in this process does so by itself, unless a state was loaded before it. With loader workers call it
        before every epoch but a resumed one.
        """
        self._done, self._ends, self._resuming = {}, None, False

    # -- resuming ------------------------------------------------------------------------------------------------------

    def consumed(self, partitions: Iterable[int], offsets: Iterable[int], workers: int = 0) -> None:
        """Tells the dataset of the training process what the loop has consumed: the samples' partition and offset.

        workers  the loader's num_workers. Samples of one worker must be told in their order, as a DataLoader gives them.
        """
        slots = self.world_size * max(workers, 1)
        for partition, offset in zip(partitions, offsets, strict=True):
            self._mark(slots, self._slot_of(int(partition), int(offset), slots), int(partition), int(offset) + 1)

    def state_dict(self) -> dict[str, Any]:
        """What is done, as JSON has it; a pair that was yielded (or told by `consumed`) is not yielded again after it."""
        done = {
            str(slots): {str(slot): {str(p): at for p, at in own.items()} for slot, own in by_slot.items()}
            for slots, by_slot in self._done.items()
        }
        ends = None if self._ends is None else {str(p): end for p, end in self._ends.items()}
        return {
            "version": STATE_VERSION, "stream": self.topics.name, "block_offsets": self.block_offsets, "done": done,
            "ends": ends,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any] | Iterable[Mapping[str, Any]]) -> None:
        """Goes on behind one state, or behind those of several ranks. Raises TldrError for the state of something else."""
        for one in [state] if isinstance(state, Mapping) else state:
            ours = (STATE_VERSION, self.topics.name, self.block_offsets)
            theirs = (one.get("version"), one.get("stream"), one.get("block_offsets"))
            if ours != theirs:
                raise TldrError(
                    f"this state is of version, stream and block size {theirs}, the dataset has {ours}: it cannot go on there"
                )
            for slots, by_slot in one["done"].items():
                for slot, own in by_slot.items():
                    for p, at in own.items():
                        self._mark(int(slots), int(slot), int(p), at)
            self._resuming = True
            if one["ends"] is not None and not self.follow:
                ends = {int(p): end for p, end in one["ends"].items()}
                self._ends = {p: max(end, (self._ends or {}).get(p, 0)) for p, end in ends.items()}


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    from torch import distributed

    if rank is None and world_size is None and distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    world_size = int(os.environ.get("WORLD_SIZE", "1")) if world_size is None else world_size
    if not 0 <= rank < world_size:
        raise TldrError(f"rank {rank} of {world_size}: give a rank from 0 to {world_size - 1}")
    return rank, world_size


class _InTheSet:
    """The input offsets of the pairs that are in the set, from the changelog: eight bytes a pair, sorted."""

    def __init__(self, source: StreamSource) -> None:
        offsets: dict[int, dict[bytes, int]] = {}

        def take(record: ChangelogRecord) -> None:
            partition, key, value = record
            if key[:1] == ENTRY:
                entries = offsets.setdefault(partition, {})
                if value is None:
                    entries.pop(key, None)
                else:
                    entries[key] = entry_head(value).offset

        # To its true end: a kept pair that is visible already must not be missing from it.
        ChangelogFollower(source).advance(take, wait=True)
        self._offsets: dict[int, NDArray[np.int64]] = {
            p: np.sort(np.fromiter(entries.values(), np.int64, len(entries))) for p, entries in offsets.items()
        }

    def has(self, partition: int, cause: int | None) -> bool:
        """Whether the pair that this input offset brought is in the set."""
        offsets = self._offsets.get(partition)
        if offsets is None or cause is None:
            return False
        i = int(np.searchsorted(offsets, cause))
        return i < len(offsets) and int(offsets[i]) == cause


def _sample(pair: Mapping[str, Any], partition: int, offset: int) -> Sample:
    return {
        "id": pair["id"],
        "image": pair["image"],
        "caption": pair["refined_caption"],
        "original_caption": pair["caption"],
        "generated_caption": pair["generated_caption"],
        "cluster": pair["cluster"],
        "epoch": pair["epoch"],
        "itm_original": pair["itm_original"],
        "itm_refined": pair["itm_refined"],
        "fields": json.dumps(pair["fields"], ensure_ascii=False, sort_keys=True),
        "index_vector": np.frombuffer(pair["index_vector"], "<u2").astype(np.int32),
        "partition": partition,
        "offset": offset,
    }
