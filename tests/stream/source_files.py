"""Small sources of image-text pairs as other tools write them, for the tests of reading and ingesting."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def write_tar(file: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file


def crawl_members(pairs: Sequence[tuple[str | None, bytes, str]]) -> list[tuple[str, bytes]]:
    """(url, image, caption) → members as img2dataset writes them: its key is the position in the shard."""
    members = []
    for i, (url, image, caption) in enumerate(pairs):
        meta = {"caption": caption, "url": url, "key": f"{i:09d}", "status": "success", "width": 64, "exif": None}
        members += [
            (f"{i:09d}.jpg", image),
            (f"{i:09d}.json", json.dumps(meta).encode()),
            (f"{i:09d}.txt", caption.encode()),
        ]
    return members


def write_parquet(file: Path, rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), file)
    return file
