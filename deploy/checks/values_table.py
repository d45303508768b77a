"""The table of values in the chart's README, made of the sentences in values.yaml: `make chart-table`.

Every value has a comment above it that begins with `# --`. Run with --check it changes nothing and fails where the table is
old; it fails, too, where a value has no sentence or the schema does not know it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

CHART = Path(__file__).parent.parent / "helm" / "tldr-stream"
BEGIN, END = "<!-- values: made by `make chart-table` -->", "<!-- values end -->"


class Value(NamedTuple):
    path: str
    default: str
    sentence: str


def values(text: str) -> Iterator[Value]:
    """The documented values of a values.yaml, in its order; what a sentence stands above is not looked into."""
    lines = text.splitlines()

    def sentence_above(line: int) -> str:
        above: list[str] = []
        while line > 0 and lines[line - 1].lstrip().startswith("#"):
            line -= 1
            above.insert(0, lines[line].strip().lstrip("#").strip())
            if above[0].startswith("-- "):
                return " ".join([above[0][3:], *above[1:]])
        return ""

    def walk(node: yaml.MappingNode, path: str) -> Iterator[Value]:
        for key, value in node.value:
            place = f"{path}.{key.value}" if path else key.value
            sentence = sentence_above(key.start_mark.line)
            if not sentence and isinstance(value, yaml.MappingNode) and value.value:
                yield from walk(value, place)
            else:
                default = json.dumps(yaml.safe_load(yaml.serialize(value)))
                yield Value(place, default, sentence)

    root = yaml.compose(text)
    if not isinstance(root, yaml.MappingNode):
        raise TypeError("values.yaml is no mapping")
    yield from walk(root, "")


def table(found: list[Value]) -> str:
    rows = [f"| `{v.path}` | `{v.default}` | {v.sentence.replace('|', chr(92) + '|')} |" for v in found]
    return "\n".join(["| value | default | meaning |", "|---|---|---|", *rows])


def problems(found: list[Value], schema: dict[str, Any]) -> Iterator[str]:
    """Values without a sentence, and values that the schema has not or has alone."""
    for value in found:
        if not value.sentence.endswith("."):
            yield f"{value.path} has no sentence above it"
    named = {value.path for value in found}
    yield from (f"values.schema.json does not know {path}" for path in sorted(named) if not _known(schema, path))
    for path in _leaves(schema, ""):
        if path != "global" and not any(path == name or path.startswith(f"{name}.") for name in named):
            yield f"values.yaml does not have {path}"


def _known(schema: dict[str, Any], path: str) -> bool:
    for step in path.split("."):
        schema = schema.get("properties", {}).get(step)
        if schema is None:
            return False
    return True


def _leaves(schema: dict[str, Any], path: str) -> Iterator[str]:
    inner = schema.get("properties")
    if not inner:
        yield path
        return
    for name, sub in inner.items():
        yield from _leaves(sub, f"{path}.{name}" if path else name)


def main() -> int:
    found = list(values((CHART / "values.yaml").read_text()))
    schema = json.loads((CHART / "values.schema.json").read_text())
    wrong = list(problems(found, schema))
    readme = CHART / "README.md"
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    fresh = f"{before}{BEGIN}\n{table(found)}\n{END}{rest.split(END)[1]}"
    if "--check" not in sys.argv:
        readme.write_text(fresh)
    elif fresh != text:
        wrong.append("the README's table of values is old: make chart-table")
    for line in wrong:
        print(f"  {line}", file=sys.stderr)
    print(f"  {len(found)} values, each with a sentence and a schema; table {'differs' if wrong else 'fresh'}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
