"""What known ids cost as they grow: seconds to add and to look up, bytes on disk, anonymous memory.

    python benchmarks/known_ids.py [--ids 2500000] [--transaction 10000]

One partition; as many random ids a transaction as 40,000 records a second on four partitions make. Each id is looked up before
it is added, as a worker does.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import lmdb
import numpy as np

from state.known_ids import KnownIds


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--ids", type=int, default=2_500_000)
    options.add_argument("--transaction", type=int, default=10_000)
    options.add_argument("--directory", type=Path)
    given = options.parse_args()
    dice = np.random.default_rng(1)
    steps = {given.ids // 100, given.ids // 10, given.ids}
    print(f"{'ids':>11} {'look-up':>9} {'add':>9} {'slowest':>9}   {'disk':>6} {'anonymous':>10}")
    print(f"{'':>11} {'µs an id':>9} {'µs an id':>9} {'s':>9}   {'MB':>6} {'MB':>10}")
    with (
        tempfile.TemporaryDirectory(dir=given.directory) as folder,
        lmdb.open(folder, map_size=1 << 34, max_dbs=1) as env,
    ):
        known, count = KnownIds(env), 0
        sought, added = [0.0], [0.0]
        before = anonymous_mb()
        while count < given.ids:
            names = dice.integers(0, 1 << 64, given.transaction, dtype=np.uint64)
            began = time.process_time()
            with env.begin(buffers=True) as view:
                known.seen_in(view).offsets_of(names)
            sought.append(time.process_time() - began)
            offsets, none = np.full(len(names), count, np.uint64), np.empty(0, np.uint64)
            began = time.process_time()
            with env.begin(write=True) as txn:
                known.put(txn, [(names, offsets)], none)
            added.append(time.process_time() - began)
            count += given.transaction
            if count in steps:
                disk = (Path(folder) / "data.mdb").stat().st_blocks * 512 / 1e6
                print(
                    f"{count:11,d} {per_id(sought, given.transaction):9.2f} {per_id(added, given.transaction):9.2f} "
                    f"{max(added):9.2f}   {disk:6.0f} {anonymous_mb() - before:10.1f}"
                )


def per_id(seconds: list[float], ids: int) -> float:
    """Of the newest tenth of the transactions, merges included."""
    newest = seconds[-max(1, len(seconds) // 10) :]
    return 1e6 * sum(newest) / len(newest) / ids


def anonymous_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise SystemExit("this kernel tells no RssAnon")


if __name__ == "__main__":
    main()
