"""How glibc's malloc keeps what it was given back, bounded: a worker that runs for months must not grow by fragments.

Every thread of librdkafka and of the pools would have a heap of its own, and fetched buffers, freed by another thread than
the one that took them, leave holes in all of them (docs/tried.md has the figures). On another C library nothing happens.
"""

from __future__ import annotations

import ctypes
import gc
import os

# From glibc's malloc.h; mallopt takes them at any time before the threads that it shall bind are started.
_M_ARENA_MAX, _M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -8, -3, -1
ARENAS_MAX = 2


def bound_heaps() -> None:
    """Lets all threads share two heaps, unless the user has set MALLOC_ARENA_MAX. Call it before the first thread."""
    if "MALLOC_ARENA_MAX" not in os.environ and (mallopt := _function("mallopt")):
        mallopt(_M_ARENA_MAX, ARENAS_MAX)


def bound_holes(bytes_max: int) -> None:
    """Lets whatever is larger go back to the kernel when it is freed, and so much as is free at the end of a heap.

    By itself malloc keeps what is freed of a kind that it has seen, up to 32 MB each, and the holes between.
    """
    if mallopt := _function("mallopt"):
        mallopt(_M_MMAP_THRESHOLD, bytes_max)
        mallopt(_M_TRIM_THRESHOLD, bytes_max)


def give_back() -> None:
    """Gives the holes of all heaps back to the kernel; takes a few milliseconds."""
    if trim := _function("malloc_trim"):
        trim(0)


def give_all_back() -> None:
    """… and Python's own, which the items of its free lists keep; takes as long as a search for cycles."""
    gc.collect()
    give_back()


def _function(name: str) -> ctypes._NamedFuncPointer | None:
    return getattr(ctypes.CDLL(None), name, None)
