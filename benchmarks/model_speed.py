"""How fast a model's steps are on this machine's GPU (or CPU), each alone and together in a worker on a real Kafka.

    python benchmarks/model_speed.py --bundle bundles/sample
    python benchmarks/model_speed.py --paper               # the paper's sizes; random weights take as long as others

Prints Markdown. Images are those of the sample corpus, again and again under other ids. The steps are timed on four batches
of the encoder at a time, as a worker hands them over; the worker from the first record it reads to its last commit.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from models.threads import set_thread_environment

set_thread_environment()

import torch  # noqa: E402

from benchmarks.engine import PARTITIONS, Input, last_commit  # noqa: E402
from benchmarks.paper_memory import paper_parts  # noqa: E402
from models.bundle import load_model, write_bundle  # noqa: E402
from models.loaded import LoadedModel  # noqa: E402
from models.model import Picture  # noqa: E402
from stream.broker import local_broker  # noqa: E402
from stream.kafka import Connection, create_missing, end_offsets  # noqa: E402
from stream.records import Codec  # noqa: E402

ROOT = Path(__file__).parents[1]
SHARDS = "corpus/sample/*.tar"
ROUNDS = 5
KEPT = 4  # one of so many


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=ROOT / "bundles" / "sample")
    parser.add_argument(
        "--paper", action="store_true", help="a bundle of the paper's sizes with random weights, made here"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-pairs", type=int, help="of the worker, instead of its default")
    parser.add_argument("--records", type=int, default=20_000, help="for the worker; 0: the steps alone")
    options = parser.parse_args()
    name = torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU"
    with tempfile.TemporaryDirectory() as folder:
        bundle = paper_bundle(Path(folder)) if options.paper else options.bundle
        what = "the paper's sizes, random weights" if options.paper else str(bundle.name)
        print(f"\n{what} on {name}, {os.cpu_count()} cores, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n")
        images = list(itertools.islice(jpegs(), 1024))
        for line in steps(load_model(bundle, options.device), images, options.device):
            print(line, flush=True)
        if options.records:
            print(in_a_worker(bundle, options.device, options.records, options.batch_pairs, Path(folder)), flush=True)


def jpegs() -> Iterator[bytes]:
    """JPEGs of the sample corpus, for ever."""
    found = []
    for shard in sorted(ROOT.glob(SHARDS)):
        with tarfile.open(shard) as tar:
            for member in tar:
                file = tar.extractfile(member) if member.name.endswith(".jpg") else None
                found += [file.read()] if file else []
    return itertools.cycle(found)


def paper_bundle(folder: Path, clusters: int = 1000) -> Path:
    """A bundle of the paper's sizes whose weights are random, its clusters fitted to the sample corpus by `bootstrap`."""
    parts = paper_parts()
    about = {"config": parts.captioner.config.as_dict(), "architecture": "paper"}
    write_bundle(folder / "captioner", parts.contents(), about)
    command = [sys.executable, "-W", "ignore", "-m", "stream", "bootstrap", SHARDS, "--captioner",
               str(folder / "captioner"), "--clusters", str(clusters), "--out", str(folder / "bundle")]  # fmt: skip
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return folder / "bundle"


def steps(model: LoadedModel, images: list[bytes], device: str) -> Iterator[str]:
    """A table of what each step does alone, in a second of it."""
    count = model.pairs_at_once
    images = (images * (count // len(images) + 1))[:count]
    pictures: list[Picture] = [model.decode(image) for image in images]
    vectors = model.encode(pictures)
    kept, shown = vectors[: count // KEPT], pictures[: count // KEPT]
    captions = ["a picture of something that was found somewhere"] * count
    threads = len(os.sched_getaffinity(0))

    def all_cores() -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(model.decode, images))

    timed: dict[str, tuple[Callable[[], Any], int]] = {
        "decode, one thread": (lambda: [model.decode(image) for image in images], count),
        f"decode, {threads} threads": (all_cores, count),
        "encode: pixels to index vectors": (lambda: model.encode(pictures), count),
        "assign": (lambda: model.assign(vectors), count),
        "match": (lambda: model.match(vectors, captions, pictures), count),
        "caption those that are kept": (lambda: model.caption(kept, shown), len(kept)),
    }
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    yield f"{count} pairs at once, the encoder by {model.batch}, {len(kept)} kept; median of {ROUNDS}:\n"
    yield "| step | ms | a second |"
    yield "|---|---|---|"
    for step, (call, of) in timed.items():
        seconds = statistics.median(took(call) for _ in range(ROUNDS))
        yield f"| {step} | {1000 * seconds:,.0f} | {of / seconds:,.0f} |"
    if device.startswith("cuda"):
        given, taken = torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30
        yield f"\nGPU memory at its peak: {given:.2f} GiB in use, {taken:.2f} GiB reserved."


def took(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def in_a_worker(bundle: Path, device: str, records: int, batch_pairs: int | None, folder: Path) -> str:
    """A line on one worker that works a backlog off: 4 partitions, M = 25 %."""
    with local_broker(folder / "kafka") as broker:
        kafka = Connection(broker.bootstrap_servers)
        data, sent = backlog(kafka, records)
        command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "our_worker.py"), "consume", "--topic",
                   data.topic, "--stream", "speed", "--bundle", str(bundle), "--device", device, "--ratio", f"1/{KEPT}",
                   "--state-dir", str(folder / "state"), "--metrics-port", "0", "--bootstrap-servers",
                   kafka.bootstrap_servers]  # fmt: skip
        command += ["--batch-pairs", str(batch_pairs)] if batch_pairs else []
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        with running(command, folder / "worker.log", environment) as process:
            try:
                ended = last_commit(kafka, "speed", data, process)
            except SystemExit:
                print((folder / "worker.log").read_text()[-2000:], file=sys.stderr)
                raise
        log = (folder / "worker.log").read_text()
    first = next(float(line.split()[1]) for line in log.splitlines() if line.startswith("first "))
    told = next((line for line in log.splitlines() if line.startswith("seconds ")), "")
    rate = records / (ended - first)
    return f"\nA worker: {records:,} records of {sent / records / 1000:.0f} kB in {ended - first:.1f} s: {rate:,.0f}/s.\n{told}"


@contextmanager
def running(command: list[str], log: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
        try:
            yield process
        finally:
            process.terminate()
            process.wait()


def backlog(kafka: Connection, records: int) -> tuple[Input, int]:
    """The raw topic with so many records, and their bytes."""
    create_missing(kafka, {"raw-pairs": {"max.message.bytes": "2097152"}}, PARTITIONS)
    producer, codec, sent = kafka.producer(linger_ms=20), Codec("RawPair"), 0
    for number, image in zip(range(records), jpegs(), strict=False):
        pair_id = f"https://example.org/{number}.jpg"
        value = codec.encode(
            {"id": pair_id, "caption": "a picture of something", "image": image,
             "image_uri": None, "fields": {}}
        )  # fmt: skip
        sent += len(value)
        while True:
            try:
                producer.produce("raw-pairs", value, pair_id.encode())
                break
            except BufferError:
                producer.poll(0.1)
    producer.flush()
    ends = end_offsets(kafka, "raw-pairs", range(PARTITIONS))
    return Input("raw-pairs", records, set(), ends), sent


if __name__ == "__main__":
    main()
