"""The memory that a snapshot takes, of a small reduced set and of one ten times as large: constant?

    python benchmarks/snapshot_memory.py

Writes two streams of the null model that keep every pair, takes a snapshot of each in a process of its own, and prints
that process's largest resident size (from getrusage, mapped files included) beside the bytes that it wrote.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from stream.broker import local_broker
from stream.kafka import Connection, create_missing
from stream.records import Codec

SIZES = (3_000, 30_000)
IMAGE_BYTES = 10_000


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, local_broker(Path(folder) / "kafka") as broker:
        connection = Connection(broker.bootstrap_servers)
        print("format      pairs   written (MB)  largest resident (MB)  seconds")
        for pairs in SIZES:
            topic = f"raw-{pairs}"
            produce(connection, topic, pairs)
            run("consume", "--topic", topic, "--model", "null", "--ratio", "1/1", "--stop-at-end", "--metrics-port", "0",
                "--state-dir", f"{folder}/state-{pairs}", "--bootstrap-servers", broker.bootstrap_servers)  # fmt: skip
            for kind in ("webdataset", "parquet"):
                out = Path(folder) / f"{kind}-{pairs}"
                began = time.monotonic()
                peak_mb = run("snapshot", str(out), "--topic", topic, "--format", kind,
                              "--bootstrap-servers", broker.bootstrap_servers)  # fmt: skip
                written = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
                print(
                    f"{kind:10}  {pairs:6,d}  {written / 1e6:13.1f}  {peak_mb:21.1f}  {time.monotonic() - began:7.1f}"
                )


def produce(connection: Connection, topic: str, pairs: int) -> None:
    create_missing(connection, {topic: {}}, 2)
    codec, producer = Codec("RawPair"), connection.producer()
    for n in range(pairs):
        record = {"id": f"https://example.org/{n}.jpg", "caption": f"picture {n}", "image": os.urandom(IMAGE_BYTES)}
        while True:
            try:
                producer.produce(topic, codec.encode(record), record["id"].encode())
                break
            except BufferError:
                producer.poll(0.1)
    producer.flush()


def run(*arguments: str) -> float:
    """Runs a command of the program to its end; its largest resident size in MB."""
    child = subprocess.Popen(
        [sys.executable, "-m", "stream", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{arguments[0]} left with status {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss / 1024


if __name__ == "__main__":
    main()
