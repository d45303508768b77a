"""A BLIP checkpoint scores pixels. Its weights are random here: only shapes, batches and refusals can be promised."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BlipConfig, BlipForImageTextRetrieval

from models.blip_matching import BlipScorer
from models.errors import BundleError, ShapeError
from models.vocabulary import of_pieces

SIDE = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    vocabulary = of_pieces(["cat", "dog", "red"])
    layers = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = BlipConfig(
        text_config={
            **layers,
            "encoder_hidden_size": 24,
            "vocab_size": len(vocabulary),
            "bos_token_id": 2,
            "pad_token_id": 0,
        },
        vision_config={**layers, "image_size": SIDE, "patch_size": 8, "initializer_range": 0.2},
        image_text_hidden_size=16,
    )
    out = tmp_path_factory.mktemp("blip")
    BlipForImageTextRetrieval(config).save_pretrained(str(out))
    vocabulary.save(out / "tokenizer.json")
    return out


def test_each_pair_has_a_probability_of_its_own_whatever_stands_beside_it(folder: Path) -> None:
    scorer = BlipScorer(folder, torch.device("cpu"))
    images = list(np.random.default_rng(0).integers(256, size=(20, SIDE, SIDE, 3), dtype=np.uint8))
    captions = ["a red dog"] * 10 + ["cat"] * 9 + [" ".join(["dog"] * 500)]

    together = scorer.scores(images, captions)
    alone = np.concatenate([scorer.scores([i], [c]) for i, c in zip(images, captions, strict=True)])

    assert together.shape == (20,) and together.dtype == np.float32 and ((together > 0) & (together < 1)).all()
    assert len(np.unique(together.round(6))) > 10
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert scorer.scores([], []).shape == (0,)


def test_pixels_of_another_size_are_refused(folder: Path) -> None:
    with pytest.raises(ShapeError, match="side 32"):
        BlipScorer(folder, torch.device("cpu")).scores([np.zeros((8, 8, 3), np.uint8)], ["a dog"])


def test_a_folder_with_a_pickle_instead_of_safetensors_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")

    with pytest.raises(BundleError, match=r"no model\.safetensors"):
        BlipScorer(tmp_path, torch.device("cpu"))
