"""The exact set of known ids of a partition: 64-bit hash of the id → input offset at which it was counted.

Random keys in one B-tree slow down as it grows, so these lie in sorted runs: a transaction adds one, and a run that is no
larger than what comes on top of it is merged with it (O'Neil et al., "The log-structured merge-tree", 1996). Of n ids there
are then at most log2(n) runs, and an id is rewritten as often. A filter in front of each run tells of almost every new id that
it is not there. Runs and filters are values of one LMDB database: what holds for the store's transactions holds for them, and
what is read of them lies in the page cache. Knows nothing of cells, windows or Kafka.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import lmdb
import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.uint64]

# An offset that no input has: the id is no longer known, whatever older runs say.
GONE = np.uint64((1 << 64) - 1)
# Hashes and offsets in one value: 16 kB.
CHUNK_IDS = 1024
# With 4 ids to a word of 64 bits and 5 bits an id, the filter takes 3 new ids of a thousand for known ones (measured).
_IDS_A_WORD = 4
_BITS_AN_ID = 5
_NUMBER = np.dtype("<u8")


class _Run(NamedTuple):
    """A sorted run. number  a higher one is newer, and says what holds; words  its filter, and how many ids it has."""

    number: int
    words: Numbers

    @property
    def ids(self) -> int:
        return int(self.words[-1])


class KnownIds:
    """Works inside the store's transactions."""

    def __init__(self, env: lmdb.Environment) -> None:
        self._env = env
        # run → filter; run and last hash of a chunk → its hashes, then its offsets
        self._db = env.open_db(b"known")

    def seen_in(self, view: lmdb.Transaction[memoryview]) -> SeenIds:
        """What a transaction that was begun with `buffers=True` shows, for as long as it lives."""
        return SeenIds(view.cursor(self._db))

    def put(self, txn: lmdb.Transaction[bytes], counted: Sequence[tuple[Numbers, Numbers]], gone: Numbers) -> None:
        """Note the offsets of hashes in place of what was there, and forget those that are `gone`. Once a transaction.

        counted  hashes and offsets; of a hash that is in several of them, or in one and in `gone`, the first says what holds
        """
        columns = [_newest_of_each([*counted, (gone, np.full(len(gone), GONE))])]
        count = len(columns[0][0])
        if not count:
            return
        # Of what is committed, since a transaction that writes has no buffers: it would copy each filter.
        with self._env.begin(buffers=True) as view, txn.cursor(self._db) as cursor:
            seen = self.seen_in(view)
            older = seen.runs
            while older and older[-1].ids <= count:
                run = older.pop()
                count += run.ids
                columns.append(seen.columns(run))
                self._delete(cursor, run)
            hashes, offsets = columns[0] if len(columns) == 1 else _newest_of_each(columns)
            if not older:
                hashes, offsets = hashes[offsets != GONE], offsets[offsets != GONE]
            self._write(cursor, older[-1].number + 1 if older else 0, hashes, offsets)

    def count(self) -> int:
        """How many ids are known. Reads them all."""
        with self._env.begin(buffers=True) as view:
            seen = self.seen_in(view)
            columns = [seen.columns(run) for run in reversed(seen.runs)]
        return int((_newest_of_each(columns)[1] != GONE).sum()) if columns else 0

    def _delete(self, cursor: lmdb.Cursor[bytes], run: _Run) -> None:
        there = cursor.set_key(_key(run.number))
        while there and int.from_bytes(cursor.key()[:4], "big") == run.number:
            there = cursor.delete()

    def _write(self, cursor: lmdb.Cursor[bytes], number: int, hashes: Numbers, offsets: Numbers) -> None:
        if not len(hashes):
            return
        # Its ids are counted in the last word, which no hash leads to.
        words = np.append(_filter(hashes), np.uint64(len(hashes)))
        chunks = [(_key(number), words.astype(_NUMBER).tobytes())]
        for start in range(0, len(hashes), CHUNK_IDS):
            rows = slice(start, start + CHUNK_IDS)
            value = np.concatenate([hashes[rows], offsets[rows]]).astype(_NUMBER).tobytes()
            chunks.append((_key(number, int(hashes[rows][-1])), value))
        cursor.putmulti(chunks, append=True)  # the newest run has the highest number


class SeenIds:
    """What a view shows of them: its runs and their filters are looked for once."""

    def __init__(self, cursor: lmdb.Cursor[memoryview]) -> None:
        self._cursor = cursor
        self.runs: list[_Run] = []  # oldest first
        at = cursor.first()
        while at:
            number = int.from_bytes(cursor.key()[:4], "big")
            self.runs.append(_Run(number, np.frombuffer(cursor.value(), _NUMBER)))
            at = cursor.set_range(_key(number + 1))

    def offsets_of(self, hashes: Numbers) -> dict[int, int]:
        """The input offsets at which those of the ids that are known were counted."""
        found: dict[int, int] = {}
        halves, bits = hashes >> np.uint64(32), _bits_of(hashes)
        for run in reversed(self.runs):
            for known_hash in hashes[_may_hold(run.words, halves, bits)].tolist():
                if known_hash not in found and (offset := self._in_run(run, known_hash)) is not None:
                    found[known_hash] = offset
        return {known_hash: offset for known_hash, offset in found.items() if offset != GONE}

    def columns(self, run: _Run) -> tuple[Numbers, Numbers]:
        """Hashes and offsets of a run."""
        chunks, cursor = [], self._cursor
        cursor.set_key(_key(run.number))
        while cursor.next() and int.from_bytes(cursor.key()[:4], "big") == run.number:
            chunks.append(_columns_of(cursor.value()))
        hashes, offsets = zip(*chunks, strict=True)
        return np.concatenate(hashes), np.concatenate(offsets)

    def _in_run(self, run: _Run, known_hash: int) -> int | None:
        cursor = self._cursor
        if not cursor.set_range(_key(run.number, known_hash)) or cursor.key()[:4] != _key(run.number):
            return None
        hashes, offsets = _columns_of(cursor.value())
        at = int(hashes.searchsorted(np.uint64(known_hash)))
        return int(offsets[at]) if hashes[at] == known_hash else None


def _key(number: int, last_hash: int | None = None) -> bytes:
    head = number.to_bytes(4, "big")
    return head if last_hash is None else head + last_hash.to_bytes(8, "big")


def _columns_of(value: bytes | memoryview) -> tuple[Numbers, Numbers]:
    both = np.frombuffer(value, _NUMBER)
    return both[: len(both) // 2], both[len(both) // 2 :]


def _newest_of_each(columns: Sequence[tuple[Numbers, Numbers]]) -> tuple[Numbers, Numbers]:
    """The columns as one, sorted by hash, from newest to oldest: the first that has a hash tells its offset."""
    hashes = np.concatenate([hashes for hashes, _ in columns])
    offsets = np.concatenate([offsets for _, offsets in columns])
    order = np.argsort(hashes)  # three times as fast as a stable one
    hashes = hashes[order]
    first = np.ones(len(hashes), bool)
    first[1:] = hashes[1:] != hashes[:-1]
    if first.all():
        return hashes, offsets[order]
    starts = np.flatnonzero(first)
    return hashes[starts], offsets[np.minimum.reduceat(order, starts)]


# A Bloom filter in which the bits of an id lie in one word (Putze, Sanders, Singler, "Cache-, hash- and space-efficient
# Bloom filters", 2007): one look at memory. The hashes are keyed and uniform: their upper half names the word, their lower
# half the bits.


def _filter(hashes: Numbers) -> Numbers:
    words = np.zeros((len(hashes) + _IDS_A_WORD - 1) // _IDS_A_WORD, np.uint64)
    # sorted hashes lead to ascending words
    places, starts = np.unique(_word_of(hashes >> np.uint64(32), len(words)), return_index=True)
    words[places] = np.bitwise_or.reduceat(_bits_of(hashes), starts)
    return words


def _may_hold(words: Numbers, halves: Numbers, bits: Numbers) -> NDArray[np.bool_]:
    held: NDArray[np.bool_] = (words.take(_word_of(halves, len(words) - 1)) & bits) == bits
    return held


def _word_of(halves: Numbers, words: int) -> NDArray[np.int64]:
    """halves  the upper 32 bits of hashes"""
    return (halves * np.uint64(words) >> np.uint64(32)).view(np.int64)


def _bits_of(hashes: Numbers) -> Numbers:
    bits = np.zeros(len(hashes), np.uint64)
    for number in range(_BITS_AN_ID):
        bits |= np.uint64(1) << (hashes >> np.uint64(6 * number) & np.uint64(63))
    return bits
