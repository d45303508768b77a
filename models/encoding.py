"""Pixels → features → index vectors, always at one padded batch shape.

The same image then gives the same bits wherever it stands in a batch and however full the batch is: libraries choose
their kernels by shape, so a fixed shape is a fixed computation. tests/models/test_encoding.py holds it to that.
The lite encoder on a CPU goes further: it and the look-up are run image by image, by one thread each (models/lite_graph.py).
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.captioner import Captioner
from models.codebook import look_up
from models.device import fingerprint
from models.errors import ShapeError
from models.lite_encoder import LiteEncoder
from models.lite_graph import LiteGraph
from models.model import Pixels

GPU_BATCH = 256  # a vision transformer in bfloat16: 2.1 GiB counted at the paper's size (benchmarks/paper_memory.py)
BATCH = 16  # two cores are as fast as with 32, and half as much padding is computed for the last images of a commit


class PaddedEncoder:
    """Encoder and quantiser of a captioner at one padded batch shape, (batch, 3, S, S)."""

    def __init__(
        self, captioner: Captioner, device: torch.device, batch: int | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """batch, dtype  of the encoder; by default what `serving_shape` says. The look-up is computed in float32."""
        usual_batch, usual_dtype = serving_shape(captioner, device)
        self.batch = batch or usual_batch
        self.dtype = dtype or usual_dtype
        self.device = device
        self.side = captioner.config.side
        self.tokens = captioner.config.tokens
        self.quantiser = captioner.quantiser.to(device).eval()
        self._width = captioner.config.feature_width
        # Where the pixels of a batch are put together; a GPU copies them from locked memory by itself.
        gpu = device.type == "cuda"
        self._block = torch.zeros(self.batch, self.side, self.side, 3, dtype=torch.uint8, pin_memory=gpu)
        self._copied = torch.cuda.Event() if gpu else None
        self._graph: LiteGraph | None = None
        if isinstance(captioner.encoder, LiteEncoder) and device.type == "cpu":
            self._graph = LiteGraph(captioner.encoder, self.quantiser, self.side, torch.get_num_threads())
        else:
            # Not traced: that gives transformers' vision transformer an attention mask of ones, and so the slow kernels of
            # attention (on an H200 84 ms instead of 39 for 256 images).
            self._encoder = captioner.encoder.to(device, self.dtype).eval().to(memory_format=torch.channels_last)

    def fingerprint(self) -> dict[str, str]:
        """What can change the last bits of the features, and so an index vector, on this machine."""
        return fingerprint(self.device, self.batch, self.dtype, by_threads=self._graph is None)

    @torch.inference_mode()
    def features(self, pixels: Sequence[Pixels]) -> NDArray[np.float32]:
        """(n, L, F) of n images."""
        parts = [block[:count].cpu().numpy() for block, count in self._blocks(pixels)]
        return np.concatenate(parts) if parts else np.empty((0, self.tokens, self._width), np.float32)

    @torch.inference_mode()
    def vectors(self, pixels: Sequence[Pixels]) -> NDArray[np.uint16]:
        """(n, L) index vectors of n images."""
        if self._graph is not None:
            self._refuse_other_sizes(pixels)
            parts = [codes[None].astype(np.uint16) for codes in self._graph.codes(pixels)]
        else:
            codebook = self.quantiser.codebook.codes
            parts = [
                look_up(tokens, codebook)[:count].cpu().numpy().astype(np.uint16)
                for tokens, count in self._tokens(pixels)
            ]
        return np.concatenate(parts) if parts else np.empty((0, self.tokens), np.uint16)

    @torch.inference_mode()
    def image_tokens(self, pixels: Sequence[Pixels]) -> Iterator[Tensor]:
        """(b, L, D) tokens of the images before the look-up, b ≤ batch at a time: what `authors` captions from."""
        for tokens, count in self._tokens(pixels):
            yield tokens[:count]

    def _tokens(self, pixels: Sequence[Pixels]) -> Iterator[tuple[Tensor, int]]:
        for block, count in self._blocks(pixels):
            yield self.quantiser.tokens(block), count

    def _blocks(self, pixels: Sequence[Pixels]) -> Iterator[tuple[Tensor, int]]:
        """Features (batch, L, F) on the device, and how many of them are of images and not padding."""
        self._refuse_other_sizes(pixels)
        for start in range(0, len(pixels), self.batch):
            part = pixels[start : start + self.batch]
            if self._graph is not None:
                block = torch.zeros(self.batch, self.tokens, self._width)
                block[: len(part)] = torch.from_numpy(np.stack(self._graph.features(part)))
            else:
                block = self._encoder(self._padded(part)).float()
            yield block, len(part)

    def _refuse_other_sizes(self, pixels: Sequence[Pixels]) -> None:
        expected = (self.side, self.side, 3)
        if wrong := [p.shape for p in pixels if p.shape != expected]:
            raise ShapeError(f"pixels of shape {wrong[0]} for an encoder of {expected}")

    def _padded(self, pixels: Sequence[Pixels]) -> Tensor:
        if self._copied is not None:
            self._copied.synchronize()
        block = self._block.numpy()
        np.stack(pixels, out=block[: len(pixels)])
        block[len(pixels) :] = 0
        there = self._block.to(self.device, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        # (B, S, S, 3) seen as (B, 3, S, S) is the channels-last layout that convolutions like best
        return there.permute(0, 3, 1, 2).to(self.dtype)


def serving_shape(captioner: Captioner, device: torch.device) -> tuple[int, torch.dtype]:
    """(batch, number format) of the encoder on this device: vision transformers in bfloat16 where a GPU computes it."""
    if device.type != "cuda":
        return BATCH, torch.float32
    low = not isinstance(captioner.encoder, LiteEncoder) and torch.cuda.is_bf16_supported()
    return GPU_BATCH, torch.bfloat16 if low else torch.float32
