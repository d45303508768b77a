"""What state/ and the batch reference must not know of each other and of the world."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PURE = ("errors", "priority", "quota", "reservoir", "settings", "changelog")


def imports_of(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_the_batch_reference_imports_nothing_of_ours() -> None:
    assert imports_of(ROOT / "stream" / "batch_tldr.py") <= {
        "__future__",
        "collections",
        "hashlib",
        "struct",
        "typing",
    }


@pytest.mark.parametrize("file", sorted((ROOT / "state").glob("*.py")), ids=lambda file: file.stem)
def test_state_knows_neither_kafka_nor_torch_nor_the_other_packages(file: Path) -> None:
    assert not imports_of(file) & {"confluent_kafka", "torch", "stream", "models", "time", "random"}


@pytest.mark.parametrize("name", PURE)
def test_the_arithmetic_does_no_io(name: str) -> None:
    assert not imports_of(ROOT / "state" / f"{name}.py") & {"lmdb", "os", "pathlib", "io", "socket", "shutil"}


def test_the_state_loads_without_torch_and_kafka() -> None:
    code = "import sys, state.partition, state.directory; print({'torch', 'confluent_kafka'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).strip() == "set()"
