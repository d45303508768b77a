"""`python -m stream ARGUMENTS`, but it says when the first record came and, at its end, where its time went.

Nothing of the program is changed: six calls are passed through and timed. `engine.py` reads what is printed.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

import stream.worker
from state.partition import Partition
from state.partition_store import PartitionStore
from stream.intake import Intake
from stream.worker import Worker

SECONDS: dict[str, float] = {}


def timed(owner: Any, name: str, what: str) -> None:
    call = getattr(owner, name)

    def through(*args: Any, **kwargs: Any) -> Any:
        began, began_cpu = time.perf_counter(), time.thread_time()
        try:
            return call(*args, **kwargs)
        finally:
            SECONDS[what] = SECONDS.get(what, 0.0) + time.perf_counter() - began
            SECONDS[f"{what} cpu"] = SECONDS.get(f"{what} cpu", 0.0) + time.thread_time() - began_cpu

    setattr(owner, name, through)


def main() -> None:
    receive = Intake.poll

    def poll(intake: Intake, wait_s: float) -> list[Any]:
        came = receive(intake, wait_s)
        if len(intake):
            print("first", time.time(), time.process_time(), flush=True)
            Intake.poll = receive  # type: ignore[method-assign]
        return came

    Intake.poll = poll  # type: ignore[method-assign]
    for step in ("seal", "send", "write", "keep"):
        timed(stream.worker, step, step)
    timed(Partition, "changes", "changes")
    timed(PartitionStore, "apply_beside", "apply")
    run = Worker.run

    def ran(worker: Worker) -> None:
        try:
            run(worker)
        finally:
            stages = {
                sample.labels["stage"]: sample.value
                for family in worker.metrics.stage_seconds.collect()
                for sample in family.samples
                if sample.name.endswith("_total")
            }
            cpu = sum(os.times()[:2])
            print("seconds", json.dumps({**SECONDS, "stages": stages, "cpu": cpu}), flush=True)

    Worker.run = ran  # type: ignore[method-assign, assignment]
    from stream.cli import main as program

    program()


if __name__ == "__main__":
    main()
