"""An image's index vector is a function of the image: not of its neighbours, its place, or how full the batch is."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from models.captioner import PAPER, Captioner
from models.encoding import PaddedEncoder
from models.errors import ShapeError
from models.lite_encoder import LiteEncoder
from models.lite_graph import LiteGraph
from tests.models.conftest import Small, drawing

BATCH = 4  # a small one, for speed: what is promised is the same


@pytest.fixture(scope="module")
def encoder(small: Small) -> PaddedEncoder:
    return PaddedEncoder(small.captioner, torch.device("cpu"), BATCH)


@pytest.fixture(scope="module")
def pixels() -> list[np.ndarray]:
    noise = np.random.default_rng(0)
    return [(drawing(i % 8) ^ noise.integers(32, size=(224, 224, 3), dtype=np.uint8)) for i in range(6)]


def test_features_are_the_same_bits_at_every_place_of_the_batch(
    encoder: PaddedEncoder, pixels: list[np.ndarray]
) -> None:
    first = encoder.features(pixels[:BATCH])

    for shift in (1, 3):
        rolled = encoder.features(pixels[shift:BATCH] + pixels[:shift])
        assert np.roll(first, -shift, axis=0).tobytes() == rolled.tobytes()


@pytest.mark.parametrize("count", [1, 3])
def test_features_are_the_same_bits_however_full_the_batch_is(
    encoder: PaddedEncoder, pixels: list[np.ndarray], count: int
) -> None:
    assert encoder.features(pixels[:count]).tobytes() == encoder.features(pixels[:BATCH])[:count].tobytes()


def test_features_are_the_same_bits_with_one_thread_and_with_two(small: Small, pixels: list[np.ndarray]) -> None:
    assert isinstance(small.captioner.encoder, LiteEncoder)

    one, two = (LiteGraph(small.captioner.encoder, 224, threads).features(pixels) for threads in (1, 2))

    assert np.stack(one).tobytes() == np.stack(two).tobytes()


def test_the_graph_computes_what_the_module_computes(
    small: Small, encoder: PaddedEncoder, pixels: list[np.ndarray]
) -> None:
    with torch.inference_mode():
        slow = small.captioner.encoder(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float()).numpy()

    np.testing.assert_allclose(encoder.features(pixels), slow, rtol=1e-4, atol=1e-4 * np.abs(slow).max())


def test_vectors_do_not_depend_on_how_images_are_split_into_calls(
    encoder: PaddedEncoder, pixels: list[np.ndarray]
) -> None:
    together = encoder.vectors(pixels)

    alone = np.concatenate([encoder.vectors([p]) for p in pixels])
    halves = np.concatenate([encoder.vectors(pixels[:1]), encoder.vectors(pixels[1:])])

    assert together.shape == (6, 49) and together.dtype == np.uint16
    assert (together == alone).all() and (together == halves).all()


def test_a_vision_transformer_in_bfloat16_gives_every_image_its_own_vector_too() -> None:
    torch.manual_seed(0)
    config = replace(
        PAPER, side=32, vit_patch=8, tokens=16, feature_width=24, vit_layers=1, vit_heads=2, code_width=24, codes=30,
        decoder_layers=1, decoder_width=24, decoder_heads=2, vocabulary=50,
    )  # fmt: skip
    encoder = PaddedEncoder(Captioner(config), torch.device("cpu"), BATCH, torch.bfloat16)
    images = list(np.random.default_rng(0).integers(256, size=(6, 32, 32, 3), dtype=np.uint8))

    together = encoder.vectors(images)

    assert together.shape == (6, 16) and len(np.unique(together, axis=0)) == 6
    assert (together == np.concatenate([encoder.vectors([i]) for i in images])).all()


def test_no_image_gives_no_vector(encoder: PaddedEncoder) -> None:
    assert encoder.vectors([]).shape == (0, 49)


def test_pixels_of_another_size_are_refused(encoder: PaddedEncoder) -> None:
    with pytest.raises(ShapeError):
        encoder.vectors([np.zeros((32, 32, 3), np.uint8)])
