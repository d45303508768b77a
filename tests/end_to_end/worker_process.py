"""A worker as its user runs it: a process, its log, its exit status. Knows nothing of what the worker did."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from stream.kafka import Connection

REPOSITORY = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    **{key: value for key, value in os.environ.items() if not key.startswith("TLDR_")},
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "OPENBLAS_NUM_THREADS": "1",
}
TIMEOUT_S = 60.0


def until(condition: Callable[[], bool], what: str, timeout_s: float = TIMEOUT_S) -> float:
    """Waits for a condition; the seconds it took. Fails with `what` if it does not come."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > timeout_s:
            raise AssertionError(f"waited {timeout_s:.0f} s in vain: {what}")
        time.sleep(0.02)
    return time.monotonic() - began


def null_worker(kafka: Connection, topic: str, state: Path | str, *more: str) -> list[str]:
    """Arguments of a worker with the null model, for small inputs: 40 records a batch, a transaction each."""
    return [
        "consume", "--topic", topic, "--model", "null", "--bootstrap-servers", kafka.bootstrap_servers,
        "--state-dir", str(state), "--metrics-port", "0", "--batch-pairs", "40", "--commit-interval-s", "0",
        "--session-timeout-s", "6", *more,
    ]  # fmt: skip


class WorkerProcess:
    """`python -m stream ARGUMENTS`, its log in a file. entry  what to run in place of `-m stream`."""

    def __init__(
        self, arguments: list[str], log: Path, *, entry: tuple[str, ...] = ("-m", "stream"), **environment: str
    ) -> None:
        self.log_file = log
        with log.open("ab") as out:
            self.begins_at = out.tell()
            self.process = subprocess.Popen(
                [sys.executable, *entry, *arguments],
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=REPOSITORY,
                env=ENVIRONMENT | environment,
            )

    @property
    def log(self) -> str:
        with self.log_file.open("rb") as file:
            file.seek(self.begins_at)
            return file.read().decode(errors="replace")

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        """The exit status, once it has ended."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGUSR1)  # it writes every thread's stack into its log
            time.sleep(0.5)
            raise AssertionError(f"the worker did not end within {timeout_s:.0f} s:\n{self.log}") from None

    def finish(self) -> None:
        """Waits until the worker has left by itself, all well."""
        status = self.wait()
        assert status == 0, f"the worker left with status {status}:\n{self.log}"

    def until_it_says(self, text: str, times: int = 1, timeout_s: float = TIMEOUT_S) -> float:
        """Waits for a text in the log; the seconds it took."""

        def said() -> bool:
            log = self.log
            if log.count(text) >= times:
                return True
            assert self.running, f"the worker ended before it said {text!r}:\n{log}"
            return False

        try:
            return until(said, text, timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log}") from None

    def until_it_runs(self, partitions: int = 1) -> float:
        """Waits until so many partitions are restored and consumed."""
        return self.until_it_says(" runs from offset ", partitions)

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    def drain(self) -> None:
        """SIGTERM; it must settle and leave with status 0."""
        self.process.send_signal(signal.SIGTERM)
        self.finish()

    @property
    def partitions(self) -> int:
        """How many partitions it consumes now, as its metrics say; -1 before they are served."""
        if "metrics on port" not in self.log:
            return -1
        found = re.search(r'^tldr_partitions\{state="running"\} (\d+)', self.get("/metrics")[1], re.MULTILINE)
        return int(found[1]) if found else -1

    def get(self, path: str) -> tuple[int, str]:
        """What the worker's own HTTP server answers."""
        port = self.log.split("metrics on port ")[1].split(",")[0]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, ""


@contextmanager
def worker(
    arguments: list[str], log: Path, *, entry: tuple[str, ...] = ("-m", "stream"), **environment: str
) -> Iterator[WorkerProcess]:
    """A worker process that does not outlive the block."""
    running = WorkerProcess(arguments, log, entry=entry, **environment)
    try:
        yield running
    finally:
        if running.running:
            running.kill()


def run_command(*arguments: str, timeout_s: float = TIMEOUT_S, **environment: str) -> tuple[int, str]:
    """Runs a command to its end: status, and all that it wrote."""
    done = subprocess.run(
        [sys.executable, "-m", "stream", *arguments],
        capture_output=True, text=True, timeout=timeout_s, cwd=REPOSITORY, env=ENVIRONMENT | environment, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def refused(status: int, output: str, expected: int = 2) -> str:
    """The one line with which a command refused. Anything else (a traceback, two lines, another status) fails."""
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    assert status == expected, f"status {status}, not {expected}:\n{output}"
    assert len(errors) == 1 and lines[-1] == errors[0], output
    assert "Traceback" not in output, output
    return errors[0]
