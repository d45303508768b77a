"""Pixels → features → index vectors, always at one padded batch shape.

The same image then gives the same bits wherever it stands in a batch and however full the batch is: libraries choose
their kernels by shape, so a fixed shape is a fixed computation. tests/models/test_encoding.py holds it to that.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.captioner import Captioner
from models.codebook import look_up
from models.errors import ShapeError
from models.model import Pixels

BATCH = 16  # two cores are as fast as with 32, and half as much padding is computed for the last images of a commit


class PaddedEncoder:
    """Encoder and quantiser of a captioner, traced once at (batch, 3, S, S)."""

    def __init__(self, captioner: Captioner, device: torch.device, batch: int = BATCH) -> None:
        self.batch = batch
        self.device = device
        self.side = captioner.config.side
        self.tokens = captioner.config.tokens
        self.quantiser = captioner.quantiser.to(device).eval()
        self.encoder = _traced(captioner.encoder, batch, self.side, device)

    @torch.inference_mode()
    def features(self, pixels: Sequence[Pixels]) -> NDArray[np.float32]:
        """(n, L, F) of n images."""
        parts = [self.encoder(padded)[:count].float().cpu().numpy() for padded, count in self._padded(pixels)]
        return np.concatenate(parts) if parts else np.empty((0, self.tokens, 0), np.float32)

    @torch.inference_mode()
    def vectors(self, pixels: Sequence[Pixels]) -> NDArray[np.uint16]:
        """(n, L) index vectors of n images."""
        parts = []
        for padded, count in self._padded(pixels):
            tokens = self.quantiser.tokens(self.encoder(padded).float())
            parts.append(look_up(tokens, self.quantiser.codebook.codes)[:count].cpu().numpy().astype(np.uint16))
        return np.concatenate(parts) if parts else np.empty((0, self.tokens), np.uint16)

    def _padded(self, pixels: Sequence[Pixels]) -> Iterator[tuple[Tensor, int]]:
        for start in range(0, len(pixels), self.batch):
            part = pixels[start : start + self.batch]
            block = np.zeros((self.batch, self.side, self.side, 3), np.uint8)
            for row, one in enumerate(part):
                if one.shape != block.shape[1:]:
                    raise ShapeError(f"pixels of shape {one.shape} for an encoder of {block.shape[1:]}")
                block[row] = one
            # (B, S, S, 3) seen as (B, 3, S, S) is the channels-last layout that convolutions like best
            yield torch.from_numpy(block).to(self.device).permute(0, 3, 1, 2).float(), len(part)


def _traced(encoder: nn.Module, batch: int, side: int, device: torch.device) -> nn.Module:
    """Frozen TorchScript: twice as fast as the module itself on a CPU, since nothing of Python is left between layers."""
    example = torch.zeros(batch, side, side, 3, device=device).permute(0, 3, 1, 2)
    encoder = encoder.to(device).eval().to(memory_format=torch.channels_last)
    with torch.inference_mode():
        traced: nn.Module = torch.jit.freeze(torch.jit.trace(encoder, example, check_trace=False))
        for _ in range(2):  # the first two calls specialise; results must not change after that
            traced(example)
    return traced
