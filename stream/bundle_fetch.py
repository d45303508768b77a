"""A bundle from wherever it was announced to be (a local path, any fsspec URL) into a worker's own folder, whole or not at all.

What another bundle on this disk has already is linked or copied from there: bundles of one stream share their networks, so
that a new one costs its clusters. Must not know what a bundle is for.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from models.bundle import MANIFEST, READABLE, read_manifest
from models.errors import BundleError

CHUNK_BYTES = 1 << 20
# A manifest holds baselines and examples, some hundred kB of them.
MANIFEST_BYTES_MAX = 64 << 20
_PARTIAL = ".partial-"


def fetch(uri: str, version: str, cache: Path, beside: Iterable[Path] = ()) -> Path:
    """The folder in `cache` that has the bundle `version`, fetched from `uri` if it is not there yet; every hash compared.

    beside  folders of other bundles on this disk. Raises BundleError in one line; nothing half is ever left in its place.
    """
    target = cache / version
    if target.is_dir():
        with contextlib.suppress(BundleError):
            if read_manifest(target).version.startswith(version):
                return target
        shutil.rmtree(target)
    system, path = _file_system(uri)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        for left in cache.glob(f"{_PARTIAL}*"):  # of a process that died over it
            shutil.rmtree(left, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=cache))
    except OSError as error:
        raise BundleError(f"the bundle {version[:12]} has no place in {cache} ({error.strerror}): make room") from error
    try:
        _download(system, f"{path}/{MANIFEST}", partial / MANIFEST, uri, MANIFEST_BYTES_MAX)
        manifest = read_manifest(partial)
        if not manifest.version.startswith(version):
            raise BundleError(
                f"{uri} holds bundle {manifest.version[:12]} and was announced as {version[:12]}: announce it again"
            )
        there = _files_of([*beside, *(folder for folder in cache.iterdir() if folder != partial)])
        for name, about in manifest.data["files"].items():
            if Path(name).name != name or Path(name).suffix not in READABLE:
                raise BundleError(
                    f"{uri} names {name!r}: a bundle holds {' and '.join(READABLE)} files and nothing else"
                )
            if _take(there.get(about["sha256"]), partial / name, about["sha256"]):
                continue
            digest = _download(system, f"{path}/{name}", partial / name, uri, int(about["bytes"]))
            if digest != about["sha256"]:
                raise BundleError(f"{uri}: {name} is damaged or cut off (its SHA-256 is not the manifest's)")
        partial.rename(target)
        return target
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def prune(cache: Path, keep: Collection[str]) -> None:
    """Removes the bundles in `cache` that are none of these versions."""
    if cache.is_dir():
        for folder in cache.iterdir():
            if folder.name not in keep and not folder.name.startswith(_PARTIAL):
                shutil.rmtree(folder, ignore_errors=True)


def store(folder: Path, uri: str) -> None:
    """Copies the bundle in `folder` to `uri`, its manifest last, so that nobody finds half of one there.

    Raises BundleError where there is one already, or where nothing can be written.
    """
    system, path = _file_system(uri)
    try:
        there = system.exists(f"{path}/{MANIFEST}")
        if not there:
            system.makedirs(path, exist_ok=True)
            for file in sorted(folder.iterdir(), key=lambda file: file.name == MANIFEST):
                system.put_file(str(file), f"{path}/{file.name}")
    except Exception as error:  # each file system has its own
        raise BundleError(f"no bundle can be written to {uri} ({_said(error)}): give --out") from error
    if there:
        raise BundleError(f"{uri} exists: a bundle is never changed, give another --out")


def manifest_at(uri: str) -> dict[str, Any]:
    """The manifest of the bundle at `uri`, its own hash checked. Raises BundleError."""
    system, path = _file_system(uri)
    with tempfile.TemporaryDirectory() as folder:
        _download(system, f"{path}/{MANIFEST}", Path(folder) / MANIFEST, uri, MANIFEST_BYTES_MAX)
        return dict(read_manifest(folder).data)


def _file_system(uri: str) -> tuple[Any, str]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(uri)
    except (ValueError, ImportError, OSError) as error:
        raise BundleError(f"{uri} cannot be read: {' '.join(str(error).split())}") from error
    return system, str(path).rstrip("/")


def _download(system: Any, path: str, out: Path, uri: str, bytes_max: int) -> str:
    """The SHA-256 of what was copied to `out`."""
    digest, count = hashlib.sha256(), 0
    # Not every web server knows ranges: one request a file, which is read as it comes.
    how = {"block_size": 0} if "http" in system.protocol else {}
    try:
        with system.open(path, "rb", **how) as source, out.open("wb") as file:
            while chunk := source.read(CHUNK_BYTES):
                count += len(chunk)
                if count > bytes_max:
                    raise BundleError(f"{uri}: {out.name} is longer than {bytes_max} bytes, which is all it may have")
                digest.update(chunk)
                file.write(chunk)
    except BundleError:
        raise
    except Exception as error:  # each file system has its own
        raise BundleError(f"{uri}: {out.name} cannot be fetched ({_said(error)})") from error
    return digest.hexdigest()


def _said(error: Exception) -> str:
    said = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return str(said)[:200]


def _files_of(folders: Iterable[Path]) -> dict[str, Path]:
    """SHA-256 → file, of the bundles in these folders, as their manifests say."""
    found: dict[str, Path] = {}
    for folder in folders:
        with contextlib.suppress(BundleError):
            for name, about in read_manifest(folder).data["files"].items():
                found[about["sha256"]] = folder / Path(name).name
    return found


def _take(source: Path | None, out: Path, sha256: str) -> bool:
    """Links or copies a file of another bundle, if it is what its manifest says."""
    if source is None:
        return False
    try:
        with source.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                return False
        try:
            os.link(source, out)
        except OSError:  # another file system
            shutil.copyfile(source, out)
    except OSError:
        out.unlink(missing_ok=True)
        return False
    return True
