"""Models with random weights, small, in the shape of those that no package carries: a BLIP, and an `authors` captioner."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import BlipConfig, BlipForImageTextRetrieval

from models.bundle import write_bundle
from models.captioner import AUTHORS, Captioner, sized
from models.loaded import CaptionerParts
from models.matching import MatchingHead
from models.vocabulary import of_pieces

SIDE = 32  # of the BLIP; the captioner's is another, as with the published ones
WORDS = ["cat", "dog", "red", "apple", "sign", "flag", "blue", "tree"]


def random_blip(out: Path, seed: int = 0) -> Path:
    """A folder as BlipForImageTextRetrieval.save_pretrained writes it."""
    torch.manual_seed(seed)
    vocabulary = of_pieces(WORDS)
    layers = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = BlipConfig(
        text_config={
            **layers, "encoder_hidden_size": 24, "vocab_size": len(vocabulary), "bos_token_id": 2, "pad_token_id": 0,
        },
        vision_config={**layers, "image_size": SIDE, "patch_size": 8, "initializer_range": 0.2},
        image_text_hidden_size=16,
    )  # fmt: skip
    BlipForImageTextRetrieval(config).save_pretrained(str(out))
    vocabulary.save(out / "tokenizer.json")
    return out


def random_authors(out: Path) -> Path:
    """A captioner folder of the architecture `authors`: its decoder is shown the image's own tokens."""
    torch.manual_seed(1)
    vocabulary = of_pieces(WORDS)
    config = sized(
        AUTHORS, side=48, vit_patch=16, feature_width=24, vit_layers=1, vit_heads=2, code_width=24, codes=30,
        decoder_layers=1, decoder_width=24, decoder_heads=2, vocabulary=len(vocabulary), caption_pieces_max=8,
    )  # fmt: skip
    captioner = Captioner(config).eval()
    torch.nn.init.normal_(captioner.decoder.bridge.weight, std=10.0)  # so that other images get other captions
    matching = MatchingHead(config.codes, config.code_width, config.vocabulary)
    write_bundle(
        out, CaptionerParts(captioner, vocabulary, matching).contents(),
        {"config": config.as_dict(), "architecture": "authors"},
    )  # fmt: skip
    return out
