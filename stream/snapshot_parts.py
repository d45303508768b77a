"""A snapshot that several processes share: which partitions are whose, and the manifest that is made of their parts.

Partitions are independent: a shard never spans two, and any vector of input offsets is a cut. So every part cuts its own
partitions when it begins, writes their shards and what the manifest says of them, and whoever finds all parts finished puts
the manifest together. It is the one that a single process would write at the same cut. Must not know topics.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from stream.errors import TldrError

# What adds up over the parts; all else must be equal in each of them.
_ADDED = ("offsets", "epochs", "counts", "cells", "files", "state")
_OF_ANY_PART = re.compile(r"(?:unfinished|finished)-\d+-of-(\d+)\.json(?:\.partial)?|\.index-\d+-of-(\d+)")
# … and what any run leaves that was refused.
_LOCK = re.compile(r"\.lock(?:-\d+-of-\d+)?")
_OUTPUT = re.compile(r"(?:part|state)-\d{5}.*")


class Part(NamedTuple):
    """Part `number` (from 0) of `of`: every partition whose number leaves it as remainder."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """`0/16`, as an Indexed Job counts. Raises TldrError."""
        found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if not found or not int(found[1]) < int(found[2]):
            raise TldrError(f"--part {text}: give its number from 0 and how many there are, as in 0/16 … 15/16")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @property
    def suffix(self) -> str:
        """Stands in the names of files that are this part's own."""
        return f"-{self.number}-of-{self.of}"

    def partitions(self, count: int) -> range:
        """Those of `count` partitions that are this part's. Raises TldrError where some part would have none."""
        if self.of > count:
            raise TldrError(f"--part {self}: the stream has {count} partitions, so there can be {count} parts at most")
        return range(self.number, count, self.of)

    def report(self, number: int | None = None) -> str:
        """The file in which a finished part says what the manifest shall say of it."""
        return f"finished-{self.number if number is None else number}-of-{self.of}.json"

    def allows(self, name: str) -> bool:
        """Whether a file in the folder is what parts of this division leave there."""
        found = _OF_ANY_PART.fullmatch(name)
        if found:
            return (found[1] or found[2]) == str(self.of)
        return (_LOCK.fullmatch(name) or _OUTPUT.fullmatch(name)) is not None


def missing_parts(folder: Path, part: Part) -> list[int]:
    """The parts that are not finished, by their number."""
    there = {path.name for path in folder.iterdir()}
    return [number for number in range(part.of) if part.report(number) not in there]


def reports(folder: Path, part: Part) -> list[dict[str, Any]]:
    """What all parts say. Raises FileNotFoundError where another one has put them together meanwhile."""
    return [json.loads((folder / part.report(number)).read_text()) for number in range(part.of)]


def remove_reports(folder: Path, part: Part) -> None:
    for number in range(part.of):
        (folder / part.report(number)).unlink(missing_ok=True)


def put_together(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The manifest (not sealed yet) of what the parts say of theirs. Raises TldrError where they are of two snapshots."""
    first, *others = every = list(parts)
    for other in others:
        for name in first.keys() | other.keys():
            if name not in _ADDED and first.get(name) != other.get(name):
                raise TldrError(
                    f"the parts were taken with different settings ({name}: {first.get(name)} and {other.get(name)}): remove "
                    "the folder and take them again with one command line"
                )
    states = [part["state"] for part in every]
    return {
        **{name: value for name, value in first.items() if name not in _ADDED},
        "offsets": _union(part["offsets"] for part in every),
        "epochs": _epochs(every),
        "counts": {name: sum(part["counts"][name] for part in every) for name in first["counts"]},
        "cells": {
            "columns": first["cells"]["columns"],
            "rows": sorted(row for part in every for row in part["cells"]["rows"]),
        },
        "files": sorted((file for part in every for file in part["files"]), key=lambda file: str(file["name"])),
        "state": None if None in states else _union(states),
    }


def _union(dicts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {key: value for one in dicts for key, value in one.items()}


def _epochs(parts: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    by_name: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for part in parts:
        for epoch in part["epochs"]:
            by_name.setdefault((epoch["epoch"], epoch["bundle"]), []).append(epoch)

    def merged() -> Iterator[dict[str, Any]]:
        for _, same in sorted(by_name.items()):
            begins = _union(epoch["begins"] for epoch in same)
            sums = {name: sum(epoch[name] for epoch in same) for name in ("pairs", "taken")}
            yield {**same[0], **sums, "begins": begins}

    return list(merged())
