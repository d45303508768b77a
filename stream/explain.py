"""`explain ID`: what became of a pair, and why, from what the stream has recorded about it.

Reads rows, dead letters and kept records; asks no worker and no store. Everything that is said here names the offset where
it can be looked up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from state.partition import Fate
from stream.errors import TldrError
from stream.kafka import start_offsets
from stream.murmur2 import partitions_of
from stream.progress import Progress
from stream.records import Codec, UndecodableRecord
from stream.rights import check_rights
from stream.stream_view import (
    CodesRow,
    KeptRecord,
    StreamSource,
    StreamView,
    read_codes,
    read_dead_letters,
    read_kept,
    read_view,
    whole,
)

SAYS = {
    Fate.KEPT: "kept",
    Fate.OVER_QUOTA: "not kept: over the quota of its cell",
    Fate.BELOW_GATE: "not kept: its ITM is below the gate",
    Fate.OVER_CAP: "not kept: its cell was full of pairs with a smaller priority",
    Fate.DUPLICATE: "not counted: a duplicate",
    Fate.FORGOTTEN: "forgotten: taken down for good",
}


@dataclass(frozen=True)
class Event:
    """Something that happened to the pair. offset: the raw record that caused it; -1 where a field does not apply."""

    partition: int
    offset: int
    what: str
    fate: str = ""
    epoch: int = -1
    cluster: int = -1
    position: int = -1
    priority: int = -1
    itm: float | None = None
    duplicate_of: int = -1
    bundle: str = ""
    detail: str = ""


@dataclass
class Explanation:
    """What became of a pair. verdict: one sentence for now; events: how it came to it, in the order of the stream."""

    id: str
    in_the_set: bool = False
    verdict: str = "nothing is recorded of it"
    events: list[Event] = field(default_factory=list)
    kept_partition: int = -1
    kept_offset: int = -1
    caption: str | None = None
    refined_caption: str | None = None
    notes: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """The explanation for a person."""
        yield f"{self.id}"
        yield f"  {'in the reduced set' if self.in_the_set else 'not in the reduced set'}: {self.verdict}"
        if self.in_the_set:
            yield f"  kept record: partition {self.kept_partition} offset {self.kept_offset}"
        if self.refined_caption is not None:
            yield f"  caption: {self.refined_caption}"
        for event in self.events:
            yield f"  partition {event.partition} offset {event.offset}: {event.what}"
            told = [
                f"{name} {value}"
                for name, value in (
                    ("epoch", event.epoch),
                    ("cluster", event.cluster),
                    ("position", event.position),
                    ("priority", event.priority),
                )
                if value >= 0
            ]
            told += [f"ITM {event.itm:.3f}"] if event.itm is not None else []
            told += [f"bundle {event.bundle[:12]}"] if event.bundle else []
            if told:
                yield f"    {', '.join(told)}"
            if event.detail:
                yield f"    {event.detail}"
        for note in self.notes:
            yield f"  note: {note}"


def explain(source: StreamSource, pair_id: str) -> Explanation:
    """What became of one pair. Raises TldrError where nothing is recorded of it."""
    check_rights(source.connection, "explain", stream=source.name)
    view = read_view(source)
    home = int(partitions_of([pair_id.encode()], len(view.partitions))[0])
    found = explain_many(source, [pair_id], view=view, partitions=[home])[pair_id]
    others = [p for p in view.partitions if p != home]
    if not found.events and others:  # its producer may partition in another way than Kafka's Java client
        found = explain_many(source, [pair_id], view=view, partitions=others)[pair_id]
    if not found.events:
        notes = f" ({'; '.join(found.notes)})" if found.notes else ""
        raise TldrError(
            f"nothing is recorded of {pair_id!r} in the stream {source.name} up to its last commit{notes}: check the id, or "
            "wait until a worker has passed its offset (`tldr-stream status` shows the lag)"
        )
    return found


def explain_many(
    source: StreamSource,
    ids: Iterable[str] | None,
    *,
    view: StreamView | None = None,
    partitions: Iterable[int] | None = None,
) -> dict[str, Explanation]:
    """What became of each of these pairs (None: of every one that a row, dead letter or kept record names), in one pass."""
    view = view or read_view(source)
    gathered = _Gathered(source, view, None if ids is None else set(ids))
    numbers = sorted(view.partitions if partitions is None else partitions)
    topics = source.topics
    spans = {topic: whole(source.connection, topic, numbers) for topic in (topics.codes, topics.dead, topics.kept)}
    total = sum(end - start for by_partition in spans.values() for start, end in by_partition.values())
    with Progress("looking through the stream", total) as progress:
        for row in read_codes(source, spans[topics.codes], below=view.cut):
            gathered.row(row)
        progress.advance(sum(end - start for start, end in spans[topics.codes].values()))
        for letter, message in read_dead_letters(source, spans[topics.dead]):
            if letter.offset < view.cut[letter.partition]:
                gathered.letter(letter.partition, letter.offset, letter.reason, letter.detail, message)
        progress.advance(sum(end - start for start, end in spans[topics.dead].values()))
        for batch in read_kept(source, spans[topics.kept]):
            for record in batch:
                gathered.kept(record)
            progress.advance(len(batch))
    return gathered.explained(_expired(source, numbers))


def _expired(source: StreamSource, partitions: Iterable[int]) -> list[str]:
    """What may be missing because the broker no longer has it."""
    numbers = list(partitions)
    notes = []
    for topic, what in ((source.topics.codes, "pair-codes"), (source.topics.dead, "dead letters")):
        gone = [str(p) for p, first in start_offsets(source.connection, topic, numbers).items() if first > 0]
        if gone:
            notes.append(f"the oldest {what} of partition {', '.join(gone)} have expired")
    return notes


class _Gathered:
    """Everything that was found about the wanted ids."""

    def __init__(self, source: StreamSource, view: StreamView, wanted: set[str] | None) -> None:
        self._view, self._wanted = view, wanted
        self._found: dict[str, Explanation] = {pair_id: Explanation(pair_id) for pair_id in wanted or ()}
        self._live: dict[str, KeptRecord] = {}
        self._raw, self._pair = source.codec("RawPair"), source.codec("KeptPair")

    def _of(self, pair_id: str) -> Explanation | None:
        if self._wanted is None:
            return self._found.setdefault(pair_id, Explanation(pair_id))
        return self._found.get(pair_id)

    def row(self, row: CodesRow) -> None:
        if (about := self._of(row.id)) is not None:
            what = SAYS[row.fate]
            if row.fate == Fate.DUPLICATE:
                what += f" of offset {row.duplicate_of}"
            elif row.fate == Fate.BELOW_GATE:
                what += f" of {self._view.settings.gate}"
            elif row.fate == Fate.OVER_QUOTA:
                what += f" ({self._view.settings.ratio} of it is kept)"
            itm = None if np.isnan(row.itm) else row.itm
            about.events.append(
                Event(row.partition, row.offset, what, row.fate.name.lower(), row.epoch, row.cluster, row.position,
                      row.priority, itm, row.duplicate_of, row.bundle)
            )  # fmt: skip
        for pair_id in row.removed:
            if (about := self._of(pair_id)) is not None:
                if row.fate == Fate.FORGOTTEN:
                    event = Event(row.partition, row.offset, "removed: taken down", "removed")
                elif row.fate == Fate.KEPT and len(row.removed) == 1:
                    event = Event(
                        row.partition, row.offset, f"evicted: {row.id} has a smaller priority and took its place in a full "
                        "cell", "evicted", row.epoch, row.cluster, bundle=row.bundle,
                    )  # fmt: skip
                else:
                    event = Event(
                        row.partition, row.offset, "evicted: a switch of the bundle brought it into a cell that is over its "
                        f"cap, which shrank when {row.id} came", "evicted", row.epoch, row.cluster, bundle=row.bundle,
                    )  # fmt: skip
                about.events.append(event)

    def letter(self, partition: int, offset: int, reason: str, detail: str, message: Any) -> None:
        pair_id = _id_of_letter(self._raw, message)
        if pair_id is not None and (about := self._of(pair_id)) is not None:
            about.events.append(Event(partition, offset, f"dead letter: {reason}", "dead", detail=detail))

    def kept(self, record: KeptRecord) -> None:
        if record.cause is not None and record.cause >= self._view.cut[record.partition]:
            return
        pair_id = record.id
        if self._of(pair_id) is None:
            return
        if record.value is None:
            self._live.pop(pair_id, None)
        else:
            # With one id asked for the captions are told; with all of them the pairs would fill the memory.
            self._live[pair_id] = record if self._wanted is not None else record._replace(value=b"")

    def explained(self, notes: list[str]) -> dict[str, Explanation]:
        for pair_id, about in self._found.items():
            about.events.sort(key=lambda event: (event.partition, event.offset))
            about.notes = list(notes)
            live = self._live.get(pair_id)
            about.in_the_set = live is not None
            if live is not None:
                about.kept_partition, about.kept_offset = live.partition, live.offset
                if live.value:
                    pair = self._pair.decode(live.value)
                    about.caption, about.refined_caption = pair["caption"], pair["refined_caption"]
            about.verdict = self._verdict(about)
        return self._found

    def _verdict(self, about: Explanation) -> str:
        """The last thing that decided; duplicates and dead letters of other copies decide nothing once the id is known."""
        deciding = [event for event in about.events if event.fate not in ("duplicate", "dead")]
        last = next(reversed(deciding or about.events), None)
        if any(event.fate == "forgotten" for event in about.events):
            last = next(event for event in about.events if event.fate == "forgotten")
        says_in = last is not None and last.fate == "kept"
        if last is not None and says_in == about.in_the_set:
            return f"{last.what} (offset {last.offset}{f', bundle {last.bundle[:12]}' if last.bundle else ''})"
        if about.in_the_set:
            return "kept; the row that says so has expired" if about.notes else "kept, but no row says so: run verify"
        if last is None:
            return "nothing is recorded of it"
        return (
            "removed; the row that says so has expired" if about.notes else "kept, but its record is gone: run verify"
        )


def _id_of_letter(codec: Codec, message: Any) -> str | None:
    """The id of a dead letter: its own, where it can be read, else its key."""
    try:
        return str(codec.decode(message.value())["id"])
    except (UndecodableRecord, TypeError):
        key = message.key()
        return None if key is None else key.decode("utf-8", "replace")
