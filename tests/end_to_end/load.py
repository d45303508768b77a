"""Records that flow like a crawl's: real pictures and captions, some repeated, some bad, at a rate that may change."""

from __future__ import annotations

import random
import threading
import time
from itertools import count
from pathlib import Path
from types import TracebackType

from stream.kafka import Connection
from stream.murmur2 import partitions_of
from stream.pair_sources import SourcePair, open_source
from stream.records import Codec

TICK_S = 0.05


def sample_pairs(corpus: Path) -> list[tuple[str, bytes]]:
    """(caption, image) of every pair of a folder of WebDataset shards."""
    return [
        (pair.caption, pair.image)
        for shard in sorted(corpus.glob("*.tar"))
        for pair in open_source(shard)
        if isinstance(pair, SourcePair) and pair.image is not None and pair.caption
    ]


class Load:
    """A thread that produces into a topic for the length of a `with` block.

    rate  records a second; bad_share, repeated_share  how many of them are no pairs, or ids that were sent before: all three
    may be set while it runs. sent  what it has produced
    """

    def __init__(
        self, kafka: Connection, topic: str, partitions: int, corpus: Path, *, rate: float, repeated_share: float = 0.05,
        bad_share: float = 0.005, seed: int = 1,
    ) -> None:  # fmt: skip
        self.rate, self.repeated_share, self.bad_share = rate, repeated_share, bad_share
        self.sent = 0
        self._topic, self._partitions = topic, partitions
        self._pairs = sample_pairs(corpus)
        self._dice = random.Random(seed)
        self._codec, self._producer = Codec("RawPair"), kafka.producer(linger_ms=20)
        self._numbers = count()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends it, everything acknowledged."""
        self._stop.set()
        self._thread.join()
        self._producer.flush(60)

    def _run(self) -> None:
        due, last = 0.0, time.monotonic()
        while not self._stop.wait(TICK_S):
            now = time.monotonic()
            due += self.rate * (now - last)
            last = now
            for _ in range(int(due)):
                self._send()
            due -= int(due)
            self._producer.poll(0)

    def _send(self) -> None:
        what = self._dice.random()
        if what < self.bad_share:
            key, value = self._bad()
        else:
            fresh = what >= self.bad_share + self.repeated_share or not self.sent
            number = next(self._numbers) if fresh else self._dice.randrange(max(1, self.sent))
            caption, image = self._pairs[number % len(self._pairs)]
            key = f"crawl-{number}"
            value = self._codec.encode(
                {"id": key, "caption": caption, "image": image, "image_uri": None, "fields": {"number": str(number)}}
            )
        partition = int(partitions_of([key.encode()], self._partitions)[0])
        self._producer.produce(self._topic, value, key.encode(), partition)
        self.sent += 1

    def _bad(self) -> tuple[str, bytes]:
        """One of three things that happen to crawlers: a truncated picture, an error page, bytes of another format."""
        key = f"bad-{self.sent}"
        kind = self._dice.randrange(3)
        if kind == 2:
            return key, b"neither Avro nor anything else"
        _, image = self._dice.choice(self._pairs)
        bytes_ = image[: len(image) // 2] if kind == 0 else b"<html>404</html>"
        return key, self._codec.encode(
            {"id": key, "caption": "a caption", "image": bytes_, "image_uri": None, "fields": {}}
        )
