"""A worker's anonymous memory after 10,000 and after 100,000 small records: flat but for the known ids?

    python benchmarks/worker_memory.py

Starts a broker and one worker with the null model, sends records in waves of 10,000, and prints RssAnon (from /proc) once
the worker has committed each number of records and has come to rest, with the bytes received for each byte of payload.
Equal waves fill the buffers equally, so what grows from line to line is what the worker never lets go. Then a backlog of
200,000 shows what full buffers take on top.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from stream.broker import free_port, local_broker
from stream.kafka import Connection, create_missing
from stream.records import Codec

TOPIC = "raw-pairs"
WAVE = 10_000
STEPS = (10_000, 50_000, 100_000, 200_000)
BACKLOG = 200_000
# Longer than stream.worker.GIVE_BACK_EVERY_S.
REST_S = 7.0
IMAGE_BYTES = 300
TIMEOUT_S = 300.0


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, local_broker(Path(folder) / "kafka") as broker:
        connection = Connection(broker.bootstrap_servers)
        create_missing(connection, {TOPIC: {}}, 4)
        port = free_port()
        worker = subprocess.Popen(
            [sys.executable, "-m", "stream", "consume", "--topic", TOPIC, "--model", "null", "--state-dir",
             f"{folder}/state", "--metrics-port", str(port), "--bootstrap-servers", broker.bootstrap_servers],
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            print("records  anonymous memory (MB)  received/payload")
            for sent in range(0, STEPS[-1], WAVE):
                produce(connection, sent, sent + WAVE)
                figures = wait_for(port, sent + WAVE)
                if sent + WAVE in STEPS:
                    time.sleep(REST_S)
                    show(f"{sent + WAVE:,d}", worker.pid, figures)
            produce(connection, STEPS[-1], STEPS[-1] + BACKLOG)
            figures = wait_for(port, STEPS[-1] + BACKLOG)
            show("backlog", worker.pid, figures)
            time.sleep(REST_S)
            show("at rest", worker.pid, figures)
        finally:
            worker.terminate()
            worker.wait()


def show(when: str, pid: int, figures: dict[str, float]) -> None:
    ratio = figures["tldr_received_bytes_total"] / figures["tldr_payload_bytes_total"]
    print(f"{when:>7}  {anonymous_mb(pid):21.1f}  {ratio:16.3f}", flush=True)


def produce(connection: Connection, start: int, end: int) -> None:
    codec, producer = Codec("RawPair"), connection.producer()
    for n in range(start, end):
        pair_id = f"https://example.org/{n}.jpg"
        record = {"id": pair_id, "caption": f"picture {n}", "image": os.urandom(IMAGE_BYTES)}
        while True:
            try:
                producer.produce(TOPIC, codec.encode(record), pair_id.encode())
                break
            except BufferError:
                producer.poll(0.1)
    producer.flush()


def wait_for(port: int, records: int) -> dict[str, float]:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        time.sleep(1.5)  # the worker counts bytes once a second
        figures: dict[str, float] = {}
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                text = answer.read().decode()
        except OSError:
            continue
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                figures[sample.name] = figures.get(sample.name, 0.0) + sample.value
        if figures.get("tldr_pairs_total", 0) >= records:
            return figures
    raise SystemExit(f"{records} records were not processed within {TIMEOUT_S:.0f} s")


def anonymous_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise SystemExit("this kernel tells no RssAnon")


if __name__ == "__main__":
    main()
