"""Settings that must stand in the environment before numpy, torch or faiss are imported. Imports none of them."""

import os

# Each of the three brings an OpenMP whose threads otherwise spin after every call and stall the other's next one by 5-15 ms.
THREAD_ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "OPENBLAS_NUM_THREADS": "1"}
# With it cuBLAS adds in the same order every time (its documentation, "Results reproducibility").
GPU_ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def set_thread_environment() -> None:
    """Sets what the user has not set."""
    for name, value in (THREAD_ENVIRONMENT | GPU_ENVIRONMENT).items():
        os.environ.setdefault(name, value)
