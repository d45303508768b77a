"""`python late_worker.py SECONDS consume …`: the program, which takes so long to fetch a bundle that is announced."""

from __future__ import annotations

import sys
import time

from models.null import NullModel


def main() -> None:
    seconds, at = float(sys.argv[1]), NullModel.at

    def late(uri: str) -> NullModel:
        time.sleep(seconds)
        return at(uri)

    NullModel.at = staticmethod(late)  # type: ignore[method-assign]
    sys.argv = ["tldr-stream", *sys.argv[2:]]
    from stream.cli import main as program

    program()


if __name__ == "__main__":
    main()
