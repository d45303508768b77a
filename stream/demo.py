"""The whole service on this machine, on real images: broker, ingest, two workers, one of them killed, snapshot, report.

Uses nothing but the command line that every user has, plus records that are planted to be found again: duplicates and bad
ones. What the summary says is read from Kafka and from the workers' metrics afterwards, not from what was meant to happen.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from state.changelog import CELL, POSITION, cells_of, decode_position
from stream.broker import REPOSITORY, free_port, local_broker
from stream.errors import Stopped, TldrError
from stream.kafka import Connection, create_missing, end_offsets, read_partition
from stream.pair_sources import SourcePair, open_source
from stream.progress import Progress
from stream.records import Codec
from stream.stream_view import ChangelogFollower, StreamSource
from stream.topics import StreamTopics

log = logging.getLogger(__name__)

TOPIC = "raw-pairs"
PARTITIONS = 2
WORKERS = 2
# Every so many pairs of the first half come again, and one bad record of each kind comes this often.
DUPLICATE_EVERY = 12
BAD_OF_EACH_KIND = 3
KILL_AT_SHARE = 0.4
DOWN_S = 1.0
# Longer than a worker takes to come back, so that its partition waits for it.
SESSION_TIMEOUT_S = 30
STALLED_AFTER_S = 120.0
LOOK_EVERY_S = 0.25
# A worker counts bytes once a second, received ones and payload each in its own second.
COUNTED_WITHIN_S = 2.0
DRAIN_TIMEOUT_S = 60.0


@dataclass
class DemoResult:
    """What the demo did and found."""

    out: Path
    seconds: float
    steps: dict[str, float]
    raw_records: int
    totals: dict[str, int]
    planted_duplicates: int
    planted_bad: int
    worker_shares: dict[str, float]
    killed: str
    median_cell: float
    cells: int
    verify: dict[str, Any]
    captions_visible: int
    received_over_payload: float
    pairs_per_second: dict[str, float]
    report: Path
    snapshots: list[Path]
    logs: list[Path]
    problems: list[str] = field(default_factory=list)

    def lines(self) -> Iterable[str]:
        t = self.totals
        in_set = t["kept"] - t["evicted"] - t["removed"]
        shares = " · ".join(f"{name} {share:.0%}" for name, share in self.worker_shares.items())
        stages = " · ".join(f"{stage} {rate:,.0f}/s" for stage, rate in self.pairs_per_second.items())
        yield ""
        yield "tldr-stream demo"
        yield f"  raw records      {self.raw_records} in {PARTITIONS} partitions, {self.planted_duplicates} duplicates and "\
              f"{self.planted_bad} bad ones planted"  # fmt: skip
        yield f"  what became      {t['kept']} kept · {t['over_quota']} over quota · {t['duplicates']} duplicates · "\
              f"{t['dead']} dead letters"  # fmt: skip
        yield f"  the reduced set  {in_set} pairs = {t['kept'] / max(1, t['counted']):.1%} of {t['counted']} counted"
        yield f"  cells            {self.cells}, the median one has {self.median_cell:.0f} counted pairs"
        yield f"  workers          {shares}; {self.killed}"
        yield f"  captions         {self.captions_visible} visible / {t['kept']} kept = "\
              f"{self.captions_visible / max(1, t['kept']):.2f}"  # fmt: skip
        yield f"  network          {self.received_over_payload:.2f} bytes received for each byte of payload"
        yield f"  speed by stage   {stages} (both workers, this machine)"
        counts = ", ".join(
            f"{self.verify[key]} {key}" for key in ("missing", "extra", "cluster_differs", "unaccounted")
        )
        yield f"  verify           {counts}"
        yield f"  time             {self.seconds:.0f} s: " + " · ".join(f"{k} {v:.0f}" for k, v in self.steps.items())
        yield f"  report           {self.report}"
        yield f"  snapshots        {', '.join(map(str, self.snapshots))}"
        yield f"  logs             {', '.join(map(str, self.logs))}"
        for problem in self.problems:
            yield f"  PROBLEM          {problem}"


def demo(out: Path, corpus: Path | None = None, bundle: Path | None = None) -> DemoResult:
    """Runs the demo into the folder `out`, which is emptied if an earlier demo made it.

    Raises TldrError where something is missing, Stopped where a worker or a job fails (with the log to look at).
    """
    corpus = corpus or REPOSITORY / "corpus" / "sample"
    bundle = bundle or REPOSITORY / "bundles" / "sample"
    for folder, what in ((corpus, "sample corpus"), (bundle, "sample bundle")):
        if not folder.is_dir():
            raise TldrError(f"no {what} at {folder}: run the demo in a checkout, or give --corpus and --bundle")
    _empty(out)
    steps = _Steps()
    with ExitStack() as stack:
        with steps.step("broker"):
            broker = stack.enter_context(local_broker(out / "kafka"))
        run = _Run(out, Connection(broker.bootstrap_servers))
        create_missing(run.connection, {TOPIC: {"max.message.bytes": str(4 << 20)}}, PARTITIONS)
        run.job("bundle", "announce", str(bundle))
        with steps.step("workers"):
            workers = [stack.enter_context(_worker(run, number)) for number in range(1, WORKERS + 1)]
            _wait_until_each_has_a_partition(workers)
        with steps.step("ingest"):
            planted_duplicates, planted_bad = _fill(run, corpus)
        raw_records = sum(end_offsets(run.connection, TOPIC, range(PARTITIONS)).values())
        with steps.step("reduce"):
            killed = _watch(run.connection, workers, raw_records)
            time.sleep(COUNTED_WITHIN_S)
            figures = [worker.figures() for worker in workers]
            for worker in workers:
                worker.drain()
        with steps.step("verify"):
            verified = run.job("verify", "--topic", TOPIC, "--bundle", str(bundle))
        snapshots = [out / "snapshot-webdataset", out / "snapshot-parquet"]
        with steps.step("snapshot"):
            for folder in snapshots:
                kind = folder.name.removeprefix("snapshot-")
                run.job("snapshot", str(folder), "--topic", TOPIC, "--format", kind)
        report = out / "report.html"
        with steps.step("report"):
            run.job("report", str(report), "--topic", TOPIC, "--bundle", str(bundle))
        totals, shares, cells = _read_changelog(run.connection)
        captions = _captions_visible(run.connection)
    result = DemoResult(
        out=out,
        seconds=sum(steps.seconds.values()),
        steps=steps.seconds,
        raw_records=raw_records,
        totals=totals,
        planted_duplicates=planted_duplicates,
        planted_bad=planted_bad,
        worker_shares=shares,
        killed=killed,
        median_cell=statistics.median(cells) if cells else 0.0,
        cells=len(cells),
        verify={key: _count(verified.get(key, -1)) for key in ("missing", "extra", "cluster_differs", "unaccounted")},
        captions_visible=captions,
        received_over_payload=_ratio(figures, "tldr_received_bytes_total", "tldr_payload_bytes_total"),
        pairs_per_second=_speeds(figures),
        report=report,
        snapshots=snapshots,
        logs=[worker.log for worker in workers],
    )
    result.problems = list(_problems(result))
    return result


def _problems(result: DemoResult) -> Iterator[str]:
    """What a demo must show, and this one did not."""
    t = result.totals
    if t["read"] != result.raw_records:
        yield f"{t['read']} of {result.raw_records} raw records were read"
    if t["duplicates"] < result.planted_duplicates:
        yield f"{t['duplicates']} duplicates found, {result.planted_duplicates} planted"
    if t["dead"] < result.planted_bad:
        yield f"{t['dead']} dead letters, {result.planted_bad} bad records planted"
    if result.captions_visible != t["kept"]:
        yield f"{result.captions_visible} captions visible for {t['kept']} kept pairs"
    if any(result.verify.values()):
        yield "the stream differs from the batch reference: run `tldr-stream verify`"
    if len(result.worker_shares) < WORKERS or min(result.worker_shares.values()) < 1 / 5:
        yield "a worker processed less than a fifth"
    if result.median_cell < 20:
        yield f"the median cell has {result.median_cell:.0f} counted pairs, less than 20"


class _Steps:
    """The steps of the demo, said as they begin and timed."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        print(f"▸ {name} …", file=sys.stderr, flush=True)
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began
        print(f"  {name} done in {self.seconds[name]:.1f} s", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class _Run:
    """One demo: its folder and its broker."""

    out: Path
    connection: Connection

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "stream", *words, "--bootstrap-servers", self.connection.bootstrap_servers]

    def job(self, *words: str) -> dict[str, Any]:
        """Runs one of our own commands, its progress on our standard error; returns its JSON result."""
        done = subprocess.run(
            [*self.command(*words), "--json"], stdout=subprocess.PIPE, text=True, check=False, env=_environment()
        )
        try:
            result: dict[str, Any] = json.loads(done.stdout)
        except json.JSONDecodeError:
            raise Stopped(f"`tldr-stream {words[0]}` failed with status {done.returncode}") from None
        if done.returncode not in (0, 5):  # 5: verify found a difference, which the summary shows
            raise Stopped(f"`tldr-stream {words[0]}` failed with status {done.returncode}")
        return result


@dataclass
class _WorkerProcess:
    """A `tldr-stream consume` process and its metrics."""

    name: str
    command: list[str]
    log: Path
    port: int
    process: subprocess.Popen[bytes] | None = None
    # Counters of the lives that ended, since a new process counts from zero.
    before: dict[str, float] = field(default_factory=dict)

    def start(self) -> None:
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(self.command, stdout=file, stderr=file, env=_environment())

    def kill(self) -> None:
        self.before = self.figures()
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def drain(self) -> None:
        if self.process is None:
            return
        self.process.send_signal(signal.SIGTERM)
        if self.process.wait(DRAIN_TIMEOUT_S) != 0:
            raise Stopped(f"{self.name} left with status {self.process.returncode}: see {self.log}")

    def figures(self) -> dict[str, float]:
        """The sums of its counters by name (and by `stage` or `fate`), all its lives together."""
        found = dict(self.before)
        for name, labels, value in self._samples():
            if name.endswith("_total"):
                label = next((f":{labels[key]}" for key in ("stage", "fate") if key in labels), "")
                found[name + label] = found.get(name + label, 0.0) + value
        return found

    @property
    def partitions(self) -> float:
        """How many partitions it runs now."""
        running = (
            v for name, labels, v in self._samples() if (name, labels.get("state")) == ("tldr_partitions", "running")
        )
        return sum(running)

    def _samples(self) -> Iterator[tuple[str, dict[str, str], float]]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=2) as answer:
                text = answer.read().decode()
        except OSError:  # it is still loading its models, or down
            return
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                yield sample.name, sample.labels, sample.value


@contextmanager
def _worker(run: _Run, number: int) -> Iterator[_WorkerProcess]:
    name = f"worker-{number}"
    port = free_port()
    command = run.command(
        "consume", "--topic", TOPIC, "--state-dir", str(run.out / "state" / name), "--instance-id", name,
        "--session-timeout-s", str(SESSION_TIMEOUT_S), "--metrics-host", "127.0.0.1", "--metrics-port", str(port),
    )  # fmt: skip
    (run.out / "logs").mkdir(exist_ok=True)
    worker = _WorkerProcess(name, command, run.out / "logs" / f"{name}.log", port)
    worker.start()
    try:
        yield worker
    finally:
        if worker.process is not None and worker.process.poll() is None:
            worker.process.kill()
            worker.process.wait()


def _wait_until_each_has_a_partition(workers: list[_WorkerProcess]) -> None:
    """The models are loaded and the group is balanced: from here on the stream flows."""
    deadline = time.monotonic() + STALLED_AFTER_S
    while not all(worker.partitions == PARTITIONS / WORKERS for worker in workers):
        time.sleep(0.25)
        _refuse_dead(workers)
        if time.monotonic() > deadline:
            raise Stopped(f"the workers did not share the topic within {STALLED_AFTER_S:.0f} s: see {workers[0].log}")


def _refuse_dead(workers: list[_WorkerProcess]) -> None:
    for worker in workers:
        if worker.process is not None and worker.process.poll() is not None:
            raise Stopped(f"{worker.name} ended with status {worker.process.returncode}: see {worker.log}")


def _watch(connection: Connection, workers: list[_WorkerProcess], raw_records: int) -> str:
    """Waits until everything is committed; kills the last worker in the middle and starts it again. Says how that went.

    What is done is read from the changelog: a worker's metrics die with it, and with them what it committed last.
    """
    follower = ChangelogFollower(StreamSource(connection, StreamTopics(TOPIC)))
    victim = workers[-1]
    killed = ""
    done, moved_at = 0, time.monotonic()
    with Progress("reduce", raw_records, "records") as progress:
        while done < raw_records:
            time.sleep(LOOK_EVERY_S)
            _refuse_dead(workers)
            read = _committed_by(follower)
            now = sum(read.values())
            if now > done:
                progress.advance(now - done)
                done, moved_at = now, time.monotonic()
            if not killed and done > KILL_AT_SHARE * raw_records and read.get(victim.name):
                victim.kill()
                at = f"after {read[victim.name]} records"
                print(f"  kill -9 {victim.name} {at}", file=sys.stderr, flush=True)
                time.sleep(DOWN_S)
                victim.start()
                killed = f"{victim.name} killed with -9 {at} and started again"
            if time.monotonic() - moved_at > STALLED_AFTER_S:
                logs = ", ".join(str(worker.log) for worker in workers)
                raise Stopped(f"nothing moved for {STALLED_AFTER_S:.0f} s at {done} of {raw_records}: see {logs}")
    return killed or "none was killed: the run was over too soon"


def _committed_by(follower: ChangelogFollower) -> dict[str, int]:
    """The records read of all partitions, by the worker that committed a partition last; nothing before the first commit."""
    try:
        view = follower.advance()
    except TldrError:
        return {}
    read: dict[str, int] = {}
    for part in view.partitions.values():
        if part.position is not None:
            read[part.position.instance] = read.get(part.position.instance, 0) + part.totals.read
    return read


def _fill(run: _Run, corpus: Path) -> tuple[int, int]:
    """Ingests the corpus, with duplicates and bad records in its middle. Returns how many of each were planted."""
    shards = sorted(corpus.glob("*.tar"))
    if not shards:
        raise TldrError(f"no shards (*.tar) in {corpus}")
    half = max(1, len(shards) // 2)
    journal = str(run.out / "ingest")
    for shard in shards[:half]:
        run.job("ingest", str(shard), "--topic", TOPIC, "--journal", journal)
    seen = [pair for shard in shards[:half] for pair in open_source(shard) if isinstance(pair, SourcePair)]
    duplicates = [pair for pair in seen[::DUPLICATE_EVERY] if pair.image is not None]
    bad = list(_bad_records(duplicates[0].image or b""))
    codec, producer = Codec("RawPair"), run.connection.producer(acks="all")
    for pair in duplicates:
        record = {"id": pair.id, "caption": pair.caption, "image": pair.image, "fields": pair.fields}
        producer.produce(TOPIC, codec.encode(record), pair.id.encode())
    for key, value in bad:
        producer.produce(TOPIC, value, key)
    producer.flush()
    for shard in shards[half:]:
        run.job("ingest", str(shard), "--topic", TOPIC, "--journal", journal)
    return len(duplicates), len(bad)


def _bad_records(image: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Records that must become dead letters: (key, value)."""
    codec = Codec("RawPair")
    huge = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (50_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0" + b"\0" * 32
    kinds: dict[str, dict[str, Any]] = {
        "truncated": {"caption": "a truncated image", "image": image[: len(image) // 2]},
        "huge": {"caption": "a header of 50,000 x 50,000", "image": huge},
        "text": {"caption": "not an image", "image": b"<html>404</html>"},
        "caption": {"caption": "", "image": image},
        "uri": {"caption": "an image nobody may fetch", "image_uri": "http://127.0.0.1/a.png"},
    }
    for n in range(BAD_OF_EACH_KIND):
        for kind, record in kinds.items():
            key = f"planted-{kind}-{n}"
            yield key.encode(), codec.encode({"id": key, "image": None, **record})
        yield f"planted-bytes-{n}".encode(), b"neither Avro nor anything else"


def _read_changelog(connection: Connection) -> tuple[dict[str, int], dict[str, float], list[int]]:
    """The stream's totals, each worker's share of the records read, and the counted pairs of every cell."""
    topic = StreamTopics(TOPIC).changelog
    totals: dict[str, int] = {}
    read_by: dict[str, int] = {}
    cells: dict[tuple[int, ...], int] = {}
    for p, end in end_offsets(connection, topic, range(PARTITIONS)).items():
        before, last = 0, None
        for messages in read_partition(connection, topic, p, 0, end):
            for message in messages:
                kind = message.key()[:1]
                if kind == POSITION:
                    last = decode_position(message.value())
                    read_by[last.instance] = read_by.get(last.instance, 0) + last.totals.read - before
                    before = last.totals.read
                elif kind == CELL:
                    cells |= {(p, *cell): counts.counted for *cell, counts in cells_of(message.key(), message.value())}
        if last is not None:
            for name, value in last.totals._asdict().items():
                totals[name] = totals.get(name, 0) + value
    whole = max(1, sum(read_by.values()))
    return totals, {name: count / whole for name, count in sorted(read_by.items())}, list(cells.values())


def _captions_visible(connection: Connection) -> int:
    topic = StreamTopics(TOPIC).kept
    ends = end_offsets(connection, topic, range(PARTITIONS))
    return sum(
        message.value() is not None
        for p, end in ends.items()
        for messages in read_partition(connection, topic, p, 0, end)
        for message in messages
    )


def _ratio(figures: list[dict[str, float]], above: str, below: str) -> float:
    return sum(f.get(above, 0.0) for f in figures) / max(1.0, sum(f.get(below, 0.0) for f in figures))


def _speeds(figures: list[dict[str, float]]) -> dict[str, float]:
    """Things done in a second of each stage, summed over the workers."""
    stages = {"decode": "tldr_images_total", "encode": "tldr_images_total", "caption": "tldr_captions_total"}
    speeds = {}
    for stage, counter in stages.items():
        speeds[stage] = sum(
            f.get(counter, 0.0) / f[f"tldr_stage_seconds_total:{stage}"]
            for f in figures
            if f.get(f"tldr_stage_seconds_total:{stage}")
        )
    return speeds


def _count(value: Any) -> int:
    return value if isinstance(value, int) else len(value)


def _environment() -> dict[str, str]:
    """Two workers share this machine's cores: each network gets its part of them."""
    threads = str(max(1, (os.cpu_count() or 1) // WORKERS))
    return {**os.environ, "OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}


def _empty(out: Path) -> None:
    mark = out / ".tldr-demo"
    if out.exists() and any(out.iterdir()) and not mark.exists():
        raise TldrError(f"{out} is not empty and no earlier demo made it: give another --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    mark.touch()
