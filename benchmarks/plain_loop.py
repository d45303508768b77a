"""The stateless loop that `engine.py` measures against: consume, produce every fourth record, commit in transactions.

    python benchmarks/plain_loop.py BOOTSTRAP TOPIC GROUP OUT [CONSUMER.SETTING=VALUE]…

It knows no ids, keeps no state and decodes nothing: what a Python consumer and producer do as they come.
"""

from __future__ import annotations

import os
import sys
import time

from confluent_kafka import Consumer, Producer, TopicPartition

COMMIT_INTERVAL_S = 1.0


def main() -> None:
    bootstrap, topic, group, out, *settings = sys.argv[1:]
    consumer = Consumer(
        {"bootstrap.servers": bootstrap, "group.id": group, "auto.offset.reset": "earliest", "enable.auto.commit": False,
         "isolation.level": "read_committed"} | dict(setting.split("=") for setting in settings)
    )  # fmt: skip
    producer = Producer(
        {
            "bootstrap.servers": bootstrap,
            "transactional.id": f"{group}-{os.getpid()}",
            "compression.type": "lz4",
            "linger.ms": 5,
        }
    )
    producer.init_transactions()
    consumer.subscribe([topic])
    next_offsets: dict[int, int] = {}
    began = 0.0
    said = False
    while True:
        messages = consumer.consume(1000, 0.1)
        if messages and not said:
            said = True
            print("first", time.time(), time.process_time(), flush=True)
        if messages and not next_offsets:
            producer.begin_transaction()
            began = time.monotonic()
        for message in messages:
            if message.error():
                raise SystemExit(str(message.error()))
            if message.offset() % 4 == 0:
                while True:
                    try:
                        producer.produce(out, message.value(), message.key(), message.partition())
                        break
                    except BufferError:
                        producer.poll(0.1)
            next_offsets[message.partition()] = message.offset() + 1
        producer.poll(0)
        if next_offsets and time.monotonic() - began >= COMMIT_INTERVAL_S:
            offsets = [TopicPartition(topic, p, offset) for p, offset in next_offsets.items()]
            producer.send_offsets_to_transaction(offsets, consumer.consumer_group_metadata())
            producer.commit_transaction()
            next_offsets = {}


if __name__ == "__main__":
    main()
