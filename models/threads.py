"""Settings that must stand in the environment before numpy, torch or faiss are imported. Imports none of them."""

import os

# Each of the three brings an OpenMP whose threads otherwise spin after every call and stall the other's next one by 5-15 ms.
THREAD_ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "OPENBLAS_NUM_THREADS": "1"}
# With the first cuBLAS adds in the same order every time (its documentation, "Results reproducibility"); with the second the
# paper's model reserves 3.3 GiB of a GPU and not 5.0 (benchmarks/GPU.md).
GPU_ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


def set_thread_environment() -> None:
    """Sets what the user has not set."""
    for name, value in (THREAD_ENVIRONMENT | GPU_ENVIRONMENT).items():
        os.environ.setdefault(name, value)
