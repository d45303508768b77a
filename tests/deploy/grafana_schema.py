"""Reads dashboards with Grafana's own library and writes them again: what it does not know gets lost, and is printed.

Runs in an environment of its own (`make observe-check` makes it), since nothing else here needs that library.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard


def lost(ours: Any, theirs: Any, path: str = "") -> Iterator[str]:
    """Where `theirs` lacks or changes something of `ours`."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key, value in ours.items():
            if key not in theirs:
                yield f"{path}/{key}"
            else:
                yield from lost(value, theirs[key], f"{path}/{key}")
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            yield from lost(one, other, f"{path}[{i}]")
    elif ours != theirs:
        yield path


def main() -> None:
    register_default_plugins()
    unknown = []
    for file in map(Path, sys.argv[1:]):
        dashboard = json.loads(file.read_text())
        again = json.loads(json.dumps(Dashboard.from_json(dashboard), cls=JSONEncoder))
        unknown += [f"{file.name}{path}" for path in lost(dashboard, again)]
    print("\n".join(unknown))
    raise SystemExit(bool(unknown))


if __name__ == "__main__":
    main()
