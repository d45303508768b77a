"""Where a training stands, on disk: weights, moving averages and the optimiser's memory, in one safetensors file.

A checkpoint is replaced as a whole, so a kill at any moment leaves the last one or the one before it. No state of a random
number generator is in it: what a step draws depends on the seed and the step's number alone.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from models.captioner import CaptionerConfig


@dataclass(frozen=True)
class Position:
    """`step` steps of `phase` are done."""

    phase: str
    step: int


def save(
    file: Path, model: nn.Module, optimiser: torch.optim.Optimizer | None, at: Position, about: CaptionerConfig
) -> None:
    """Write `file`, durably and as a whole."""
    tensors = {f"model.{name}": t.detach().cpu().contiguous() for name, t in _tensors(model)}
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    for parameter, state in (optimiser.state if optimiser else {}).items():
        tensors |= {f"optimiser.{names[parameter]}.{key}": value.cpu() for key, value in state.items()}
    metadata = {"phase": at.phase, "step": str(at.step), "config": json.dumps(about.as_dict())}
    partial = file.with_suffix(".partial")
    save_file(tensors, partial, metadata)
    with open(partial, "rb") as written:
        os.fsync(written.fileno())
    partial.replace(file)


def position(file: Path) -> tuple[Position, CaptionerConfig]:
    """How far the training is whose checkpoint `file` is, and the sizes of its captioner."""
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    return Position(about["phase"], int(about["step"])), CaptionerConfig(**json.loads(about["config"]))


def width(file: Path, name: str) -> int:
    """The first size of a tensor of the model, 0 where it has none of that name."""
    with safe_open(file, "pt") as opened:
        key = f"model.{name}"
        return int(opened.get_slice(key).get_shape()[0]) if key in set(opened.keys()) else 0


@torch.no_grad()
def load(file: Path, model: nn.Module) -> None:
    """Put the weights of `file` into `model`."""
    with safe_open(file, "pt") as opened:
        for name, tensor in _tensors(model):
            tensor.copy_(opened.get_tensor(f"model.{name}"))


def load_optimiser(file: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Give `optimiser` the memory that `file` has of its parameters."""
    with safe_open(file, "pt") as opened:
        keys = set(opened.keys())
        for name, parameter in model.named_parameters():
            prefix = f"optimiser.{name}."
            if state := {k.removeprefix(prefix): opened.get_tensor(k) for k in keys if k.startswith(prefix)}:
                step = {"step": state.pop("step")}  # AdamW keeps its count on the CPU
                optimiser.state[parameter] = step | {k: v.to(parameter) for k, v in state.items()}


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer once, those included that a bundle leaves out (the codebook's moving averages)."""
    yield from model.named_parameters()
    yield from model.named_buffers()
