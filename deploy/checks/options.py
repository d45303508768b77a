"""Asked by chart.py: does the program have the options that the chart gives it, and does it make the same topics?

Reads a JSON list from standard input, answers with one object. A command line is parsed by the program itself, and not run.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from typing import Any

from stream.cli import commands
from stream.topics import BUNDLES, StreamTopics

# What Kubernetes would put in their place.
VARIABLES = {"$(POD_NAME)": "crawl-tldr-stream-0", "$(JOB_NAME)": "crawl-snapshot-1", "$(PART)": "0"}


def refusal(arguments: list[str], config: str) -> str | None:
    """What the program has against a command line with this configuration file; None: nothing."""
    for variable, value in VARIABLES.items():
        arguments = [argument.replace(variable, value) for argument in arguments]
    name, *rest = arguments
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(config)
        file.flush()
        os.environ["TLDR_CONFIG"] = file.name
        try:
            commands()[name].make_context(name, rest)
        except SystemExit as error:
            return f"exit status {error.code}"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return None


def difference(topics: dict[str, dict[str, Any]]) -> list[str]:
    """Where KafkaTopic resources and the program's own topics differ."""
    stream = next(name.removesuffix(".kept-pairs") for name in topics if name.endswith(".kept-pairs"))
    room = int(topics[f"{stream}.kept-pairs"]["config"]["max.message.bytes"])
    ours = {**StreamTopics(stream).settings(room), BUNDLES: {"cleanup.policy": "compact"}}
    found = []
    for name, settings in ours.items():
        given = {k: v for k, v in topics.get(name, {"config": {}})["config"].items() if k != "min.insync.replicas"}
        if given != settings:
            found.append(f"{name}: the chart has {given} and the program {settings}")
    return found


def main() -> None:
    wrong: list[str] = []
    lines = topics = 0
    for question in json.load(sys.stdin):
        if "topics" in question:
            topics += len(question["topics"])
            wrong += [f"{question['where']}: {line}" for line in difference(question["topics"])]
        elif question["args"][0] not in commands():
            wrong.append(f"{question['where']}: the program has no command {question['args'][0]}")
        else:
            lines += 1
            if said := refusal(question["args"], question["config"]):
                wrong.append(f"{question['where']}: {' '.join(question['args'])}: {said}")
    checked = f"{lines} command lines with their configuration parsed by the program, {topics} topics as it makes them"
    json.dump({"wrong": wrong, "checked": checked}, sys.stdout)


if __name__ == "__main__":
    main()
