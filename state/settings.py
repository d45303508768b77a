"""What makes a stream this stream: settings that may not change while its changelog lives, and the two rules by name.

They are the first record of every partition's changelog. Pure values: knows neither Kafka nor LMDB.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

from state.errors import BadSetting, SettingsDiffer, UnknownRecord
from state.quota import Ratio


class Rule(NamedTuple):
    """A way to reduce, by name: the share kept, the clusters to make, and whether only the better half (ITM) counts."""

    name: str
    ratio: Ratio
    clusters: int
    gated: bool


# What the paper says (TL;DR §3.2, §4), and what the authors' code does.
PAPER = Rule("paper", Ratio(1, 4), clusters=3000, gated=False)
AUTHORS = Rule("authors", Ratio(1, 2), clusters=1000, gated=True)
RULES = {rule.name: rule for rule in (PAPER, AUTHORS)}


def rule_named(name: str) -> Rule:
    """The rule of that name. Raises BadSetting with the names there are."""
    try:
        return RULES[name]
    except KeyError:
        raise BadSetting(f"there is no rule {name!r}; the rules are {', '.join(sorted(RULES))}") from None


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """The settings of a stream. Raises BadSetting where one of them cannot be.

    raw_topic_id   Kafka's own id of the raw topic: a recreated topic has another one
    cell_cap       most pairs in one cell, None: no limit; dedupe_window  in offsets, None: for ever
    gate           pairs whose ITM is below it do not count, None: no gate
    space          hash of encoder and codebook; tokens  indices in a vector
    """

    partition_count: int
    raw_topic_id: str
    seed: int
    ratio: Ratio
    cell_cap: int | None
    dedupe_window: int | None
    gate: float | None
    rule: str
    space: str
    tokens: int

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 64:
            raise BadSetting(f"the seed {self.seed} is not in 0 … 2^64 - 1")
        if self.cell_cap is not None and self.cell_cap < 1:
            raise BadSetting(f"a cell cap of {self.cell_cap} keeps nothing; give 1 or more, or none")
        if self.dedupe_window is not None and self.dedupe_window < 1:
            raise BadSetting(f"a dedupe window of {self.dedupe_window} remembers nothing; give 1 or more, or none")
        if not 1 <= self.tokens < 1 << 16:
            raise BadSetting(f"{self.tokens} tokens an image; 1 … 65535 are possible")

    def to_json(self) -> bytes:
        """One line of JSON, keys sorted, so that equal settings are equal bytes."""
        values = {**asdict(self), "ratio": str(self.ratio)}
        return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, value: bytes) -> StreamSettings:
        """Inverse of `to_json`. Raises UnknownRecord where a field is missing or strange."""
        try:
            values: dict[str, Any] = json.loads(value)
            values["ratio"] = Ratio.parse(values["ratio"])
            return cls(**values)
        except (ValueError, KeyError, TypeError) as error:
            raise UnknownRecord(
                f"the stream's settings cannot be read ({error}); they were written by another version of tldr-stream"
            ) from error


def refuse_difference(stored: StreamSettings, given: StreamSettings) -> None:
    """Raises SettingsDiffer, naming each field that differs with both values, unless the settings are equal."""
    different = [
        f"{field.name} is {getattr(stored, field.name)} in the stream and {getattr(given, field.name)} here"
        for field in fields(StreamSettings)
        if getattr(stored, field.name) != getattr(given, field.name)
    ]
    if different:
        raise SettingsDiffer(
            f"these are not the settings of this stream: {'; '.join(different)}; "
            "start the worker with the stream's settings, or give a new stream another --stream name"
        )
