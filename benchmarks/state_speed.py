"""How fast the state of one partition decides, commits and restores, without Kafka and without a model.

python benchmarks/state_speed.py [--pairs 400000] [--clusters 3000] [--cap N] [--window N] [--directory DIR]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from state.changelog import Record
from state.partition import Kind, Partition, Rows
from state.partition_store import PartitionStore
from state.priority import hash_ids, id_key
from state.quota import Ratio
from state.settings import StreamSettings

DECIDED_TOGETHER = 500  # about a partition's share of a batch with the null model

SECONDS: dict[str, float] = {}  # on the wall clock
CPU: dict[str, float] = {}  # of this process: what a busy machine does not change much


@contextmanager
def timed(what: str) -> Iterator[None]:
    start, cpu = time.perf_counter(), time.process_time()
    yield
    SECONDS[what] = SECONDS.get(what, 0.0) + time.perf_counter() - start
    CPU[what] = CPU.get(what, 0.0) + time.process_time() - cpu


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--pairs", type=int, default=400_000)
    options.add_argument("--batch", type=int, default=50_000, help="pairs in a transaction (one second's worth)")
    options.add_argument("--clusters", type=int, default=3000)
    options.add_argument("--tokens", type=int, default=196)
    options.add_argument("--cap", type=int)
    options.add_argument("--window", type=int)
    options.add_argument("--directory", type=Path, help="where the stores lie; default: a temporary directory")
    given = options.parse_args()
    settings = StreamSettings(
        partition_count=1, raw_topic_id="bench", seed=1, ratio=Ratio(1, 4), cell_cap=given.cap,
        dedupe_window=given.window, gate=None, rule="paper", space="bench", tokens=given.tokens,
    )  # fmt: skip
    dice = np.random.default_rng(1)
    clusters = dice.integers(0, given.clusters, given.pairs).tolist()
    vectors = dice.integers(0, 3000, (10_000, given.tokens), dtype=np.uint16)
    ids = [f"https://example.org/{i:09d}.jpg" for i in range(given.pairs)]
    with tempfile.TemporaryDirectory(dir=given.directory) as folder:
        log = fill(Path(folder) / "filled", settings, given.batch, ids, clusters, vectors)
        same = restore(Path(folder) / "restored", log, Path(folder) / "filled")
    pairs, entries = given.pairs, sum(1 for key, value in log if key[:1] == b"E" and value)
    for clock in (SECONDS, CPU):
        clock["decide + changes + commit"] = sum(clock[what] for what in ("decide", "changes", "commit"))
    print(f"{pairs:,} pairs, {given.clusters} cells, 1/4 kept, {given.tokens} codes, {given.batch:,} a transaction")
    print(f"{'step':<36}{'seconds':>9}{'pairs/s':>12}{'CPU s':>9}{'pairs/CPU s':>13}")
    for what, seconds in SECONDS.items():
        print(f"{what:<36}{seconds:>9.2f}{pairs / seconds:>12,.0f}{CPU[what]:>9.2f}{pairs / CPU[what]:>13,.0f}")
    restored = entries + pairs
    print(
        f"restored: {entries:,} entries and {pairs:,} known ids, {restored / SECONDS['restore']:,.0f} of both a second "
        f"({restored / CPU['restore']:,.0f} a CPU second), {sum(len(value or b'') for _, value in log) / 1e6:,.0f} MB, "
        f"same store: {same}"
    )


def fill(
    path: Path,
    settings: StreamSettings,
    batch: int,
    ids: list[str],
    clusters: list[int],
    vectors: np.ndarray[tuple[int, int], np.dtype[np.uint16]],
) -> list[Record]:
    log: list[Record] = []
    key = id_key(settings.seed)
    with PartitionStore(path) as store:
        partition = Partition(store, settings, 0)
        partition.adopt("bundle", settings.space, 0)
        for start in range(0, len(ids), batch):
            end = min(start + batch, len(ids))
            for first in range(start, end, DECIDED_TOGETHER):
                offsets = np.arange(first, min(first + DECIDED_TOGETHER, end))
                its = slice(first, first + len(offsets))
                with timed("hash and look up before decoding"):
                    names = [pair_id.encode() for pair_id in ids[its]]
                    known, priorities = hash_ids(key, names)
                    firsts = partition.look_up(known)
                with timed("decide"):
                    kinds, itms = np.full(len(offsets), Kind.PAIR, np.uint8), np.full(len(offsets), 0.5, np.float32)
                    partition.decide_all(
                        Rows(
                            offsets, names, kinds, firsts, known, priorities, np.array(clusters[its], np.int32), itms,
                            vectors[offsets % len(vectors)],
                        )
                    )  # fmt: skip
            with timed("changes"):
                log += partition.changes("bench", 0)
            with timed("commit"):
                partition.commit(len(log))
    return log


def restore(path: Path, log: list[Record], filled: Path, batch: int = 20_000) -> bool:
    with PartitionStore(path) as store, PartitionStore(filled) as other:
        with timed("restore"):
            for start in range(0, len(log), batch):
                store.apply(log[start : start + batch], min(start + batch, len(log)))
        return all(a == b for a, b in zip(store.items(), other.items(), strict=True))


if __name__ == "__main__":
    main()
