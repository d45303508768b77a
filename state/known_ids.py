"""The exact set of known ids of a partition: 64-bit hash of the id → input offset at which it was counted.

One LMDB database of its own, always inside a transaction of the store; knows nothing of cells, windows or Kafka. It
is a class of its own because random 8-byte keys in one B-tree slow down as it grows, so that what lies behind these
three methods may change.
"""

from __future__ import annotations

from collections.abc import Iterable

import lmdb
import numpy as np


class KnownIds:
    """Hash and offset are rows of 8 big-endian bytes here, as LMDB wants them."""

    def __init__(self, env: lmdb.Environment) -> None:
        self._db = env.open_db(b"known")

    def lookup(self, txn: lmdb.Transaction[bytes], known_hash: bytes) -> bytes | None:
        """The input offset at which the id was counted, or None."""
        return txn.get(known_hash, db=self._db)

    def add(self, txn: lmdb.Transaction[bytes], counted: dict[bytes, bytes]) -> None:
        """Note hash → offset for each; a hash that is already there gets the new offset."""
        if not counted:
            return
        # in the order of the keys: neighbours share a page, which then is copied once
        hashes = np.frombuffer(b"".join(counted), "V8")
        offsets = np.frombuffer(b"".join(counted.values()), "V8")
        order = np.argsort(hashes.view(">u8"))
        with txn.cursor(self._db) as cursor:
            cursor.putmulti(zip(hashes[order].tolist(), offsets[order].tolist(), strict=True))

    def expire(self, txn: lmdb.Transaction[bytes], known_hashes: Iterable[bytes]) -> None:
        """Forget these."""
        for known_hash in sorted(known_hashes):
            txn.delete(known_hash, db=self._db)

    def count(self, txn: lmdb.Transaction[bytes]) -> int:
        """How many ids are known."""
        return int(txn.stat(self._db)["entries"])
