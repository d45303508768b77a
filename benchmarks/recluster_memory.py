"""The memory that `recluster` takes, for each form of clustering and several --memory-mb: does the bound hold?

    python benchmarks/recluster_memory.py

Each measurement is a process of its own, which draws entries, samples a window larger than it can hold, fits it and foretells
what changes, by the command's own functions and made-up vectors. Prints the most resident memory beyond what the process had
when its modules and the live clusters were loaded (VmHWM, which the kernel keeps; nothing is missed).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from models.threads import set_thread_environment

set_thread_environment()

import numpy as np  # noqa: E402

# index vectors and clusters of the sample bundle, of one like the paper's with the sample's clusters, and with the paper's
SIZES = {
    "sample": (49, 1000, 64, 16),
    "paper, N = 16": (196, 3000, 768, 16),
    "paper, N = 3,000": (196, 3000, 768, 3000),
}
RECORD_ROWS = 2000
ENTRIES = 600_000
WINDOW = 1.1  # times what fits, so that the sample is cut


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory-mb", type=int, nargs="+", default=[128, 256, 1024])
    parser.add_argument("--forms", nargs="+", default=["raw", "pca", "histogram", "mean"])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measured(options.forms[0], options.memory_mb[0], *SIZES[options.sizes[0]])))
        return
    print("bundle            form       --memory-mb  most beyond the start (MB)  pairs sampled  entries  seconds")
    for size in options.sizes:
        for form in options.forms:
            for memory_mb in options.memory_mb:
                command = [
                    sys.executable,
                    __file__,
                    "--child",
                    "--sizes",
                    size,
                    "--forms",
                    form,
                    "--memory-mb",
                    str(memory_mb),
                ]
                one = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                print(
                    f"{size:16}  {form:9}  {memory_mb:11,d}  {one['mb']:26.0f}  {one['rows']:13,d}  {one['entries']:7,d}  "
                    f"{one['seconds']:7.1f}",
                    flush=True,
                )


def measured(form: str, memory_mb: int, tokens: int, codes: int, width: int, clusters: int) -> dict[str, float]:
    """In this process."""
    import faiss  # noqa: F401
    import scipy.optimize  # noqa: F401

    from models.clustering import fit
    from stream.allocator import bound_holes
    from stream.recent_codes import Rows
    from stream.recluster import ENTRY_BYTES, HOLES_MAX, ReclusterResult, refitted, sample_within, taken
    from stream.report_data import Draw

    dice = np.random.default_rng(0)
    codebook = dice.normal(size=(codes, width)).astype(np.float32)

    def made_up(rows: int) -> np.ndarray:
        kinds = dice.integers(50, size=rows)[:, None] * (codes // 50)
        return (kinds + dice.integers(codes // 10, size=(rows, tokens))).astype(np.uint16) % codes

    def window(rows: int) -> Iterator[Rows]:
        for first in range(0, rows, RECORD_ROWS):
            n = min(RECORD_ROWS, rows - first)
            yield Rows(
                0,
                0,
                np.arange(first, first + n),
                np.zeros(n, np.int32),
                np.zeros(n, np.float32),
                made_up(n),
                np.ones(n, bool),
            )

    def run(memory_bytes: int, rows: int, entries: int) -> dict[str, float]:
        drawn: Draw[tuple[int, bytes], np.ndarray] = Draw(memory_bytes // (4 * ENTRY_BYTES))
        for _ in range(entries):
            number = int(dice.integers(1 << 62))
            drawn.offer(
                (0, b"e" + number.to_bytes(8, "big") + b"https://example.org/0123456789.jpg"),
                number,
                one.copy,
            )
        there = taken(drawn, entries)
        del drawn
        sample = sample_within(memory_bytes, live, tokens, there, 0)
        for part in window(rows or int(WINDOW * 2 * sample.size)):
            sample.offer(part)
        result = ReclusterResult("nothing", "", "")
        _, vectors, _ = refitted(live, sample, there, 0, result)
        return {"rows": len(vectors), "entries": 0 if there is None else len(there.vectors)}

    bound_holes(HOLES_MAX)
    one = made_up(1)[0]
    live = fit(made_up(max(2 * clusters, 200)), codebook, clusters, form)
    run(2 << 30, 2 * clusters + 100, 10)  # what libraries load and keep
    began, base = time.monotonic(), resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    found = run(memory_mb << 20, 0, ENTRIES)
    return found | {"mb": resident("VmHWM") - base, "seconds": time.monotonic() - began}


def resident(what: str) -> float:
    """MB of this process, as the kernel says."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


if __name__ == "__main__":
    main()
