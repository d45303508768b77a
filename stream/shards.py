"""Files of a snapshot: WebDataset tars and Parquet, byte for byte the same for the same pairs.

A shard is written under a temporary name and gets its own when it is complete and on disk, so nothing half-written
looks finished. Must not know Kafka, nor which pair belongs where.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

# img2dataset's users find images by extension, so it has to be the one that the bytes have.
_MAGIC = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    (b"\0\0\0\x0cjP  ", "jp2"),
    (b"\xff\x0a", "jxl"),
)
_BRANDS = {b"avif": "avif", b"avis": "avif", b"heic": "heic", b"heix": "heic", b"mif1": "heic"}

# A row group is what a Parquet reader loads at once, and what a writer has in memory.
ROW_GROUP_BYTES = 8 * 1024 * 1024
PARTIAL = ".partial"


class ShardFile(NamedTuple):
    """A finished file of a snapshot."""

    name: str
    partition: int
    pairs: int
    bytes: int
    sha256: str


class Shard(Protocol):
    """A shard that is being written."""

    def add(self, pair: Mapping[str, Any]) -> None:
        """Appends a KeptPair record. Raises OSError where the disk is full."""
        ...

    def finish(self) -> ShardFile:
        """Completes the file, puts it on disk and gives it its name."""
        ...

    def discard(self) -> None:
        """Removes what was written."""
        ...


def image_extension(image: bytes) -> str:
    """The usual extension of the image format that these bytes have, `bin` for an unknown one."""
    for magic, extension in _MAGIC:
        if image.startswith(magic):
            return extension
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    if image[4:8] == b"ftyp":
        return _BRANDS.get(image[8:12], "bin")
    return "bin"


def safe_key(pair_id: str) -> str:
    """A name for a pair's files: ids are URLs and worse, WebDataset splits a name at its first dot."""
    return hashlib.sha256(pair_id.encode()).hexdigest()[:32]


def described(pair: Mapping[str, Any]) -> dict[str, Any]:
    """Everything about a kept pair but its image and refined caption, ready for JSON."""
    fields = dict(sorted(pair["fields"].items()))
    return {
        "key": safe_key(pair["id"]),
        "id": pair["id"],
        "url": pair["image_uri"] or fields.get("url"),
        "original_caption": pair["caption"],
        "generated_caption": pair["generated_caption"],
        "cluster": pair["cluster"],
        "epoch": pair["epoch"],
        "position": pair["position"],
        "itm_original": _number(pair["itm_original"]),
        "itm_refined": _number(pair["itm_refined"]),
        "bundle": pair["bundle"],
        "rate": pair["rate"],
        # In hexadecimal: JSON readers take a number of 64 bits for a signed or a rounded one.
        "priority": pair["priority"][::-1].hex(),
        "source_topic": pair["source_topic"],
        "source_partition": pair["source_partition"],
        "source_offset": pair["source_offset"],
        "source_timestamp_ms": pair["source_timestamp_ms"],
        "fields": fields,
        "index_vector": np.frombuffer(pair["index_vector"], "<u2").tolist(),
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value  # JSON has no NaN


class _HashedFile(io.RawIOBase):
    """A file that is written once, front to back, and hashed on the way."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=1 << 18)
        self._digest = hashlib.sha256()
        self._bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._digest.update(data)
        self._file.write(data)
        count = len(data)
        self._bytes += count
        return count

    def tell(self) -> int:
        return self._bytes

    def settle(self) -> tuple[int, str]:
        """Puts everything on disk; (bytes, SHA-256)."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._bytes, self._digest.hexdigest()

    def abandon(self) -> None:
        """Closes without caring whether the rest could be written."""
        with contextlib.suppress(OSError):  # the disk is full, and the file about to be removed
            self._file.close()


class _Writing:
    """What both formats share: the temporary name, and the steps from there to the finished file."""

    def __init__(self, folder: Path, name: str, partition: int) -> None:
        self.path, self.name, self.partition = folder / name, name, partition
        self._partial = folder / (name + PARTIAL)
        self._file = _HashedFile(self._partial)
        self._pairs = 0

    def _settle(self) -> ShardFile:
        size, digest = self._file.settle()
        self._partial.replace(self.path)
        sync_folder(self.path.parent)
        return ShardFile(self.name, self.partition, self._pairs, size, digest)

    def discard(self) -> None:
        """Removes what was written."""
        self._file.abandon()
        self._partial.unlink(missing_ok=True)


class TarShard(_Writing):
    """WebDataset: for every pair `key.<image>`, `key.txt` (the refined caption) and `key.json` (the rest)."""

    def __init__(self, folder: Path, name: str, partition: int) -> None:
        super().__init__(folder, name, partition)
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def add(self, pair: Mapping[str, Any]) -> None:
        """Appends a KeptPair record. Raises OSError where the disk is full."""
        about = described(pair)
        key = about["key"]
        self._member(f"{key}.{image_extension(pair['image'])}", pair["image"])
        self._member(f"{key}.txt", pair["refined_caption"].encode())
        self._member(f"{key}.json", json.dumps(about, ensure_ascii=False, sort_keys=True).encode())
        self._pairs += 1

    def _member(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)  # its owner is 0:0 and its time 0: the same bytes whoever writes it when
        member.size, member.mode = len(data), 0o644
        self._tar.addfile(member, io.BytesIO(data))
        self._tar.members = []  # type: ignore[attr-defined]  # tarfile would remember every member it wrote

    def finish(self) -> ShardFile:
        """Completes the file, puts it on disk and gives it its name."""
        self._tar.close()
        return self._settle()


_TEXTS = ("caption", "original_caption", "generated_caption", "url")
_COLUMNS: tuple[tuple[str, pa.DataType, str], ...] = (
    ("key", pa.string(), "string"),
    ("id", pa.string(), "string"),
    ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]), "image"),
    *((name, pa.string(), "string") for name in _TEXTS),
    ("cluster", pa.int32(), "int32"),
    ("epoch", pa.int64(), "int64"),
    ("position", pa.int64(), "int64"),
    ("itm_original", pa.float32(), "float32"),
    ("itm_refined", pa.float32(), "float32"),
    ("bundle", pa.string(), "string"),
    ("rate", pa.string(), "string"),
    ("priority", pa.string(), "string"),
    ("source_topic", pa.string(), "string"),
    ("source_partition", pa.int32(), "int32"),
    ("source_offset", pa.int64(), "int64"),
    ("source_timestamp_ms", pa.int64(), "int64"),
    ("fields", pa.string(), "string"),
    ("index_vector", pa.list_(pa.uint16()), "list"),
)


def _feature(kind: str) -> dict[str, Any]:
    """How Hugging Face's `datasets` names the type; it then decodes the images by itself."""
    if kind == "image":
        return {"_type": "Image"}
    if kind == "list":
        return {"feature": {"dtype": "uint16", "_type": "Value"}, "_type": "List"}
    return {"dtype": kind, "_type": "Value"}


def _parquet_schema() -> pa.Schema:
    features = {name: _feature(kind) for name, _, kind in _COLUMNS}
    metadata = {"huggingface": json.dumps({"info": {"features": features}}, sort_keys=True)}
    return pa.schema([(name, kind) for name, kind, _ in _COLUMNS], metadata=metadata)


PARQUET_SCHEMA = _parquet_schema()


class ParquetShard(_Writing):
    """Parquet: one row a pair, `caption` is the refined one, the image a struct as Hugging Face has it."""

    def __init__(self, folder: Path, name: str, partition: int) -> None:
        super().__init__(folder, name, partition)
        self._writer = pq.ParquetWriter(pa.PythonFile(self._file, mode="w"), PARQUET_SCHEMA, compression="snappy")
        self._rows: list[dict[str, Any]] = []
        self._row_bytes = 0

    def add(self, pair: Mapping[str, Any]) -> None:
        """Appends a KeptPair record. Raises OSError where the disk is full."""
        about = described(pair)
        path = f"{about['key']}.{image_extension(pair['image'])}"
        about["image"] = {"bytes": pair["image"], "path": path}
        about["caption"] = pair["refined_caption"]
        about["fields"] = json.dumps(about["fields"], ensure_ascii=False, sort_keys=True)
        self._rows.append(about)
        self._row_bytes += len(pair["image"]) + len(pair["refined_caption"])
        self._pairs += 1
        if self._row_bytes >= ROW_GROUP_BYTES:
            self._write()

    def _write(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, PARQUET_SCHEMA))
        self._rows, self._row_bytes = [], 0

    def finish(self) -> ShardFile:
        """Completes the file, puts it on disk and gives it its name."""
        self._write()
        self._writer.close()
        return self._settle()

    def discard(self) -> None:
        """Removes what was written."""
        self._rows = []
        with contextlib.suppress(OSError):  # it wants to write its footer to the full disk
            self._writer.close()
        super().discard()


class Format(NamedTuple):
    """A snapshot's format. open_max: shards written at once, bounded by what each holds in memory."""

    extension: str
    shard: type[TarShard] | type[ParquetShard]
    open_max: int


FORMATS = {"webdataset": Format("tar", TarShard, 64), "parquet": Format("parquet", ParquetShard, 16)}


def write_whole(path: Path, data: bytes) -> None:
    """Writes a small file so that it is either the old or the new one, never a part."""
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Puts a folder's names on disk: a rename is durable only then."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
