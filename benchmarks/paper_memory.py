"""The memory that `paper` takes for encoding in bfloat16, counted without a GPU: live bytes of every tensor, none computed.

    python benchmarks/paper_memory.py --batch 256

Tensors without storage ("meta") run through the network, and what is alive at once is added up. Attention is counted with
its whole score matrix, which a GPU's kernels do not keep; what an allocator rounds up and CUDA itself takes are not counted.
"""

import argparse
import sys
import weakref
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.captioner import PAPER, Captioner
from models.codebook import look_up

GIB = 1 << 30


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that are alive; `peak` is the most there ever were."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=256)
    options = parser.parse_args()
    with torch.device("meta"):
        captioner = Captioner(PAPER).eval()
    captioner.encoder.bfloat16()
    weights = sum(t.nbytes for t in [*captioner.parameters(), *captioner.buffers()])
    side = PAPER.side
    with torch.inference_mode(), LiveBytes() as memory:
        pixels = torch.zeros(options.batch, 3, side, side, dtype=torch.bfloat16, device="meta")
        features = captioner.encoder(pixels)
        encoded = memory.peak
        look_up(captioner.quantiser.tokens(features.float()), captioner.quantiser.codebook.codes)
    print(
        f"paper, batch {options.batch}: weights {weights / GIB:.2f} GiB (encoder bfloat16, the rest float32), encoder "
        f"{encoded / GIB:.2f} GiB, with the look-up {memory.peak / GIB:.2f} GiB at once; together "
        f"{(weights + memory.peak) / GIB:.2f} GiB. Counted, not measured on a GPU."
    )


if __name__ == "__main__":
    main()
