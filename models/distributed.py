"""Several processes that train one captioner, as torchrun starts them. Without it, everything here is the identity."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from models.errors import ShapeError

# The others wait at a barrier while the first reads the corpora, which may take hours; torch's own default is half an hour.
PATIENCE = timedelta(days=2)


@contextmanager
def joined() -> Iterator[None]:
    """Joins the processes that torchrun has started with this one (its environment says so), and leaves them at the end.

    Raises ShapeError for more processes than GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    gpu = torch.cuda.is_available()
    if gpu:
        if int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
            raise ShapeError(
                f"{os.environ['LOCAL_WORLD_SIZE']} processes for {torch.cuda.device_count()} GPU(s): give torchrun "
                "--nproc-per-node as many as there are, or hide them with CUDA_VISIBLE_DEVICES= to train on CPUs"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if gpu else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process; 0 is the one that reads the corpora and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes train."""
    return dist.get_world_size() if dist.is_initialized() else 1


def summed(tensor: Tensor) -> Tensor:
    """The sum of all processes' tensors, in each of them."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def wait() -> None:
    """Until every process has come here."""
    if dist.is_initialized():
        dist.barrier()
