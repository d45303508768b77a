"""A real stream on the real broker, made in a second: the worker's own steps (reduce, commit), without its group and loop.

A test says which raw records there are and how they fall into transactions, and gets the topics that a worker would leave.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from confluent_kafka import Consumer, Producer

from models.model import PairModel
from models.null import NullModel
from state.partition import Partition
from state.partition_store import PartitionStore
from state.quota import Ratio
from state.regroup import Regrouping
from state.settings import StreamSettings
from stream.kafka import Connection, create_missing, end_offsets, read_partition, topic_id
from stream.murmur2 import partitions_of
from stream.raw_format import raw_reader
from stream.records import Codec
from stream.reduce import Effects, Reduction, reduce_batch
from stream.stream_view import StreamSource
from stream.topics import StreamTopics
from stream.transaction import Outlet, commit
from tests.end_to_end.worker_process import until

# librdkafka would write to standard error when the test's broker has gone before its clients.
_quiet = logging.getLogger("stream.librdkafka")
PNG = b"\x89PNG\r\n\x1a\n"
RECORD_BYTES_MAX = 1 << 20


def raw(pair_id: str, caption: str = "a caption", image: bytes | None = None, **fields: str) -> dict[str, Any]:
    """A RawPair; its image is different for every id unless given."""
    return {
        "id": pair_id,
        "caption": caption,
        "image": PNG + pair_id.encode() if image is None else image,
        "image_uri": None,
        "fields": fields,
    }


@dataclass
class StreamWriter:
    """The stream `name` on a raw topic of the same name, with a small null model."""

    kafka: Connection
    name: str
    folder: Path
    partitions: int = 2
    ratio: str = "1/2"
    cap: int | None = None
    window: int | None = None
    gate: float | None = None
    seed: int = 7
    batch: int = 40  # raw records a transaction
    model: NullModel = field(default_factory=lambda: NullModel(tokens=8, codebook_size=50, clusters=3))
    kept_settings: Mapping[str, str] = field(default_factory=dict)
    codes_settings: Mapping[str, str] = field(default_factory=dict)
    changelog_settings: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.topics = StreamTopics(self.name)
        self.source = StreamSource(self.kafka, self.topics)
        create_missing(self.kafka, {self.name: {}}, self.partitions)
        wanted = self.topics.settings(RECORD_BYTES_MAX)
        wanted[self.topics.kept] |= self.kept_settings
        wanted[self.topics.codes] |= self.codes_settings
        wanted[self.topics.changelog] |= self.changelog_settings
        create_missing(self.kafka, wanted, self.partitions)
        self.settings = StreamSettings(
            partition_count=self.partitions,
            raw_topic_id=topic_id(self.kafka, self.name),
            seed=self.seed,
            ratio=Ratio.parse(self.ratio),
            cell_cap=self.cap,
            dedupe_window=self.window,
            gate=self.gate,
            rule="paper",
            space=self.model.space,
            tokens=self.model.tokens,
        )
        self.models: dict[str, PairModel] = {self.model.version: self.model}
        self._raw = self.kafka.producer()
        self._codec = Codec("RawPair")
        self._pool = ThreadPoolExecutor(1)
        self._transactional = Producer(
            self.kafka.config(transactional_id=f"{self.name}-writer", acks="all"), logger=_quiet
        )
        self._transactional.init_transactions()
        self._consumer = Consumer(self.kafka.config(group_id=self.name, enable_auto_commit=False), logger=_quiet)
        self._using = Reduction(
            model=self.model,
            reader=raw_reader(),
            kept_codec=Codec("KeptPair"),
            fetch=None,
            pool=self._pool,
            threads=1,
            seed=self.seed,
            rate=str(self.settings.ratio),
            joiner=" ",
            kept_bytes_max=RECORD_BYTES_MAX,
            topic=self.name,
            models=self.models,
        )
        self.stores: list[PartitionStore] = []
        self.live: dict[int, Partition] = {}
        for p in range(self.partitions):
            self.stores.append(PartitionStore(self.folder / f"store-{p}"))
            self.live[p] = Partition(self.stores[p], self.settings, p)
            self.live[p].adopt(self.model.version, self.model.space, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._consumer.close()
        self._pool.shutdown()
        for store in self.stores:
            store.close()

    def partition_of(self, pair_id: str) -> int:
        return int(partitions_of([pair_id.encode()], self.partitions)[0])

    def feed(self, pairs: Iterable[Mapping[str, Any] | str | tuple[str, bytes | None]]) -> Self:
        """Raw records: a RawPair, an id (a pair of that name), or (id, value): None takes it down, bytes are as they are."""
        for pair in pairs:
            if isinstance(pair, tuple):
                pair_id, value = pair
            else:
                record = raw(pair) if isinstance(pair, str) else pair
                pair_id, value = record["id"], self._codec.encode(record)
            self._raw.produce(self.name, value, pair_id.encode(), self.partition_of(pair_id))
        self._raw.flush()
        return self

    def run(self, skip: Callable[[Any], bool] = lambda message: False) -> Self:
        """Reduces all that is in the raw topic, a transaction for every `batch` records; `skip` plants a worker that
        passes a message over without a trace."""
        ends = end_offsets(self.kafka, self.name, range(self.partitions))
        messages = []
        for p in range(self.partitions):
            for batch in read_partition(self.kafka, self.name, p, self.live[p].next_offset or 0, ends[p]):
                messages += [message for message in batch if not skip(message)]
        for start in range(0, len(messages), self.batch):
            effects = Effects()
            reduce_batch(messages[start : start + self.batch], self.live, self._using, effects)
            commit(effects, self.live, self._outlet)
        self._wait_for_markers()
        return self

    @property
    def _outlet(self) -> Outlet:
        codec = Codec("PairCodes")
        return Outlet(self._transactional, self._consumer, self.topics, self.name, codec, "writer", self.partitions)

    def switch(self, model: PairModel, partitions: Iterable[int] | None = None) -> Self:
        """Begins the next epoch in these partitions (None: in all), as a worker does: in a transaction of its own."""
        self.models[model.version] = model
        numbers = set(self.live if partitions is None else partitions)
        for partition in (self.live[number] for number in numbers):
            tail, until = None, partition.next_offset or 0
            if self.cap is not None:
                epoch = partition.epoch + 1
                tail = Regrouping(partition.store, epoch, model.version, model.assign, until).tail()
            partition.adopt(model.version, model.space, until, tail)
        commit(Effects(switched=numbers), self.live, self._outlet)
        self._wait_for_markers()
        return self

    def switch_apart(
        self,
        between: PairModel,
        newest: PairModel,
        pairs: Sequence[Mapping[str, Any] | str],
        straight: Iterable[int] = (0,),
        stays: Iterable[int] = (),
    ) -> Self:
        """Partitions come to `newest` in two ways: straight (its epoch is 1 there), or over `between` (2), in which some stay.

        A third of the pairs comes before the first switch, between the two, and after the second.
        """
        third = -(-len(pairs) // 3)
        self.feed(pairs[:third]).run()
        self.switch(between, self.live.keys() - set(straight))
        self.feed(pairs[third : 2 * third]).run()
        self.switch(newest, self.live.keys() - set(stays))
        return self.feed(pairs[2 * third :]).run()

    def _wait_for_markers(self) -> None:
        """The broker writes them behind the caller's back, and a committed reader that comes sooner sees less."""
        numbers = range(self.partitions)
        for topic in (self.topics.changelog, self.topics.kept, self.topics.codes, self.topics.dead):
            until(
                lambda topic=topic: (
                    end_offsets(self.kafka, topic, numbers)  # type: ignore[misc]
                    == end_offsets(self.kafka, topic, numbers, committed=False)
                ),
                f"{topic} is committed to its end",
            )

    def plant(self, topic: str, pair_id: str, value: bytes | None, **headers: str) -> None:
        """A record that no worker wrote, in an output topic."""
        producer = self.kafka.producer()
        pairs = [(name, text.encode()) for name, text in headers.items()]
        producer.produce(topic, value, pair_id.encode(), self.partition_of(pair_id), headers=pairs)
        producer.flush()

    def plant_record(self, topic: str, key: bytes, value: bytes | None, partition: int = 0) -> None:
        """A record that no worker wrote, under any key."""
        producer = self.kafka.producer()
        producer.produce(topic, value, key, partition)
        producer.flush()

    def members(self) -> dict[str, int]:
        """The reduced set as the stores have it: id → input offset."""
        from state.changelog import decode_entry

        found = {}
        for store in self.stores:
            for _, value in store.entries():
                entry = decode_entry(value)
                found[entry.pair_id] = entry.offset
        return found
