"""The model without a model keeps the promises that the stream builds on."""

import subprocess
import sys

import numpy as np
import pytest

from models.errors import BadImage
from models.null import NullModel

IMAGES = [f"image {i}".encode() for i in range(500)]


def test_the_same_bytes_give_the_same_everything_in_any_batch() -> None:
    model, other = NullModel(clusters=16), NullModel(clusters=16)
    vectors = model.encode([model.decode(i) for i in IMAGES])

    for row in (0, 7, 499):
        alone = other.encode([other.decode(IMAGES[row])])
        assert (alone[0] == vectors[row]).all()
        assert other.assign(alone)[0] == model.assign(vectors)[row]
        assert other.match(alone, ["a cat"])[0] == model.match(vectors, ["a cat"] * 500)[row]
        assert other.caption(alone)[0] == model.caption(vectors)[row] != ""


def test_everything_lies_in_its_range_and_is_spread_over_it() -> None:
    model = NullModel(tokens=20, codebook_size=100, clusters=16)
    vectors = model.encode([model.decode(i) for i in IMAGES])
    scores = model.match(vectors, ["x"] * 500)

    assert vectors.shape == (500, 20) and vectors.dtype == np.uint16 and len(np.unique(vectors)) == 100
    assert vectors.max() < 100
    assert np.bincount(model.assign(vectors), minlength=16).min() > 10
    assert scores.dtype == np.float32 and scores.min() >= 0 and scores.max() < 1 and 0.4 < scores.mean() < 0.6


def test_the_score_depends_on_the_caption() -> None:
    model = NullModel()
    vectors = model.encode([model.decode(IMAGES[0])] * 2)

    assert len(set(model.match(vectors, ["a cat", "a dog"]).tolist())) == 2


def test_planted_bad_images_are_refused() -> None:
    with pytest.raises(BadImage):
        NullModel().decode(b"BAD image")
    with pytest.raises(BadImage):
        NullModel().decode(b"")


def test_other_clusters_make_another_version_of_the_same_space() -> None:
    assert NullModel(clusters=8).version != NullModel(clusters=9).version
    assert NullModel(clusters=8).space == NullModel(clusters=9).space != NullModel(tokens=5).space


def test_nothing_in_nothing_out() -> None:
    model = NullModel()
    none = model.encode([])

    assert none.shape == (0, 196) and model.assign(none).shape == (0,) and model.match(none, []).shape == (0,)
    assert model.caption(none) == []


def test_it_imports_without_torch() -> None:
    code = "import sys, models.null, models.bundle, models.model; print('torch' in sys.modules, 'cv2' in sys.modules)"

    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert out.split() == ["False", "False"]
