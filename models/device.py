"""Device, threads and number format of this process, decided once, and the fingerprint of what they do to floats.

Floats differ by machine, batch shape, thread count and version; those of the lite encoder on a CPU do not by thread count. A
worker compares its fingerprint with the bundle's and warns; what it computed is recorded in any case, so that nothing has to
be computed twice.
"""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import torch


def choose_device(name: str | None = None) -> torch.device:
    """`name`, or the first GPU, or the CPU. Matrix products keep full float32 precision (no TF32)."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False  # chooses kernels by time: another one on another day
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def fingerprint(
    device: torch.device, batch: int, dtype: torch.dtype = torch.float32, *, by_threads: bool = True
) -> dict[str, str]:
    """What can change the last bits of an encoder's result.

    by_threads  whether the number of threads can: not where one thread computes all of an image (models/lite_graph.py).
    """
    known = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "dtype": str(dtype).removeprefix("torch."),
        "batch": str(batch),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "tf32": str(torch.backends.cuda.matmul.allow_tf32).lower(),
        "torch": torch.__version__,
        "onnxruntime": version("onnxruntime"),
        "mkldnn": str(torch.backends.mkldnn.is_available()).lower(),
    }
    if by_threads:
        known["threads"] = str(torch.get_num_threads())
    if device.type == "cuda":
        known["cuda"] = str(torch.version.cuda)
    return known


@contextmanager
def repeatable() -> Iterator[None]:
    """A GPU computes gradients in the same order every time; its fastest kernels add in any."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def seeded(seed: int) -> Iterator[torch.Generator]:
    """A generator from `seed`; torch's global one is seeded too, and put back afterwards."""
    before = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        yield torch.Generator().manual_seed(seed)
    finally:
        torch.set_rng_state(before)
