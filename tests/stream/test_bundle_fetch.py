"""A bundle is fetched whole or not at all, each hash compared, and what is on the disk already is not fetched again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest

from models.bundle import load_beside, load_model, read_files
from models.errors import BundleError
from stream.bundle_fetch import fetch, prune, store
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
