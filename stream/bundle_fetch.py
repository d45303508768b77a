"""A bundle from wherever it was announced to be (a local path, any fsspec URL) into a worker's own folder, whole or not at all.

What another bundle on this disk has already is linked or copied from there: bundles of one stream share their networks, so
that a new one costs its clusters. Only what lies in that folder is ever removed. Must not know what a bundle is for.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, TypeVar

from models.bundle import MANIFEST, READABLE, read_files, read_manifest
from models.errors import BundleError

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
# A manifest holds baselines and examples, some hundred kB of them.
MANIFEST_BYTES_MAX = 64 << 20
CONNECT_TIMEOUT_S = 30.0
STALL_S = 60.0  # a fetch ends when nothing has come for so long, however long it takes as a whole
LOOK_EVERY_S = 0.1  # at whether it is given up
_PARTIAL = ".partial-"
PARTIALS_MAX = 2  # in one cache: the one that is being fetched, and one more whose fetch failed
# It names a folder, and whoever announces bundles must not name one outside of the cache.
_VERSION = re.compile(r"[0-9a-f]{8,64}")

T = TypeVar("T")
Moved = Callable[[], None]  # is called whenever something has come


def never() -> bool:
    """For fetches that nobody gives up."""
    return False


def fetch(
    uri: str, version: str, cache: Path, beside: Iterable[Path] = (), cancelled: Callable[[], bool] = never
) -> Path:
    """The folder in `cache` that has the bundle `version`, fetched from `uri` if it is not there yet; every hash compared.

    A copy there that turns out damaged is thrown away, and what is damaged of it fetched again. Nothing half is ever left in
    a bundle's place; what a failed fetch has whole waits beside it for the next one.

    beside     folders of other bundles on this disk
    cancelled  is looked at all the time: whether to give up
    Raises BundleError in one line.
    """
    if not _VERSION.fullmatch(version):
        raise BundleError(f"{uri} was announced as {version[:80]!r}, which is no bundle's version: announce it again")
    target, partial = cache / version, cache / f"{_PARTIAL}{version}"
    try:
        if target.is_dir() and not _whole(target, version):
            log.warning("bundle %s is damaged in %s: what is not whole of it is fetched again", version[:12], cache)
            shutil.rmtree(partial, ignore_errors=True)
            target.rename(partial)
        if not target.is_dir():
            partial.mkdir(parents=True, exist_ok=True)
            _bound_partials(cache, partial)
            try:
                if not _whole(partial, version):
                    _complete(partial, uri, version, beside, cancelled)
                partial.rename(target)
            finally:
                _drop_if_empty(partial)
    except OSError as error:
        raise BundleError(f"the bundle {version[:12]} has no place in {cache} ({_said(error)}): make room") from error
    return target


def _whole(folder: Path, version: str) -> bool:
    """Whether it has this bundle with every file, each hash compared."""
    try:
        manifest, _ = read_files(folder, ())
    except BundleError:
        return False
    return manifest.version.startswith(version)


def _complete(
    partial: Path, uri: str, version: str, beside: Iterable[Path], cancelled: Callable[[], bool]
) -> None:  # fmt: skip
    """Fetches into `partial` what it does not have yet."""
    source = _watched(lambda moved: _file_system(uri), uri, cancelled)
    _download(source, uri, partial / MANIFEST, MANIFEST_BYTES_MAX, cancelled)
    manifest = read_manifest(partial)
    if not manifest.version.startswith(version):
        raise BundleError(
            f"{uri} holds bundle {manifest.version[:12]} and was announced as {version[:12]}: announce it again"
        )
    files = manifest.data["files"]
    for name in files:
        if Path(name).name != name or Path(name).suffix not in READABLE:
            raise BundleError(f"{uri} names {name!r}: a bundle holds {' and '.join(READABLE)} files and nothing else")
    for stray in partial.iterdir():
        if stray.is_dir():
            shutil.rmtree(stray)
        elif stray.name != MANIFEST and stray.name not in files:
            stray.unlink()
    there = _files_of([*beside, *(folder for folder in partial.parent.iterdir() if folder != partial)])
    for name, about in files.items():
        if cancelled():
            raise _given_up(uri)
        out, sha256 = partial / name, about["sha256"]
        if _has(out, sha256) or _take(there.get(sha256), out, sha256):
            continue
        if _download(source, uri, out, int(about["bytes"]), cancelled) != sha256:
            out.unlink()
            raise BundleError(f"{uri}: {name} is damaged or cut off (its SHA-256 is not the manifest's)")


def _bound_partials(cache: Path, partial: Path) -> None:
    others = [(left.stat().st_mtime, left) for left in cache.glob(f"{_PARTIAL}*") if left != partial]
    for _, left in sorted(others, reverse=True)[PARTIALS_MAX - 1 :]:
        shutil.rmtree(left, ignore_errors=True)


def _drop_if_empty(partial: Path) -> None:
    """A folder that has a manifest and nothing else saves the next fetch nothing."""
    if partial.is_dir() and not any(file.name != MANIFEST for file in partial.iterdir()):
        shutil.rmtree(partial, ignore_errors=True)


def prune(cache: Path, keep: Collection[str]) -> None:
    """Removes the bundles in `cache` that are none of these versions, and what failed fetches have left."""
    if cache.is_dir():
        for folder in cache.iterdir():
            if folder.name not in keep:
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
    with tempfile.TemporaryDirectory() as folder:
        source = _watched(lambda moved: _file_system(uri), uri, never)
        _download(source, uri, Path(folder) / MANIFEST, MANIFEST_BYTES_MAX, never)
        return dict(read_manifest(folder).data)


def _file_system(uri: str) -> tuple[Any, str]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(uri, **_web_options(uri))
    except (ValueError, ImportError, OSError) as error:
        raise BundleError(f"{uri} cannot be read: {' '.join(str(error).split())}") from error
    return system, str(path).rstrip("/")


def _web_options(uri: str) -> dict[str, Any]:
    """Options by protocol: aiohttp gives a request 300 s as a whole, which a large file on a slow line takes."""
    web = [protocol for protocol in ("http", "https") if f"{protocol}://" in uri]
    if not web:
        return {}
    import aiohttp
    from fsspec.config import conf

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=STALL_S)
    return {
        protocol: {"client_kwargs": {"timeout": timeout} | conf.get(protocol, {}).get("client_kwargs", {})}
        for protocol in web
    }


def _given_up(uri: str) -> BundleError:
    return BundleError(f"{uri} is given up before it is fetched: the worker is leaving")


def _watched(work: Callable[[Moved], T], uri: str, cancelled: Callable[[], bool]) -> T:
    """What `work` returns; it says whenever something has come.

    It works in a thread of its own, which is left behind where nothing comes for STALL_S or `cancelled` says so: no file
    system's call can be ended from outside. Raises BundleError, and whatever `work` raises.
    """
    done: list[T] = []
    failed: list[BaseException] = []
    moved_at = time.monotonic()

    def moved() -> None:
        nonlocal moved_at
        moved_at = time.monotonic()

    def run() -> None:
        try:
            done.append(work(moved))
        except BaseException as error:  # whoever waits raises it
            failed.append(error)

    thread = threading.Thread(target=run, name="bundle-fetch", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(LOOK_EVERY_S)
        if cancelled():
            raise _given_up(uri)
        if thread.is_alive() and time.monotonic() - moved_at > STALL_S:
            raise BundleError(f"{uri} timed out: nothing has come from there for {STALL_S:g} s")
    if failed:
        raise failed[0]
    return done[0]


def _download(
    source: tuple[Any, str], uri: str, out: Path, bytes_max: int, cancelled: Callable[[], bool]
) -> str:  # fmt: skip
    """The SHA-256 of what was copied to `out` from the folder `source`, (file system, path). No half file stays there."""
    system, path = source
    digest, count = hashlib.sha256(), 0
    # Not every web server knows ranges: one request a file, which is read as it comes, and none for its size.
    how = {"block_size": 0, "size": 1} if "http" in system.protocol else {}

    def copy(moved: Moved) -> None:
        nonlocal count
        with system.open(f"{path}/{out.name}", "rb", **how) as content:
            while chunk := content.read(CHUNK_BYTES):
                moved()
                count += len(chunk)
                if count > bytes_max:
                    raise BundleError(f"{uri}: {out.name} is longer than {bytes_max} bytes, which is all it may have")
                digest.update(chunk)
                file.write(chunk)  # closed where this thread was left behind, which so ends

    out.unlink(missing_ok=True)  # it may be a link to another bundle's file
    try:
        with out.open("wb") as file:
            _watched(copy, f"{uri}: {out.name}", cancelled)
    except BaseException as error:
        out.unlink(missing_ok=True)
        if isinstance(error, BundleError) or not isinstance(error, Exception):
            raise
        what = "timed out" if isinstance(error, TimeoutError) else "cannot be fetched"  # each file system has its own
        raise BundleError(f"{uri}: {out.name} {what} ({_said(error)})") from error
    return digest.hexdigest()


def _said(error: Exception) -> str:
    if isinstance(error, FileNotFoundError) and error.strerror is None:
        return "it is not there"
    error = error.__cause__ if isinstance(error, TimeoutError) and isinstance(error.__cause__, Exception) else error
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


def _has(file: Path, sha256: str) -> bool:
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest() == sha256
    except OSError:
        return False


def _take(source: Path | None, out: Path, sha256: str) -> bool:
    """Links or copies a file of another bundle, if it is what its manifest says."""
    if source is None or not _has(source, sha256):
        return False
    try:
        out.unlink(missing_ok=True)
        try:
            os.link(source, out)
        except OSError:  # another file system
            shutil.copyfile(source, out)
    except OSError:
        out.unlink(missing_ok=True)
        return False
    return True
