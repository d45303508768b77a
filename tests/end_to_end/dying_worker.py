"""Workers that kill themselves (-9) before or after their nth step, forked from a process that has imported everything.

A step is a call of `STEPS`: what a worker does to Kafka, to its store, and with its partitions. Nothing of the program is
changed but that the process ends there, and that a produced record has reached the broker when its step is over. Run as
a program it is the nursery: one JSON request a line (see `Nursery.run`) → pid, later status. It has no Kafka client and no
thread itself, so that forking it is safe; the import of a worker would take ten times as long as its life here.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from confluent_kafka import KafkaError, KafkaException

PRODUCER_STEPS = (
    "begin_transaction",
    "produce",
    "flush",
    "send_offsets_to_transaction",
    "commit_transaction",
    "abort_transaction",
)
# In the place of a signal: nobody dies, but the transaction is aborted as if Kafka had said so.
ABORT = 0
# Where that can be: a transaction is open, and nobody has asked to commit it.
ABORTABLE = (
    "after begin_transaction",
    "before produce",
    "after produce",
    "before flush",
    "after flush",
    "before send_offsets_to_transaction",
    "after send_offsets_to_transaction",
    "before commit_transaction",
)
ABORTED = "aborted"


class Countdown:
    """Counts steps and ends the process at the nth, having written down which one that was.

    nth     0: never
    within  counts only while a call with one of these names is under way; empty: always
    at      counts only this step; empty: all of them
    how     SIGKILL; SIGSTOP makes a zombie, that may wake up; ABORT, of which only the steps of a transaction count
    """

    def __init__(self, nth: int, within: Iterable[str], at: str, how: int, report: Path) -> None:
        self.nth, self.within, self.at, self.how = nth, frozenset(within), at, how
        self.count = 0
        self._inside: list[str] = []
        self._one_at_a_time = threading.Lock()
        self._report = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)

    def step(self, what: str) -> None:
        # Partitions are restored in two threads: none may write down a step behind the one that the process dies of.
        with self._one_at_a_time:
            os.write(self._report, f"{what}\n".encode())
            if (self.within and not self.within.intersection(self._inside)) or (self.at and self.at != what):
                return
            if self.how == ABORT and what not in ABORTABLE:
                return
            self.count += 1
            if self.count == self.nth and self.how == ABORT:
                os.write(self._report, f"{ABORTED}\n".encode())
                raise KafkaException(KafkaError(KafkaError._TIMED_OUT, "as planned", txn_requires_abort=True))
            if self.count == self.nth:
                # To this thread, not to the process: a SIGSTOP that another thread takes lets this one go on for a while.
                signal.pthread_kill(threading.get_ident(), self.how)

    def watch(self, owner: Any, name: str, also: Callable[[Any], None] = lambda result: None) -> None:
        """Replaces a function by itself between two steps."""
        call = getattr(owner, name)

        @functools.wraps(call)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(name)
            try:
                self.step(f"before {name.strip('_')}")
                result = call(*args, **kwargs)
                also(result)
                self.step(f"after {name.strip('_')}")
                return result
            finally:
                self._inside.remove(name)

        setattr(owner, name, watched)

    def watch_batches(self, owner: Any, name: str, batch: int) -> None:
        """A generator of batches: a step at each, and smaller ones, so that there is a window between them."""
        call = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Iterator[Any]:
            for messages in call(*args, **{**kwargs, "batch": batch}):
                self.step(f"read a batch in {name}")
                yield messages

        setattr(owner, name, watched)


class _MortalProducer:
    """A producer that passes every call on, with a step before and after."""

    def __init__(self, producer: Any, countdown: Countdown) -> None:
        self._producer = producer
        for name in PRODUCER_STEPS:
            setattr(self, name, getattr(producer, name))
            countdown.watch(self, name, also=self._at_the_broker if name == "produce" else lambda result: None)

    def _at_the_broker(self, _: Any) -> None:
        self._producer.flush()

    def __len__(self) -> int:
        return len(self._producer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._producer, name)


def _become_mortal(nth: int, within: Iterable[str], at: str, how: int, report: Path) -> None:
    import stream.consume
    import stream.restore
    from state.partition_store import PartitionStore
    from stream.assignment import Assignment
    from stream.bundle_switch import BundleSwitch
    from stream.intake import Intake
    from stream.worker import Worker

    countdown = Countdown(nth, within, at, how, report)
    make_producer = stream.consume._producer
    stream.consume._producer = lambda *args: _MortalProducer(make_producer(*args), countdown)
    for owner, names in (
        (stream.consume, ("_producer", "restore", "_beside", "prune")),
        (stream.restore, ("group_offsets", "start_offsets", "end_offsets", "_open", "_where_to_go_on")),
        (shutil, ("rmtree",)),
        (PartitionStore, ("__init__", "apply", "apply_beside", "close", "begin_grouping", "group", "sweep")),
        (BundleSwitch, ("make_ready", "adopt", "begin", "_choose")),
        (Assignment, ("assigned", "revoked")),
        (Intake, ("start", "stop")),
        (
            Worker,
            (
                "_collect",
                "_begin_commit",
                "_end_commit",
                "_on_assign",
                "_on_revoke",
                "_settle",
                "_close",
                "_switch_over",
            ),
        ),
    ):
        for name in names:
            countdown.watch(owner, name)
    countdown.watch_batches(stream.restore, "read_partition", batch=7)


def _serve() -> None:
    import stream.cli
    import stream.consume
    import stream.restore
    import stream.worker  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _live(**request)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _live(arguments: list[str], log: str, nth: int, within: list[str], at: str, how: int, report: str) -> None:
    """The life of a child; never returns."""
    status = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(out, 2)
        _become_mortal(nth, within, at, how, Path(report))
        sys.argv = ["tldr-stream", *arguments]
        from stream.cli import main as program

        program()
        status = 0
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class Life(NamedTuple):
    """How a worker ended. status  0: it got through, -9: killed at the last of its `steps`."""

    status: int
    steps: list[str]


class Nursery:
    """The process from which mortal workers are forked, and what a test asks of it. One worker at a time."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        )
        self.pid = 0

    def begin(
        self, arguments: list[str], log: Path, *, nth: int = 0, within: Iterable[str] = (), at: str = "",
        how: int = signal.SIGKILL,
    ) -> None:  # fmt: skip
        """Starts a worker; it kills itself at its nth step (see Countdown). One that a failed test left behind is killed."""
        if self.pid:
            self.send_signal(signal.SIGKILL)
            self.end()
        self._report = log.with_suffix(".steps")
        self._report.unlink(missing_ok=True)
        request = {
            "arguments": arguments, "log": str(log), "nth": nth, "within": list(within), "at": at,
            "how": how, "report": str(self._report),
        }  # fmt: skip
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the nursery has no pipes")
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        self.pid = int(self._process.stdout.readline())

    def end(self) -> Life:
        """Waits until the worker has ended."""
        if self._process.stdout is None:
            raise RuntimeError("the nursery has no pipes")
        status = int(self._process.stdout.readline())
        self.pid = 0
        return Life(status, self.steps)

    def send_signal(self, signum: int) -> None:
        """To the worker; one that has ended by itself says so in its status."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signum)

    @property
    def steps(self) -> list[str]:
        """The steps of the worker so far."""
        return self._report.read_text().splitlines() if self._report.exists() else []

    def run(
        self, arguments: list[str], log: Path, *, nth: int = 0, within: Iterable[str] = (), at: str = "",
        how: int = signal.SIGKILL,
    ) -> Life:  # fmt: skip
        """`begin` and `end`."""
        self.begin(arguments, log, nth=nth, within=within, at=at, how=how)
        return self.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.pid:
            self.send_signal(signal.SIGKILL)
        self._process.kill()
        self._process.wait()


if __name__ == "__main__":
    _serve()
