"""The history of a run, one JSON line an event: what went in, what a reader was shown and when, and every fault.

    {"at": 12.345, "what": "sent", "id": …, "partition": …, "offset": …}        acknowledged by the broker
    {"at": …, "what": "visible", "topic": …, "partition": …, "offset": …, "key": …, "crc": …}    to read_committed
    {"at": …, "what": "fault", "fault": "kill", …}          and "begin" (the settings), "end", "left", "runs", …

`at` is in seconds since the beginning. Must not know what the records mean: the checker does.
"""

from __future__ import annotations

import json
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from confluent_kafka import Consumer, KafkaException, TopicPartition

from tests.end_to_end.checker import OUTPUTS, Place


class History:
    """An append-only file of events; any thread may append."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self._clock = clock
        self._began = clock()
        self._lock = threading.Lock()
        self._file = path.open("a", buffering=1)  # a line is in the file once it is appended

    def append(self, what: str, **event: Any) -> None:
        line = json.dumps({"at": round(self._clock() - self._began, 3), "what": what, **event})
        with self._lock:
            self._file.write(line + "\n")

    @property
    def seconds(self) -> float:
        return self._clock() - self._began

    def close(self) -> None:
        self._file.close()


def events(path: Path, what: str | None = None) -> Iterator[dict[str, Any]]:
    """The events of a history so far, those of one kind if it is given."""
    with path.open() as file:
        for line in file:
            event: dict[str, Any] = json.loads(line)
            if what is None or event["what"] == what:
                yield event


def sent_in(path: Path) -> Iterator[tuple[int, int]]:
    """(partition, offset) of all that was acknowledged."""
    return ((event["partition"], event["offset"]) for event in events(path, "sent"))


def visible_in(path: Path) -> Iterator[tuple[Place, int]]:
    """Where the records lay that a reader was shown, and their CRC-32."""
    return (
        (Place(event["topic"], event["partition"], event["offset"]), event["crc"]) for event in events(path, "visible")
    )


class Observer:
    """A reader of a stream's outputs, from their beginning on, that puts down what it is shown and when.

    isolation  `read_committed` unless a test wants to see what must not be shown
    """

    def __init__(
        self,
        bootstrap_servers: str,
        stream: str,
        partitions: Iterable[int],
        history: History,
        isolation: str = "read_committed",
    ) -> None:
        self.history = history
        self.count = 0
        self._consumer = Consumer(
            {
                "bootstrap.servers": bootstrap_servers,
                "group.id": "observer",
                "enable.auto.commit": False,
                "isolation.level": isolation,
                "auto.offset.reset": "earliest",
                "metadata.recovery.strategy": "none",
                "log_level": 0,
            }
        )
        numbers = list(partitions)
        self._consumer.assign([TopicPartition(f"{stream}.{kind}", p, 0) for kind in OUTPUTS for p in numbers])
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="observer")
        self._thread.start()

    def _watch(self) -> None:
        while not self._ending.is_set():
            try:
                messages = self._consumer.consume(500, 0.2)
            except KafkaException:  # the broker is away
                continue
            for message in messages:
                if message.error() is None:
                    self.count += 1
                    self.history.append(
                        "visible",
                        topic=message.topic(),
                        partition=message.partition(),
                        offset=message.offset(),
                        key=(message.key() or b"").decode(errors="replace"),
                        crc=zlib.crc32(message.value() or b""),
                    )

    def close(self) -> None:
        self._ending.set()
        self._thread.join()
        self._consumer.close()
