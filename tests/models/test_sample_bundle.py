"""The committed bundle loads, captions real images, and is small enough for the repository."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from models.bundle import load_model, read_manifest
from models.model import PairModel

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "bundles" / "sample"
SHARD = ROOT / "corpus" / "sample" / "sample-000000.tar"


@pytest.fixture(scope="module")
def model() -> PairModel:
    return load_model(BUNDLE, "cpu")


def pairs(count: int) -> Iterator[tuple[bytes, str]]:
    with tarfile.open(SHARD) as tar:
        members = {m.name: m for m in tar}
        for name in [n for n in members if n.endswith(".txt")][:count]:
            image = next(members[n] for n in (name[:-3] + "jpg", name[:-3] + "png") if n in members)
            yield tar.extractfile(image).read(), tar.extractfile(members[name]).read().decode()  # type: ignore[union-attr]


def test_it_captions_and_scores_pairs_that_it_never_saw(model: PairModel) -> None:
    images, captions = zip(*pairs(48), strict=True)
    vectors = model.encode([model.decode(i) for i in images])
    scores = model.match(vectors, captions)
    others = model.match(vectors, [*captions[17:], *captions[:17]])

    assert all(c.strip() for c in model.caption(vectors)) and len(set(model.caption(vectors))) > 10
    assert vectors.shape == (48, model.tokens) and vectors.max() < model.codebook_size
    assert len(np.unique(model.assign(vectors))) > model.clusters // 3
    assert np.median(scores) > np.median(others)


def test_its_manifest_tells_how_it_was_made_and_what_drift_is_measured_against() -> None:
    manifest = read_manifest(BUNDLE).data

    assert manifest["gate"] is not None and manifest["training"]["seed"] == 0 and manifest["fingerprint"]["torch"]
    assert len(manifest["keywords"]) == manifest["config"]["codes"]
    baselines = manifest["baselines"]
    assert sum(baselines["cluster_occupancy"]) == baselines["pairs"]
    assert sum(baselines["itm_histogram"]) == baselines.get("itm_pairs", baselines["pairs"])
    assert sum(baselines["code_usage"]) == baselines["pairs"] * manifest["config"]["tokens"]


def test_it_is_at_most_16_megabytes_and_nothing_in_it_can_be_executed() -> None:
    files = [f for f in BUNDLE.rglob("*") if f.is_file()]

    assert sum(f.stat().st_size for f in files) <= 16_000_000
    assert {f.suffix for f in files} <= {".safetensors", ".json"}


def test_a_gif_of_an_image_has_nearly_the_vector_of_its_png(model: PairModel) -> None:
    """The same picture in another container: decoding must not decide the meaning."""
    from PIL import Image

    picture = Image.open(io.BytesIO(next(pairs(1))[0])).convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE)
    as_png, as_gif = io.BytesIO(), io.BytesIO()
    picture.save(as_png, "PNG")
    picture.save(as_gif, "GIF")

    one, other = model.encode([model.decode(as_png.getvalue()), model.decode(as_gif.getvalue())])

    assert (one == other).mean() > 0.9
