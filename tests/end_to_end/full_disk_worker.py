"""`python full_disk_worker.py BYTES consume …`: the program on a disk that is full as soon as a file has so many bytes."""

from __future__ import annotations

import resource
import sys


def main() -> None:
    limit = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # Python ignores the signal, so writes fail with EFBIG
    sys.argv = ["tldr-stream", *sys.argv[2:]]
    from stream.cli import main as program

    program()


if __name__ == "__main__":
    main()
