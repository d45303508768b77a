"""What `ingest` has already sent: one SQLite file for a source and a topic. Must not know Kafka.

An entry is written here only after the broker has acknowledged it, so what stands here is never sent again. What a killed
run had sent and not yet written stands in the topic behind `next_offsets`: the next run looks there first and hands the
ids that it found to `take_over`. Together the two leave no entry that is sent twice or not at all.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from stream.errors import TldrError
from stream.pair_sources import BadEntry, SourcePair

# 64 bits of image, 64 of id and the place: an entry that agrees in all three is the same.
HASH_BYTES = 8

TABLES = """
CREATE TABLE IF NOT EXISTS acknowledged (image BLOB, id BLOB, place TEXT, PRIMARY KEY (image, id, place)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS shards (name TEXT PRIMARY KEY, fingerprint TEXT, pairs INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS bad (place TEXT PRIMARY KEY, shard TEXT, reason TEXT, detail TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS next_offsets (partition INTEGER PRIMARY KEY, next_offset INTEGER);
CREATE TABLE IF NOT EXISTS found (id BLOB PRIMARY KEY, count INTEGER) WITHOUT ROWID;
"""
FORGET = (
    "DELETE FROM acknowledged",
    "DELETE FROM shards",
    "DELETE FROM bad",
    "DELETE FROM next_offsets",
    "DELETE FROM found",
)


class Mark(NamedTuple):
    """By what an entry is known again."""

    image: bytes
    id: bytes
    place: str

    @classmethod
    def of(cls, pair: SourcePair) -> Mark:
        return cls(short_hash(pair.image) if pair.image else b"", short_hash(pair.id.encode()), pair.place)


class FinishedShard(NamedTuple):
    """A shard whose every entry is acknowledged or bad."""

    name: str
    fingerprint: str
    pairs: int


@dataclass(frozen=True)
class RepeatedImage:
    """One image that stands under `ids` different ids, at `place` among others."""

    ids: int
    place: str


def short_hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=HASH_BYTES).digest()


class Journal:
    """Opens or makes the journal and keeps others out of it. Raises TldrError if another ingest has it open."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(file, timeout=0.0, isolation_level=None)
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode=WAL")
            # A power cut may take the last commits; next_offsets goes back with them, so they are found in the topic.
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(f"BEGIN EXCLUSIVE; {TABLES} COMMIT;")
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise TldrError(f"another ingest of this source into this topic is running (journal {file})") from error
            raise TldrError(f"cannot open the journal {file}: {error}: give --journal DIR") from error
        except (OSError, sqlite3.DatabaseError) as error:
            raise TldrError(f"cannot open the journal {file}: {error}: give --journal DIR") from error

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()

    @property
    def next_offsets(self) -> dict[int, int]:
        """For each partition the offset behind the last record of ours that stands here; empty after an orderly end."""
        return dict(self._db.execute("SELECT partition, next_offset FROM next_offsets"))

    def begin(self, end_offsets: Mapping[int, int], found: Mapping[bytes, int]) -> None:
        """Starts a run: everything of ours below `end_offsets` stands here or is in `found` (hash of an id → how often)."""
        with self._transaction():
            self._set_next_offsets(end_offsets)
            self._db.executemany(
                "INSERT INTO found VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET count = count + excluded.count",
                found.items(),
            )

    def end(self) -> None:
        """Ends a run whose every record is acknowledged and written here."""
        with self._transaction():
            self._db.execute("DELETE FROM next_offsets")
            self._db.execute("DELETE FROM found")

    def forget(self) -> None:
        """Forgets everything: all will be sent again."""
        with self._transaction():
            for statement in FORGET:
                self._db.execute(statement)

    def has(self, mark: Mark) -> bool:
        query = "SELECT 1 FROM acknowledged WHERE image = ? AND id = ? AND place = ?"
        return self._db.execute(query, mark).fetchone() is not None

    def take_over(self, mark: Mark) -> bool:
        """Whether a killed run had sent this entry without writing it here; it is written now."""
        if self._db.execute("SELECT 1 FROM found WHERE id = ? AND count > 0", (mark.id,)).fetchone() is None:
            return False
        with self._transaction():
            self._db.execute("UPDATE found SET count = count - 1 WHERE id = ?", (mark.id,))
            self._db.execute("INSERT OR IGNORE INTO acknowledged VALUES (?, ?, ?)", mark)
        return True

    def acknowledge(
        self, marks: Iterable[Mark], next_offsets: Mapping[int, int], finished: Iterable[FinishedShard] = ()
    ) -> None:
        """Writes what the broker has acknowledged, all or nothing."""
        with self._transaction():
            self._db.executemany("INSERT OR IGNORE INTO acknowledged VALUES (?, ?, ?)", marks)
            self._set_next_offsets(next_offsets)
            self._db.executemany("INSERT OR REPLACE INTO shards VALUES (?, ?, ?)", finished)

    def finished_shard(self, name: str) -> FinishedShard | None:
        row = self._db.execute("SELECT name, fingerprint, pairs FROM shards WHERE name = ?", (name,)).fetchone()
        return None if row is None else FinishedShard(*row)

    def begin_shard(self, name: str) -> None:
        """The shard is read from its start: what was bad in it shows again."""
        self._db.execute("DELETE FROM bad WHERE shard = ?", (name,))

    def add_bad(self, shard: str, entry: BadEntry) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO bad VALUES (?, ?, ?, ?)", (entry.place, shard, entry.reason, entry.detail)
        )

    def bad_reasons(self) -> dict[str, int]:
        """How many entries of the source are bad, by reason, the most frequent first."""
        return dict(self._db.execute("SELECT reason, count(*) AS n FROM bad GROUP BY reason ORDER BY n DESC, reason"))

    def bad_entries(self) -> Iterable[BadEntry]:
        """All of them, by place."""
        for row in self._db.execute("SELECT place, reason, detail FROM bad ORDER BY place"):
            yield BadEntry(*row)

    def repeated_images(self, ids_min: int, limit: int) -> list[RepeatedImage]:
        """The images that stand under the most ids, `ids_min` at least."""
        query = """SELECT count(DISTINCT id) AS ids, min(place) FROM acknowledged WHERE image != x''
                   GROUP BY image HAVING ids >= ? ORDER BY ids DESC, min(place) LIMIT ?"""
        return [RepeatedImage(*row) for row in self._db.execute(query, (ids_min, limit))]

    def _set_next_offsets(self, next_offsets: Mapping[int, int]) -> None:
        self._db.executemany("INSERT OR REPLACE INTO next_offsets VALUES (?, ?)", next_offsets.items())

    def _transaction(self) -> sqlite3.Connection:
        # Commits at the end of the block, rolls back on an error.
        self._db.execute("BEGIN")
        return self._db
