"""Cells under new centroids: the entries of older epochs, grouped by the clusters of another bundle, beside the running stream.

Needed with a cap only, since then pairs compete in the cells of the present epoch. A step is a few milliseconds of the
store's time, and what it notes claims nothing until a switch is committed; so this may stop, or the process die, between
any two steps. Entries are grouped in the order of their input offsets and only ever come at the end, so how far it has
got is one number. Must not know what a bundle is beyond a function of index vectors.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from state.changelog import decode_entry, entry_head
from state.errors import RoomWanted
from state.partition_store import PartitionStore, Tail, Ungrouped
from state.reservoir import mark_of, rank_of

Assign = Callable[[NDArray[np.uint16]], NDArray[np.int32]]

ROWS_A_STEP = 1024  # for which a commit may have to wait
ROWS_A_STEP_ALONE = 16_384
# More than these are not left to the moment of the switch.
TAIL_MAX = 20_000


def sweep(store: PartitionStore) -> bool:
    """Removes some of what earlier epochs were grouped by; False: nothing is left of it. Raises StoreClosed, StoreFull."""
    try:
        return store.sweep()
    except RoomWanted:
        return True


class Regrouping:
    """The grouping of a store's entries by the clusters of `bundle`, for its epoch number `epoch`.

    assign  (n, tokens) index vectors → (n,) clusters
    until   entries from before this input offset; None: up to what is committed, a target that moves
    alone   whether nobody else uses the store meanwhile
    """

    def __init__(
        self, store: PartitionStore, epoch: int, bundle: str, assign: Assign, until: int | None = None, *,
        alone: bool = False, rows_a_step: int | None = None,
    ) -> None:  # fmt: skip
        self.store, self.epoch, self.bundle = store, epoch, bundle
        self._assign, self._until, self._alone = assign, until, alone
        self._rows = rows_a_step or (ROWS_A_STEP_ALONE if alone else ROWS_A_STEP)

    def step(self) -> bool:
        """Groups the next entries; False: there are none left at the moment.

        Raises StoreClosed, StoreFull; a map that is full waits for the store's user to make room.
        """
        try:
            return self._step()
        except RoomWanted:
            return True
        finally:
            if self._alone:
                self.store.make_room()

    def _step(self) -> bool:
        if not self.store.begin_grouping(self.epoch, self.bundle):
            return True
        found = self.store.ungrouped(self.epoch, self._until, self._rows)
        if not found.rows and found.through == found.start:
            return False
        return not self.store.group(self.epoch, self.bundle, found, self._clusters(found)) or not found.last

    def _clusters(self, found: Ungrouped) -> list[int]:
        if not found.rows:
            return []
        clusters: list[int] = self._assign(np.stack([decode_entry(entry).vector for _, entry in found.rows])).tolist()
        return clusters

    def tail(self) -> Tail:
        """The entries that are left at the moment of a switch, in memory: the store need not be written for them then.

        Raises StoreClosed, StoreFull.
        """
        while (found := self._left()) is None:
            self.step()
        tail = Tail(found.start, found.through, {}, {})
        for (_, entry), cluster in zip(found.rows, self._clusters(found), strict=True):
            head = entry_head(entry)
            tail.marks.setdefault(cluster, []).append(mark_of(rank_of(head.priority, head.rate), head.offset))
            tail.cluster_of[head.offset] = cluster
        return tail

    def _left(self) -> Ungrouped | None:
        """What is left to group, if that is little enough; None: a step has to come first."""
        try:
            if not self.store.begin_grouping(self.epoch, self.bundle):
                return None
        except RoomWanted:
            self.store.make_room()
            return None
        found = self.store.ungrouped(self.epoch, self._until, TAIL_MAX)
        return found if found.last else None

    def finish(self, cancelled: Callable[[], bool] = lambda: False) -> bool:
        """Steps until none is left; False: cancelled."""
        while self.step():
            if cancelled():
                return False
        return True
