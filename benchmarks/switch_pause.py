"""For how long a switch of the bundle keeps a capped partition from deciding: with ten thousand entries and with a million.

    python benchmarks/switch_pause.py [--entries 10000 1000000] [--switches 5] [--out benchmarks/switch_pause.json]

The state's part of it, on a real store and with the null model's clusters: entries are grouped beside the stream (not in the
pause), a commit adds some that are not grouped yet, and then the clock runs over what the worker's loop does between two
batches: the rest is grouped in memory, the epoch begins, its changelog records are made and stored. Kafka's part, one
transaction of two small records, does not know how many entries there are. Also told, since it comes with a switch: the first
batches afterwards, which load their cells' heaps anew, against those before.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from models.null import NullModel
from state.partition import Kind, Partition, Rows
from state.partition_store import PartitionStore
from state.priority import hash_ids, id_key
from state.quota import Ratio
from state.regroup import Regrouping, sweep
from state.settings import StreamSettings

CLUSTERS = 3000
CAP = 500
BATCH_PAIRS = 256
COMMIT_PAIRS = 2000  # that come between the last look beside the stream and the switch


class Bench:
    """A partition with so many entries in its store."""

    def __init__(self, folder: Path, entries: int, tokens: int) -> None:
        self.tokens, self.next = tokens, 0
        self.settings = StreamSettings(1, "bench", 1, Ratio(1, 1), CAP, None, None, "none", "bench", tokens)
        self.dice = np.random.default_rng(1)
        self.store = PartitionStore(folder, map_bytes=4 << 30)
        self.partition = Partition(self.store, self.settings, 0)
        self.models = [NullModel(tokens=tokens, clusters=CLUSTERS, seed=seed) for seed in range(100)]
        self.model = self.models[0]
        self.partition.adopt(self.model.version, "bench", 0)
        self.changelog = 0
        while self.next < entries:
            self.decide(min(20_000, entries - self.next))
            self.commit()

    def decide(self, count: int) -> None:
        names = [b"https://example.org/%09d.jpg" % i for i in range(self.next, self.next + count)]
        vectors = self.dice.integers(0, 3000, (count, self.tokens), dtype=np.uint16)
        known, priorities = hash_ids(id_key(1), names)
        offsets = np.arange(self.next, self.next + count)
        self.next += count
        firsts = self.partition.look_up(known)
        itms, kinds = np.ones(count, np.float32), np.full(count, Kind.PAIR, np.uint8)
        clusters = self.model.assign(vectors)
        self.partition.decide_all(
            Rows(offsets, names, kinds, firsts, known, priorities, clusters, itms, vectors)
        )  # fmt: skip

    def commit(self) -> int:
        changes = self.partition.changes("bench", 0)
        self.changelog += len(changes)
        self.partition.commit(self.changelog)
        return sum(len(key) + len(value or b"") for key, value in changes)

    def batch_s(self) -> float:
        began = time.perf_counter()
        self.decide(BATCH_PAIRS)
        return time.perf_counter() - began

    def beside(self, step: Callable[[], bool]) -> None:
        """Steps until none is left, as the worker's thread does; the loop lets the store make room now and then."""
        while step():
            self.store.make_room()
        self.store.make_room()

    def switch(self, number: int) -> dict[str, float]:
        model, epoch = self.models[number], self.partition.epoch + 1
        before = [self.batch_s() for _ in range(5)]
        self.commit()
        beside = time.perf_counter()
        self.beside(Regrouping(self.store, epoch, model.version, model.assign).step)
        beside = time.perf_counter() - beside
        self.decide(COMMIT_PAIRS)
        self.commit()

        began = time.perf_counter()
        tail = Regrouping(self.store, epoch, model.version, model.assign, self.next).tail()
        self.partition.adopt(model.version, "bench", self.next, tail)
        written = self.commit()
        pause = time.perf_counter() - began

        self.model = model
        after = [self.batch_s() for _ in range(5)]
        self.commit()
        self.beside(Regrouping(self.store, epoch, model.version, model.assign, self.next).step)
        self.beside(lambda: sweep(self.store))
        return {
            "pause_s": pause, "changelog_bytes": written, "beside_s": beside,
            "batch_before_s": statistics.median(before), "first_batch_after_s": after[0],
            "batch_after_s": statistics.median(after),
        }  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--entries", type=int, nargs=2, default=[10_000, 1_000_000])
    options.add_argument("--switches", type=int, default=5)
    options.add_argument("--tokens", type=int, default=196)
    options.add_argument("--directory", type=Path, help="where the stores lie; default: a temporary directory")
    options.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    given = options.parse_args()
    medians: dict[int, dict[str, float]] = {}
    for entries in given.entries:
        with tempfile.TemporaryDirectory(dir=given.directory) as folder:
            bench = Bench(Path(folder), entries, given.tokens)
            there = bench.store.entry_count()
            before = (Path(folder) / "data.mdb").stat().st_size
            runs = [bench.switch(number) for number in range(1, given.switches + 1)]
            grown = (Path(folder) / "data.mdb").stat().st_size / before
            bench.store.close()
        medians[entries] = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        medians[entries] |= {"store_bytes": float(before), "store_grown": round(grown, 2)}
        told = ", ".join(f"{name} {value:.4g}" for name, value in medians[entries].items())
        print(f"{there:,} entries, {given.switches} switches, medians: {told}", flush=True)
    small, large = (medians[entries] for entries in given.entries)
    ratio = large["pause_s"] / small["pause_s"]
    print(f"pause at {given.entries[1]:,} ÷ pause at {given.entries[0]:,} entries: {ratio:.2f} (at most 2 is promised)")
    result = {
        "date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1),
        "tokens": given.tokens, "clusters": CLUSTERS, "cap": CAP, "switches": given.switches, "ratio": round(ratio, 3),
        "medians": {str(entries): values for entries, values in medians.items()},
    }  # fmt: skip
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
