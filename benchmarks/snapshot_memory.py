"""The memory that a snapshot takes, of a small reduced set and of one ten times as large: constant?

    python benchmarks/snapshot_memory.py

Writes streams of the null model that keep every pair, takes a snapshot of each in a process of its own, and prints the most
anonymous memory that this process had (RssAnon, sampled), and the most of mapped files (its temporary index, which the
kernel takes back when it needs the room), beside the bytes that it wrote.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from stream.broker import local_broker
from stream.kafka import Connection, create_missing
from stream.records import Codec

SIZES = (30_000, 90_000)
IMAGE_BYTES = 10_000
SAMPLE_EVERY_S = 0.05


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, local_broker(Path(folder) / "kafka") as broker:
        connection = Connection(broker.bootstrap_servers)
        print("format      pairs   written (MB)  anonymous (MB)  mapped files (MB)  seconds")
        for pairs in SIZES:
            topic = f"raw-{pairs}"
            produce(connection, topic, pairs)
            run("consume", "--topic", topic, "--model", "null", "--ratio", "1/1", "--stop-at-end", "--metrics-port", "0",
                "--state-dir", f"{folder}/state-{pairs}", "--bootstrap-servers", broker.bootstrap_servers)  # fmt: skip
            for kind in ("webdataset", "parquet"):
                out = Path(folder) / f"{kind}-{pairs}"
                began = time.monotonic()
                anonymous_mb, mapped_mb = run("snapshot", str(out), "--topic", topic, "--format", kind,
                              "--bootstrap-servers", broker.bootstrap_servers)  # fmt: skip
                took = time.monotonic() - began
                written = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
                print(
                    f"{kind:10}  {pairs:6,d}  {written / 1e6:13.1f}  {anonymous_mb:14.1f}  {mapped_mb:17.1f}  {took:7.1f}"
                )


def produce(connection: Connection, topic: str, pairs: int) -> None:
    create_missing(connection, {topic: {}}, 2)
    codec, producer = Codec("RawPair"), connection.producer()
    for n in range(pairs):
        pair_id = f"https://example.org/{n}.jpg"
        record = {"id": pair_id, "caption": f"picture {n}", "image": os.urandom(IMAGE_BYTES)}
        while True:
            try:
                producer.produce(topic, codec.encode(record), pair_id.encode())
                break
            except BufferError:
                producer.poll(0.1)
    producer.flush()


def run(*arguments: str) -> tuple[float, float]:
    """Runs a command of the program to its end; the most anonymous memory and mapped files that it had, in MB."""
    command = [sys.executable, "-m", "stream", *arguments]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    most = {"RssAnon": 0, "RssFile": 0}
    while child.poll() is None:
        with contextlib.suppress(OSError):  # it has just ended
            for line in Path(f"/proc/{child.pid}/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in most:
                    most[name] = max(most[name], int(value.split()[0]))
        time.sleep(SAMPLE_EVERY_S)
    if child.returncode:
        raise SystemExit(f"{arguments[0]} left with status {child.returncode}")
    return most["RssAnon"] / 1024, most["RssFile"] / 1024


if __name__ == "__main__":
    main()
