"""How fast the engine is, with the null model: against Quix and Kafka Streams, against a plain loop, and as its stores grow.

    python benchmarks/engine.py [--small] [--fresh] [--rounds N] [--quix PYTHON]

Every contender reads the same topic of four partitions from its first record to its last committed one, in turn, three times;
the plain loop and ours at 400 B seven times. What it emits is held against the batch reference. Results go to
benchmarks/results.jsonl after each unit (at most a few minutes), and a run that was cut off goes on there; the table in
benchmarks/RESULTS.md is made of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from confluent_kafka import Consumer, KafkaException, TopicPartition

from models.null import NullModel
from state import changelog
from state.changelog import Position, Switch, Totals
from state.partition_store import PartitionStore
from state.quota import Ratio
from state.settings import StreamSettings
from stream.batch_tldr import Row, reduce_partition
from stream.broker import local_broker
from stream.kafka import Connection, create_missing, end_offsets, read_partition, topic_id
from stream.murmur2 import partitions_of
from stream.records import Codec
from stream.topics import StreamTopics

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / ".build"
RESULTS = HERE / "results.jsonl"
PYTHON = " ".join(sys.version.split())
QUIX_PYTHON = BUILD / "quix-venv" / "bin" / "python"
STREAMS_JARS = BUILD / "kafka-streams"  # and the class that was compiled with them

PARTITIONS = 4
SEED = 7
DUPLICATES = 0.02  # of the records: an id that came before, in the same partition
IMAGE_BYTES = {"400 B": 250, "30 KB": 29_850}  # with id, caption and framing the record has the size of its name
# So many that half a second from the last record to the next commit, which all of them have, is little of the fastest run.
RECORDS = {"400 B": 1_200_000, "30 KB": 40_000}
RECORDS_SMALL = {"400 B": 100_000, "30 KB": 20_000}
LOOK_EVERY_S = 0.05
# A group whose committed offsets have not moved for so long, at the end of everything, is done.
SETTLED_AFTER_S = 3.0
UNIT_TIMEOUT_S = 600.0
GROWN = (100_000, 10_000_000)  # pairs in the stores
TWO = "ours, two workers"
# As it comes, librdkafka pauses a fetch for a second once the client's queue is full, and the same loop does between 190,000
# and 560,000 small records a second, by luck: it and ours beside it take more rounds.
PLAIN, TUNED, TWO_PLAIN = PLAINS = ("plain loop", "plain loop, no pauses", "plain loop, two of it")
ROUNDS = 3
MORE_ROUNDS = {("400 B", "ours"): 7, ("400 B", TWO): 7, ("400 B", PLAIN): 7}
CONTENDERS = ("ours", TWO, "quix, documented", "quix, by hand", "kafka streams", *PLAINS)


@dataclass
class Input:
    """A raw topic, and the ids that the batch reference keeps of it."""

    topic: str
    records: int
    kept: set[str]
    ends: dict[int, int]


@dataclass
class Run:
    """What one contender did: records a second from the first to the last committed, and its CPU seconds since."""

    records: int
    seconds: float
    cpu_s: float
    emitted: int
    right: bool | None  # None: it decides nothing
    told: dict[str, Any] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        return self.records / self.seconds


def fill(kafka: Connection, topic: str, records: int, image_bytes: int, first: int = 0) -> Input:
    """Produces the records, from the offset `first` of each partition on.

    Their cluster, which the null model will assign, stands in them for those who have no model.
    """
    create_missing(kafka, {topic: {"max.message.bytes": "1048588"}}, PARTITIONS)
    dice = random.Random(SEED)
    noise = dice.randbytes(8 << 20)
    model, codec = NullModel(), Codec("RawPair")
    producer = kafka.producer(linger_ms=20, batch_size=1 << 20, queue_buffering_max_kbytes=1 << 18)
    rows: list[list[Row]] = [[] for _ in range(PARTITIONS)]
    pictures: list[list[tuple[str, bytes, int]]] = [[] for _ in range(PARTITIONS)]
    for start in range(0, records, 5000):
        count = min(5000, records - start)
        ids = [f"https://example.org/{start + n:09d}.jpg" for n in range(count)]
        images = []
        for n in range(count):
            at = dice.randrange(len(noise) - image_bytes)
            images.append((start + n).to_bytes(8, "big") + noise[at : at + image_bytes - 8])
        clusters = model.assign(model.encode([model.decode(image) for image in images])).tolist()
        homes = partitions_of([pair_id.encode() for pair_id in ids], PARTITIONS).tolist()
        for pair in zip(ids, images, clusters, homes, strict=True):
            pair_id, image, cluster, home = pair
            if rows[home] and dice.random() < DUPLICATES:
                pair_id, image, cluster = pictures[home][dice.randrange(len(pictures[home]))]
            elif len(pictures[home]) < 500:
                pictures[home].append((pair_id, image, cluster))
            value = codec.encode(
                {"id": pair_id, "caption": "a picture of something that was found somewhere", "image": image,
                 "image_uri": None, "fields": {"cluster": str(cluster)}}
            )  # fmt: skip
            rows[home].append(Row(first + len(rows[home]), pair_id, cluster))
            while True:
                try:
                    producer.produce(topic, value, pair_id.encode(), home)
                    break
                except BufferError:
                    producer.poll(0.1)
        producer.poll(0)
    producer.flush()
    kept: set[str] = set()
    for number, its in enumerate(rows):
        kept |= reduce_partition(its, seed=SEED, partition=number, p=1, q=4)[0].keys()
    return Input(topic, records, kept, {number: first + len(its) for number, its in enumerate(rows)})


def command_of(
    contender: str, kafka: Connection, data: Input, group: str, folder: Path, quix: Path, bundle: str | None
) -> list[str]:
    bootstrap, kept = kafka.bootstrap_servers, f"{group}.kept-pairs"
    if contender in ("ours", TWO):
        return [sys.executable, str(HERE / "our_worker.py"), "consume", "--topic", data.topic, "--stream", group,
                *(("--bundle", bundle) if bundle else ("--model", "null")),
                "--seed", str(SEED), "--ratio", "1/4", "--state-dir", str(folder / "state"),
                "--metrics-port", "0", "--bootstrap-servers", bootstrap]  # fmt: skip
    if contender in PLAINS:
        tuned = ["fetch.queue.backoff.ms=20"] if contender == TUNED else []
        return [sys.executable, str(HERE / "plain_loop.py"), bootstrap, data.topic, group, kept, *tuned]
    if contender == "kafka streams":
        return ["java", "-Xmx3g", "-cp", f"{STREAMS_JARS}:{STREAMS_JARS}/*", "ReducePairs", bootstrap, data.topic, group, kept,
                str(folder), str(SEED)]  # fmt: skip
    way = contender.removeprefix("quix, ").replace(" ", "_")
    return [str(quix), str(HERE / "quix_worker.py"), way, bootstrap, data.topic, group, kept, str(folder), str(SEED)]


def measure(
    contender: str,
    kafka: Connection,
    data: Input,
    quix: Path,
    folder: Path,
    group: str = "",
    grown: Path | None = None,
    bundle: str | None = None,
) -> Run:
    """One contender from the first record that it reads to its last commit; grown: where it keeps its state."""
    group = group or f"{contender.replace(', ', '-').replace(' ', '-')}-{time.time_ns() // 1_000_000}"
    if contender not in ("ours", TWO):
        create_missing(kafka, {f"{group}.kept-pairs": {"max.message.bytes": "2097152"}}, PARTITIONS)
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    if contender.startswith("quix"):
        environment.pop("PYTHONPATH")
    with tempfile.TemporaryDirectory(dir=folder) as state:
        commands = [command_of(contender, kafka, data, group, grown or Path(state), quix, bundle)]
        if contender == TWO:
            commands = [[*commands[0], "--instance-id", name, "--state-dir", f"{state}/{name}"] for name in ("a", "b")]
        elif contender == TWO_PLAIN:
            commands *= 2
        logs = [folder / f"{group}-{number}.log" for number in range(len(commands))]
        processes = [started(*each, environment) for each in zip(commands, logs, strict=True)]
        try:
            ended = last_commit(kafka, group, data, processes[0])
        finally:
            cpu_s = [ended_with(process) for process in processes]
    texts = [log.read_text() for log in logs]
    tolds = [
        dict(line.split(" ", 1) for line in text.splitlines() if line.startswith(("first ", "seconds ")))
        for text in texts
    ]
    firsts = [tuple(map(float, each["first"].split())) for each in tolds if "first" in each]
    if not firsts:
        raise SystemExit(f"{contender} read nothing:\n{texts[0][-3000:]}")
    emitted = kept_ids(kafka, f"{group}.kept-pairs")
    # A cell that has grown is in the middle of a block, of which the reference knows nothing.
    right = None if contender in PLAINS or grown else len(emitted) == len(data.kept) and set(emitted) == data.kept
    first_at = min(at for at, _ in firsts)
    cpu = sum(cpu_s) - sum(cpu_before for _, cpu_before in firsts)
    delete_topics(kafka)
    return Run(data.records, ended - first_at, cpu, len(emitted), right, json.loads(tolds[0].get("seconds", "{}")))


def started(command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with log.open("w") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=HERE.parent)


def ended_with(process: subprocess.Popen[bytes]) -> float:
    """Asks the process to end and waits for it: the CPU seconds that it had, NaN if it was gone."""
    process.send_signal(signal.SIGTERM)
    with suppress(ChildProcessError):
        _, _, used = os.wait4(process.pid, 0)
        return used.ru_utime + used.ru_stime
    return float("nan")


def last_commit(kafka: Connection, group: str, data: Input, process: subprocess.Popen[bytes]) -> float:
    """When the group's committed offsets moved for the last time, the whole raw topic committed."""
    began, moved = time.monotonic(), time.time()
    before: dict[Any, int] = {}
    # Asks for the group's offsets without joining it.
    asking = Consumer(kafka.config(group_id=group, enable_auto_commit=False))
    try:
        while True:
            time.sleep(LOOK_EVERY_S)
            # what `group_by` wrote is committed by the same group
            topics = [
                data.topic,
                *(t for t in asking.list_topics(timeout=10).topics if group in t and "repartition" in t),
            ]
            asked = [TopicPartition(topic, p) for topic in topics for p in range(PARTITIONS)]
            try:
                now = {(tp.topic, tp.partition): tp.offset for tp in asking.committed(asked, timeout=5)}
            except KafkaException:  # a transaction holds some of them
                continue
            if now != before:
                before, moved = now, time.time()
            done = all(now[data.topic, p] >= end for p, end in data.ends.items() if end)
            if done and time.time() - moved > SETTLED_AFTER_S:
                return moved
            if process.poll() is not None or time.monotonic() - began > UNIT_TIMEOUT_S:
                raise SystemExit(f"{group} did not get through: {now}")
    finally:
        asking.close()


def kept_ids(kafka: Connection, topic: str) -> list[str]:
    ends = end_offsets(kafka, topic, range(PARTITIONS))
    return [
        message.key().decode()
        for p, end in ends.items()
        for batch in read_partition(kafka, topic, p, 0, end, timeout_s=30.0)
        for message in batch
        if message.value() is not None
    ]


def delete_topics(kafka: Connection) -> None:
    """All but the raw ones."""
    topics = [t for t in kafka.admin.list_topics(timeout=10).topics if not t.startswith(("raw-", "__"))]
    for done in kafka.admin.delete_topics(topics).values() if topics else ():
        done.result()


@contextmanager
def broker_folder() -> Iterator[Path]:
    BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD, prefix="bench-") as folder:
        yield Path(folder)


# -- stores that have grown ---------------------------------------------------------------------------------------------


def grow(kafka: Connection, topic: str, pairs: int, folder: Path) -> None:
    """Stores as they are after so many pairs, and the raw offsets that they have passed (one byte each in the topic)."""
    create_missing(kafka, {topic: {"max.message.bytes": "1048588"}}, PARTITIONS)
    producer, model, dice = kafka.producer(linger_ms=50), NullModel(), np.random.default_rng(SEED)
    settings = StreamSettings(
        partition_count=PARTITIONS, raw_topic_id=topic_id(kafka, topic), seed=SEED, ratio=Ratio(1, 4), cell_cap=None,
        dedupe_window=None, gate=None, rule="none", space=model.space, tokens=model.tokens,
    )  # fmt: skip
    share = pairs // PARTITIONS
    for number in range(PARTITIONS):
        for _ in range(share):
            while True:
                try:
                    producer.produce(topic, b"x", None, number)
                    break
                except BufferError:
                    producer.poll(0.1)
        with PartitionStore(folder / f"partition-{number}") as store:
            first = changelog.switch_key(0), changelog.encode_switch(Switch(0, model.version, model.space, 0))
            store.apply([(changelog.SETTINGS, settings.to_json()), first], 1)
            for start in range(0, share, 25_000):
                count = min(25_000, share - start)
                store.apply(_counted(dice, start, count, model), 1)
            counts = np.tile([share // model.clusters, share // model.clusters // 4, 0, 0], (model.clusters, 1))
            cells = [
                (changelog.cells_key(0, c), changelog.encode_cells(counts[c : c + changelog.CELLS_A_RECORD]))
                for c in range(0, model.clusters, changelog.CELLS_A_RECORD)
            ]
            position = Position(share, 0, int(time.time() * 1000), "grown", Totals(read=share, counted=share))
            store.apply([*cells, (changelog.POSITION, changelog.encode_position(position))], 1)
    producer.flush()


def _counted(dice: np.random.Generator, start: int, count: int, model: NullModel) -> list[changelog.Record]:
    """The records of a transaction that counted `count` pairs, each fourth of them kept."""
    hashes = dice.integers(0, 1 << 64, count, dtype=np.uint64)
    offsets = np.arange(start, start + count, dtype=np.uint64)
    vector = bytes(2 * model.tokens)
    entries: list[changelog.Record] = [
        (
            changelog.entry_key(name),
            changelog.encode_entry(
                at, 0, at % model.clusters, name, Ratio(1, 4), b"https://example.org/%09d.jpg" % at, vector
            ),
        )
        for name, at in zip(hashes[::4].tolist(), offsets[::4].tolist(), strict=True)
    ]
    return [*entries, *changelog.encode_known(hashes, offsets)]


def grown_run(kafka: Connection, data: Input, stores: Path, folder: Path, quix: Path) -> Run:
    """Our engine on a copy of these stores, from the first record that is new to it."""
    group = f"grown-{time.time_ns() // 1_000_000}"
    topics = StreamTopics(group)
    create_missing(kafka, topics.settings(2 << 20), PARTITIONS)
    producer = kafka.producer()
    for number in range(PARTITIONS):  # the stores stand at offset 1 of it
        producer.produce(topics.changelog, b"{}", b"P", number)
    producer.flush()
    with tempfile.TemporaryDirectory(dir=folder) as state:
        shutil.copytree(stores, Path(state) / "state")
        os.sync()  # or the first commit would have to wait until the whole copy is on the disk
        return measure("ours", kafka, data, quix, folder, group, Path(state))


def as_it_grows(results: Results, records: int, rounds: int, quix: Path) -> None:
    """Small and large stores take turns: minutes apart, the same work took a third longer on a shared machine."""
    wanted = [(n, pairs) for n in range(rounds) for pairs in GROWN if f"after {pairs:,} pairs/{n}" not in results]
    if not wanted:
        return
    with broker_folder() as folder, local_broker(folder / "kafka") as broker:
        kafka = Connection(broker.bootstrap_servers)
        stores = {pairs: folder / f"grown-{pairs}" for _, pairs in wanted}
        inputs = {}
        for pairs, its in stores.items():
            grow(kafka, f"raw-{pairs}", pairs, its)
            inputs[pairs] = fill(kafka, f"raw-{pairs}", records, IMAGE_BYTES["400 B"], first=pairs // PARTITIONS)
        for n, pairs in wanted:
            run = grown_run(kafka, inputs[pairs], stores[pairs], folder, quix)
            stored = sum(file.stat().st_size for file in stores[pairs].rglob("data.mdb"))
            results.add(
                f"after {pairs:,} pairs/{n}", records=run.records, seconds=round(run.seconds, 3), rate=round(run.rate),
                cpu_s=round(run.cpu_s, 2), emitted=run.emitted, load=os.getloadavg()[0], told=run.told, stored=stored,
            )  # fmt: skip


# -- units, results, table ---------------------------------------------------------------------------------------------


class Results:
    """One line of JSON a unit; a unit that is there is not measured again."""

    def __init__(self, file: Path, fresh: bool) -> None:
        self.file = file
        if fresh:
            file.unlink(missing_ok=True)
        self.units: dict[str, dict[str, Any]] = {}
        if file.exists():
            for line in file.read_text().splitlines():
                unit = json.loads(line)
                self.units[unit["unit"]] = unit

    def __contains__(self, unit: str) -> bool:
        return unit in self.units

    def add(self, unit: str, **values: Any) -> None:
        self.units[unit] = {"unit": unit, "at": datetime.now(UTC).isoformat(timespec="seconds"), **values}
        with self.file.open("a") as file:
            file.write(json.dumps(self.units[unit]) + "\n")
        self.file.with_name("RESULTS.md").write_text(table(self))
        print(json.dumps(self.units[unit]), flush=True)


def against_others(
    results: Results, contenders: Sequence[str], counts: dict[str, int], rounds: int | None, quix: Path
) -> None:
    for size, count in counts.items():
        of_each = {c: rounds or MORE_ROUNDS.get((size, c), ROUNDS) for c in contenders}
        turns = [(c, n) for n in range(max(of_each.values())) for c in contenders if n < of_each[c]]
        wanted = [(c, n) for c, n in turns if f"{size}/{c}/{n}" not in results]
        if not wanted:
            continue
        # Kafka's own default: a group's first members wait for each other, so that two workers begin with two partitions each.
        together = {"group_initial_rebalance_delay_ms": "3000"}
        with broker_folder() as folder, local_broker(folder / "kafka", **together) as broker:
            kafka = Connection(broker.bootstrap_servers)
            data = fill(kafka, "raw-pairs", count, IMAGE_BYTES[size])
            for contender, n in wanted:
                run = measure(contender, kafka, data, quix, folder)
                if run.right is False:
                    raise SystemExit(f"{contender} kept other pairs than the batch reference ({run.emitted})")
                results.add(
                    f"{size}/{contender}/{n}", records=run.records, seconds=round(run.seconds, 3), rate=round(run.rate),
                    cpu_s=round(run.cpu_s, 2), right=run.right, emitted=run.emitted, load=os.getloadavg()[0], told=run.told,
                )  # fmt: skip


def with_a_model(results: Results, quix: Path) -> None:
    """Where the time of a batch goes with the sample bundle on its own corpus."""
    unit = "sample bundle"
    if unit in results:
        return
    with broker_folder() as folder, local_broker(folder / "kafka") as broker:
        kafka = Connection(broker.bootstrap_servers)
        ingest = [sys.executable, "-m", "stream", "ingest", "corpus/sample/*.tar", "--topic", "raw-pairs",
                  "--partitions", str(PARTITIONS), "--bootstrap-servers", kafka.bootstrap_servers]  # fmt: skip
        subprocess.run(ingest, check=True, cwd=HERE.parent, stdout=subprocess.DEVNULL)
        ends = end_offsets(kafka, "raw-pairs", range(PARTITIONS))
        data = Input("raw-pairs", sum(ends.values()), set(), ends)
        with tempfile.TemporaryDirectory(dir=folder) as state:
            run = measure("ours", kafka, data, quix, folder, "sample", Path(state), str(HERE.parent / "bundles/sample"))
        # A transaction is sent and stored beside the next batches: most of sending is waiting for the broker.
        told = run.told
        state_s = told["stages"]["decide"] + told["seal"] + told["write"] + told["keep"]
        busy = sum(told["stages"].values()) + told["seal"] + told["write"] + told["keep"]
        results.add(
            unit, records=run.records, seconds=round(run.seconds, 3), rate=round(run.rate), told=told,
            share=round(state_s / busy, 4), with_sending=round((state_s + told["send cpu"]) / busy, 4),
            send_share=round(told["send"] / busy, 4), load=os.getloadavg()[0],
        )  # fmt: skip


def table(results: Results) -> str:
    """The results as Markdown; medians of the rounds that there are."""
    units = results.units
    when = sorted(unit["at"] for unit in units.values())
    lines = [
        "# Speed of the engine",
        "",
        "Made by `make bench` (`benchmarks/engine.py`): the null model, four partitions, 2 % duplicates, a "
        "quarter kept, from the first record read to the last one committed. Our engine runs with everything on: pair-codes "
        "with 196 indices, known ids, changelog, Avro, captions, a synced store. Quix Streams and Kafka Streams "
        "(Java, two threads) find the cluster in the record, and pass a kept pair on as it came. Two workers are two "
        "processes of ours that share the partitions, on the same two cores. All keep exactly the ids of the batch reference. "
        "The plain loop has librdkafka's defaults, with which its fetches pause for a second once the client's queue is full; "
        "“no pauses” is the same without them, and “two of it” are two that share the partitions.",
        "",
        f"Between {when[0]} and {when[-1]}; {cpu_name()}, {os.cpu_count()} cores shared by the broker, the "
        f"contender and whatever else ran; CPython {PYTHON}: load average {min(u['load'] for u in units.values()):.1f} to "
        f"{max(u['load'] for u in units.values()):.1f}. The contenders took turns.",
        "",
        "| size | contender | records/s (each round) | median | CPU µs a record | ours ÷ it | two of ours ÷ it | by CPU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size in RECORDS:
        found = {c: [u for name, u in units.items() if name.startswith(f"{size}/{c}/")] for c in CONTENDERS}
        for contender, runs in found.items():
            if not runs:
                continue
            rates = [run["rate"] for run in runs]
            cpu = [1e6 * run["cpu_s"] / run["records"] for run in runs]
            ours, two = found["ours"] or runs, found[TWO]
            ratio = statistics.median(u["rate"] for u in ours) / statistics.median(rates)
            of_two = f"{statistics.median(u['rate'] for u in two) / statistics.median(rates):.2f}" if two else ""
            by_cpu = statistics.median(cpu) / statistics.median(1e6 * u["cpu_s"] / u["records"] for u in ours)
            lines.append(
                f"| {size} | {contender} | {' · '.join(f'{rate:,}' for rate in rates)} | {statistics.median(rates):,.0f} | "
                f"{statistics.median(cpu):.1f} | {ratio:.2f} | {of_two} | {by_cpu:.2f} |"
            )
    lines += ["", "| our engine at 400 B, on stores that hold | records/s (each round) | median | CPU µs a record |",
              "|---|---|---|---|"]  # fmt: skip
    for pairs in GROWN:
        runs = [u for name, u in units.items() if name.startswith(f"after {pairs:,} pairs/")]
        if runs:
            rates = [run["rate"] for run in runs]
            cpu = statistics.median(1e6 * run["cpu_s"] / run["records"] for run in runs)
            lines.append(f"| {pairs:,} pairs, a quarter of them kept ({runs[0]['stored'] / 1e6:,.0f} MB) | "
                         f"{' · '.join(f'{r:,}' for r in rates)} | {statistics.median(rates):,.0f} | {cpu:.1f} |")  # fmt: skip
    if sample := units.get("sample bundle"):
        lines += ["", f"With the sample bundle ({sample['records']:,} records at {sample['rate']}/s) deciding, the "
                  f"changelog and the store take {sample['share']:.1%} of a batch's time, {sample['with_sending']:.1%} with "
                  f"the processor time of sending. Sending and committing lasts {sample['send_share']:.1%} of that time, "
                  "beside the next batches."]  # fmt: skip
    return "\n".join(lines) + "\n"


def cpu_name() -> str:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return names[0] if names else platform.machine()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--small", action="store_true", help="fewer records")
    options.add_argument("--records", type=int, help="so many of each size")
    options.add_argument("--fresh", action="store_true", help="forget earlier results")
    options.add_argument("--rounds", type=int, help="of each contender, in turn")
    options.add_argument("--size", choices=list(RECORDS), action="append")
    options.add_argument("--contender", choices=CONTENDERS, action="append")
    options.add_argument("--quix", type=Path, default=QUIX_PYTHON, help="the Python that has quixstreams")
    options.add_argument("--results", type=Path, default=RESULTS)
    given = options.parse_args()
    counts = RECORDS_SMALL if given.small else RECORDS
    counts = {size: given.records or count for size, count in counts.items() if not given.size or size in given.size}
    results = Results(given.results, given.fresh)
    against_others(results, given.contender or CONTENDERS, counts, given.rounds, given.quix)
    if not (given.size or given.contender):
        with_a_model(results, given.quix)
        as_it_grows(results, counts["400 B"] // 3, given.rounds or ROUNDS, given.quix)
    print(table(results))


if __name__ == "__main__":
    main()
