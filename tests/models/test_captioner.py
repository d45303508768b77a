"""The captioner learns, captions from index vectors alone, and comes in the paper's size by the same code."""

from dataclasses import replace
from itertools import pairwise

import torch

from models.captioner import PAPER, Captioner
from models.captioning import generate
from models.vocabulary import PAD, START, STOP
from tests.models.conftest import CAPTIONS, Small


def test_a_tiny_captioner_overfits_eight_pairs(small: Small) -> None:
    said = generate(small.captioner, small.vocabulary, small.vectors)

    assert small.losses[0] > 2 and small.losses[-1] < 0.2
    assert sum(a == b for a, b in zip(said, CAPTIONS, strict=True)) >= 7


def test_cached_greedy_decoding_says_what_an_uncached_loop_says(small: Small) -> None:
    decoder, codes = small.captioner.decoder, small.captioner.quantiser.codebook.codes
    expected = []
    for vector in small.vectors.astype(int):
        said = [START]
        with torch.inference_mode():
            while len(said) <= 8 and said[-1] != STOP:
                seen = decoder.see(codes[torch.from_numpy(vector)][None])
                logits = decoder.logits(torch.tensor([said]), seen)[0, -1]
                logits[:STOP] = -torch.inf
                logits[STOP + 1] = -torch.inf
                logits[said[-1]] = -torch.inf
                said.append(int(logits.argmax()))
        expected.append(small.vocabulary.decode(said))

    assert generate(small.captioner, small.vocabulary, small.vectors, guidance=1.0) == expected


def test_a_caption_is_never_empty_and_never_stutters(small: Small) -> None:
    noise = torch.randint(64, (40, small.captioner.config.tokens), generator=torch.Generator().manual_seed(1))

    for caption in generate(small.captioner, small.vocabulary, noise.numpy().astype("uint16")):
        words = caption.split()
        pairs = list(pairwise(words))
        assert words and all(a != b for a, b in pairs) and len(set(pairs)) == len(pairs)


def test_the_paper_s_architecture_is_built_by_the_same_code_and_learns_end_to_end() -> None:
    """Every part of it, narrow: ViT without its class token, codebook, BERT."""
    torch.manual_seed(0)
    config = replace(
        PAPER, side=32, vit_patch=8, tokens=16, feature_width=24, vit_layers=1, vit_heads=2, code_width=24, codes=30,
        decoder_layers=1, decoder_width=24, decoder_heads=2, vocabulary=50,
    )  # fmt: skip
    captioner = Captioner(config)
    features = captioner.encoder(torch.rand(2, 3, 32, 32) * 255)
    inputs, targets = torch.tensor([[START, 7, 8], [START, 9, PAD]]), torch.tensor([[7, 8, STOP], [9, STOP, PAD]])

    language, commitment, _, indices = captioner.losses(features, inputs, targets)
    (language + commitment).backward()

    assert features.shape == (2, 16, 24) and indices.shape == (2, 16)
    assert (PAPER.tokens, PAPER.codes, PAPER.decoder_layers) == (196, 3000, 12)
    reached = [
        n for n, p in captioner.encoder.named_parameters() if p.grad is not None and float(p.grad.abs().sum()) > 0
    ]
    assert any("patch_embeddings" in n for n in reached)
