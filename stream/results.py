"""What a command found → what a person or a program reads. One place decides how a result looks.

A job returns a dataclass; `show` prints it as JSON (its fields) or as the lines that its `lines()` method gives.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import typer


class Result(Protocol):
    """A dataclass that a job returns."""

    def lines(self) -> Iterable[str]:
        """The result for a person, line by line; a terminal of 80 columns shows it unbroken."""
        ...


def show(result: Result, as_json: bool) -> None:
    """Prints `result` to standard output."""
    if as_json:
        typer.echo(json.dumps(to_plain(result), ensure_ascii=False, indent=2))
    else:
        for line in result.lines():
            typer.echo(line)


def to_plain(value: Any) -> Any:
    """Dataclasses, paths and sets as JSON has them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(to_plain(item) for item in value)
    if isinstance(value, Path):
        return str(value)
    return value


def ranges(numbers: list[int]) -> str:
    """Partitions as a person reads them: `0-3, 7`."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
