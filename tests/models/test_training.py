"""Training from pairs to a captioner, at the paper's architecture made narrow, with an encoder that learns."""

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertConfig, BertModel

from models.captioner import PAPER
from models.errors import CorpusError
from models.loaded import CaptionerParts
from models.text_embeddings import TextEncoder
from models.training import Trained, TrainingConfig, TrainingPair, train_captioner
from models.vocabulary import of_pieces
from tests.models.conftest import CAPTIONS, drawing

CONFIG = replace(
    PAPER, side=32, vit_patch=8, tokens=16, feature_width=16, vit_layers=1, vit_heads=2, code_width=24, codes=10,
    decoder_layers=1, decoder_width=24, decoder_heads=2, caption_pieces_max=8,
)  # fmt: skip
QUICK = TrainingConfig(epochs_noisy=3, epochs_clean=1, epochs_matching=2, batch=8, seed=4)


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    """A BERT with random weights in a folder, as transformers writes it."""
    folder: Path = tmp_path_factory.mktemp("bert")
    vocabulary = of_pieces(sorted({w for c in CAPTIONS for w in c.split()}))
    torch.manual_seed(0)
    narrow = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(narrow).save_pretrained(folder)
    vocabulary.save(folder / "tokenizer.json")
    return TextEncoder(folder)


def pairs(copies: int = 3) -> Iterator[TrainingPair]:
    for copy in range(copies):
        for number, caption in enumerate(CAPTIONS):
            out = io.BytesIO()
            Image.fromarray(drawing(number, 48 + copy)).save(out, "PNG")
            yield TrainingPair(f"{copy}-{number}", caption, out.getvalue())


def train(text_encoder: TextEncoder, config: TrainingConfig = QUICK) -> Trained:
    return train_captioner(CONFIG, config, pairs(), pairs(1), text_encoder, progress=lambda _: None)


def test_the_loss_falls_in_both_stages_and_bad_pairs_are_left_out(text_encoder: TextEncoder) -> None:
    bad = [TrainingPair("x", "a circle", b"no image"), TrainingPair("y", "  ", next(pairs()).image)]

    trained = train_captioner(CONFIG, QUICK, [*pairs(), *bad], pairs(1), text_encoder, progress=lambda _: None)

    assert [e.stage for e in trained.epochs] == ["noisy"] * 3 + ["clean"]
    assert trained.epochs[-1].language_loss < trained.epochs[0].language_loss
    assert trained.pairs == {"noisy": 24, "clean": 8}
    assert len(trained.keywords) == 10 and "red" in trained.keywords


def test_the_same_seed_trains_the_same_captioner(text_encoder: TextEncoder) -> None:
    one, same, other = train(text_encoder), train(text_encoder), train(text_encoder, replace(QUICK, seed=5))

    contents = [CaptionerParts(t.captioner, t.vocabulary, t.matching).contents() for t in (one, same, other)]

    assert contents[0] == contents[1] != contents[2]


def test_no_pair_that_decodes_is_one_clear_error(text_encoder: TextEncoder) -> None:
    with pytest.raises(CorpusError, match="could be decoded"):
        train_captioner(CONFIG, QUICK, [TrainingPair("x", "a cat", b"no image")], [], text_encoder)


def test_training_leaves_the_caller_s_random_numbers_alone(text_encoder: TextEncoder) -> None:
    torch.manual_seed(9)
    expected = torch.rand(3)

    torch.manual_seed(9)
    train(text_encoder, replace(QUICK, epochs_noisy=1, epochs_clean=0))

    assert np.array_equal(torch.rand(3).numpy(), expected.numpy())
