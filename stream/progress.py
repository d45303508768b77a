"""How far a long job is: a bar on a terminal, a line now and then elsewhere. On standard error, so that `--json` stays clean.

Must not know the jobs.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

LINE_INTERVAL_S = 10.0


class Progress:
    """One step of a job, as a context manager. total  None: nobody knows how much it is; unit  what is counted."""

    def __init__(self, what: str, total: int | None, unit: str = "records") -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done = 0
        self._began = self._said = time.monotonic()
        self._bars: Bars | None = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            self._bars = Bars(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bars.add_task(self.what, total=self.total, rate="")
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def advance(self, count: int = 1) -> None:
        """`count` more are done."""
        self.done += count
        now = time.monotonic()
        if self._bars is not None:
            rate = self.done / max(now - self._began, 1e-3)
            self._bars.update(self._bars.task_ids[0], completed=self.done, rate=f"{rate:,.0f} {self.unit}/s")
        elif now - self._said > LINE_INTERVAL_S:
            self._said = now
            of = f" of {self.total:,}" if self.total is not None else ""
            print(f"{self.what}: {self.done:,}{of} {self.unit}", file=sys.stderr, flush=True)
