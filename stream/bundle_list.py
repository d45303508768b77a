"""`bundle list`: what was announced, and which partitions of a stream run or ran with it, from topics alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from stream.bundles import Announcement, announced, told
from stream.cut import written
from stream.kafka import Connection
from stream.rights import check_rights
from stream.stream_view import StreamSource, read_view


@dataclass(frozen=True)
class Use:
    """An epoch of a stream. begins  input offset by partition; now  the partitions that are in it."""

    epoch: int
    begins: dict[int, int]
    now: list[int]


@dataclass
class ListedBundle:
    """A bundle. announcement None: a stream runs or ran with it, and it was never announced.

    A bundle that was announced to several streams is listed for each of them where no stream is named.
    """

    version: str
    announcement: Announcement | None
    fits: bool | None  # whether the stream can switch to it; None: no stream was named
    uses: list[Use] = field(default_factory=list)


@dataclass
class BundleList:
    """Every bundle, oldest announcement first. stream None: none was named, or it has committed nothing."""

    stream: str | None
    bundles: list[ListedBundle]

    def lines(self) -> Iterator[str]:
        """The list for a person."""
        if not self.bundles:
            yield "no bundle was announced: `tldr-stream bundle announce FOLDER`"
        for listed in self.bundles:
            about = listed.announcement
            if about is None:
                yield f"{listed.version[:12]}  never announced"
            else:
                when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(about.created_ms / 1000))
                yield f"{listed.version[:12]}  announced {when} to {about.stream or 'any stream'}, at {about.uri}"
            if listed.fits is False:
                yield f"  {self.stream} cannot switch to it: another encoder, codebook or gate, or another stream's"
            for use in listed.uses:
                now = f"partitions {', '.join(map(str, use.now))} run with it" if use.now else "over"
                yield f"  epoch {use.epoch} of {self.stream}, from the offsets {written(use.begins)}: {now}"


def list_bundles(connection: Connection, source: StreamSource | None) -> BundleList:
    """The announced bundles, and where a stream is named those of its epochs.

    Raises TldrError where that stream does not exist or has committed nothing yet.
    """
    check_rights(connection, "bundle list")
    everything = announced(connection)
    if source is None:
        return BundleList(None, [ListedBundle(a.version, a, None) for a in everything])
    view = read_view(source)
    own = told(everything, source.name)
    known: dict[str, ListedBundle] = {}
    for a in everything:
        if own.get(a.version, a) is a:  # else the stream was told of it, and this is what was said to another one
            known.pop(a.version, None)
            known[a.version] = ListedBundle(a.version, a, a.version in own and a.space == view.settings.space)
    epochs: dict[tuple[int, str], Use] = {}
    for p, part in sorted(view.partitions.items()):
        for epoch, switch in part.switches.items():
            use = epochs.setdefault((epoch, switch.bundle), Use(epoch, {}, []))
            use.begins[p] = switch.input_offset
            if epoch == max(part.switches):
                use.now.append(p)
    for (_, version), use in sorted(epochs.items()):
        known.setdefault(version, ListedBundle(version, None, None)).uses.append(use)
    never = [listed for listed in known.values() if listed.announcement is None]
    return BundleList(source.name, never + [listed for listed in known.values() if listed.announcement is not None])
