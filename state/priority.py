"""An id's two numbers: the 64-bit hash by which it is known, and the 64-bit priority by which a full cell chooses.

Pure arithmetic: knows neither Kafka nor LMDB, and draws no dice. Both numbers are halves of one keyed BLAKE2b, so that
they are independent of each other, and nobody who lacks the seed can choose an id that survives.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

_halves = struct.Struct(">QQ").unpack


def id_key(seed: int) -> hashlib.blake2b:
    """The keyed hash of a stream, made once: copying it costs two thirds of making it anew for each id.

    seed  0 ≤ seed < 2^64
    """
    return hashlib.blake2b(digest_size=16, key=seed.to_bytes(8, "big"))


def hash_id(key: hashlib.blake2b, pair_id: str) -> tuple[int, int]:
    """(known hash, priority) of an id, both in [0, 2^64).

    key  what `id_key` made; it is not changed.
    """
    digest = key.copy()
    digest.update(pair_id.encode())
    return _halves(digest.digest())


def hash_ids(key: hashlib.blake2b, names: Iterable[bytes]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """`hash_id` of many ids, given as UTF-8: a column of known hashes and one of priorities."""
    digests = []
    copy = key.copy
    for name in names:
        digest = copy()
        digest.update(name)
        digests.append(digest.digest())
    both = np.frombuffer(b"".join(digests), ">u8").astype(np.uint64)
    return both[::2], both[1::2]
