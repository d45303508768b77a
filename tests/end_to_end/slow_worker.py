"""`python slow_worker.py SECONDS consume …`: the program with a model that takes so long for each batch."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import models.null
from models.model import Picture, Vectors


class SlowModel(models.null.NullModel):
    """The null model, after a while."""

    seconds = 0.0

    def encode(self, pictures: Sequence[Picture]) -> Vectors:
        time.sleep(SlowModel.seconds)
        return super().encode(pictures)


def main() -> None:
    SlowModel.seconds = float(sys.argv[1])
    models.null.NullModel = SlowModel  # type: ignore[misc]
    sys.argv = ["tldr-stream", *sys.argv[2:]]
    from stream.cli import main as program

    program()


if __name__ == "__main__":
    main()
