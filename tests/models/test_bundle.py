"""A bundle is what it was when it was written, or it is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from models.bundle import BUNDLE_FILES, content_hash, load_model, read_manifest, write_bundle
from models.clustering import Clustering, fit
from models.errors import BundleError
from models.loaded import CaptionerParts, clusters_content
from tests.models.conftest import Small, jpeg


def written(small: Small, out: Path, clusters: int = 3, gate: float = 0.5) -> Path:
    contents = CaptionerParts(small.captioner, small.vocabulary, small.matching).contents()
    clustering = fit(small.vectors, small.captioner.quantiser.codebook.codes.numpy(), clusters)
    contents["clusters.safetensors"] = clusters_content(clustering)
    about = {
        "config": small.captioner.config.as_dict(),
        "gate": gate,
        "clustering": {"form": "mean", "clusters": clusters},
    }
    write_bundle(out, contents, about)
    return out


def test_a_written_bundle_works_and_names_itself_by_its_content(small: Small, tmp_path: Path) -> None:
    model = load_model(written(small, tmp_path / "a"), "cpu")
    again = read_manifest(written(small, tmp_path / "b"))

    vectors = model.encode([model.decode(jpeg(i)) for i in range(8)])
    scores = model.match(vectors, ["a red circle"] * 8)

    assert model.version == again.version[:16] and len(again.version) == 64
    assert (model.tokens, model.codebook_size, model.clusters, model.gate) == (49, 64, 3, 0.5)
    assert vectors.shape == (8, 49) and set(model.assign(vectors)) <= {0, 1, 2}
    assert ((scores >= 0) & (scores <= 1)).all() and all(model.caption(vectors))
    assert model.fingerprint["batch"] == str(model.batch)


def test_other_clusters_share_the_space_and_another_gate_does_not(small: Small, tmp_path: Path) -> None:
    one, clusters, gate = (
        read_manifest(written(small, tmp_path / name, **options))
        for name, options in (("a", {}), ("b", {"clusters": 2}), ("c", {"gate": 0.6}))
    )

    assert len({one.version, clusters.version, gate.version}) == 3
    assert one.space == clusters.space != gate.space


@pytest.mark.parametrize("name", BUNDLE_FILES)
def test_one_flipped_bit_is_refused_with_the_file_s_name(small: Small, tmp_path: Path, name: str) -> None:
    file = written(small, tmp_path / "a") / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)

    with pytest.raises(BundleError, match=name) as caught:
        load_model(tmp_path / "a", "cpu")
    assert "\n" not in str(caught.value)


def test_a_changed_manifest_is_refused(small: Small, tmp_path: Path) -> None:
    file = written(small, tmp_path / "a") / "manifest.json"
    file.write_text(file.read_text().replace('"gate": 0.5', '"gate": 0.1'))

    with pytest.raises(BundleError, match=r"manifest\.json is damaged"):
        load_model(tmp_path / "a", "cpu")


def in_format(bundle: Path, number: int) -> Path:
    """The manifest says another format, and its hash agrees."""
    file = bundle / "manifest.json"
    about = json.loads(file.read_text()) | {"format": number}
    del about["version"]
    file.write_text(json.dumps(about | {"version": content_hash(about)}))
    return bundle


def test_a_bundle_of_the_first_format_works_as_it_did(small: Small, tmp_path: Path) -> None:
    new = load_model(written(small, tmp_path / "a"), "cpu")

    old = load_model(in_format(tmp_path / "a", 1), "cpu")

    assert old.space == new.space and old.version != new.version


@pytest.mark.parametrize("number", [0, 3])
def test_a_bundle_of_an_unknown_format_is_refused_in_one_line(small: Small, tmp_path: Path, number: int) -> None:
    with pytest.raises(BundleError, match="not of format 1 or 2: it belongs to another version") as caught:
        load_model(in_format(written(small, tmp_path / "a"), number), "cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["weights.pt", "weights.pkl", "../elsewhere.json", "pytorch_model.bin"])
def test_a_bundle_that_names_anything_but_data_is_refused(small: Small, tmp_path: Path, name: str) -> None:
    contents = CaptionerParts(small.captioner, small.vocabulary, small.matching).contents()
    write_bundle(tmp_path / "a", {**contents, "innocent.json": b"x"}, {"config": small.captioner.config.as_dict()})
    file = tmp_path / "a" / "manifest.json"
    about = json.loads(file.read_text())
    about["files"][name] = about["files"].pop("innocent.json")
    del about["version"]
    about["version"] = content_hash(about)
    file.write_text(json.dumps(about))

    with pytest.raises(BundleError, match="nothing else"):
        load_model(tmp_path / "a", "cpu")


def test_a_missing_file_and_a_missing_bundle_are_one_line_each(small: Small, tmp_path: Path) -> None:
    (written(small, tmp_path / "a") / "decoder.safetensors").unlink()

    for path, words in (
        (tmp_path / "a", "decoder.safetensors cannot be read"),
        (tmp_path / "no", "is no model bundle"),
    ):
        with pytest.raises(BundleError, match=words) as caught:
            load_model(path, "cpu")
        assert "\n" not in str(caught.value)


def test_a_captioner_without_clusters_says_how_to_get_them(small: Small, tmp_path: Path) -> None:
    contents = CaptionerParts(small.captioner, small.vocabulary, small.matching).contents()
    write_bundle(tmp_path / "a", contents, {"config": small.captioner.config.as_dict()})

    with pytest.raises(BundleError, match="tldr-stream bootstrap"):
        load_model(tmp_path / "a", "cpu")


def test_weights_of_another_configuration_are_refused(small: Small, tmp_path: Path) -> None:
    contents = CaptionerParts(small.captioner, small.vocabulary, small.matching).contents()
    about = {"config": small.captioner.config.as_dict() | {"codes": 65}, "clustering": {"form": "mean"}}
    write_bundle(tmp_path / "a", contents | {"clusters.safetensors": clusters_content(_any(small))}, about)

    with pytest.raises(BundleError, match=r"codebook\.safetensors does not fit"):
        load_model(tmp_path / "a", "cpu")


def test_writing_never_replaces_a_folder_that_is_no_bundle(small: Small, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "precious.jpg").write_bytes(b"x")

    with pytest.raises(BundleError):
        written(small, tmp_path / "photos")

    assert (tmp_path / "photos" / "precious.jpg").exists() and len(list(tmp_path.iterdir())) == 1


def _any(small: Small) -> Clustering:
    return fit(small.vectors, np.asarray(small.captioner.quantiser.codebook.codes), 2)
