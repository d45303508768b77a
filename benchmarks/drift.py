"""`make drift`: false alarms, delay, churn and what reclustering is worth, on the corpora of `make corpus`; writes docs/drift.md.

Everything is made of the product's own functions: the sample bundle's encoder and matching head, models/drift.py,
models/clustering.py and the batch reference. A unit is one measurement with its seeds and is written as soon as it is done;
a run stops before its minutes are over: type the command again until nothing is left. Images are encoded once.
"""

from __future__ import annotations

import argparse
import json
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from models.threads import set_thread_environment

set_thread_environment()

import numpy as np  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from models.bundle import load_model  # noqa: E402
from models.errors import BadImage  # noqa: E402

ROOT = Path(__file__).parents[1]
WORK = ROOT / ".build" / "drift"
CORPUS = ROOT / "corpus" / "full"
BUNDLE = ROOT / "bundles" / "sample"
DATA = ROOT / "docs" / "drift.jsonl"
PAGE = ROOT / "docs" / "drift.md"
PICTURES = ROOT / "docs" / "drift"


@dataclass(frozen=True)
class Corpus:
    """Pairs of one corpus, in the order of its shards; about: a dict a pair (title, keywords, description, family)."""

    vectors: NDArray[np.uint16]
    captions: list[str]
    about: list[dict[str, Any]]


def encoded(prefix: str) -> Corpus:
    """All pairs of `corpus/full/PREFIX-*.tar` whose image decodes, encoded by the sample bundle; cached by shard."""
    parts = [_shard(tar) for tar in sorted(CORPUS.glob(f"{prefix}-*.tar"))]
    if not parts:
        raise SystemExit(f"{CORPUS} has no {prefix}-*.tar: run `make corpus` first")
    vectors = np.concatenate([p[0] for p in parts])
    about = [one for p in parts for one in p[1]]
    return Corpus(vectors, [str(one["caption"]) for one in about], about)


def _shard(tar: Path) -> tuple[NDArray[np.uint16], list[dict[str, Any]]]:
    model = None
    file = WORK / f"{tar.stem}-{json.loads((BUNDLE / 'manifest.json').read_text())['space'][:12]}.npz"
    if not file.exists():
        model = load_model(BUNDLE, "cpu")
        pixels, about = [], []
        with tarfile.open(tar) as members:
            found: dict[str, dict[str, bytes]] = {}
            for member in members:
                key, _, extension = member.name.partition(".")
                if content := members.extractfile(member):
                    found.setdefault(key, {})[extension] = content.read()
        for pair in found.values():
            image = next(v for k, v in pair.items() if k not in ("txt", "json"))
            try:
                pixels.append(model.decode(image))
            except BadImage:
                continue
            about.append(json.loads(pair["json"]))
        WORK.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial.npz")
        np.savez(partial, vectors=model.encode(pixels), about=np.array([json.dumps(a) for a in about]))
        partial.rename(file)
        print(f"{tar.name}: {len(about)} pairs encoded", file=sys.stderr, flush=True)
    with np.load(file) as stored:
        return stored["vectors"], [json.loads(text) for text in stored["about"].tolist()]
