"""The architectures at their full size, and their start from published checkpoints, all without a network."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, BlipVisionConfig, BlipVisionModel, ViTConfig, ViTModel

from benchmarks.paper_memory import counted
from models.captioner import AUTHORS, PAPER, Captioner, CaptionerConfig, VitEncoder, sized
from models.errors import CorpusError, ShapeError
from models.pretrained import load_decoder, load_encoder, sizes_of_decoder, sizes_of_encoder
from models.vocabulary import PAD, START, STOP, of_pieces

NARROW = replace(PAPER, code_width=24, codes=30, decoder_layers=1, decoder_width=24, decoder_heads=2, vocabulary=100)


def test_the_paper_s_captioner_at_full_size_has_its_shapes_and_learns_a_step() -> None:
    torch.manual_seed(0)
    captioner = Captioner(PAPER)
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in captioner.named_children()}
    inputs = torch.tensor([[START, 2000, 3000, 4000]])
    targets = torch.tensor([[2000, 3000, 4000, STOP]])

    features = captioner.encoder(torch.rand(1, 3, 224, 224) * 255)
    captioner.quantiser.codebook.learn_by("gradient")
    language, commitment, tokens, indices = captioner.losses(features, inputs, targets)
    (language + commitment).backward()

    assert features.shape == tokens.shape == (1, 196, 768) and indices.shape == (1, 196)
    assert captioner.quantiser.codebook.codes.shape == (3000, 768)
    # ViT-B/16; projection; BERT-base with 32 positions, 12 cross-attentions of 2.36 M, tied head, bridge and places
    assert parts == {"encoder": 85_798_656, "quantiser": 590_592, "decoder": 138_252_858}
    assert all(p.grad is not None for p in captioner.decoder.parameters())
    assert sum(bool(p.grad.abs().sum() > 0) for p in captioner.encoder.parameters() if p.grad is not None) > 190
    assert captioner.quantiser.codebook.codes.grad is not None


def test_the_authors_decoder_sees_the_image_and_keeps_the_class_token() -> None:
    torch.manual_seed(0)
    config = sized(
        AUTHORS, side=32, vit_patch=8, feature_width=24, vit_layers=1, vit_heads=2, code_width=24, codes=30,
        decoder_layers=1, decoder_width=24, decoder_heads=2, vocabulary=50, dropout=0.0,
    )  # fmt: skip
    captioner = Captioner(config).eval()
    features = captioner.encoder(torch.rand(1, 3, 32, 32) * 255)
    inputs, targets = torch.tensor([[START, 7]]), torch.tensor([[7, STOP]])

    before = captioner.losses(features, inputs, targets)[0]
    captioner.quantiser.codebook.start_from(torch.randn(30, 24))
    after = captioner.losses(features, inputs, targets)[0]

    assert features.shape == (1, 17, 24) and AUTHORS.tokens == 197
    assert before == after


@pytest.mark.parametrize("kind", ["vit", "blip"])
def test_an_encoder_starts_from_a_published_checkpoint_s_folder(kind: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 8,
    }  # fmt: skip
    network: Any = (
        ViTModel(ViTConfig(**sizes), add_pooling_layer=False)
        if kind == "vit"
        else BlipVisionModel(BlipVisionConfig(**sizes, initializer_range=0.02))
    )
    network.save_pretrained(tmp_path)
    captioner = Captioner(sizes_of_encoder(NARROW, str(tmp_path))).eval()
    pixels = torch.rand(2, 3, 32, 32) * 255

    load_encoder(captioner, str(tmp_path))

    encoder = captioner.encoder
    assert isinstance(encoder, VitEncoder)
    scaled = (pixels - encoder.mean) / encoder.std
    expected = network.eval()(pixel_values=scaled).last_hidden_state[:, 1:]
    assert captioner.config.encoder == kind and captioner.config.tokens == 16
    assert torch.equal(encoder(pixels), expected)


def test_a_decoder_starts_from_a_bert_whatever_the_numbers_of_its_pieces(tmp_path: Path) -> None:
    theirs = of_pieces(["cat", "dog", "fish"])
    source: Any = BertModel(
        BertConfig(
            vocab_size=len(theirs), hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64
        )
    )
    source.save_pretrained(tmp_path)
    theirs.save(tmp_path / "tokenizer.json")
    ours = of_pieces(["fish", "unheard"])
    captioner = Captioner(
        sized(sizes_of_decoder(replace(NARROW, decoder_layers=2), str(tmp_path)), vocabulary=len(ours))
    )

    load_decoder(captioner, ours, str(tmp_path))

    bert: Any = captioner.decoder.bert.bert
    place = {p: i for i, p in enumerate(ours.pieces)}["fish"]
    assert (captioner.config.decoder_width, captioner.config.decoder_layers) == (16, 2)
    assert torch.equal(
        bert.embeddings.word_embeddings.weight[place],
        source.embeddings.word_embeddings.weight[theirs.tokenizer.token_to_id("fish")],
    )
    assert torch.equal(bert.encoder.layer[1].output.dense.weight, source.encoder.layer[1].output.dense.weight)


def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path: Path) -> None:
    BertConfig(hidden_size=16, intermediate_size=64, num_attention_heads=2).save_pretrained(tmp_path)

    with pytest.raises(CorpusError, match='is a "bert": an encoder starts from a ViT or from a BLIP'):
        sizes_of_encoder(NARROW, str(tmp_path))
    with pytest.raises(CorpusError, match="neither a folder"):
        sizes_of_decoder(NARROW, str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"side": 100}, "no multiple of vit_patch"),
        ({"encoder": "cnn"}, "unknown"),
        ({"decoder_heads": 7}, "decoder_heads=7"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ShapeError, match=said):
        sized(CaptionerConfig(), **changes)


def test_padding_does_not_change_the_loss() -> None:
    torch.manual_seed(0)
    captioner = Captioner(
        sized(replace(NARROW, dropout=0.0), side=32, vit_patch=8, feature_width=24, vit_layers=1, vit_heads=2)
    )
    features = captioner.encoder(torch.rand(1, 3, 32, 32) * 255)

    short = captioner.losses(features, torch.tensor([[START, 9]]), torch.tensor([[9, STOP]]))[0]
    padded = captioner.losses(features, torch.tensor([[START, 9, PAD, PAD]]), torch.tensor([[9, STOP, PAD, PAD]]))[0]

    assert torch.allclose(short, padded, atol=1e-6)


def test_the_paper_s_encoder_works_within_4_gib_at_batch_256_by_count() -> None:
    """Live bytes of tensors without storage; on a GPU: benchmarks/paper_memory.py --gpu."""
    weights, encoder, together = counted(256)

    # ViT-B/16 in bfloat16, the rest in float32; 256 images of 196 tokens and 768 numbers, several times over
    assert weights == pytest.approx(2 * 85.8e6 + 4 * (0.59e6 + 138.25e6 + 2 * 2.3e6), rel=0.01)
    assert 256 * 197 * 768 * 2 < encoder < together
    assert weights + together < 4 << 30
