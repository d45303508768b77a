"""How glibc's malloc keeps what it was given back, bounded: a worker that runs for months must not grow by fragments.

Every thread of librdkafka and of the pools would have a heap of its own, and fetched buffers, freed by another thread than
the one that took them, leave holes in all of them (docs/tried.md has the figures). On another C library nothing happens.
"""

from __future__ import annotations

import ctypes
import os

# From glibc's malloc.h; mallopt takes them at any time before the threads that it shall bind are started.
_M_ARENA_MAX = -8
ARENAS_MAX = 2


def bound_heaps() -> None:
    """Lets all threads share two heaps, unless the user has set MALLOC_ARENA_MAX. Call it before the first thread."""
    if "MALLOC_ARENA_MAX" not in os.environ and (mallopt := _function("mallopt")):
        mallopt(_M_ARENA_MAX, ARENAS_MAX)


def give_back() -> None:
    """Gives the holes of all heaps back to the kernel; takes a few milliseconds."""
    if trim := _function("malloc_trim"):
        trim(0)


def _function(name: str) -> ctypes._NamedFuncPointer | None:
    return getattr(ctypes.CDLL(None), name, None)
