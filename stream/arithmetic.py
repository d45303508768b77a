"""The sums that a stream's totals must satisfy, printed with their numbers and checked; `status` and `report` show them.

Must not know Kafka: it is given what the changelog says. The cells' counters are kept apart from the totals, so where
both tell the same number the check compares two records, not a number with itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from state.changelog import Totals
from state.quota import Ratio, kept_positions
from state.settings import StreamSettings
from stream.stream_view import PartitionView, StreamView


@dataclass(frozen=True)
class Sum:
    """An equation in words and in numbers, and whether it holds."""

    words: str
    numbers: str
    holds: bool

    def lines(self) -> list[str]:
        """Two lines of at most 80 characters for numbers up to a billion."""
        return [f"{'ok ' if self.holds else 'NO '} {self.words}", f"    {self.numbers}"]


def in_the_set(totals: Totals) -> int:
    """Pairs in the reduced set now."""
    return totals.kept - totals.evicted - totals.removed


def sums_of(view: StreamView) -> list[Sum]:
    """The four sums of a stream."""
    totals = view.totals
    read = (totals.dead, totals.duplicates, totals.forgotten, totals.below_gate, totals.counted)
    fates = (totals.kept, totals.over_quota, totals.over_cap)
    in_cells = sum(cell.size for part in view.partitions.values() for cell in part.cells.values())
    return [
        Sum(
            "read = dead + duplicates + forgotten + below gate + counted",
            f"{totals.read:,} = {_plus(read)}",
            totals.read == sum(read),
        ),
        Sum(
            "counted = kept + over quota + over cap",
            f"{totals.counted:,} = {_plus(fates)}",
            totals.counted == sum(fates),
        ),
        _quota(view),
        Sum(
            "kept - evicted - removed = in the set (the sizes of all cells)",
            f"{totals.kept:,} - {totals.evicted:,} - {totals.removed:,} = {in_cells:,}",
            in_the_set(totals) == in_cells,
        ),
    ]


def _quota(view: StreamView) -> Sum:
    """Counted × M is what blocks of q make of it: exact for whole blocks, by the drawn positions in the last one."""
    totals, ratio = view.totals, view.settings.ratio
    passed = totals.kept + totals.over_cap
    share = float(totals.counted * ratio.share)
    numbers = f"{totals.counted:,} × {ratio} = {share:,.1f} ≈ {totals.kept:,} + {totals.over_cap:,}"
    cells = sum(len(part.cells) for part in view.partitions.values())
    due = sum(due_of(view.settings, part) for part in view.partitions.values())
    counted = sum(cell.counted for part in view.partitions.values() for cell in part.cells.values())
    return Sum(
        "counted × M ≈ kept + over cap",
        f"{numbers}; the blocks of {cells:,} cells: {due:,}",
        due == passed and counted == totals.counted,
    )


def due_of(settings: StreamSettings, part: PartitionView) -> int:
    """How many of a partition's counted pairs the quota lets pass, cell by cell."""
    return sum(
        _passed(settings, part.partition, epoch, cluster, cell.counted, settings.ratio)
        for (epoch, cluster), cell in part.cells.items()
    )


def _passed(settings: StreamSettings, partition: int, epoch: int, cluster: int, counted: int, ratio: Ratio) -> int:
    blocks, begun = divmod(counted, ratio.q)
    if not begun:
        return blocks * ratio.p
    mask = kept_positions(settings.seed, epoch, partition, cluster, blocks, ratio)
    return blocks * ratio.p + (mask & ((1 << begun) - 1)).bit_count()


def _plus(numbers: tuple[int, ...]) -> str:
    return " + ".join(f"{number:,}" for number in numbers)
