"""The memory that `bootstrap` takes, of a shard and of one five times as large: constant?

    python benchmarks/bootstrap_memory.py

The shard is the sample corpus, named as often as is asked for. With `--feature image`, which keeps 1,280 bytes a pair beside
the 98 of its index vector, and codes. Prints the most anonymous memory of the process, sampled, and of mapped files.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from snapshot_memory import run  # type: ignore[import-not-found]  # it lies beside this file

ROOT = Path(__file__).parents[1]
SHARD = str(ROOT / "corpus" / "sample" / "*.tar")
HELD_OUT = str(ROOT / "corpus" / "sample" / "sample-000002.tar")
PAIRS = 1166


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--features", nargs="+", default=["codes", "image"])
    options = parser.parse_args()
    print("feature   pairs  anonymous (MB)  mapped files (MB)  seconds")
    for feature in options.features:
        for times in options.times:
            with tempfile.TemporaryDirectory() as folder:
                began = time.monotonic()
                anonymous_mb, mapped_mb = run(
                    "bootstrap", *[SHARD] * times, "--held-out", HELD_OUT, "--captioner", str(ROOT / "bundles" / "sample"),
                    "--clusters", "8", "--feature", feature, "--out", f"{folder}/bundle",
                )  # fmt: skip
                took = time.monotonic() - began
            print(f"{feature:7}  {PAIRS * times:6,d}  {anonymous_mb:14.1f}  {mapped_mb:17.1f}  {took:7.1f}", flush=True)


if __name__ == "__main__":
    main()
