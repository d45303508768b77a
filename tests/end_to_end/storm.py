"""A storm (`make soak`): workers join, leave, freeze and get killed, the broker too, while records flow; then a check.

The fault plan follows from the seed alone; what the operating system makes of it does not, which is why a storm is run
again and again. Knows workers as their operator does: processes, signals, logs. What must hold is the checker's business.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import signal
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from models.null import NullModel
from stream.broker import LocalBroker
from stream.bundles import announce_folder
from stream.kafka import Connection
from stream.murmur2 import partitions_of
from stream.records import Codec
from tests.end_to_end.checker import ANOMALIES, Findings, check
from tests.end_to_end.history import History, Observer, sent_in, visible_in
from tests.end_to_end.outcome import Raw, create_topic, local_stores, processed
from tests.end_to_end.worker_process import REPOSITORY, WorkerProcess, null_worker

PARTITIONS, WORKERS = 4, 3
SESSION_TIMEOUT_S = 6.0
UNIT_SECONDS = 600
# No fault in the last seconds, so that the last ones meet a stream that works.
CALM_S = 10.0
SETTLE_TIMEOUT_S = 180.0
TICK_S = 0.05
SUPERVISOR_WAIT_S = 0.5
TOPIC = "raw"
DONE = REPOSITORY / ".build" / "storm.jsonl"
DOCUMENT = REPOSITORY / "docs" / "storm.md"

# What is done to a worker or to the broker, how often, and for how long at most (seconds).
FAULTS = {
    "kill": (5, 3.0),  # -9, back with its state directory
    "kill_wiped": (3, 3.0),  # -9, back without it
    "freeze": (3, SESSION_TIMEOUT_S + 6.0),  # SIGSTOP past the session time-out, then SIGCONT
    "leave": (3, 8.0),  # SIGTERM; joins again
    "broker": (2, 5.0),  # -9, back on its data
    "switch": (4, 1.0),  # another bundle is announced; a stream that runs with a bundle of its own has none
}
# One of the workers takes so long to load a bundle: partitions go on in different ones meanwhile.
LATE_WORKER, LATE_S = 2, 5.0


# How a worker may leave by itself: no broker, fenced. Of any other status the report says why.
EXPECTED = (3, 7)
# Faults that do not hit a worker.
NOBODY = {"broker": -1, "switch": -2}
BUNDLES = ("null:1/16", "null:2/5", "null:3/24")
ASSIGN_OF = {model.version: model.assign for model in (NullModel(), *(NullModel.at(uri) for uri in BUNDLES))}


class Fault(NamedTuple):
    """worker  -1: the broker, -2: the bundles. for_s  until it is back."""

    at_s: float
    kind: str
    worker: int
    for_s: float


def plan_of(seed: int, seconds: float, gap_s: float, *, switches: bool = True) -> list[Fault]:
    """The faults of a storm, `gap_s` apart on average: each kind once, in some order, then by chance."""
    dice = random.Random(seed)
    possible = [kind for kind in FAULTS if switches or kind != "switch"]
    kinds = dice.sample(possible, len(possible))
    weights = [FAULTS[kind][0] for kind in possible]
    faults, at = [], 0.0
    while (at := at + dice.uniform(0.3, 1.7) * gap_s) < seconds - CALM_S:
        kind = kinds.pop() if kinds else dice.choices(possible, weights)[0]
        shortest = SESSION_TIMEOUT_S + 1.0 if kind == "freeze" else 0.0
        worker = NOBODY.get(kind, dice.randrange(WORKERS))
        faults.append(Fault(at, kind, worker, dice.uniform(shortest, FAULTS[kind][1])))
    return faults


@dataclass(frozen=True)
class Weather:
    """What a storm is made of. rate  raw records a second; records  stop sending after so many; gap_s  between faults."""

    seed: int
    seconds: float
    records: int = 100_000
    rate: float = 170.0
    gap_s: float = 4.0
    model: str = "null"


@dataclass
class Report:
    """How a storm ended. exits  of workers that left by themselves, by status."""

    weather: Weather
    anomalies: dict[str, int]
    faults: dict[str, int]
    records: int
    visible: int
    restores: int
    rebuilt: int
    switches: int
    aborted: int
    exits: dict[str, int]
    seconds: float
    date: str
    details: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """`name: count` of each anomaly, then what the storm was."""
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(self.faults.items()))
        exits = ", ".join(f"{count} with status {status}" for status, count in sorted(self.exits.items()))
        return [
            *(f"{name}: {count}" for name, count in self.anomalies.items()),
            f"faults: {sum(self.faults.values())} ({kinds})",
            f"records: {self.records}",
            f"visible: {self.visible}",
            f"restores: {self.restores} ({self.rebuilt} rebuilt)",
            f"partitions that were switched: {self.switches}",
            f"aborted transactions: {self.aborted}",
            f"workers that left by themselves: {exits or 'none'}",
            f"seconds: {self.seconds:.0f}",
            *self.details,
        ]


class Storm:
    """One storm on a broker of its own, in a folder that it may fill."""

    def __init__(self, weather: Weather, folder: Path) -> None:
        self.weather, self.folder = weather, folder
        self.broker = LocalBroker(folder / "kafka")
        self.dice = random.Random(weather.seed + 1)
        self.workers: list[WorkerProcess | None] = [None] * WORKERS
        self.back_at: dict[int, tuple[float, str]] = {}  # worker or -1 → when it is back from which fault
        self.exits: Counter[str] = Counter()
        self.unexpected: list[str] = []
        self.sent = self.announced = 0
        self._codec = Codec("RawPair")

    def run(self) -> Report:
        """The storm from its first record to the check."""
        began = time.monotonic()
        self.broker.start()
        self.kafka = Connection(self.broker.bootstrap_servers)
        create_topic(self.kafka, TOPIC, PARTITIONS)
        self.history = History(self.folder / "history.jsonl")
        self.history.append("begin", **asdict(self.weather))
        observer = None
        try:
            for number in range(WORKERS):
                self._start(number)
            for worker in self._running():
                worker.until_it_says("metrics on port")  # the topics are there
            observer = Observer(self.broker.bootstrap_servers, TOPIC, range(PARTITIONS), self.history)
            self._blow()
            self._settle()
            observer.close()
            self.history.append("end")
            return self._report(observer.count, time.monotonic() - began)
        finally:
            for worker in self._running():
                worker.kill()
            if observer is not None:
                observer.close()
            self.history.close()
            self.broker.kill()

    # -- the storm -----------------------------------------------------------------------------------------------------

    def _blow(self) -> None:
        """Sends and breaks until the time is over, and mends what is broken then."""
        weather = self.weather
        plan = plan_of(weather.seed, weather.seconds, weather.gap_s, switches=weather.model == "null")
        producer = self.kafka.producer(linger_ms=20)
        records = self._records()
        began = time.monotonic()
        while (now := time.monotonic() - began) < self.weather.seconds:
            while plan and plan[0].at_s <= now:
                self._break(plan.pop(0), now)
            for number, (at, kind) in list(self.back_at.items()):
                if at <= now:
                    self._mend(number, kind)
            self._supervise(now)
            due = min(self.weather.records, int(now * self.weather.rate))
            while self.sent < due:
                key, value = next(records)
                partition = int(partitions_of([key], PARTITIONS)[0])
                producer.produce(TOPIC, value, key, partition, on_delivery=self._acknowledged)
                self.sent += 1
            producer.poll(TICK_S)
        for number, (_, kind) in list(self.back_at.items()):
            self._mend(number, kind)
        if producer.flush(60):
            raise AssertionError("the broker does not take what was sent")

    def _acknowledged(self, error: object, message: object) -> None:
        if error is not None:
            self.history.append("unsent", why=str(error))
            return
        self.history.append("sent", id=message.key().decode(), partition=message.partition(), offset=message.offset())  # type: ignore[attr-defined]

    def _break(self, fault: Fault, now: float) -> None:
        """Does it to the worker that was meant, or to the next one that is well."""
        if fault.kind == "broker":
            number = NOBODY["broker"]
            if number not in self.back_at:
                self.broker.kill()
        elif fault.kind == "switch":
            number = NOBODY["switch"]
            if NOBODY["broker"] in self.back_at or number in self.back_at:
                return
            announce_folder(self.kafka, BUNDLES[self.announced % len(BUNDLES)], TOPIC)
            self.announced += 1
        else:
            others = ((fault.worker + n) % WORKERS for n in range(WORKERS))
            number = next((n for n in others if n not in self.back_at and self._is_well(n)), fault.worker)
        if number in self.back_at:
            return
        worker = self.workers[number] if number >= 0 else None
        if worker is not None and fault.kind == "freeze":
            worker.process.send_signal(signal.SIGSTOP)
        elif worker is not None and fault.kind == "leave":
            worker.process.send_signal(signal.SIGTERM)
        elif worker is not None:
            worker.kill()
        if fault.kind == "kill_wiped":
            shutil.rmtree(self._state(number), ignore_errors=True)  # it may not have come to make one
        self.back_at[number] = now + fault.for_s, fault.kind
        self.history.append("fault", fault=fault.kind, worker=number, for_s=round(fault.for_s, 3))

    def _is_well(self, number: int) -> bool:
        worker = self.workers[number]
        return worker is not None and worker.running

    def _mend(self, number: int, kind: str) -> None:
        if kind == "leave" and NOBODY["broker"] in self.back_at:  # it cannot leave before the broker is back
            return
        del self.back_at[number]
        worker = self.workers[number] if number >= 0 else None
        if kind == "broker":
            self.broker.start()
        elif kind == "switch":
            pass
        elif kind == "freeze" and worker is not None:
            worker.process.send_signal(signal.SIGCONT)
        else:
            if worker is not None and worker.running:  # it was told to leave
                status = worker.wait(60)
                if status not in (0, -signal.SIGTERM):  # it may have been too young to hear it
                    self.exits[f"{status} on leaving"] += 1
            self._start(number)
        self.history.append("mended", fault=kind, worker=number)

    def _supervise(self, now: float) -> None:
        """Starts a worker again that left by itself, as an operator's supervisor would."""
        for number, worker in enumerate(self.workers):
            if worker is not None and number not in self.back_at and not worker.running:
                status = worker.process.returncode
                self.exits[str(status)] += 1
                if status not in EXPECTED:
                    self.unexpected.append(f"worker {number} left with status {status}: {worker.log.strip()[-500:]}")
                self.history.append("left", worker=number, status=status, log=worker.log[-1500:])
                self.back_at[number] = now + SUPERVISOR_WAIT_S, "left"

    def _settle(self) -> None:
        """Waits until everything is processed, then lets the workers leave one after the other."""
        deadline = time.monotonic() + SETTLE_TIMEOUT_S
        while not processed(self.kafka, TOPIC):
            if time.monotonic() > deadline:
                logs = "\n".join(f"--- {n}\n{worker.log[-3000:]}" for n, worker in enumerate(self._running()))
                raise AssertionError(f"the stream does not get to its end\n{logs}")
            self._supervise(0.0)
            for number, (_, kind) in list(self.back_at.items()):
                self._mend(number, kind)
            time.sleep(0.5)
        for worker in self._running():
            worker.until_it_says("metrics on port")  # it hears SIGTERM from here on
            worker.drain()

    def _running(self) -> list[WorkerProcess]:
        return [worker for worker in self.workers if worker is not None and worker.running]

    def _start(self, number: int) -> None:
        late = (str(REPOSITORY / "tests" / "end_to_end" / "late_worker.py"), f"{LATE_S}")
        self.workers[number] = WorkerProcess(
            self._arguments(number), self.folder / f"worker-{number}.log",
            entry=late if number == LATE_WORKER else ("-m", "stream"),
        )  # fmt: skip

    def _state(self, number: int) -> Path:
        return self.folder / f"state-{number}"

    def _arguments(self, number: int) -> list[str]:
        arguments = null_worker(
            self.kafka, TOPIC, self._state(number), "--instance-id", f"worker-{number}", "--ratio", "1/3",
            "--cell-cap", "60", "--gate", "0.2", "--commit-interval-s", "0.2", "--batch-pairs", "100",
        )  # fmt: skip
        if self.weather.model != "null":
            arguments[arguments.index("--model") : arguments.index("--model") + 2] = ["--bundle", self.weather.model]
        return arguments

    # -- the input -----------------------------------------------------------------------------------------------------

    def _records(self) -> Iterator[tuple[bytes, bytes | None]]:
        """Keys and values without end: mostly new pairs; some repeated, some bad, some takedowns."""
        images = _sample_images() if self.weather.model != "null" else [b"picture %d" % n for n in range(24)]
        number = 0
        while True:
            what = self.dice.random()
            if what < 0.04 and number:
                record = Raw(f"pair-{self.dice.randrange(number)}", image=self.dice.choice(images))
            elif what < 0.05:
                record = Raw(f"bad-{number}", image=b"BAD")
            elif what < 0.055:
                record = Raw(f"garbage-{number}", value=b"\x00not a record")
            elif what < 0.06 and number:
                record = Raw(f"pair-{self.dice.randrange(number)}", value=None)
            else:
                caption = f"caption {number} " + "word " * self.dice.randrange(60)
                record = Raw(f"pair-{number}", caption, self.dice.choice(images))
                number += 1
            value = record.value
            if value == b"=":
                value = self._codec.encode(
                    {"id": record.id, "caption": record.caption, "image": record.image, "image_uri": None, "fields": {}}
                )
            yield record.id.encode(), value

    # -- the end -------------------------------------------------------------------------------------------------------

    def _report(self, visible: int, seconds: float) -> Report:
        with local_stores([self._state(n) for n in range(WORKERS)], PARTITIONS) as stores:
            findings = check(
                self.broker.bootstrap_servers,
                TOPIC,
                log_folder=self.broker.data / "logs",
                sent=sent_in(self.history.path),
                visible=visible_in(self.history.path),
                stores=stores,
                assign_of=ASSIGN_OF,
            )
        logs = "".join((self.folder / f"worker-{n}.log").read_text(errors="replace") for n in range(WORKERS))
        restores = re.findall(r"runs from offset \d+: \d+ changelog records (\w+)", logs)
        return Report(
            self.weather,
            findings.anomalies,
            dict(Counter(event["fault"] for event in self._events("fault"))),
            sum(1 for _ in self._events("sent")),
            visible,
            len(restores),
            restores.count("rebuilt"),
            len(re.findall(r"partition \d+: epoch \d+ begins", logs)),
            logs.count("transaction aborted"),
            dict(self.exits),
            seconds,
            f"{datetime.now(UTC):%Y-%m-%d}",
            [*self.unexpected, *([] if findings.anomalies == Findings().anomalies else findings.lines())],
        )

    def _events(self, what: str) -> Iterator[dict[str, str]]:
        from tests.end_to_end.history import events

        return events(self.history.path, what)


def _sample_images() -> list[bytes]:
    """The pictures of the sample corpus."""
    images = []
    for shard in sorted((REPOSITORY / "corpus" / "sample").glob("*.tar")):
        with tarfile.open(shard) as archive:
            for member in archive:
                file = archive.extractfile(member) if member.name.endswith((".png", ".jpg")) else None
                if file is not None:
                    images.append(file.read())
    return images[:300]


# -- units -------------------------------------------------------------------------------------------------------------

HEAD = """\
# Storms

Written by `make soak`, a row a unit of at most ten minutes: 3 workers on 4 partitions of a real Apache Kafka are killed
(-9, with and without their state directory), frozen past their session time-out, made to leave and join; the broker is
killed and started again; bundles are announced, which one of the workers takes 5 s to load; records with duplicates,
takedowns and bad ones flow all the while. The seed gives the fault plan. An independent checker
(`tests/end_to_end/checker.py`) then counts every anomaly.

| date | model | seed | seconds | records | faults | restores (rebuilt) | switched | aborted | left | anomalies |
|---|---|---|---|---|---|---|---|---|---|---|
"""


def row_of(report: Report) -> str:
    """A storm as a row of docs/storm.md."""
    found = ", ".join(f"{name} {count}" for name, count in report.anomalies.items() if count)
    none = f"none of {len(ANOMALIES)} kinds"
    exits = ", ".join(f"{count}× status {status}" for status, count in sorted(report.exits.items())) or "none"
    faults = ", ".join(f"{kind} {count}" for kind, count in sorted(report.faults.items()))
    return (
        f"| {report.date} | {report.weather.model} | {report.weather.seed} | {report.seconds:.0f} | {report.records:,} | "
        f"{sum(report.faults.values())}: {faults} | {report.restores} ({report.rebuilt}) | {report.switches} | "
        f"{report.aborted} | {exits} | {found or none} |\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1200)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", default="null", help="`null`, or a bundle's folder")
    parser.add_argument("--rate", type=float, default=170)
    parser.add_argument("--gap-s", type=float, default=4.0, help="between two faults, on average")
    parser.add_argument("--again", action="store_true", help="forget the units that are done")
    parser.add_argument("--keep", type=Path, help="keep history, logs and stores in this folder")
    options = parser.parse_args()
    DONE.parent.mkdir(exist_ok=True)
    if options.again:
        DONE.unlink(missing_ok=True)
    units = max(1, round(options.seconds / UNIT_SECONDS))
    failed = False
    for unit in range(units):
        weather = Weather(
            options.seed + unit, min(options.seconds, UNIT_SECONDS), options.records // units, options.rate,
            options.gap_s, options.model,
        )  # fmt: skip
        if DONE.exists() and json.dumps(asdict(weather)) in DONE.read_text().splitlines():
            print(f"unit {unit + 1} of {units} is done (--again does it again)")
            continue
        with tempfile.TemporaryDirectory(prefix="storm-") as temporary:
            folder = options.keep / f"seed-{weather.seed}" if options.keep else Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            report = Storm(weather, folder).run()
        print("\n".join(report.lines()), flush=True)
        if not DOCUMENT.exists():
            DOCUMENT.write_text(HEAD)
        with DOCUMENT.open("a") as file:
            file.write(row_of(report))
        with DONE.open("a") as file:
            file.write(json.dumps(asdict(weather)) + "\n")
        failed |= any(report.anomalies.values())
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
