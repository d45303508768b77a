"""An image's index vector is a function of the image: not of its neighbours, its place, or how full the batch is."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from models.captioner import PAPER, Captioner
from models.codebook import look_up
from models.encoding import PaddedEncoder
from models.errors import ShapeError
from models.lite_encoder import LiteEncoder
from models.lite_graph import LiteGraph
from tests.models.conftest import Small, drawing

BATCH = 4  # a small one, for speed: what is promised is the same
NARROW = replace(
    PAPER, side=32, vit_patch=8, tokens=16, feature_width=24, vit_layers=1, vit_heads=2, code_width=24, codes=30,
    decoder_layers=1, decoder_width=24, decoder_heads=2, vocabulary=50,
)  # fmt: skip


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


def test_lite_features_and_codes_are_the_same_bits_with_any_number_of_threads(
    small: Small, pixels: list[np.ndarray]
) -> None:
    encoder, quantiser = small.captioner.encoder, small.captioner.quantiser
    assert isinstance(encoder, LiteEncoder)

    one, two, five = (LiteGraph(encoder, quantiser, 224, threads) for threads in (1, 2, 5))

    for graph in (two, five):
        assert np.stack(graph.features(pixels)).tobytes() == np.stack(one.features(pixels)).tobytes()
        assert np.stack(graph.codes(pixels)).tobytes() == np.stack(one.codes(pixels)).tobytes()


def test_the_graph_looks_up_the_codes_that_the_modules_look_up(
    small: Small, encoder: PaddedEncoder, pixels: list[np.ndarray]
) -> None:
    quantiser = small.captioner.quantiser
    with torch.inference_mode():
        expected = look_up(quantiser.tokens(torch.from_numpy(encoder.features(pixels))), quantiser.codebook.codes)

    assert (encoder.vectors(pixels) == expected.numpy()).all()


def test_only_an_encoder_whose_bits_depend_on_threads_has_them_in_its_fingerprint(encoder: PaddedEncoder) -> None:
    vit = PaddedEncoder(Captioner(NARROW), torch.device("cpu"), BATCH)

    assert "threads" not in encoder.fingerprint() and encoder.fingerprint()["onnxruntime"]
    assert vit.fingerprint()["threads"] == str(torch.get_num_threads())


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
    encoder = PaddedEncoder(Captioner(NARROW), torch.device("cpu"), BATCH, torch.bfloat16)
    images = list(np.random.default_rng(0).integers(256, size=(6, 32, 32, 3), dtype=np.uint8))

    together = encoder.vectors(images)

    assert together.shape == (6, 16) and len(np.unique(together, axis=0)) == 6
    assert (together == np.concatenate([encoder.vectors([i]) for i in images])).all()


def test_no_image_gives_no_vector(encoder: PaddedEncoder) -> None:
    assert encoder.vectors([]).shape == (0, 49)


def test_pixels_of_another_size_are_refused(encoder: PaddedEncoder) -> None:
    with pytest.raises(ShapeError):
        encoder.vectors([np.zeros((32, 32, 3), np.uint8)])
