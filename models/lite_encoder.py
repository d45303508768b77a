"""The body of EfficientNet-lite0 with its batch norms folded into the convolutions: 224×224 pixels → 49 tokens of 320.

Written out here so that serving needs neither the package that carries the weights nor a pickle. Layer sizes: Tan & Le
2019 (B0 without squeeze-and-excitation, ReLU6); padding as in TensorFlow, where the weights come from.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# (repeats, kernel, stride, expansion, channels in, channels out) of each stage of lite0
STAGES = (
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)
WIDTH = 320
TOKENS = 49
SIDE = 224
BATCH_NORM_EPS = 1e-3
PIXEL_MEAN, PIXEL_SCALE = 127.0, 128.0


class FoldedConv(nn.Module):
    """Convolution with TensorFlow's "same" padding, the batch norm folded into weight and bias, ReLU6 if `clamp`."""

    def __init__(self, inp: int, out: int, kernel: int, stride: int = 1, groups: int = 1, clamp: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inp, out, kernel, stride, 0 if stride == 2 else kernel // 2, groups=groups)
        before = (kernel - 2) // 2  # stride 2 on an even side pads kernel - 2 pixels, the odd one after
        self.pad = (before, kernel - 2 - before) * 2 if stride == 2 else None
        self.clamp = clamp

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C', H / stride, W / stride)."""
        if self.pad is not None:
            x = F.pad(x, self.pad)
        x = self.conv(x)
        return F.relu6(x) if self.clamp else x


class Block(nn.Module):
    """Inverted bottleneck: widen, filter each channel, narrow; add the input where the shapes agree."""

    def __init__(self, inp: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inp * expansion
        self.expand = FoldedConv(inp, wide, 1) if expansion != 1 else nn.Identity()
        self.filter = FoldedConv(wide, wide, kernel, stride, groups=wide)
        self.narrow = FoldedConv(wide, out, 1, clamp=False)
        self.adds = stride == 1 and inp == out

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C', H / stride, W / stride)."""
        y: Tensor = self.narrow(self.filter(self.expand(x)))
        return x + y if self.adds else y


class LiteEncoder(nn.Module):
    """Pixels to the tokens of the last feature map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = FoldedConv(3, 32, 3, 2)
        blocks = []
        for repeats, kernel, stride, expansion, inp, out in STAGES:
            blocks.append(Block(inp, out, kernel, stride, expansion))
            blocks += [Block(out, out, kernel, 1, expansion) for _ in range(repeats - 1)]
        self.blocks = nn.Sequential(*blocks)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, 224, 224) float in [0, 255] → (B, 49, 320)."""
        x = self.blocks(self.stem((pixels - PIXEL_MEAN) / PIXEL_SCALE))
        return torch.flatten(x, 2).transpose(1, 2)


def fold(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published checkpoint's tensors (convolutions and batch norms apart) as those of LiteEncoder.

    Raises KeyError where the checkpoint is not an EfficientNet-lite0.
    """
    folded = _folded(state, "_conv_stem", "_bn0", "stem")
    repeats = [(block, stage) for stage in STAGES for block in range(stage[0])]
    for number, (first_of_stage, stage) in enumerate(repeats):
        source, target = f"_blocks.{number}.", f"blocks.{number}."
        if stage[3] != 1 or first_of_stage > 0:
            folded |= _folded(state, f"{source}_expand_conv", f"{source}_bn0", f"{target}expand")
        folded |= _folded(state, f"{source}_depthwise_conv", f"{source}_bn1", f"{target}filter")
        folded |= _folded(state, f"{source}_project_conv", f"{source}_bn2", f"{target}narrow")
    return folded


def _folded(state: Mapping[str, Tensor], conv: str, norm: str, target: str) -> dict[str, Tensor]:
    scale = state[f"{norm}.weight"] / torch.sqrt(state[f"{norm}.running_var"] + BATCH_NORM_EPS)
    return {
        f"{target}.conv.weight": state[f"{conv}.weight"] * scale[:, None, None, None],
        f"{target}.conv.bias": state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale,
    }
