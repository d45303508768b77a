"""murmur2 as Kafka's Java client partitions with it, for many keys at once.

librdkafka can produce with it (`partitioner=murmur2_random`) but does not say where a key belongs; a worker asks that of
every record, so this works on a whole batch: one pass of numpy over the keys for every four bytes of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

TOGETHER_BYTES = 4 << 20
# org.apache.kafka.common.utils.Utils.murmur2
SEED = np.uint32(0x9747B28C)
M = np.uint32(0x5BD1E995)


def partitions_of(keys: Sequence[bytes], partition_count: int) -> NDArray[np.int64]:
    """The partition of each key, (n,) int64 in [0, partition_count): positive murmur2 modulo the count."""
    return (_murmur2(keys) & np.uint32(0x7FFFFFFF)).astype(np.int64) % partition_count


def _murmur2(keys: Sequence[bytes]) -> NDArray[np.uint32]:
    # All are made as long as the longest: one that is very long must not make many so.
    step = max(1, TOGETHER_BYTES // (max(map(len, keys), default=0) + 4))
    if len(keys) <= step:
        return _murmur2_of_some(keys)
    return np.concatenate([_murmur2_of_some(keys[at : at + step]) for at in range(0, len(keys), step)])


def _murmur2_of_some(keys: Sequence[bytes]) -> NDArray[np.uint32]:
    count = len(keys)
    lengths = np.fromiter(map(len, keys), np.int64, count)
    if not count:
        return np.empty(0, np.uint32)
    longest = int(lengths.max())
    if lengths.min() < longest:
        keys = [key.ljust(longest, b"\0") for key in keys]
    together = np.frombuffer(b"".join(keys), np.uint8)
    padded = np.zeros((count, (longest + 4) // 4 * 4), np.uint8)
    padded[:, :longest] = together.reshape(count, longest)
    # A column for each word lies in one piece.
    words = np.ascontiguousarray(padded.view("<u4").T)
    whole = lengths // 4
    all_have, some_have = int(whole.min()), int(whole.max())
    with np.errstate(over="ignore"):
        h = SEED ^ lengths.astype(np.uint32)
        for i in range(some_have):
            k = words[i] * M
            k ^= k >> np.uint32(24)
            k *= M
            k ^= h * M
            h = k if i < all_have else np.where(i < whole, k, h)
        tail = words[whole, np.arange(count)]  # padded with zeros, so its upper bytes add nothing
        h = np.where(lengths % 4 > 0, (h ^ tail) * M, h)
        h ^= h >> np.uint32(13)
        h *= M
        h ^= h >> np.uint32(15)
    return h
