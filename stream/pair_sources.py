"""Image-text pairs from files: WebDataset shards, img2dataset's output, Parquet, a folder of images and captions.

Must not know Kafka. Pairs come in one fixed order (shards by name, entries as they lie in them), one at a time, with
the image's bytes untouched. An id says what the pair is (the source's own uid, its URL, or a hash of its content) and
never where it lay: img2dataset's `__key__` repeats from crawl to crawl.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from stream.errors import TldrError

if TYPE_CHECKING:
    import fsspec

IMAGE_EXTENSIONS = frozenset(
    [
        "jpg",
        "jpeg",
        "jpe",
        "png",
        "webp",
        "gif",
        "bmp",
        "tif",
        "tiff",
        "avif",
        "jp2",
        "jxl",
        "heic",
        "ppm",
        "pgm",
        "img",
    ]
)
# Where to look, in this order. img2dataset: .txt, caption, url, uid (DataComp); Hugging Face: image, text.
IMAGE_NAMES = IMAGE_EXTENSIONS | {"image"}
CAPTION_NAMES = ("txt", "caption", "text", "alt")
URI_NAMES = ("image_uri", "url", "image_url")
ID_NAMES = ("uid", "image_uri", "url", "image_url")
TARGETS = ("id", "caption", "image", "image_uri")

TAR = re.compile(r"\.tar(\.(gz|bz2|xz))?$")
PARQUET = re.compile(r"\.(parquet|pq)$")
# No raw record may be larger than this (stream/kafka.py), so a larger member is not worth its memory.
MEMBER_BYTES_MAX = 64 * 1024 * 1024
# A text member beside image and caption (.cls, .url) is carried along as a field up to this size.
TEXT_FIELD_BYTES_MAX = 64 * 1024
# Rows of a Parquet file held at once: 64 images of 1 MB are 64 MB.
ROWS_AT_ONCE = 64
FINGERPRINT_BYTES = 64 * 1024

Entry = dict[str, Any]


@dataclass(frozen=True, slots=True)
class SourcePair:
    """A pair as its source has it. Exactly one of `image` and `image_uri` is set."""

    id: str
    caption: str
    image: bytes | None
    image_uri: str | None
    fields: dict[str, str]
    # Shard and member, for lists of errors and for resuming; never part of the id.
    place: str


@dataclass(frozen=True, slots=True)
class BadEntry:
    """Something in a source that is no pair; `reason` is a short slug, `detail` a sentence."""

    place: str
    reason: str
    detail: str


class _NotAPair(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


@dataclass
class Shard:
    """One file of pairs, or one folder of image files."""

    name: str
    bytes_total: int
    _read: Callable[[Shard], Iterator[SourcePair | BadEntry]] = field(repr=False)
    _fingerprint: Callable[[], str | None] = field(repr=False)
    # How far `read` is, in bytes of `bytes_total`.
    bytes_read: int = 0
    # Whether `read` came to an orderly end; False after a damaged shard.
    complete: bool = False

    def read(self) -> Iterator[SourcePair | BadEntry]:
        """The shard's entries in their order. A shard that cannot be read further ends with one BadEntry."""
        try:
            yield from self._read(self)
            self.complete = True
        # What a damaged file leads its library into is not to be foreseen (zlib, Arrow, fsspec's own errors).
        except Exception as error:
            yield BadEntry(self.name, "unreadable-shard", f"{type(error).__name__}: {error}".strip().rstrip(":"))
        self.bytes_read = self.bytes_total

    def fingerprint(self) -> str | None:
        """A hash of size, head and tail, by which a file is known again; None for a folder, which may grow."""
        return self._fingerprint()


def open_source(source: str | Path, fields: Mapping[str, str] | None = None) -> Iterator[SourcePair | BadEntry]:
    """Every entry of `source`, shard after shard: see `shards_of`."""
    for shard in shards_of(source, fields):
        yield from shard.read()


def shards_of(source: str | Path, fields: Mapping[str, str] | None = None) -> list[Shard]:
    """The shards of `source`, by name.

    source  a .tar or .parquet file, a folder of them or of images with captions (sub-folders included), or several of
            these as a brace or glob pattern; a local path or any fsspec URL
    fields  target (id, caption, image, image_uri) → name in the source, where it differs from the usual ones
    Raises TldrError if there is nothing of the kind.
    """
    naming = dict(fields or {})
    if unknown := sorted(naming.keys() - set(TARGETS)):
        raise TldrError(f"--field {unknown[0]}=…: no such field, use one of {', '.join(TARGETS)}")
    fs, roots = _resolve(str(source))
    shards: list[Shard] = []
    for root, prefix in roots:
        if fs.isdir(root):
            shards.extend(_shards_in_folder(fs, root, prefix, naming))
        elif shard := _file_shard(fs, root, _relative(root, prefix), naming, None):
            shards.append(shard)
        else:
            raise TldrError(f"{root} is neither a .tar nor a .parquet file nor a folder")
    if not shards:
        raise TldrError(f"{source} holds no .tar, .parquet or image files")
    return sorted(shards, key=lambda shard: shard.name)


def _resolve(source: str) -> tuple[fsspec.AbstractFileSystem, list[tuple[str, str]]]:
    """The file system, and each path that the pattern stands for with the folder that names are relative to."""
    import fsspec.core
    from braceexpand import braceexpand

    try:
        patterns = list(braceexpand(source)) if "{" in source else [source]
        fs = fsspec.core.url_to_fs(patterns[0])[0]
        stripped = [str(fs._strip_protocol(pattern)) for pattern in patterns]
        # The folder in front of the first wildcard: names relative to it stay when more files match.
        wild = "{" in source or _is_pattern(source)
        prefix = str(fs._strip_protocol(posixpath.dirname(re.split(r"[{*?\[]", source)[0]) or "."))
        found: list[tuple[str, str]] = []
        for path in stripped:
            if fs.exists(path):
                found.append((path, prefix if wild else path if fs.isdir(path) else posixpath.dirname(path)))
            elif _is_pattern(path) and (matches := sorted(fs.glob(path))):
                found.extend((str(match), prefix) for match in matches)
            else:
                raise TldrError(f"{path} does not exist")
    except (OSError, ImportError, ValueError) as error:
        raise TldrError(f"cannot open {source}: {error}") from error
    return fs, found


def _is_pattern(path: str) -> bool:
    return any(character in path for character in "*?[")


def _relative(path: str, prefix: str) -> str:
    return path[len(prefix) :].lstrip("/") if path.startswith(prefix) else path


def _shards_in_folder(
    fs: fsspec.AbstractFileSystem, root: str, prefix: str, naming: Mapping[str, str]
) -> Iterator[Shard]:
    for folder, subfolders, files in fs.walk(root, detail=True):
        files = {name: info for name, info in files.items() if not name.startswith(".")}
        stems = {TAR.sub("", name) for name in files if TAR.search(name)}
        loose = {name: int(info.get("size") or 0) for name, info in files.items()}
        for name in sorted(files):
            path = posixpath.join(folder, name)
            if PARQUET.search(name):
                # img2dataset writes 00000.parquet beside 00000.tar or 00000/: what it downloaded, without the images.
                if PARQUET.sub("", name) in stems or PARQUET.sub("", name) in subfolders:
                    continue
            elif not TAR.search(name):
                continue
            sidecar = posixpath.join(folder, TAR.sub("", name) + ".parquet")
            beside = sidecar if TAR.search(name) and posixpath.basename(sidecar) in files else None
            if shard := _file_shard(fs, path, _relative(path, prefix), naming, beside):
                yield shard
        if any(_extension(name) in IMAGE_EXTENSIONS for name in loose):
            yield _folder_shard(fs, folder, _relative(folder, prefix), loose, naming)


def _file_shard(
    fs: fsspec.AbstractFileSystem, path: str, name: str, naming: Mapping[str, str], sidecar: str | None
) -> Shard | None:
    read: Callable[[Shard], Iterator[SourcePair | BadEntry]]
    if TAR.search(path):
        read = lambda shard: _read_tar(shard, fs, path, sidecar, naming)  # noqa: E731
    elif PARQUET.search(path):
        read = lambda shard: _read_parquet(shard, fs, path, naming)  # noqa: E731
    else:
        return None
    size = int(fs.size(path) or 0)
    return Shard(name, size, read, lambda: _fingerprint(fs, path, size))


def _fingerprint(fs: fsspec.AbstractFileSystem, path: str, size: int) -> str:
    with fs.open(path, "rb") as file:
        head = file.read(FINGERPRINT_BYTES)
        file.seek(max(0, size - FINGERPRINT_BYTES))
        return hashlib.sha256(b"%d " % size + head + file.read()).hexdigest()


# -- tar


def _read_tar(
    shard: Shard, fs: fsspec.AbstractFileSystem, path: str, sidecar: str | None, naming: Mapping[str, str]
) -> Iterator[SourcePair | BadEntry]:
    """WebDataset's convention: consecutive members of one name up to its first dot are one entry."""
    seen: dict[str, int] = {}
    known: dict[str, Entry] | None = None
    truncated = path.endswith(".tar") and not _has_end(fs, path, shard.bytes_total)
    with fs.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r|*") as tar:
        for key, members in _groups(tar, truncated):
            shard.bytes_read = min(file.tell(), shard.bytes_total)
            if sidecar and isinstance(members, dict) and "json" not in members:
                known = _rows_by_key(fs, sidecar) if known is None else known
                members = {**members, "json": known.get(posixpath.basename(key), {})}
            place = f"{shard.name}/{key}"
            # A key that comes again later in the same shard is another entry, and needs a place of its own.
            seen_before = seen.get(key, 0) if len(seen) < 1_000_000 else 0
            seen[key] = seen_before + 1
            yield _entry(place if not seen_before else f"{place}#{seen_before + 1}", members, naming)


def _has_end(fs: fsspec.AbstractFileSystem, path: str, size: int) -> bool:
    """Whether the archive ends with a block of zeros: tarfile takes one that was cut off for complete."""
    with fs.open(path, "rb") as file:
        file.seek(max(0, size - tarfile.BLOCKSIZE))
        return size % tarfile.BLOCKSIZE == 0 and not any(file.read())


def _groups(tar: tarfile.TarFile, truncated: bool) -> Iterator[tuple[str, Entry | _NotAPair]]:
    key: str | None = None
    members: Entry = {}
    problem: _NotAPair | None = None
    for member in tar:
        if not member.isfile():
            continue
        folder, base = posixpath.split(member.name)
        stem, _, extension = base.partition(".")
        if not stem or base.startswith("__"):  # WebDataset's own metadata
            continue
        own_key, extension = posixpath.join(folder, stem), extension.lower()
        if own_key != key or extension in members:
            if key is not None:
                yield key, problem or members
            key, members, problem = own_key, {}, None
        if member.size > MEMBER_BYTES_MAX:
            problem = _NotAPair("too-large", f"{member.name} has {member.size} bytes")
            continue
        reader = tar.extractfile(member)
        data = reader.read() if reader else b""
        if len(data) != member.size:
            raise tarfile.ReadError(f"{member.name} ends after {len(data)} of {member.size} bytes")
        members[extension] = data
    if truncated:  # the last entry may lack a member, and with it its id
        raise tarfile.ReadError("the archive is cut off")
    if key is not None:
        yield key, problem or members


def _rows_by_key(fs: fsspec.AbstractFileSystem, sidecar: str) -> dict[str, Entry]:
    """The rows of img2dataset's sidecar by key: 10,000 rows of text, images are never in it."""
    import pyarrow.parquet as pq

    with fs.open(sidecar, "rb") as file:
        rows = pq.read_table(file).to_pylist()
    return {str(row.get("key")): row for row in rows}


# -- folder


def _folder_shard(
    fs: fsspec.AbstractFileSystem, folder: str, name: str, sizes: dict[str, int], naming: Mapping[str, str]
) -> Shard:
    total = sum(size for file, size in sizes.items() if _extension(file) in IMAGE_EXTENSIONS)
    return Shard(name, total, lambda shard: _read_folder(shard, fs, folder, sizes, naming), lambda: None)


def _read_folder(
    shard: Shard, fs: fsspec.AbstractFileSystem, folder: str, sizes: Mapping[str, int], naming: Mapping[str, str]
) -> Iterator[SourcePair | BadEntry]:
    for file in sorted(sizes):
        stem, extension = posixpath.splitext(file)[0], _extension(file)
        place = posixpath.join(shard.name, file)
        if extension == "txt":
            # Images sort in front of their caption or behind it, so all of them are looked for.
            if not any(f"{stem}.{e}" in sizes or f"{stem}.{e.upper()}" in sizes for e in IMAGE_EXTENSIONS):
                yield BadEntry(place, "no-image", "a caption without an image of the same name")
            continue
        if extension not in IMAGE_EXTENSIONS:
            continue
        if sizes[file] > MEMBER_BYTES_MAX:
            yield BadEntry(place, "too-large", f"{sizes[file]} bytes")
            continue
        try:
            members: Entry = {extension: fs.cat_file(posixpath.join(folder, file))}
            for text in ("txt", "json"):
                if f"{stem}.{text}" in sizes:
                    members[text] = fs.cat_file(posixpath.join(folder, f"{stem}.{text}"))
        except OSError as error:
            yield BadEntry(place, "unreadable", str(error))
            continue
        yield _entry(place, members, naming)
        shard.bytes_read += sizes[file]


def _extension(file: str) -> str:
    return posixpath.splitext(file)[1][1:].lower()


# -- Parquet


def _read_parquet(
    shard: Shard, fs: fsspec.AbstractFileSystem, path: str, naming: Mapping[str, str]
) -> Iterator[SourcePair | BadEntry]:
    import pyarrow.parquet as pq

    row = 0
    file: IO[bytes]
    with fs.open(path, "rb") as file:
        parquet = pq.ParquetFile(file, pre_buffer=False)
        rows = max(1, parquet.metadata.num_rows)
        for batch in parquet.iter_batches(batch_size=ROWS_AT_ONCE, use_threads=False):
            for number in range(batch.num_rows):
                place = f"{shard.name}/{row}"
                try:
                    values: Entry | _NotAPair = batch.slice(number, 1).to_pylist()[0]
                except ValueError as error:  # text that is not UTF-8
                    values = _NotAPair("not-utf8", str(error))
                yield _entry(place, values, naming)
                row += 1
                shard.bytes_read = shard.bytes_total * row // rows


# -- an entry as a pair


def _entry(place: str, members: Entry | _NotAPair, naming: Mapping[str, str]) -> SourcePair | BadEntry:
    try:
        if isinstance(members, _NotAPair):
            raise members
        return _pair(place, _flat(members, naming), naming)
    except _NotAPair as problem:
        return BadEntry(place, problem.reason, problem.detail)


def _flat(members: Entry, naming: Mapping[str, str]) -> Entry:
    """Members and the content of .json as one mapping by lower-case name: bytes are images, the rest text or values."""
    values: Entry = {}
    image_name = naming.get("image", "").lower()
    for name, data in members.items():
        if name == "json":
            values = {**_json(data), **values}
        elif isinstance(data, bytes) and not (name.rpartition(".")[2].lower() in IMAGE_NAMES or name == image_name):
            if name.lower() in CAPTION_NAMES or name == naming.get("caption"):
                values[name.lower()] = _text(data, name)
            elif len(data) <= TEXT_FIELD_BYTES_MAX:
                try:
                    values[name.lower()] = data.decode().strip()
                except UnicodeDecodeError:
                    continue  # a tensor or the like, of no use in a field
        else:
            values[name.lower()] = data
    return values


def _json(data: Any) -> Entry:
    if isinstance(data, dict):
        content: Any = data
    else:
        try:
            content = json.loads(data)
        except ValueError as error:
            raise _NotAPair("bad-json", str(error)) from error
    if not isinstance(content, dict):
        raise _NotAPair("bad-json", "the .json member is not an object")
    return {str(key).lower(): value for key, value in content.items()}


def _text(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig").strip("\r\n")
    except UnicodeDecodeError as error:
        raise _NotAPair("not-utf8", f"{name}: {error}") from error


def _pair(place: str, values: Entry, naming: Mapping[str, str]) -> SourcePair:
    image, image_uri, image_name = _image(values, naming)
    caption_name = next(iter(_present(values, naming, "caption", CAPTION_NAMES)), None)
    if caption_name is None:
        raise _NotAPair("no-caption", f"none of {', '.join(CAPTION_NAMES)}; name it with --field caption=…")
    caption = values[caption_name]
    if not isinstance(caption, str):
        raise _NotAPair("caption-not-text", f"{caption_name} is {type(caption).__name__}")
    uri_name = None
    if image is None:
        uri_name = next(iter(_present(values, naming, "image_uri", URI_NAMES)), None)
        if image_uri is None and uri_name is not None:
            image_uri = str(values[uri_name])
        if not image_uri:
            raise _NotAPair("no-image", "neither image bytes nor a URI")
    used = {caption_name, image_name, uri_name}
    fields = {
        name: field_text(value)
        for name, value in values.items()
        if name not in used and not (value is None or isinstance(value, bytes) or value == caption)
    }
    pair_id = next((str(values[n]) for n in _present(values, naming, "id", ID_NAMES)), None) or image_uri
    return SourcePair(pair_id or content_id(image or b"", caption), caption, image, image_uri, fields, place)


def _present(values: Entry, naming: Mapping[str, str], target: str, usual: Iterable[str]) -> list[str]:
    """The names under which `target` is there; an empty value counts for a caption only."""
    names = [naming[target].lower()] if target in naming else usual
    return [name for name in names if values.get(name) is not None and (values[name] != "" or target == "caption")]


def _image(values: Entry, naming: Mapping[str, str]) -> tuple[bytes | None, str | None, str | None]:
    """(image bytes, image URI, name of the value that they are from)."""
    if "image" in naming:
        candidates = [naming["image"].lower()]
        if candidates[0] not in values:
            raise _NotAPair("no-image", f"no {naming['image']}")
    else:
        candidates = [name for name in values if name.rpartition(".")[2] in IMAGE_NAMES]
        # img2dataset's .json may well have a text "image" of its own beside the .jpg.
        candidates = [n for n in candidates if isinstance(values[n], (bytes, dict))] or candidates
    if len(candidates) > 1:
        raise _NotAPair("several-images", f"{', '.join(candidates)}: choose with --field image=…")
    if not candidates:
        return None, None, None
    name, value = candidates[0], values[candidates[0]]
    if isinstance(value, dict) and {"bytes", "path"} & value.keys():  # Hugging Face's Image feature
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value, None, name
    if isinstance(value, str) and "://" in value:
        return None, value, name
    # A row whose download failed has a null image: its URL is not a pair, or a worker would fetch what img2dataset
    # has already given up.
    raise _NotAPair("no-image", f"{name} is empty" if not value else f"{name} is neither bytes nor a URI")


def field_text(value: Any) -> str:
    """A value of the source as the text of a field: itself, JSON, or what its type shows (a date, a decimal)."""
    if isinstance(value, (dict, list, int, float)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def content_id(image: bytes, caption: str) -> str:
    """What a pair is when its source has no name for it: SHA-256 of image and caption."""
    content = hashlib.sha256(hashlib.sha256(image).digest() + caption.encode("utf-8", "surrogatepass"))
    return f"sha256:{content.hexdigest()}"
