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
from state.partition import Partition
from state.partition_store import PartitionStore
from state.priority import hash_id, id_key
from state.quota import Ratio
from state.settings import StreamSettings

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
            span = range(start, min(start + batch, len(ids)))
            with timed("hash and look up before decoding"):
                hashes = [hash_id(key, ids[offset]) for offset in span]
                partition.look_up([known for known, _ in hashes])
                for offset, (known, _) in zip(span, hashes, strict=True):
                    partition.fate_if_seen(known, offset)
            with timed("decide"):
                for offset in span:
                    both = hashes[offset - start]
                    partition.decide(offset, ids[offset], clusters[offset], 0.5, vectors[offset % 10_000], both)
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
