"""`python failing_worker.py NTH consume …`: the program with a model whose captions fail at the NTH batch."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import models.null
from models.model import Picture, Vectors


class FailingModel(models.null.NullModel):
    """The null model, until its captions fail."""

    left = 0

    def caption(self, vectors: Vectors, pictures: Sequence[Picture] = ()) -> list[str]:
        FailingModel.left -= 1
        if FailingModel.left == 0:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return super().caption(vectors, pictures)


def main() -> None:
    FailingModel.left = int(sys.argv[1])
    models.null.NullModel = FailingModel  # type: ignore[misc]
    sys.argv = ["tldr-stream", *sys.argv[2:]]
    from stream.cli import main as program

    program()


if __name__ == "__main__":
    main()
