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

from models.captioner import ARCHITECTURES, PAPER, sized
from models.errors import CorpusError
from models.loaded import CaptionerParts
from models.pair_store import TrainingPair
from models.training import RECIPES, Pretrained, Trained, TrainingConfig, train_captioner
from models.training_log import Entry, TrainingLog
from models.vocabulary import of_pieces
from tests.models.conftest import CAPTIONS, drawing

CONFIG = replace(
    PAPER, side=32, vit_patch=8, tokens=16, feature_width=16, vit_layers=1, vit_heads=2, code_width=24, codes=10,
    decoder_layers=1, decoder_width=24, decoder_heads=2, caption_pieces_max=8,
)  # fmt: skip
QUICK = TrainingConfig(epochs_noisy=3, epochs_clean=1, epochs_matching=2, batch=8, log_every=1, seed=4)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A BERT with random weights in a folder, as transformers writes it."""
    folder: Path = tmp_path_factory.mktemp("bert")
    vocabulary = of_pieces(sorted({w for c in CAPTIONS for w in c.split()}))
    torch.manual_seed(0)
    narrow = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(narrow).save_pretrained(folder)
    vocabulary.save(folder / "tokenizer.json")
    return str(folder)


def pairs(copies: int = 3) -> Iterator[TrainingPair]:
    for copy in range(copies):
        for number, caption in enumerate(CAPTIONS):
            out = io.BytesIO()
            Image.fromarray(drawing(number, 48 + copy)).save(out, "PNG")
            yield TrainingPair(f"{copy}-{number}", caption, out.getvalue())


def train(bert: str, work: Path, config: TrainingConfig = QUICK) -> Trained:
    trained = train_captioner(CONFIG, config, pairs(), pairs(1), Pretrained(bert), work, progress=lambda _: None)
    assert trained is not None
    return trained


def test_the_loss_falls_in_both_phases_and_bad_pairs_are_left_out(bert: str, tmp_path: Path) -> None:
    bad = [TrainingPair("x", "a circle", b"no image"), TrainingPair("y", "  ", next(pairs()).image)]

    trained = train_captioner(CONFIG, QUICK, [*pairs(), *bad], pairs(1), Pretrained(bert), tmp_path, progress=print)

    assert trained is not None
    assert [(e.phase, e.step) for e in trained.log] == [("noisy", i + 1) for i in range(9)] + [("clean", 1)]
    assert trained.log[8].language_loss < trained.log[0].language_loss
    assert trained.pairs == {"noisy": 24, "clean": 8}
    assert len(trained.keywords) == 10 and "red" in trained.keywords
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_seed_trains_the_same_captioner(bert: str, tmp_path: Path) -> None:
    one, same = train(bert, tmp_path / "1"), train(bert, tmp_path / "2")
    other = train(bert, tmp_path / "3", replace(QUICK, seed=5))

    contents = [CaptionerParts(t.captioner, t.vocabulary, t.matching).contents() for t in (one, same, other)]

    assert contents[0] == contents[1] != contents[2]


def test_no_pair_that_decodes_is_one_clear_error(bert: str, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="could be decoded"):
        train_captioner(CONFIG, QUICK, [TrainingPair("x", "a cat", b"no image")], [], Pretrained(bert), tmp_path)


def test_training_leaves_the_caller_s_random_numbers_alone(bert: str, tmp_path: Path) -> None:
    torch.manual_seed(9)
    expected = torch.rand(3)

    torch.manual_seed(9)
    train(bert, tmp_path, replace(QUICK, epochs_noisy=1, epochs_clean=0))

    assert np.array_equal(torch.rand(3).numpy(), expected.numpy())


def test_a_batch_in_parts_with_recomputed_activations_is_learnt_from_as_a_whole(bert: str, tmp_path: Path) -> None:
    quiet = replace(CONFIG, dropout=0.0)
    config = replace(QUICK, epochs_matching=0)
    in_parts = replace(config, accumulation=4, activation_checkpoints=True)
    curves = []

    for name, training in (("whole", config), ("parts", in_parts)):
        trained = train_captioner(
            quiet, training, pairs(), pairs(1), Pretrained(bert), tmp_path / name, progress=lambda _: None
        )
        assert trained is not None
        curves.append([e.language_loss for e in trained.log])

    assert curves[1] == pytest.approx(curves[0], rel=1e-3)


def test_bfloat16_learns_what_float32_learns_to_its_precision(bert: str, tmp_path: Path) -> None:
    config = replace(QUICK, epochs_noisy=1, epochs_clean=0, epochs_matching=0)

    full = train(bert, tmp_path / "full", config)
    half = train(bert, tmp_path / "half", replace(config, precision="bfloat16"))

    assert [e.language_loss for e in half.log] == pytest.approx([e.language_loss for e in full.log], rel=0.02)
    assert all(p.dtype == torch.float32 for p in half.captioner.parameters())


@pytest.mark.parametrize("start", ["xavier", "uniform", "words"])
def test_codes_start_at_random_or_from_a_word_list_where_asked(start: str, bert: str, tmp_path: Path) -> None:
    tags = tmp_path / "tags.txt"
    tags.write_text("\n".join(f"word {i}" for i in range(12)), "utf-8")
    start = str(tags) if start == "words" else start

    trained = train(
        bert, tmp_path / "work", replace(QUICK, epochs_noisy=1, epochs_clean=0, epochs_matching=0, codebook_start=start)
    )

    assert trained.keywords == ([f"word {i}" for i in range(10)] if start == str(tags) else [])


def test_a_log_is_cut_behind_its_checkpoint(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path / "log.jsonl")
    for phase, step in (("noisy", 1), ("noisy", 2), ("clean", 1), ("clean", 2)):
        log.add(Entry(phase, step, 2, 1.0, 1.0, 0.1, 5, 4.0, 1e-3, 9.0, 1.0))
    with open(log.file, "a", encoding="utf-8") as half_written:
        half_written.write('{"phase": "cle')

    kept = []
    for phase, step in (("done", 0), ("clean", 1), ("clean", 0), ("noisy", 1)):
        log.cut_behind(phase, step)
        kept.append(len(log.read()))

    assert kept == [4, 3, 2, 1]


@pytest.mark.parametrize("name", ["paper", "authors"])
def test_the_published_recipes_train_as_they_stand_but_for_their_size(name: str, bert: str, tmp_path: Path) -> None:
    narrow = sized(
        ARCHITECTURES[name], side=32, vit_patch=8, feature_width=16, vit_layers=1, vit_heads=2, code_width=24, codes=10,
        decoder_layers=1, decoder_width=24, decoder_heads=2,
    )  # fmt: skip
    recipe = replace(
        RECIPES[name], epochs_noisy=6, epochs_clean=1, epochs_matching=1, batch=8, rate_noisy=3e-3, log_every=3
    )

    trained = train_captioner(narrow, recipe, pairs(), pairs(1), Pretrained(bert), tmp_path, progress=lambda _: None)

    assert trained is not None
    noisy = [e for e in trained.log if e.phase == "noisy"]
    assert noisy[-1].language_loss < noisy[0].language_loss
    assert noisy[-1].rate == pytest.approx(3e-3 * 0.85**5)
    assert trained.captioner.config.tokens == (16 if name == "paper" else 17)
    assert not any(p.requires_grad for p in trained.captioner.parameters())
