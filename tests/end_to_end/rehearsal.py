"""A day in production, in miniature (`make rehearsal`): what an operator does to a stream while records flow, then the proof.

Knows the service as its operator does: processes, signals, commands, logs. What it measures is what the stream has committed,
read from Kafka once a second. It writes docs/rehearsal.md and docs/rehearsal.png.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from stream.broker import local_broker
from stream.errors import TldrError
from stream.kafka import Connection, end_offsets
from stream.stream_view import ChangelogFollower, StreamSource
from stream.topics import StreamTopics
from stream.verify import HEADLINE
from tests.end_to_end.load import Load
from tests.end_to_end.outcome import create_topic, processed
from tests.end_to_end.worker_process import ENVIRONMENT, REPOSITORY, WorkerProcess, until

TOPIC, PARTITIONS = "raw-pairs", 6
QUOTA = 0.25
SESSION_TIMEOUT_S = 10
PATIENCE_S = 180.0
WINDOW_S = 30.0
# When each step is due, as a share of the whole; a step that comes late begins at once.
DUE = {"scale out": 0.08, "scale in": 0.22, "second worker": 0.34, "roll": 0.42,
       "recluster": 0.56, "snapshot": 0.66, "lose a disk": 0.74,
       "stop the load": 0.88}  # fmt: skip
COMMITS_BACK = 20
FORMATS = ("state/changelog.py", "state/partition_store.py")
PACKAGE = ("stream", "models", "state", "pyproject.toml", "README.md", "LICENSE")
DOCUMENT = REPOSITORY / "docs" / "rehearsal.md"
PICTURE = REPOSITORY / "docs" / "rehearsal.png"


class Sample(NamedTuple):
    """What was committed at a moment (seconds since the start), and how many workers ran."""

    at_s: float
    lag: int
    read: int
    counted: int
    kept: int
    workers: int


class Event(NamedTuple):
    """What was done, when, for how long until all was well again, and what is worth saying about it."""

    at_s: float
    name: str
    took_s: float
    note: str


class Version(NamedTuple):
    """An installed version of the package: its folder and its name."""

    folder: Path
    name: str


@dataclass
class Rehearsal:
    """One rehearsal of about `seconds`, on a broker of its own, in a folder that it may fill."""

    seconds: float
    rate: float
    folder: Path
    versions: tuple[Version, Version]
    bundle: Path
    events: list[Event] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    workers: dict[int, WorkerProcess] = field(default_factory=dict)
    _epochs: dict[int, int] = field(default_factory=dict)  # of each partition, as committed

    def run(self) -> dict[str, Any]:
        """Everything from the start to what `verify` says (its JSON)."""
        self._began = time.monotonic()
        with local_broker(self.folder / "kafka") as broker:
            self.kafka = Connection(broker.bootstrap_servers)
            create_topic(self.kafka, TOPIC, PARTITIONS, max_message_bytes=str(4 << 20))
            self._command("bundle", "announce", str(self.bundle))
            old, new = self.versions
            load = Load(self.kafka, TOPIC, PARTITIONS, REPOSITORY / "corpus" / "sample", rate=self.rate)
            watching = threading.Event()
            watcher = threading.Thread(target=self._watch, args=(watching,), daemon=True)
            try:
                with self._event("start one worker") as say:
                    self._start(1, old)
                    self._until_shared([1])
                    say(f"version {old.name}")
                with load:
                    watcher.start()
                    self._steps(old, new)
                with self._event("stop the load") as say:
                    until(lambda: processed(self.kafka, TOPIC), "the lag is worked off", PATIENCE_S)
                    say(f"{load.sent:,} records were sent; until the last one was committed")
                for worker in self.workers.values():
                    worker.drain()
            finally:
                watching.set()
                for worker in self.workers.values():
                    if worker.running:
                        worker.kill()
            with self._event("verify") as say:
                verified = self._command("verify", "--topic", TOPIC, allowed=(0, 5))
                say(_proof(verified))
        return verified

    def _steps(self, old: Version, new: Version) -> None:
        self._wait_for("scale out")
        with self._event("scale out to three") as say:
            self._start(2, old)
            self._start(3, old)
            self._until_shared([1, 2, 3])
            say("until each had two partitions, their models loaded and stores restored")
        self._wait_for("scale in")
        with self._event("scale in to one") as say:
            for number in (2, 3):
                self.workers.pop(number).drain()
            self._until_shared([1])
            say(
                f"both drained with status 0; then their places are kept for the session time-out, {SESSION_TIMEOUT_S} s"
            )
        self._wait_for("second worker")
        with self._event("a second worker") as say:
            self._start(2, old)
            self._until_shared([1, 2])
            say("so that the roll has somebody to wait for")
        self._wait_for("roll")
        with self._event("roll to a new version") as say:
            for number in (1, 2):
                self.workers.pop(number).drain()
                self._start(number, new)
                self.workers[number].until_it_runs(PARTITIONS // 2)
            self._until_shared([1, 2])
            say(f"{old.name} → {new.name}, one worker after the other; each kept its partitions")
        self._wait_for("recluster")
        self._recluster()
        self._wait_for("snapshot")
        with self._event("snapshot") as say:
            made = self._command("snapshot", str(self.folder / "snapshot"), "--topic", TOPIC)
            say(f"{made.get('pairs', '?'):,} pairs, while the workers worked")
        self._wait_for("lose a disk")
        with self._event("lose a disk") as say:
            self.workers[2].kill()
            shutil.rmtree(self.folder / "state-2")
            self._start(2, new)
            self.workers[2].until_it_runs(PARTITIONS // 2)
            found = re.findall(r"(\d+) changelog records rebuilt in ([\d.]+) s", self.workers[2].log)
            records, seconds = sum(int(n) for n, _ in found), max(float(s) for _, s in found)
            say(f"kill -9 and an empty disk; {records:,} changelog records, the slowest partition {seconds:.2f} s; the "
                "rest is the start of Python and the model")  # fmt: skip
        self._wait_for("stop the load")

    def _recluster(self) -> None:
        """New centroids from what the stream has recorded."""
        with self._event("recluster") as say:
            epoch = 1 + max(self._epochs.values())
            self._command("recluster", "--topic", TOPIC, "--out", str(self.folder / "reclustered"))
            until(lambda: min(self._epochs.values()) == epoch, "every partition has switched", PATIENCE_S)
            say("new clusters from the newest index vectors, announced; until every partition had switched to them")

    # -- what is running -----------------------------------------------------------------------------------------------

    def _start(self, number: int, version: Version) -> None:
        arguments = [
            "consume", "--topic", TOPIC, "--bootstrap-servers", self.kafka.bootstrap_servers,
            "--state-dir", str(self.folder / f"state-{number}"), "--instance-id", f"worker-{number}",
            "--session-timeout-s", str(SESSION_TIMEOUT_S), "--decode-threads", "1",
            "--metrics-host", "127.0.0.1", "--metrics-port", "0",
        ]  # fmt: skip
        self.workers[number] = WorkerProcess(
            # -P: the package comes from its folder and not from the one that we stand in
            arguments, self.folder / f"worker-{number}.log", entry=("-P", "-m", "stream"), PYTHONPATH=str(version.folder),
        )  # fmt: skip

    def _until_shared(self, numbers: list[int]) -> None:
        """Waits until these workers consume the same number of partitions each."""
        share = PARTITIONS // len(numbers)

        def shared() -> bool:
            for number in numbers:
                assert self.workers[number].running, self.workers[number].log[-3000:]
            return all(self.workers[number].partitions == share for number in numbers)

        until(shared, f"workers {numbers} share the partitions", PATIENCE_S)

    def _command(self, *words: str, allowed: tuple[int, ...] = (0,)) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-m", "stream", *words, "--bootstrap-servers", self.kafka.bootstrap_servers, "--json"],
            capture_output=True, text=True, cwd=REPOSITORY, env=ENVIRONMENT, check=False,
        )  # fmt: skip
        if done.returncode not in allowed:
            raise SystemExit(f"`{' '.join(words)}` failed with status {done.returncode}: {done.stderr}")
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    # -- what is written down ------------------------------------------------------------------------------------------

    @property
    def _now_s(self) -> float:
        return time.monotonic() - self._began

    def _wait_for(self, step: str) -> None:
        time.sleep(max(0.0, DUE[step] * self.seconds - self._now_s))

    @contextlib.contextmanager
    def _event(self, name: str) -> Iterator[Callable[[str], None]]:
        note = ""

        def say(text: str) -> None:
            nonlocal note
            note = text

        began = self._now_s
        print(f"{began:5.0f} s  {name}", flush=True)
        yield say
        took = self._now_s - began
        self.events.append(Event(began, name, took, note))
        print(f"{self._now_s:5.0f} s  … done in {took:.1f} s: {note}", flush=True)

    def _watch(self, stopped: threading.Event) -> None:
        """Once a second, what the stream has committed."""
        follower = ChangelogFollower(StreamSource(self.kafka, StreamTopics(TOPIC)))
        while not stopped.wait(1.0):
            try:
                view = follower.advance()
                ends = end_offsets(self.kafka, TOPIC, range(PARTITIONS))
            except TldrError:  # nothing is committed yet
                continue
            self._epochs |= {p: part.position.epoch for p, part in view.partitions.items() if part.position}
            done = {p: part.position.next_offset for p, part in view.partitions.items() if part.position}
            lag = sum(end - done.get(p, 0) for p, end in ends.items())
            totals = view.totals
            running = sum(worker.running for worker in list(self.workers.values()))
            self.samples.append(Sample(self._now_s, lag, totals.read, totals.counted, totals.kept, running))


def _proof(verified: dict[str, Any]) -> str:
    return ", ".join(f"{verified[key]} {key}" for key in HEADLINE)


# -- the versions ------------------------------------------------------------------------------------------------------


def install(ref: str | None, folder: Path) -> Version:
    """The package as of a commit, or the working tree (None), built and installed into a folder of its own."""
    source, target = folder / "source", folder / "package"
    source.mkdir(parents=True)
    if ref is None:
        for name in PACKAGE:
            there = REPOSITORY / name
            copy = shutil.copytree if there.is_dir() else shutil.copy2
            copy(there, source / name)
        commit = _git("rev-parse", "--short", "HEAD") + (".changed" if _git("status", "--porcelain", *PACKAGE) else "")
    else:
        archive = subprocess.run(["git", "archive", ref, *PACKAGE], cwd=REPOSITORY, capture_output=True, check=True)
        subprocess.run(["tar", "-x", "-C", str(source)], input=archive.stdout, check=True)
        commit = _git("rev-parse", "--short", ref)
    project = source / "pyproject.toml"
    name = ""

    def named(found: re.Match[str]) -> str:
        nonlocal name
        name = f"{found[1]}+g{commit}"
        return f'version = "{name}"'

    project.write_text(re.sub(r'^version = "([^"]+)"$', named, project.read_text(), count=1, flags=re.MULTILINE))
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target",
         str(target), str(source)],
        check=True,
    )  # fmt: skip
    return Version(target, name)


def earlier_ref() -> str | None:
    """The newest release, else the earliest of the last twenty commits that writes the same changelog and store as this one.

    Before the first release those may change from one commit to the next, and a stream then cannot be carried over.
    """
    with contextlib.suppress(subprocess.CalledProcessError):
        return _git("describe", "--tags", "--abbrev=0", "HEAD~1")
    for back in range(COMMITS_BACK, 0, -1):
        with contextlib.suppress(subprocess.CalledProcessError):
            _git("diff", "--quiet", f"HEAD~{back}", "HEAD", "--", *FORMATS)
            return f"HEAD~{back}"
    return None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return done.stdout.strip()


# -- the page and the picture ------------------------------------------------------------------------------------------


def draw(rehearsal: Rehearsal, out: Path) -> None:
    """Lag, keep-rate and workers over time, with what was done."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    import numpy as np

    at_s, lag, _, counted, kept, workers = np.array(rehearsal.samples, float).T
    figure, (above, middle, below) = plt.subplots(
        3, 1, figsize=(11, 7), sharex=True, height_ratios=(3, 3, 1), dpi=100, layout="constrained"
    )
    above.plot(at_s, lag, color="#1f60c4", linewidth=1.3)
    above.set_ylabel("lag, raw records")
    before = np.searchsorted(at_s, at_s - WINDOW_S, side="right") - 1
    before = before.clip(0)
    news = counted - counted[before]
    recent = np.where(news > 0, (kept - kept[before]) / np.maximum(news, 1), np.nan)
    middle.plot(at_s, 100 * recent, color="#9bb8e8", linewidth=1.0, label=f"of the last {WINDOW_S:.0f} s")
    middle.plot(at_s, 100 * kept / np.maximum(counted, 1), color="#1f60c4", linewidth=1.5, label="since the start")
    middle.axhline(100 * QUOTA, color="#1f2430", linewidth=0.8, linestyle=(0, (4, 3)), label="quota M")
    middle.set_ylabel("keep-rate, %")
    middle.set_ylim(100 * QUOTA - 8, 100 * QUOTA + 8)
    middle.legend(loc="lower right", frameon=False, fontsize=8, ncol=3)
    below.step(at_s, workers, where="post", color="#1f60c4")
    below.set_ylabel("workers")
    below.set_ylim(0, 3.5)
    below.set_yticks([0, 1, 2, 3])
    below.set_xlabel("seconds")
    for number, event in enumerate(rehearsal.events):
        for axes in (above, middle, below):
            axes.axvspan(event.at_s, event.at_s + event.took_s, color="#f4e3d0", linewidth=0, zorder=0)
        above.annotate(
            event.name, (event.at_s, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 3 + 10 * (number % 3)),
            textcoords="offset points", fontsize=8,
        )  # fmt: skip
    for axes in (above, middle, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out)


def page(rehearsal: Rehearsal, verified: dict[str, Any]) -> str:
    """docs/rehearsal.md."""
    last = rehearsal.samples[-1]
    worst = max(rehearsal.samples, key=lambda sample: sample.lag)
    rows = "".join(f"| {e.at_s:.0f} | {e.name} | {e.took_s:.1f} | {e.note} |\n" for e in rehearsal.events)
    return f"""\
# A day in production, in miniature

Written by `make rehearsal` on {datetime.now(UTC):%Y-%m-%d}: {rehearsal.seconds:.0f} seconds with the sample bundle on
real pictures, {rehearsal.rate:g} records a second into {PARTITIONS} partitions of a real Apache Kafka, on
{platform.machine()} with {_cores()} cores that broker, producer and up to three workers share. Some records are
repeated, some are no pairs. What an operator does in a day is done while they flow; lag and keep-rate are read from
Kafka once a second, from what is committed.

![lag, keep-rate and workers over time](rehearsal.png)

| at, s | what was done | took, s | |
|---|---|---|---|
{rows}
- **verify:** {_proof(verified)}.
- {last.read:,} records read, {last.counted:,} counted, {last.kept:,} kept: {last.kept / max(1, last.counted):.2%} of the
  counted, with a quota of {QUOTA:.0%}.
- The lag was at most {worst.lag:,} records ({worst.lag / rehearsal.rate:.0f} s of input), at {worst.at_s:.0f} s.

A step took until all was well again: every partition consumed, its store exact. The two versions are two builds of this
package, each installed into a folder of its own: the newest release, or before there is one the earliest of the last
twenty commits that writes the same changelog and store; and the working tree.
"""


def _cores() -> int:
    import os

    return os.cpu_count() or 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--rate", type=float, default=20, help="raw records a second")
    parser.add_argument("--from-ref", default=None, help="commit that the workers run first  [default: an earlier one]")
    parser.add_argument("--keep", type=Path, help="keep logs, stores and the snapshot in this folder")
    parser.add_argument("--out", type=Path, default=DOCUMENT.parent, help="folder for rehearsal.md and rehearsal.png")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        versions = (
            install(options.from_ref or earlier_ref(), folder / "before"),
            install(None, folder / "after"),
        )
        rehearsal = Rehearsal(options.seconds, options.rate, folder, versions, REPOSITORY / "bundles" / "sample")
        verified = rehearsal.run()
        options.out.mkdir(parents=True, exist_ok=True)
        draw(rehearsal, options.out / PICTURE.name)
        (options.out / DOCUMENT.name).write_text(page(rehearsal, verified))
    differs = any(verified[key] for key in HEADLINE)
    raise SystemExit(5 if differs else 0)


if __name__ == "__main__":
    main()
