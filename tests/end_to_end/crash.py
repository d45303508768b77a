"""Every crash window: a worker is killed at its nth step, for n = 1, 2, 3 … until a run gets through (`make crash`).

Four lives are gone through: the first of a new stream, one that goes on with its store, one that goes on without it
(and rebuilds), and one that gives a partition away. What the dead one left is taken over by the next, itself mortal, and
the checker looks at the end of every unit. A unit is a stretch of windows; it is written down when it is done, and a run
that was cut off goes on behind it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from models.null import NullModel
from stream.broker import LocalBroker
from stream.bundles import announce_folder
from stream.kafka import Connection
from stream.stream_view import StreamSource, read_view
from stream.topics import StreamTopics
from tests.end_to_end.checker import NO_ANOMALY, Findings, check
from tests.end_to_end.dying_worker import ABORT, ABORTED, Life, Nursery
from tests.end_to_end.outcome import Raw, create_topic, local_stores, processed, send
from tests.end_to_end.worker_process import ENVIRONMENT, REPOSITORY, WorkerProcess, null_worker, until

WINDOWS_A_UNIT = 40
KILLED, THROUGH = -signal.SIGKILL, 0
# How an heir may end: drained, or told to while it was still starting.
CLEAN = (THROUGH, -signal.SIGTERM)
PARTITIONS = 2
BUNDLES = ("null:1/2", "null:2/1", "null:3/3", "null:2/1")
ASSIGN_OF = {model.version: model.assign for model in (NullModel(), *(NullModel.at(uri) for uri in BUNDLES))}
_streams = itertools.count(1)  # of all stands of a process: two of them may stand on one broker
DONE = REPOSITORY / ".build" / "crash.jsonl"
DOCUMENT = REPOSITORY / "docs" / "crash-windows.md"


@dataclass
class Unit:
    """A stretch of windows, done. through  the number of the run that got through, if one did."""

    scenario: str
    first: int
    last: int
    through: int | None
    anomalies: dict[str, int]
    seconds: float
    date: str


class Stand:
    """A broker and two nurseries, and the streams on which windows are tried."""

    def __init__(self, broker: LocalBroker, folder: Path) -> None:
        self.broker, self.folder = broker, folder
        self.kafka = Connection(broker.bootstrap_servers)
        self.nursery = Nursery(ENVIRONMENT)

    def close(self) -> None:
        self.nursery.__exit__(None, None, None)

    def stream(self) -> Stream:
        return Stream(self, f"crash-{os.getpid()}-{next(_streams)}")


class Stream:
    """One stream, its input, and the worker that dies on it again and again."""

    def __init__(self, stand: Stand, name: str) -> None:
        self.stand, self.name = stand, name
        self.folder = stand.folder / name
        self.folder.mkdir()
        self.state = self.folder / "state"
        self._sent = self._announced = 0
        create_topic(stand.kafka, name, PARTITIONS)

    @property
    def log(self) -> Path:
        return self.folder / "worker.log"

    def arguments(self, *more: str, who: str = "mortal") -> list[str]:
        state = self.state if who == "mortal" else self.folder / who
        return null_worker(
            self.stand.kafka, self.name, state, "--ratio", "1/2", "--cell-cap", "4", "--instance-id", who, *more
        )

    def feed(self) -> None:
        """A few more raw records: distinct pairs, a duplicate, a dead letter, a takedown."""
        first, self._sent = self._sent, self._sent + 5
        records = [Raw(f"pair-{i}", f"caption {i}", b"picture %d" % (i % 2)) for i in range(first, self._sent)]
        records += [Raw(f"pair-{first}"), Raw(f"bad-{first}", image=b"BAD"), Raw(f"pair-{first + 1}", value=None)]
        send(self.stand.kafka, self.name, records, PARTITIONS)

    def live(self, nth: int = 0, at: str = "", within: tuple[str, ...] = (), how: int = signal.SIGKILL) -> Life:
        """A worker's life until the end of the input, or until it dies."""
        return self.stand.nursery.run(self.arguments("--stop-at-end"), self.log, nth=nth, at=at, within=within, how=how)

    def announce(self) -> None:
        """The next bundle: one cell, over its cap; three; one again; two."""
        self._announced += 1
        announce_folder(self.stand.kafka, BUNDLES[self._announced % len(BUNDLES)], self.name)

    def live_through(self) -> None:
        life = self.live()
        if life.status != THROUGH:
            raise AssertionError(f"the last worker left with status {life.status}:\n{self.log.read_text()[-3000:]}")

    def findings(self) -> Findings:
        """What the checker says of the stream, and of the stores that are left."""
        folders = [self.state, self.folder / "other"]
        with local_stores(folders, PARTITIONS) as stores:
            logs = self.stand.broker.data / "logs"
            return check(
                self.stand.broker.bootstrap_servers, self.name, log_folder=logs, stores=stores, assign_of=ASSIGN_OF
            )


# -- the lives ---------------------------------------------------------------------------------------------------------
# Each yields the steps at which a worker died, from the nth on, and ends when one got through.


def first_life(stand: Stand, first: int) -> Iterator[tuple[str, Stream]]:
    """A worker on a new stream: it creates the topics, and the first batch carries the settings and the bundle."""
    for nth in range(first, 1 << 20):
        stream = stand.stream()
        stream.feed()
        life = stream.live(nth)
        if life.status == KILLED:
            stream.live_through()
        yield died_of(life, stream), stream
        if life.status == THROUGH:
            return


def next_life(stand: Stand, first: int, *, keeps_its_directory: bool = True) -> Iterator[tuple[str, Stream]]:
    """A worker takes over from the one before it, on the same disk or on another one."""
    stream = stand.stream()
    stream.feed()
    stream.live_through()
    stream.feed()
    for nth in range(first, 1 << 20):
        if not keeps_its_directory:
            shutil.rmtree(stream.state)
        life = stream.live(nth)
        yield died_of(life, stream), stream
        if life.status == THROUGH:
            return
        if "after commit_transaction" in life.steps:
            stream.feed()


def elsewhere(stand: Stand, first: int) -> Iterator[tuple[str, Stream]]:
    """`next_life` without the state directory: everything is rebuilt from the changelog, with crashes in between."""
    return next_life(stand, first, keeps_its_directory=False)


def revocation(stand: Stand, first: int) -> Iterator[tuple[str, Stream]]:
    """A worker with an open transaction gives a partition to another one that joins, and dies over it."""
    for nth in range(first, 1 << 20):
        stream = stand.stream()
        stream.feed()
        life = revoked_life(stream, nth)
        yield died_of(life, stream), stream
        if life.status == THROUGH:
            return


def revoked_life(stream: Stream, nth: int = 0, at: str = "") -> Life:
    """The worker dies at its nth step while a partition is taken from it; its heir and the other finish the work."""
    nursery, kafka = stream.stand.nursery, stream.stand.kafka
    nursery.begin(
        stream.arguments("--commit-interval-s", "60"), stream.log, nth=nth, at=at, within=("_on_revoke",)
    )  # fmt: skip
    until(lambda: "after collect" in nursery.steps, "the worker has effects that are not committed")
    other = WorkerProcess(stream.arguments(who="other"), stream.folder / "other.log")
    try:
        until(
            lambda: "after on_revoke" in nursery.steps or not Path(f"/proc/{nursery.pid}").exists()
            or _is_zombie(nursery.pid),
            "the worker gives a partition away, or dies over it",
        )  # fmt: skip
        if not _is_zombie(nursery.pid):
            nursery.send_signal(signal.SIGTERM)
        life = nursery.end()
        if life.status == KILLED:
            nursery.begin(stream.arguments(), stream.log)
            until(lambda: processed(kafka, stream.name), "everything is processed")
            nursery.send_signal(signal.SIGTERM)
            heir = nursery.end()
            assert heir.status in CLEAN, f"the heir ended with {heir.status}:\n{stream.log.read_text()[-3000:]}"
        else:
            until(lambda: processed(kafka, stream.name), "everything is processed")
        other.drain()
    finally:
        if other.running:
            other.kill()
    return life


def switch(stand: Stand, first: int) -> Iterator[tuple[str, Stream]]:
    """A worker's partitions are switched to one bundle after the other; every third worker comes without a store."""
    stream = stand.stream()
    stream.feed()
    stream.live_through()
    stream.feed()
    stream.announce()
    for nth in range(first, 1 << 20):
        if nth % 3 == 0:
            shutil.rmtree(stream.state)
        life = stream.live(nth)
        yield died_of(life, stream), stream
        if life.status == THROUGH:
            return
        if life.steps.count("after commit_transaction") > 1:  # the switch and what came after it
            stream.feed()
            stream.announce()


def aborts(stand: Stand, first: int) -> Iterator[tuple[str, Stream]]:
    """Nobody dies, but a transaction is aborted at its nth step, that of a switch like the others."""
    stream = stand.stream()
    stream.feed()
    stream.live_through()
    for nth in range(first, 1 << 20):
        stream.feed()
        stream.announce()
        life = stream.live(nth, how=ABORT)
        if life.status != THROUGH:
            raise AssertionError(f"the worker left with status {life.status}:\n{stream.log.read_text()[-3000:]}")
        aborted = ABORTED in life.steps
        yield f"{ABORTED} {life.steps[life.steps.index(ABORTED) - 1]}" if aborted else "through", stream
        if not aborted:
            return


def switch_and_rebalance(stand: Stand, first: int) -> Iterator[tuple[str, Stream]]:
    """A worker dies over a switch while another one joins, which is late to know of the bundle."""
    for nth in range(first, 1 << 20):
        stream = stand.stream()
        stream.feed()
        life = _switched_and_rebalanced(stream, nth)
        yield died_of(life, stream), stream
        if life.status == THROUGH:
            return


def _switched_and_rebalanced(stream: Stream, nth: int) -> Life:
    nursery, kafka = stream.stand.nursery, stream.stand.kafka
    nursery.begin(stream.arguments(), stream.log, nth=nth, within=("_switch_over", "adopt"))
    until(lambda: processed(kafka, stream.name), "the input is processed")
    other = WorkerProcess(stream.arguments(who="other"), stream.folder / "other.log")
    try:
        stream.announce()
        stream.feed()
        until(
            lambda: _is_zombie(nursery.pid) or (processed(kafka, stream.name) and _all_switched(stream)),
            "the partitions are switched, or the worker dies over it",
        )
        if not _is_zombie(nursery.pid):
            nursery.send_signal(signal.SIGTERM)
        life = nursery.end()
        if life.status == KILLED:
            nursery.begin(stream.arguments(), stream.log)
            until(lambda: processed(kafka, stream.name) and _all_switched(stream), "everything is processed")
            nursery.send_signal(signal.SIGTERM)
            heir = nursery.end()
            assert heir.status in CLEAN, f"the heir ended with {heir.status}:\n{stream.log.read_text()[-3000:]}"
        until(lambda: processed(kafka, stream.name), "everything is processed")
        other.drain()
    finally:
        if other.running:
            other.kill()
    return life


def _all_switched(stream: Stream) -> bool:
    view = read_view(StreamSource(stream.stand.kafka, StreamTopics(stream.name)))
    return all(len(part.switches) == 2 for part in view.partitions.values())


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):  # gone before it was opened, or before it was read
        return True


def died_of(life: Life, stream: Stream) -> str:
    """The step at which a worker died, `through` if it did not. Fails for one that left in another way."""
    if life.status == THROUGH:
        return "through"
    if life.status != KILLED:
        raise AssertionError(f"the worker left with status {life.status}:\n{stream.log.read_text()[-3000:]}")
    return life.steps[-1]


SCENARIOS = {
    "first": first_life,
    "next": next_life,
    "elsewhere": elsewhere,
    "revocation": revocation,
    "switch": switch,
    "aborts": aborts,
    "rebalance": switch_and_rebalance,
}


# -- units -------------------------------------------------------------------------------------------------------------


def run_unit(stand: Stand, scenario: str, first: int) -> Unit:
    """The next windows of a scenario, and what the checker says of every stream that they were tried on."""
    began = time.monotonic()
    counts, through, last = dict(NO_ANOMALY), None, first - 1
    streams: dict[str, Stream] = {}
    for step, stream in SCENARIOS[scenario](stand, first):
        last += 1
        streams[stream.name] = stream
        print(f"{scenario} {last}: {step}", flush=True)
        if step == "through":
            through = last
        if through or last - first + 1 >= WINDOWS_A_UNIT:
            break
    for stream in streams.values():
        if scenario in ("next", "elsewhere", "switch"):
            stream.live_through()
        findings = stream.findings()
        for name, count in findings.anomalies.items():
            counts[name] += count
        if findings.counts:
            print("\n".join([stream.name, *findings.lines()]), flush=True)
    return Unit(
        scenario, first, last, through, counts, round(time.monotonic() - began, 1), f"{datetime.now(UTC):%Y-%m-%d}"
    )


def done_so_far() -> list[Unit]:
    if not DONE.exists():
        return []
    return [Unit(**json.loads(line)) for line in DONE.read_text().splitlines()]


def document(units: list[Unit]) -> str:
    """What was tried and found, as a page."""
    lines = [
        "# Every crash window, tried",
        "",
        "Written by `make crash`: a worker is killed (-9) before and after its nth step, for n = 1, 2, 3 … until a run gets",
        "through; steps are what it does to Kafka (each record produced is one), to its store and with its partitions. What it",
        "leaves is taken over by the next, and an independent checker (`tests/end_to_end/checker.py`) looks at topics, stores",
        "and the broker's log files. In one of the lives nobody is killed: the transaction is aborted at that step.",
        "",
        "| life | windows | got through at | seconds | anomalies | date |",
        "|---|---|---|---|---|---|",
    ]
    for scenario, life in SCENARIOS.items():
        own = [unit for unit in units if unit.scenario == scenario]
        if not own:
            continue
        windows = sum(unit.last - unit.first + 1 for unit in own) - sum(unit.through is not None for unit in own)
        through = next((str(unit.through) for unit in own if unit.through), "not yet")
        found = {name: sum(unit.anomalies[name] for unit in own) for name in NO_ANOMALY}
        told = ", ".join(f"{name} {count}" for name, count in found.items() if count) or "none"
        text = (life.__doc__ or "").split("\n")[0]
        lines.append(
            f"| {scenario}: {text} | {windows} | {through} | {sum(u.seconds for u in own):.0f} | {told} | {own[-1].date} |"
        )
    lines += ["", "`name: count` over all of it:", ""]
    lines += [f"    {name}: {sum(unit.anomalies[name] for unit in units)}" for name in NO_ANOMALY]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenario", choices=list(SCENARIOS), action="append", help="only this one; repeatable")
    parser.add_argument("--units", type=int, default=0, help="stop after so many units")
    parser.add_argument("--again", action="store_true", help="forget what was done before")
    options = parser.parse_args()
    DONE.parent.mkdir(exist_ok=True)
    if options.again:
        DONE.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="crash-") as temporary:
        broker = LocalBroker(Path(temporary) / "kafka")
        broker.start()
        stand = Stand(broker, Path(temporary))
        tried = 0
        try:
            for scenario in options.scenario or SCENARIOS:
                while not options.units or tried < options.units:
                    own = [unit for unit in done_so_far() if unit.scenario == scenario]
                    if any(unit.through for unit in own):
                        break
                    unit = run_unit(stand, scenario, 1 + max((unit.last for unit in own), default=0))
                    tried += 1
                    with DONE.open("a") as file:
                        file.write(json.dumps(asdict(unit)) + "\n")
                    DOCUMENT.write_text(document(done_so_far()))
        finally:
            stand.close()
            broker.kill()
    units = done_so_far()
    print(document(units))
    raise SystemExit(any(count for unit in units for count in unit.anomalies.values()))


if __name__ == "__main__":
    main()
