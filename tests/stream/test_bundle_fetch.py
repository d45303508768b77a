"""A bundle is fetched whole or not at all, each hash compared, and what is on the disk already is not fetched again."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import aiohttp
import fsspec
import numpy as np
import pytest

from models.bundle import load_beside, load_model, read_files
from models.errors import BundleError
from stream.bundle_fetch import PARTIALS_MAX, fetch, prune, store
from stream.bundles import Announcement
from stream.consume import ConsumeOptions, _beside, _load
from stream.kafka import Connection
from tests.stream.other_bundle import SAMPLE, bundle_with_other_centroids


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_with_other_centroids(tmp_path_factory.mktemp("bundles") / "other", seed=1)


def version_of(folder: Path) -> str:
    return str(json.loads((folder / "manifest.json").read_text())["version"])[:16]


def test_a_local_path_and_a_url_give_the_same_folder_with_every_file(other: Path, tmp_path: Path) -> None:
    files = fsspec.filesystem("memory")
    for file in other.iterdir():
        files.pipe_file(f"/bundles/other/{file.name}", file.read_bytes())

    local = fetch(str(other), version_of(other), tmp_path / "a")
    remote = fetch("memory://bundles/other", version_of(other), tmp_path / "b", [SAMPLE])

    assert local == tmp_path / "a" / version_of(other)
    assert read_files(local)[1] == read_files(remote)[1] == read_files(other)[1]


def test_a_bundle_that_is_stored_at_a_url_is_fetched_from_there_and_never_replaced(other: Path, tmp_path: Path) -> None:
    store(other, "memory://stored/other")

    assert read_files(fetch("memory://stored/other", version_of(other), tmp_path))[1] == read_files(other)[1]
    with pytest.raises(BundleError, match="exists: a bundle is never changed"):
        store(SAMPLE, "memory://stored/other")
    with pytest.raises(BundleError, match="no bundle can be written to"):
        store(other, "http://127.0.0.1:1/other")


def test_what_another_bundle_on_the_disk_has_is_not_fetched_again(other: Path, tmp_path: Path) -> None:
    at = tmp_path / "far"
    shutil.copytree(other, at)
    for name in ("encoder.safetensors", "decoder.safetensors", "codebook.safetensors"):
        (at / name).unlink()

    fetched = fetch(str(at), version_of(other), tmp_path / "cache", [SAMPLE])

    assert read_files(fetched)[1] == read_files(other)[1]


@pytest.mark.parametrize("harm", ["cut off", "changed", "missing", "longer", "no manifest", "other version"])
def test_a_bundle_that_is_not_whole_is_refused_in_one_line_and_leaves_nothing(
    other: Path, tmp_path: Path, harm: str
) -> None:
    at, version = tmp_path / "far", version_of(other)
    shutil.copytree(other, at)
    file = at / "clusters.safetensors"
    content = file.read_bytes()
    if harm == "missing":
        file.unlink()
    elif harm == "no manifest":
        (at / "manifest.json").unlink()
    elif harm == "other version":
        version = "0" * 16
    else:
        changed = bytes([content[-1] ^ 1])
        file.write_bytes(
            {"cut off": content[:-9], "changed": content[:-1] + changed, "longer": content + b"more"}[harm]
        )

    with pytest.raises(BundleError) as refused:
        fetch(str(at), version, tmp_path / "cache", [SAMPLE])

    assert "\n" not in str(refused.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_a_fetch_that_died_has_left_goes_with_the_next_one_and_old_bundles_when_they_are_pruned(
    other: Path, tmp_path: Path
) -> None:
    (tmp_path / ".partial-1").mkdir()
    (tmp_path / "0123456789abcdef").mkdir()

    fetched = fetch(str(other), version_of(other), tmp_path, [SAMPLE])
    prune(tmp_path, {version_of(other)})

    assert list(tmp_path.iterdir()) == [fetched]


def test_an_unknown_kind_of_url_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot be read"):
        fetch("nowhere://bundle", "0" * 16, tmp_path)


def test_a_bundle_loaded_beside_another_shares_its_networks_and_assigns_by_its_own_centroids(other: Path) -> None:
    live = load_model(SAMPLE, "cpu")
    vectors = np.random.default_rng(1).integers(0, live.codebook_size, (200, live.tokens)).astype(np.uint16)

    beside, whole = load_beside(other, live), load_model(other, "cpu")

    assert (beside.version, beside.space, beside.clusters) == (whole.version, live.space, whole.clusters)
    assert (beside.assign(vectors) == whole.assign(vectors)).all()
    assert (beside.assign(vectors) != live.assign(vectors)).any()
    assert beside._captioner is live._captioner  # type: ignore[attr-defined]


def test_a_bundle_with_another_gate_is_not_loaded_beside_and_the_message_says_the_way_round(tmp_path: Path) -> None:
    live = load_model(SAMPLE, "cpu")
    gated = bundle_with_other_centroids(tmp_path / "gated", seed=1, gate=0.123)

    with pytest.raises(BundleError, match="start another --stream on the same raw topic"):
        load_beside(gated, live)


# -- a copy of our own that is damaged ---------------------------------------------------------------------------------

OPTIONS = ConsumeOptions(Connection("nowhere:1"), "raw", device="cpu")


def announcement_of(folder: Path) -> Announcement:
    return Announcement(
        version_of(folder), str(folder), str(json.loads((folder / "manifest.json").read_text())["space"]), "", 0
    )


def damage(file: Path) -> None:
    """What a disk does: the same inode, another bit."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink()  # not the file of another bundle that it may be a link to
    file.write_bytes(content)


@pytest.mark.parametrize(
    "harm", ["a file is changed", "a file is missing", "a file is a folder", "the manifest is cut off"]
)
def test_a_damaged_copy_in_the_cache_is_fetched_again_at_once_by_a_start_and_by_a_switch(
    other: Path, tmp_path: Path, harm: str
) -> None:
    live = load_model(SAMPLE, "cpu")
    announcement = announcement_of(other)
    cached = fetch(str(other), announcement.version, tmp_path)

    def harmed() -> None:
        if harm == "the manifest is cut off":
            (cached / "manifest.json").write_text("{")
        elif harm == "a file is changed":
            damage(cached / "clusters.safetensors")
        else:
            (cached / "clusters.safetensors").unlink()
            if harm == "a file is a folder":
                (cached / "clusters.safetensors").mkdir()

    harmed()
    started = _load(OPTIONS, [announcement], tmp_path)
    harmed()
    switched = _beside(announcement, live, tmp_path, OPTIONS)

    assert started.version == switched.version == announcement.version
    assert read_files(cached)[1] == read_files(other)[1]
    assert list(tmp_path.iterdir()) == [cached]


def test_what_is_whole_of_a_damaged_copy_is_not_fetched_again(other: Path, tmp_path: Path) -> None:
    at = tmp_path / "far"
    shutil.copytree(other, at)
    cached = fetch(str(at), version_of(other), tmp_path / "cache")
    damage(cached / "clusters.safetensors")
    for name in ("encoder.safetensors", "decoder.safetensors"):
        (at / name).unlink()

    assert read_files(fetch(str(at), version_of(other), tmp_path / "cache"))[1] == read_files(other)[1]


def test_a_damaged_bundle_of_the_users_own_is_refused_and_left_as_it_is(other: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(other, own)
    damage(own / "clusters.safetensors")
    announcement = announcement_of(own)
    before = {file.name: file.read_bytes() for file in own.iterdir()}

    with pytest.raises(BundleError, match="is damaged or cut off"):
        _load(OPTIONS, [announcement], tmp_path / "cache")
    with pytest.raises(BundleError, match="is damaged or cut off"):
        _beside(announcement, load_model(SAMPLE, "cpu"), tmp_path / "cache", OPTIONS)

    assert {file.name: file.read_bytes() for file in own.iterdir()} == before


def test_a_disk_that_fails_at_a_start_leaves_the_older_bundle_to_begin_with(
    other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(path: Path, *_: Any, **__: Any) -> Any:
        if path.name == version_of(other):
            raise OSError(5, "Input/output error")
        return load_model(path, "cpu")

    monkeypatch.setattr("models.bundle.load_model", load)

    begun = _load(OPTIONS, [announcement_of(SAMPLE), announcement_of(other)], tmp_path)

    assert begun.version == version_of(SAMPLE)


@pytest.mark.parametrize("version", ["../../own", "/own", "", "..", "0123456789abcdef/.."])
def test_a_version_that_is_announced_as_a_path_reaches_nothing_outside_of_the_cache(
    other: Path, tmp_path: Path, version: str
) -> None:
    (tmp_path / "own").mkdir()

    with pytest.raises(BundleError, match="which is no bundle's version"):
        fetch(str(other), f"{tmp_path}{version}" if version == "/own" else version, tmp_path / "state" / "bundles")

    assert (tmp_path / "own").is_dir()


# -- slow servers, and servers that stop -------------------------------------------------------------------------------


class SlowServer(ThreadingHTTPServer):
    """Serves a folder; some of its files stall, trickle or break off."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []
        self.stalls: set[str] = set()
        self.breaks_off: set[str] = set()
        self.trickles: dict[str, float] = {}
        self.goes_on = threading.Event()
        super().__init__(("127.0.0.1", 0), _SlowHandler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _SlowHandler(SimpleHTTPRequestHandler):
    server: SlowServer

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        self.server.asked.append(name)
        content = (self.server.folder / name).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        half = len(content) // 2
        self.wfile.write(content[:half])
        if name in self.server.stalls:
            self.server.goes_on.wait(20)
        if name in self.server.trickles:
            for at in range(half, len(content), max(1, half // 10)):
                time.sleep(self.server.trickles[name] / 10)
                self.wfile.write(content[at : at + max(1, half // 10)])
        elif name not in self.server.breaks_off:
            self.wfile.write(content[half:])


@pytest.fixture
def server(other: Path) -> Iterator[SlowServer]:
    running = SlowServer(other)
    threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
    yield running
    running.goes_on.set()
    running.shutdown()
    running.server_close()


def test_a_file_may_take_longer_than_a_web_request_may_by_default(
    server: SlowServer, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiohttp.client.DEFAULT_TIMEOUT", aiohttp.ClientTimeout(total=0.5))
    fsspec.get_filesystem_class("http").clear_instance_cache()
    server.trickles["clusters.safetensors"] = 1.0

    fetched = fetch(server.url, version_of(other), tmp_path, [SAMPLE])

    assert read_files(fetched)[1] == read_files(other)[1]


def test_a_server_that_stalls_ends_the_fetch_in_one_line_that_says_what_timed_out(
    server: SlowServer, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stream.bundle_fetch.STALL_S", 0.5)
    server.stalls.add("decoder.safetensors")
    began = time.monotonic()

    with pytest.raises(BundleError, match=r"decoder.safetensors.* timed out") as refused:
        fetch(server.url, version_of(other), tmp_path)

    assert "\n" not in str(refused.value)
    assert time.monotonic() - began < 10


def test_a_fetch_that_failed_goes_on_with_the_files_that_it_has(
    server: SlowServer, other: Path, tmp_path: Path
) -> None:
    server.breaks_off.add("encoder.safetensors")
    with pytest.raises(BundleError, match=r"encoder.safetensors"):
        fetch(server.url, version_of(other), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [f".partial-{version_of(other)}"]
    server.breaks_off.clear()
    first, server.asked = server.asked, []

    fetched = fetch(server.url, version_of(other), tmp_path)

    assert read_files(fetched)[1] == read_files(other)[1]
    assert list(tmp_path.iterdir()) == [fetched]
    assert set(first) & set(server.asked) == {"manifest.json", "encoder.safetensors"}


def test_what_a_dead_process_left_half_is_fetched_again_and_what_it_left_whole_is_not(
    server: SlowServer, other: Path, tmp_path: Path
) -> None:
    partial = tmp_path / f".partial-{version_of(other)}"
    partial.mkdir()
    shutil.copy(other / "encoder.safetensors", partial)
    (partial / "decoder.safetensors").write_bytes((other / "decoder.safetensors").read_bytes()[:999])
    (partial / "stray").write_bytes(b"x")

    fetched = fetch(server.url, version_of(other), tmp_path)

    assert {file.name for file in fetched.iterdir()} == {file.name for file in other.iterdir()}
    assert read_files(fetched)[1] == read_files(other)[1]
    assert "encoder.safetensors" not in server.asked


def test_failed_fetches_of_many_bundles_keep_no_more_than_two_beginnings(
    server: SlowServer, other: Path, tmp_path: Path
) -> None:
    server.breaks_off.add("encoder.safetensors")
    for number in range(4):
        begun = tmp_path / f".partial-{number:016x}"
        begun.mkdir()
        (begun / "file").touch()

    with pytest.raises(BundleError):
        fetch(server.url, version_of(other), tmp_path)

    assert len(list(tmp_path.iterdir())) == PARTIALS_MAX


def test_a_fetch_that_hangs_is_given_up_as_soon_as_the_worker_is_to_leave(
    server: SlowServer, other: Path, tmp_path: Path
) -> None:
    server.stalls.add("encoder.safetensors")
    announcement, live = replace(announcement_of(other), uri=server.url), load_model(SAMPLE, "cpu")
    leaving = threading.Event()
    threading.Timer(0.5, leaving.set).start()
    began = time.monotonic()

    with pytest.raises(BundleError, match="given up"):
        _beside(announcement, live, tmp_path, OPTIONS, leaving.is_set)

    assert time.monotonic() - began < 10


def test_what_comes_after_a_fetch_was_given_up_is_written_nowhere(
    server: SlowServer, other: Path, tmp_path: Path
) -> None:
    """The thread that was left behind must not write into the file of the fetch that follows."""
    server.stalls.add("encoder.safetensors")
    with pytest.raises(BundleError, match="given up"):
        fetch(server.url, version_of(other), tmp_path, cancelled=lambda: "encoder.safetensors" in server.asked)
    server.stalls.clear()

    fetched = fetch(server.url, version_of(other), tmp_path)
    server.goes_on.set()
    until_gone("bundle-fetch")

    assert read_files(fetched)[1] == read_files(other)[1]


def until_gone(thread: str) -> None:
    deadline = time.monotonic() + 10
    while any(one.name == thread for one in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
