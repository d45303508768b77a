"""The known ids beside a plain dict: the newest offset of every id, whatever was merged with what."""

from __future__ import annotations

import tempfile

import lmdb
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from state.known_ids import CHUNK_IDS, KnownIds
from tests.state.test_partition import scratch

# (ids counted, ids expired) of a transaction; sizes on both sides of a chunk and of what is merged with what
transactions = st.lists(st.tuples(st.integers(0, 2 * CHUNK_IDS + 10), st.integers(0, CHUNK_IDS)), max_size=12)


def numbers(values: list[int]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.array(values, np.uint64)


@settings(max_examples=40, deadline=None)
@given(transactions, st.integers(0, 2**32))
def test_every_known_id_has_its_newest_offset_and_no_other_is_known(sizes: list[tuple[int, int]], seed: int) -> None:
    dice = np.random.default_rng(seed)
    pool = dice.integers(0, 2**64, 3 * CHUNK_IDS, dtype=np.uint64)
    known: dict[int, int] = {}
    with scratch() as folder, lmdb.open(folder, map_size=1 << 26, max_dbs=1) as env:
        ids = KnownIds(env)
        for offset, (counted, expired) in enumerate(sizes):
            gone = dice.permutation(numbers([*known]))[:expired].tolist()
            fresh = [name for name in dice.permutation(pool)[:counted].tolist() if name not in set(gone)]
            with env.begin(write=True) as txn:
                ids.put(txn, [(numbers(fresh), numbers([offset] * len(fresh)))], numbers(gone))
            known |= dict.fromkeys(fresh, offset)
            known = {name: at for name, at in known.items() if name not in set(gone)}

        with env.begin(buffers=True) as view:
            assert ids.seen_in(view).offsets_of(pool) == known
        assert ids.count() == len(known)


def test_of_many_new_ids_few_are_looked_for() -> None:
    dice = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder, lmdb.open(folder, map_size=1 << 26, max_dbs=1) as env:
        ids, sought = KnownIds(env), []
        names = dice.integers(0, 2**64, 100_000, dtype=np.uint64)
        with env.begin(write=True) as txn:
            ids.put(txn, [(names, np.zeros_like(names))], numbers([]))

        with env.begin(buffers=True) as view:
            seen = ids.seen_in(view)
            look = seen._in_run
            seen._in_run = lambda *asked: sought.append(asked) or look(*asked)  # type: ignore[method-assign, func-returns-value]
            assert seen.offsets_of(dice.integers(0, 2**64, 100_000, dtype=np.uint64)) == {}

        assert len(sought) < 1000  # 1 %; each look costs a few microseconds
