"""Keys belong where Kafka's Java client would put them."""

import numpy as np
import pytest

from stream.murmur2 import _murmur2, partitions_of

# The vectors of Kafka's own UtilsTest.
KNOWN = {
    b"21": -973932308,
    b"foobar": -790332482,
    b"a-little-bit-long-string": -985981536,
    b"a-little-bit-longer-string": -1486304829,
    b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
    b"abc": 479470107,
}


def test_hashes_equal_those_of_kafkas_own_test() -> None:
    assert _murmur2(list(KNOWN)).astype(np.int32).tolist() == list(KNOWN.values())


@pytest.mark.parametrize("partition_count", [1, 2, 7])
def test_a_key_belongs_to_the_same_partition_in_any_batch(partition_count: int) -> None:
    together = partitions_of([*KNOWN, b""], partition_count)
    alone = [partitions_of([key], partition_count)[0] for key in [*KNOWN, b""]]
    assert together.tolist() == alone
    assert all(0 <= p < partition_count for p in together)
