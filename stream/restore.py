"""A partition's store, brought up to date: local store + the tail of the changelog → exactly what was last committed.

Must not know the group's life (assignment.py) nor what a record does to the store (state/).
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from state.partition import Partition
from state.partition_store import PartitionStore
from state.settings import StreamSettings
from stream.errors import DataLoss, TldrError
from stream.kafka import Connection, end_offsets, group_offsets, read_partition, start_offsets, topic_setting
from stream.logs import at
from stream.topics import StreamTopics

log = logging.getLogger(__name__)

DEFAULT_DELETE_RETENTION_MS = 24 * 3600 * 1000
# Below this a wait is ordinary (a commit's markers on their way) and not worth a line.
WAIT_NOTICE_S = 2.0
# No worker's transaction is open for longer than its time-out (10 s by default) and the broker's sweep (10 s).
HANGING_NOTICE_S = 60.0


@dataclass(frozen=True)
class Restored:
    """A partition that is ready to run, and how it became so."""

    partition: Partition
    next_offset: int  # where consuming goes on
    records: int  # changelog records replayed
    rebuilt: bool  # from nothing: no store, or one that could not be trusted
    seconds: float
    lost: int = 0  # raw offsets that the broker had deleted before they were processed
    changelog_topic: str = ""
    changelog: tuple[int, int] = (0, 0)  # the offset that the replay began with, and the one behind its end


def restore(
    connection: Connection,
    topics: StreamTopics,
    raw_topic: str,
    group: str,
    settings: StreamSettings,
    number: int,
    folder: Path,
    *,
    continue_after_loss: bool = False,
    cancelled: Callable[[], bool] = lambda: False,
) -> Restored | None:
    """Opens the store of partition `number` and replays the changelog from the store's position to its true end.

    The end is read *uncommitted*: a transaction whose markers are still on their way, or that a dead worker left open, is
    waited for. Input that is gone is an error, or with `continue_after_loss` counted as lost and passed over.
    Returns None if cancelled. Raises TldrError (other settings, a reset group offset), DataLoss (input that
    was not processed is gone, or the beginning of the changelog), StateError.
    """
    began = time.monotonic()
    # First: it waits for transactions with pending offsets, whose records then lie before the end that is asked for next.
    committed = group_offsets(connection, group, raw_topic, [number]).get(number)
    first = start_offsets(connection, topics.changelog, [number])[number]
    end = end_offsets(connection, topics.changelog, [number], committed=False)[number]
    store, rebuilt = _open(connection, topics, number, folder, first, end)
    try:
        start = max(store.changelog_position or 0, first)
        replayed = 0
        notice = _Notice(connection, topics.changelog, number, end)
        for messages in read_partition(
            connection, topics.changelog, number, start, end, batch=10_000, cancelled=cancelled, waiting=notice.waiting
        ):
            store.apply([(m.key(), m.value()) for m in messages], messages[-1].offset() + 1)
            replayed += len(messages)
        if cancelled():
            store.close()
            return None
        if first > 0 and store.settings() is None:
            raise DataLoss(
                f"{topics.changelog}/{number} begins at offset {first}: what the stream had written before was deleted, so "
                "its state cannot be rebuilt from it. Start a worker on a disk that still has a newer store, or use another "
                "--stream"
            )
        if (store.changelog_position or 0) < end:
            # A marker or an aborted record may end the changelog. A store that stands behind it is up to date however old.
            store.apply([], end)
        partition = Partition(store, settings, number)
        next_offset = _where_to_go_on(connection, raw_topic, group, number, committed, partition, continue_after_loss)
        lost = 0
        if partition.next_offset is not None and next_offset > partition.next_offset:
            lost = next_offset - partition.next_offset
            partition.skip(next_offset)
        took_s = time.monotonic() - began
        return Restored(partition, next_offset, replayed, rebuilt, took_s, lost, topics.changelog, (start, end))
    except BaseException:
        store.close()
        raise


class _Notice:
    """Says what a restore waits for, once it takes longer than a moment, and what to do once it takes too long."""

    def __init__(self, connection: Connection, topic: str, partition: int, end: int) -> None:
        self.bootstrap_servers = connection.bootstrap_servers
        self.topic, self.partition, self.end = topic, partition, end
        self.since: float | None = None
        self.said = 0.0  # the longest wait that was told of

    def waiting(self, position: int) -> None:
        self.since = self.since or time.monotonic()
        waited_s = time.monotonic() - self.since
        if waited_s > WAIT_NOTICE_S and not self.said:
            self.said = WAIT_NOTICE_S
            log.info(
                "%s/%d: waiting at offset %d of %d for an open transaction to end (its worker's transaction time-out)",
                self.topic, self.partition, position, self.end,
                extra=at("waiting", self.topic, {self.partition: (position, self.end)}),
            )  # fmt: skip
        if waited_s > HANGING_NOTICE_S and self.said < HANGING_NOTICE_S:
            self.said = HANGING_NOTICE_S
            log.warning(
                "%s/%d: still waiting at offset %d for a transaction that nobody seems to end. If its producer is gone, the "
                "broker has lost the transaction's marker (docs/reference.md, A transaction that hangs): "
                "`kafka-transactions.sh --bootstrap-server %s abort --topic %s --partition %d --start-offset %d` ends it",
                self.topic, self.partition, position, self.bootstrap_servers, self.topic, self.partition, position,
                extra=at("hanging", self.topic, {self.partition: (position, self.end)}),
            )  # fmt: skip


def _open(
    connection: Connection, topics: StreamTopics, number: int, folder: Path, first: int, end: int
) -> tuple[PartitionStore, bool]:
    """The local store, or an empty one where the local one is missing or too old to be brought up to date."""
    existed = folder.exists()
    store = PartitionStore(folder)
    position = store.changelog_position
    if position is None:
        return store, True
    why = None
    if position < first:
        why = f"it stands at offset {position} and the changelog begins at {first}"
    elif position > end:
        why = f"it stands at offset {position} and the changelog ends at {end}: the topic was recreated"
    else:
        kept_ms = int(topic_setting(connection, topics.changelog, "delete.retention.ms") or DEFAULT_DELETE_RETENTION_MS)
        committed = store.position()
        age_ms = time.time() * 1000 - (committed.wall_clock_ms if committed else 0)
        # A tombstone that the cleaner has taken away since would never reach this store.
        if position < end and age_ms > kept_ms:
            why = f"it is {age_ms / 3.6e6:.0f} h old and the changelog keeps tombstones for {kept_ms / 3.6e6:.0f} h"
    if why is None:
        return store, not existed
    log.warning(
        "partition %d: rebuilding the local store from the changelog, since %s", number, why,
        extra=at("rebuild", topics.changelog, {number: (first, end)}),
    )  # fmt: skip
    store.close()
    shutil.rmtree(folder)
    return PartitionStore(folder), True


def _where_to_go_on(
    connection: Connection,
    raw_topic: str,
    group: str,
    number: int,
    committed: int | None,
    partition: Partition,
    continue_after_loss: bool,
) -> int:
    """The next input offset. The changelog is the truth; the group's offset must agree with it or be absent."""
    first = start_offsets(connection, raw_topic, [number])[number]
    end = end_offsets(connection, raw_topic, [number], committed=False)[number]
    known = partition.next_offset
    if committed is not None and committed != known:
        raise TldrError(
            f"{raw_topic}/{number}: group {group} stands at offset {committed}, the stream's changelog at "
            f"{'nothing' if known is None else known}; offsets were reset by hand. Put the group right with "
            f"`kafka-consumer-groups.sh --bootstrap-server {connection.bootstrap_servers} --group {group} --topic "
            f"{raw_topic}:{number} --reset-offsets --to-offset {known or first} --execute`, or start another --stream"
        )
    if known is None:
        return first
    if known < first:
        lost = (
            f"{raw_topic}/{number}: the stream goes on at offset {known}, but the broker has nothing before {first} "
            f"(retention): {first - known} offsets are lost"
        )
        if not continue_after_loss:
            raise DataLoss(
                f"{lost}. Lengthen the topic's retention, and go on without them with --on-data-loss continue"
            )
        log.error(
            "%s; going on without them (--on-data-loss continue)", lost,
            extra=at("data loss", raw_topic, {number: (known, first - 1)}),
        )  # fmt: skip
        return first
    if known > end:
        raise DataLoss(
            f"{raw_topic}/{number}: the stream goes on at offset {known}, but the topic ends at {end}: it was truncated "
            "or recreated; use another --stream"
        )
    return known


class Cancel:
    """A flag that a restore looks at between two reads."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def __call__(self) -> bool:
        return self._event.is_set()

    def set(self) -> None:
        self._event.set()

    def wait(self, timeout_s: float) -> bool:
        """Waits for the flag; whether it is set."""
        return self._event.wait(timeout_s)
