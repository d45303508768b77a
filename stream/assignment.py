"""The life of the partitions that the group gives this worker: restoring → running → closed.

Must not know what is done with a running partition. `restoring` goes on in a thread while the others run; a partition is
consumed only when its store is exact. The states and the only steps between them:

    assigned ──▶ restoring ──▶ running ──▶ closed
                  ▲  │ └────── revoked ───────▲
                  └─ waiting for its bundle ──┘
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from state.partition import Partition
from stream.bundle_switch import BundleComing, BundleMissing
from stream.intake import Intake
from stream.logs import at, place
from stream.restore import Cancel, Restored

log = logging.getLogger(__name__)

RESTORES_AT_ONCE = 2
# A partition whose bundle cannot be had is tried again after this long.
BUNDLE_AGAIN_AFTER_S = 5.0
# … and one that waits for the fetch of another bundle to end.
BUNDLE_COMING_AFTER_S = 1.0

Restore = Callable[[int, Cancel], Restored | None]


class _Restoring(NamedTuple):
    future: Future[Restored | None]
    cancel: Cancel


class Assignment:
    """Which partitions this worker has, and the live state of the running ones."""

    def __init__(self, intake: Intake, restore: Restore, on_restored: Callable[[int, Restored], None]) -> None:
        self.running: dict[int, Partition] = {}
        self.joined = False  # whether the group has answered, and not taken this worker for dead since
        self._intake = intake
        self._restore = restore
        self._on_restored = on_restored
        self._restoring: dict[int, _Restoring] = {}
        self._waiting: dict[int, tuple[float, str]] = {}  # partition → when to try again, and what it waits for
        self._threads = ThreadPoolExecutor(RESTORES_AT_ONCE, "restore")

    @property
    def restoring(self) -> list[int]:
        return sorted(self._restoring)

    @property
    def waiting(self) -> list[int]:
        """Partitions that this worker declines to run, since their bundle cannot be had here."""
        return sorted(self._waiting)

    def assigned(self, partitions: list[int]) -> None:
        """The group gave us `partitions`: their stores are restored in the background."""
        self.joined = True
        self._restore_all(partitions)

    def _restore_all(self, partitions: list[int]) -> None:
        for number in partitions:
            self._begin_restore(number)
        if partitions:
            log.info(
                "assigned %s; restoring", partitions, extra={"fields": {"event": "assign", "partitions": partitions}}
            )

    def _begin_restore(self, number: int) -> None:
        cancel = Cancel()
        self._restoring[number] = _Restoring(self._threads.submit(self._restore, number, cancel), cancel)

    def start_restored(self) -> None:
        """Starts to consume the partitions whose restore has ended. Raises what their restore raised."""
        for number, (again_at, _) in list(self._waiting.items()):
            if time.monotonic() >= again_at and number not in self._restoring:
                self._begin_restore(number)
        for number, restoring in list(self._restoring.items()):
            if not restoring.future.done():
                continue
            del self._restoring[number]
            try:
                restored = restoring.future.result()
            except BundleMissing as missing:
                coming = isinstance(missing, BundleComing)
                if self._waiting.get(number, (0.0, ""))[1] != str(missing):
                    level = logging.INFO if coming else logging.ERROR
                    log.log(level, "partition %d is not run: %s; trying on", number, missing)
                again_after_s = BUNDLE_COMING_AFTER_S if coming else BUNDLE_AGAIN_AFTER_S
                self._waiting[number] = time.monotonic() + again_after_s, str(missing)
                continue
            self._waiting.pop(number, None)
            if restored is None:
                continue
            self.running[number] = restored.partition
            self._on_restored(number, restored)
            self._intake.start(number, restored.next_offset)
            first, behind = restored.changelog
            spans = {number: (first, behind - 1)} if behind > first else {}
            log.info(
                "partition %d runs from offset %d: %d changelog records %s in %.2f s, %s",
                number, restored.next_offset, restored.records, "rebuilt" if restored.rebuilt else "replayed",
                restored.seconds, place("offsets", spans) if spans else "none was missing",
                extra=at("restore", restored.changelog_topic, spans, partition=number, next_offset=restored.next_offset,
                         records=restored.records, rebuilt=restored.rebuilt, seconds=round(restored.seconds, 3)),
            )  # fmt: skip

    def revoked(self, partitions: list[int], *, lost: bool = False) -> bool:
        """The group took `partitions` back: stop consuming them and close their stores (their effects are settled).

        Returns whether any of them was consumed: the client then knows of it.
        """
        for number in partitions:
            if number in self._restoring:
                self._restoring[number].cancel.set()
        for number in partitions:
            self._waiting.pop(number, None)
            if restoring := self._restoring.pop(number, None):
                if restoring.future.cancel():  # it waited for its turn behind others
                    continue
                try:
                    restored = restoring.future.result()  # it looks at the flag between two reads
                except Exception as error:  # whoever has the partition now will meet it again
                    log.info("partition %d was taken back while its restore failed: %s", number, error)
                    restored = None
                if restored is not None:
                    restored.partition.store.close()
        stopped = self._intake.stop(partitions, lost=lost)
        stood_at: dict[int, int] = {}
        for number in partitions:
            if partition := self.running.pop(number, None):
                if position := partition.store.position():
                    stood_at[number] = position.next_offset
                partition.store.close()
        if partitions:
            how, topic = "lost" if lost else "revoked", self._intake.topic
            next_offsets = [{"partition": number, "next_offset": stood_at.get(number)} for number in partitions]
            fields = {"event": how, "topic": topic, "next_offsets": next_offsets}
            where = "".join(f" {number}:{offset}" for number, offset in stood_at.items())
            standing = f" at {topic}{where}" if where else ""
            log.info("%s %s%s", how, partitions, standing, extra={"fields": fields})
        return stopped

    def restore_again(self, partitions: Iterable[int]) -> None:
        """Begins anew with these running partitions, from what is committed: nobody here knows what that is any more.

        Unlike `assigned` this says nothing of the group, which may have taken the worker for dead.
        """
        running = list(partitions)
        self.revoked(running, lost=True)
        self._restore_all(running)

    def close(self) -> None:
        """Closes what is left."""
        self.revoked([*self._restoring, *self.running], lost=True)
        self._threads.shutdown()
