"""A small stream on the real broker: raw records written by hand, and a worker of the null model run to their end."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from stream.consume import ConsumeOptions, consume
from stream.kafka import Connection, create_missing
from stream.murmur2 import partitions_of
from stream.records import Codec
from stream.stream_view import StreamSource
from stream.topics import StreamTopics


class Raw(NamedTuple):
    """A raw record as it is produced."""

    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...] = ()
    partition: int | None = None


def picture(number: int) -> bytes:
    """A small PNG that no other number has."""
    out = io.BytesIO()
    colour = (number * 37 % 256, number * 101 % 256, number // 256 % 256)
    Image.new("RGB", (40, 24), colour).save(out, "PNG")
    return out.getvalue()


def pair(pair_id: str, caption: str, image: bytes, *, key: bool = True) -> Raw:
    """A pair, under its id as key or under none."""
    record: dict[str, Any] = {"id": pair_id, "caption": caption, "image": image, "image_uri": None, "fields": {}}
    return Raw(pair_id.encode() if key else None, Codec("RawPair").encode(record))


@dataclass
class SmallStream:
    """A raw topic and its stream of the same name."""

    kafka: Connection
    topic: str
    state: Path
    partitions: int = 2

    @property
    def source(self) -> StreamSource:
        return StreamSource(self.kafka, StreamTopics(self.topic))

    def produce(self, records: Iterable[Raw]) -> None:
        create_missing(self.kafka, {self.topic: {}}, self.partitions)
        producer = self.kafka.producer()
        for raw in records:
            home = raw.partition
            if home is None:
                home = 0 if raw.key is None else int(partitions_of([raw.key], self.partitions)[0])
            producer.produce(self.topic, raw.value, raw.key, home, headers=list(raw.headers))
        assert producer.flush(30) == 0

    def run(self, *, commit_interval_s: float = 0.2, **options: Any) -> None:
        """A worker, until the end of the topic."""
        consume(
            ConsumeOptions(
                connection=self.kafka,
                topic=self.topic,
                model="null",
                state_dir=self.state,
                instance_id="worker",
                metrics_host="127.0.0.1",
                metrics_port=0,
                commit_interval_s=commit_interval_s,
                stop_at_end=True,
                **options,
            )
        )
