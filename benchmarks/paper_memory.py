"""The memory that `paper` takes for encoding in bfloat16, counted without a GPU: live bytes of every tensor, none computed.

    python benchmarks/paper_memory.py --batch 256          # with --gpu: measured, too, where there is one

Tensors without storage ("meta") run through the network, and what is alive at once is added up. Attention is counted with
its whole score matrix, which a GPU's kernels do not keep; what an allocator rounds up and CUDA itself takes are not counted.
"""

import argparse
import sys
import weakref
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from models.threads import set_thread_environment

set_thread_environment()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from models.captioner import PAPER, Captioner  # noqa: E402
from models.codebook import look_up  # noqa: E402
from models.loaded import CaptionerParts, LoadedCaptioner  # noqa: E402
from models.matching import MatchingHead  # noqa: E402
from models.model import Picture  # noqa: E402
from models.vocabulary import CHARACTERS, SPECIAL, of_pieces  # noqa: E402

GIB = 1 << 30
VOCABULARY_OWN = len(SPECIAL) + 2 * len(CHARACTERS)


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


def counted(batch: int) -> tuple[int, int, int]:
    """Bytes of (weights, encoder at its peak, encoder and look-up at their peak); nothing is computed."""
    with torch.device("meta"):
        captioner = Captioner(PAPER).eval()
    captioner.encoder.bfloat16()
    weights = sum(t.nbytes for t in [*captioner.parameters(), *captioner.buffers()])
    with torch.inference_mode(), LiveBytes() as memory:
        pixels = torch.zeros(batch, 3, PAPER.side, PAPER.side, dtype=torch.bfloat16, device="meta")
        features = captioner.encoder(pixels)
        encoded = memory.peak
        look_up(captioner.quantiser.tokens(features.float()), captioner.quantiser.codebook.codes)
    return weights, encoded, memory.peak


def paper_parts() -> CaptionerParts:
    """A captioner of the paper's sizes, its weights random."""
    torch.manual_seed(0)
    vocabulary = of_pieces(f"word{n}" for n in range(PAPER.vocabulary - VOCABULARY_OWN))
    head = MatchingHead(PAPER.codes, PAPER.code_width, PAPER.vocabulary)
    return CaptionerParts(Captioner(PAPER).eval(), vocabulary, head)


def measured(batch: int) -> tuple[int, int]:
    """The most that PyTorch's allocator had (given out, taken from the GPU) while a worker's encoder and decoder worked on
    `batch` images, the paper's gate and quota aside: all of them are captioned. Random weights take as much as others.
    """
    parts = paper_parts()
    torch.cuda.reset_peak_memory_stats()
    model = LoadedCaptioner(parts, torch.device("cuda"))
    noise = np.random.default_rng(0).integers(256, size=(batch, PAPER.side, PAPER.side, 3), dtype=np.uint8)
    vectors = model.encode([Picture(pixels) for pixels in noise])
    model.match(vectors, ["a caption"] * batch)
    model.caption(vectors)
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--gpu", action="store_true", help="measure on the GPU of this machine, too")
    options = parser.parse_args()
    weights, encoded, together = counted(options.batch)
    print(
        f"paper, batch {options.batch}: weights {weights / GIB:.2f} GiB (encoder bfloat16, the rest float32), encoder "
        f"{encoded / GIB:.2f} GiB, with the look-up {together / GIB:.2f} GiB at once; together "
        f"{(weights + together) / GIB:.2f} GiB. Counted, not measured on a GPU."
    )
    if options.gpu:
        if not torch.cuda.is_available():
            print("error: no GPU here: leave --gpu out, or run this where there is one", file=sys.stderr)
            return 2
        given, taken = measured(options.batch)
        print(f"{torch.cuda.get_device_name()}: {given / GIB:.2f} GiB in use at most, {taken / GIB:.2f} GiB reserved")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
