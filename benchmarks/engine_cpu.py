"""What a record of 400 B costs in CPU, by thread of the worker and of the broker: for comparing changes on a busy machine.

    python benchmarks/engine_cpu.py [--code . --code ../OTHER] [--records 300000] [--rounds 5] [--kafka KEY=VALUE]

Checkouts take turns on the same topic. A rate needs two quiet cores; CPU time needs only a median of a few rounds. With
`--kafka` a second contender is the first checkout with that setting.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# What the kernel calls the threads → what they are here.
THREADS = {
    "main": "loop", "model": "model", "send": "sender", "rdk": "librdkafka", "data-plane-kaf": "broker requests",
    "C1": "broker compiler", "C2": "broker compiler", "VM Thread": "broker GC",
}  # fmt: skip


def cpu_of(pid: int | str, other: str) -> dict[str, float]:
    """CPU seconds of a process by kind of thread."""
    used: dict[str, float] = defaultdict(float)
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            name = (task / "comm").read_text().strip()
            spent = int((task / "schedstat").read_text().split()[0]) / 1e9
        except OSError:  # it has just ended
            continue
        kinds = [kind for start, kind in THREADS.items() if name.startswith(start)]
        used[kinds[0] if kinds else other] += spent
    return dict(used)


def all_cpu(broker: str) -> dict[str, float]:
    ours = cpu_of("self", "other")
    ours["stores"] = time.process_time() - sum(ours.values())  # the threads that write them have ended
    return ours | cpu_of(broker, "broker other")


def work(broker: str, arguments: list[str]) -> None:
    """`python -m stream ARGUMENTS`, which says at its end what was used since the first record."""
    bootstrap = threading.Thread._bootstrap_inner  # type: ignore[attr-defined]

    def named(thread: threading.Thread) -> None:
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(thread.name[:15])
        bootstrap(thread)

    threading.Thread._bootstrap_inner = named  # type: ignore[attr-defined]
    Path("/proc/self/comm").write_text("main")
    from stream.intake import Intake
    from stream.worker import Worker

    receive, close = Intake.poll, Worker._close
    first: dict[str, Any] = {}

    def poll(intake: Intake, wait_s: float) -> Any:
        came = receive(intake, wait_s)
        if len(intake):
            first.update(cpu=all_cpu(broker), at=time.monotonic())
            Intake.poll = receive  # type: ignore
        return came

    def closing(worker: Worker) -> None:
        used = {kind: seconds - first["cpu"].get(kind, 0.0) for kind, seconds in all_cpu(broker).items()}
        print("used", json.dumps({**used, "wall": time.monotonic() - first["at"]}), flush=True)
        close(worker)

    Intake.poll = poll  # type: ignore
    Worker._close = closing  # type: ignore
    from stream.cli import main as program

    sys.argv[1:] = arguments
    program()


def run(code: Path, bootstrap: str, broker: int, topic: str, folder: Path, settings: list[str]) -> dict[str, float]:
    stream = f"s{time.time_ns()}"
    with tempfile.TemporaryDirectory(dir=folder) as state:
        done = subprocess.run(
            [sys.executable, str(HERE / "engine_cpu.py"), "--worker", str(broker), "consume", "--topic", topic,
             "--stream", stream, "--model", "null", "--seed", "7", "--ratio", "1/4", "--state-dir", state, "--stop-at-end",
             "--metrics-port", "0", "--bootstrap-servers", bootstrap,
             *(word for setting in settings for word in ("--kafka", setting))],
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(code)},
            cwd=code, capture_output=True, text=True, check=False,
        )  # fmt: skip
    told = [line for line in done.stdout.splitlines() if line.startswith("used ")]
    if done.returncode or not told:
        raise SystemExit(f"{code}: {done.stdout[-1000:]}{done.stderr[-3000:]}")
    used: dict[str, float] = json.loads(told[0].removeprefix("used "))
    return used


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], sys.argv[3:])
        return
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--code", type=Path, action="append", help="a checkout; several take turns")
    options.add_argument("--records", type=int, default=300_000)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--kafka", action="append", help="a setting of a second contender; several: one each")
    given = options.parse_args()
    from engine import broker_folder, delete_topics, fill  # type: ignore[import-not-found]  # it lies beside this file

    from stream.broker import local_broker
    from stream.kafka import Connection

    codes = [code.resolve() for code in given.code or [HERE.parent]]
    contenders = [(str(code), code, list[str]()) for code in codes]
    contenders += [(setting, codes[0], setting.split(",")) for setting in given.kafka or []]
    runs: dict[str, list[dict[str, float]]] = defaultdict(list)
    with broker_folder() as folder, local_broker(folder / "kafka") as broker:
        kafka = Connection(broker.bootstrap_servers)
        fill(kafka, "raw-pairs", given.records, 250)
        pid = broker._process.pid if broker._process else 0
        for turn in range(given.rounds + 1):
            for name, code, settings in contenders:
                used = run(code, broker.bootstrap_servers, pid, "raw-pairs", folder, settings)
                delete_topics(kafka)
                if turn:  # the first one warms the broker's JVM
                    runs[name].append({kind: 1e6 * spent / given.records for kind, spent in used.items()})
    kinds = sorted({kind for its in runs.values() for used in its for kind in used})
    print("| µs a record | " + " | ".join(runs) + " |")
    print("|---" * (len(runs) + 1) + "|")
    for kind in [*kinds, "ours", "broker", "all"]:
        medians = [statistics.median(_of(kind, used) for used in its) for its in runs.values()]
        print(f"| {kind} | " + " | ".join(f"{median:.2f}" for median in medians) + " |")


def _of(kind: str, used: dict[str, float]) -> float:
    """One kind of thread, or the sum of those of one side."""
    if kind in used or kind not in ("ours", "broker", "all"):
        return used.get(kind, 0.0)
    return sum(
        spent
        for name, spent in used.items()
        if name != "wall" and (kind == "all" or name.startswith("broker") == (kind == "broker"))
    )


if __name__ == "__main__":
    main()
