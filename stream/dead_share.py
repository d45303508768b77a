"""The share of dead letters among the last records of a worker: what `--dlq-limit` judges before a corpus is thrown away.

A window, in the order in which the worker read its batches. What other workers, or earlier lives of this one, made of the
records just before counts too: else a supervisor that restarts a stopped worker would lead it through the whole corpus,
a window at a time. Must not know how a worker stops.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

from state.quota import Ratio
from stream.errors import Stopped
from stream.reduce import Effects
from stream.stream_view import StreamSource, read_dead_letters, whole

WINDOW_RECORDS = 2000
DEFAULT_LIMIT = Ratio(1, 5)
NO_LIMIT = Ratio(1, 1)
# Dead letters carry their images: so many offsets of their topic are read at once, newest first.
LETTERS_READ = 500


class Dead(NamedTuple):
    """Where a dead letter came from, and why it is one."""

    partition: int
    offset: int
    reason: str
    detail: str


class Stretch(NamedTuple):
    """Some records in a row, and those of them that are dead."""

    records: int
    dead: list[Dead]


class DeadShare:
    """The window. Used by one thread; records of an open transaction count at once, and no longer once it is aborted."""

    def __init__(self, limit: Ratio = DEFAULT_LIMIT, window_records: int = WINDOW_RECORDS) -> None:
        self.limit, self.window_records = limit, window_records
        self._before: list[tuple[int, int, Stretch]] = []  # committed at ms, partition, …
        self._committed: deque[Stretch] = deque()
        self._committed_records = 0
        self._sealed: list[Stretch] = []  # of a transaction that is being committed
        self._open: list[Stretch] = []
        self._open_records = self._open_dead = 0

    def remember(self, partition: int, committed_at_ms: int, stretch: Stretch) -> None:
        """What was committed of a partition before it came to this worker; the first time counts, later ones it did itself."""
        if all(number != partition for _, number, _ in self._before):
            self._before.append((committed_at_ms, partition, stretch))
            self._before.sort(key=lambda known: known[:2])

    def take(self, effects: Effects) -> None:
        """Notes what the last batch added to the effects of the open transaction."""
        dead = [
            Dead(letter.message.partition(), letter.message.offset(), letter.reason, letter.detail)
            for letter in effects.dead[self._open_dead :]
        ]
        self._open.append(Stretch(effects.records - self._open_records, dead))
        self._open_records, self._open_dead = effects.records, len(effects.dead)

    def seal(self) -> None:
        """The open transaction is being committed; what is noted from now on belongs to the next one."""
        self._sealed, self._open = self._sealed + self._open, []
        self._open_records = self._open_dead = 0

    def commit(self) -> None:
        """What was sealed is committed."""
        self._committed += self._sealed
        self._committed_records += sum(stretch.records for stretch in self._sealed)
        self._sealed = []
        while self._committed and self._committed_records - self._committed[0].records >= self.window_records:
            self._committed_records -= self._committed.popleft().records

    def abort(self) -> None:
        """What is not committed did not happen."""
        self._sealed, self._open = [], []
        self._open_records = self._open_dead = 0

    @property
    def share(self) -> Fraction | None:
        """The share of the window; None while that has too few records to be judged."""
        stretches = list(self._window())
        records = sum(stretch.records for stretch in stretches)
        dead = sum(len(stretch.dead) for stretch in stretches)
        return Fraction(dead, records) if records >= self.window_records else None

    def refuse_above_limit(self, topic: str) -> None:
        """Raises Stopped where the share is above the limit."""
        share = self.share
        if share is None or share <= self.limit.share:
            return
        stretches = list(self._window())
        records = sum(stretch.records for stretch in stretches)
        dead = sorted(letter for stretch in stretches for letter in stretch.dead)
        reason, count = Counter(letter.reason for letter in dead).most_common(1)[0]
        of_it = [letter for letter in dead if letter.reason == reason]
        first, last = of_it[0], of_it[-1]
        raise Stopped(
            f"{100 * float(share):.1f} % of the last {records:,} records would be dead letters, more than --dlq-limit "
            f"{100 * float(self.limit.share):g}%: {count:,} of them {reason}, from {topic}/{first.partition} offset "
            f"{first.offset} to {topic}/{last.partition} offset {last.offset} ({last.detail.rstrip('.')}). The open "
            "transaction was given up, nothing is lost: put the cause right and start again, or raise --dlq-limit"
        )

    def _window(self) -> Iterator[Stretch]:
        """The stretches, newest first, until they are enough."""
        records = 0
        before = (stretch for *_, stretch in reversed(self._before))
        for stretches in (reversed(self._open), reversed(self._sealed), reversed(self._committed), before):
            for stretch in stretches:
                if records >= self.window_records:
                    return
                yield stretch
                records += stretch.records


def recent_dead(source: StreamSource, partition: int, next_offset: int, read: int) -> Stretch:
    """The dead letters among the last records of a partition before `next_offset`, as far as they have not expired.

    read  how many records the stream has read of the partition
    """
    topic = source.topics.dead
    first, end = whole(source.connection, topic, [partition], committed=True)[partition]
    records = min(read, WINDOW_RECORDS)
    since = next_offset - records
    dead: list[Dead] = []
    while end > first and len(dead) < records:
        start = max(first, end - LETTERS_READ)
        letters = [seen for seen, _ in read_dead_letters(source, {partition: (start, end)})]
        dead += [
            Dead(partition, seen.offset, seen.reason, seen.detail)
            for seen in letters
            if since <= seen.offset < next_offset
        ]
        if any(seen.offset < since for seen in letters):
            break
        end = start
    return Stretch(records, dead)
