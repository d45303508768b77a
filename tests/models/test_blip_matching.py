"""A BLIP checkpoint scores pictures. Its weights are random here: only shapes, bits and refusals can be promised."""

from pathlib import Path

import numpy as np
import pytest
import torch

from models.blip_matching import FILES, BlipScorer
from models.errors import BundleError, ShapeError
from models.model import Picture
from tests.models.random_models import SIDE, random_blip

NO_VECTORS = np.empty((0, 0), np.uint16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_blip(tmp_path_factory.mktemp("blip"))


def pictures(count: int) -> list[Picture]:
    noise = np.random.default_rng(0).integers(256, size=(count, SIDE, SIDE, 3), dtype=np.uint8)
    return [Picture(np.zeros((8, 8, 3), np.uint8), judged) for judged in noise]


def test_each_pair_has_a_probability_of_its_own_bit_for_bit_whatever_stands_beside_it(folder: Path) -> None:
    scorer = BlipScorer(folder, torch.device("cpu"))
    captions = ["a red dog"] * 10 + ["cat"] * 9 + [" ".join(["dog"] * 5000)]

    together = scorer.scores(NO_VECTORS, captions, pictures(20))
    alone = [scorer.scores(NO_VECTORS, [c], [p]) for c, p in zip(captions, pictures(20), strict=True)]

    assert together.shape == (20,) and together.dtype == np.float32 and ((together > 0) & (together < 1)).all()
    assert len(np.unique(together.round(6))) > 10
    assert together.tobytes() == np.concatenate(alone).tobytes()
    assert scorer.scores(NO_VECTORS, [], []).shape == (0,)


@pytest.mark.parametrize(
    "wrong", [Picture(np.zeros((8, 8, 3), np.uint8)), Picture(*[np.zeros((8, 8, 3), np.uint8)] * 2)]
)
def test_pictures_that_were_not_decoded_for_it_are_refused(folder: Path, wrong: Picture) -> None:
    with pytest.raises(ShapeError, match="side 32"):
        BlipScorer(folder, torch.device("cpu")).scores(NO_VECTORS, ["a dog"], [wrong])


def test_captions_without_pictures_are_refused(folder: Path) -> None:
    with pytest.raises(ShapeError, match="judges both"):
        BlipScorer(folder, torch.device("cpu")).scores(NO_VECTORS, ["a dog"], [])


def test_a_folder_with_a_pickle_instead_of_safetensors_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")

    with pytest.raises(BundleError, match=r"no model\.safetensors"):
        BlipScorer(tmp_path, torch.device("cpu"))


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_with_another_file_than_the_bundle_names_is_refused(folder: Path, name: str) -> None:
    files = BlipScorer(folder, torch.device("cpu")).files

    with pytest.raises(BundleError, match=f"its {name} has another SHA-256") as caught:
        BlipScorer(folder, torch.device("cpu"), files | {name: "0" * 64})
    assert "\n" not in str(caught.value)
