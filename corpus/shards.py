"""WebDataset shards with the same bytes for the same pairs: sorted, no clock, no user, no umask."""

import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Pair:
    """An image, its caption, and what else is known of it."""

    uid: str
    image: bytes
    extension: str  # "jpg" or "png"
    caption: str
    fields: Mapping[str, object]


def write_shards(pairs: Iterable[Pair], folder: Path, prefix: str, pairs_max: int) -> list[Path]:
    """`folder/prefix-000000.tar` and so on, at most `pairs_max` pairs each, in the order of the uid."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{prefix}-*.tar"):
        old.unlink()
    ordered = sorted(pairs, key=lambda p: p.uid)
    files = []
    for number, start in enumerate(range(0, len(ordered), pairs_max)):
        files.append(folder / f"{prefix}-{number:06d}.tar")
        _write(ordered[start : start + pairs_max], files[-1])
    return files


def read_json_members(shard: Path) -> Iterator[dict[str, object]]:
    """The .json of every pair of a shard."""
    with tarfile.open(shard) as tar:
        for member in tar:
            if member.name.endswith(".json") and (content := tar.extractfile(member)):
                yield json.load(content)


def _write(pairs: list[Pair], file: Path) -> None:
    with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index, pair in enumerate(pairs):
            key = f"{index:06d}"  # like img2dataset's: repeats from shard to shard and names nothing
            about = {"uid": pair.uid, "caption": pair.caption, **pair.fields}
            _add(tar, f"{key}.{pair.extension}", pair.image)
            _add(tar, f"{key}.txt", pair.caption.encode())
            _add(tar, f"{key}.json", json.dumps(about, ensure_ascii=False, sort_keys=True).encode())


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    info.mtime = 0
    info.mode = 0o644
    tar.addfile(info, io.BytesIO(content))
