"""The captioner learns, captions from index vectors alone, and comes in the paper's size by the same code."""

import copy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.bundle import read_files
from models.captioner import PAPER, Captioner
from models.captioning import Generation, generate, generate_from_tokens, quantised
from models.device import choose_device
from models.errors import ShapeError
from models.loaded import CaptionerParts, LoadedCaptioner
from models.model import Picture
from models.stepwise import GraphSteps
from models.vocabulary import MASK, PAD, START, STOP
from tests.models.conftest import CAPTIONS, Small
from tests.models.random_models import random_authors


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

    assert generate(small.captioner, small.vocabulary, small.vectors, Generation(guidance=1.0)) == expected


def test_a_caption_is_never_empty_and_never_stutters(small: Small) -> None:
    noise = torch.randint(64, (40, small.captioner.config.tokens), generator=torch.Generator().manual_seed(1))

    for caption in generate(small.captioner, small.vocabulary, noise.numpy().astype("uint16")):
        words = caption.split()
        pairs = list(pairwise(words))
        assert words and all(a != b for a, b in pairs) and len(set(pairs)) == len(pairs)


@pytest.mark.parametrize("how", [Generation(beams=3), Generation(beams=3, guidance=1.0, pieces_min=3)])
def test_cached_beams_say_what_uncached_ones_say(small: Small, how: Generation) -> None:
    uncached = generate(small.captioner, small.vocabulary, small.vectors, replace(how, cached=False))

    assert generate(small.captioner, small.vocabulary, small.vectors, how) == uncached


@pytest.mark.filterwarnings(
    "ignore:captions take several times as long"
)  # no graphs without a GPU, but the same places
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_captions_in_fixed_places_are_the_same_however_full_the_batch_is(small: Small, guidance: float) -> None:
    how = Generation(guidance=guidance)
    noise = np.random.default_rng(1).integers(64, size=(300, small.captioner.config.tokens)).astype(np.uint16)
    there = copy.deepcopy(small.captioner).to(choose_device())
    steps = GraphSteps(there.decoder, there.config.caption_pieces_max, guided=guidance != 1.0, rows=32)

    said = [
        caption
        for part in (noise[:32], noise[32:35], noise[35:36], noise[36:60], noise[60:])
        for tokens in quantised(there, part)
        for fitting in tokens.split(32)
        for caption in generate_from_tokens(there, small.vocabulary, fitting, how, steps)
    ]

    assert said == generate(small.captioner, small.vocabulary, noise, how)


def test_where_no_graph_can_be_recorded_a_warning_says_so(small: Small) -> None:
    steps = GraphSteps(small.captioner.decoder, small.captioner.config.caption_pieces_max, guided=False, rows=8)
    (tokens,) = quantised(small.captioner, small.vectors)

    with torch.inference_mode(), pytest.warns(UserWarning, match="no CUDA graph could be recorded"):
        steps.look(tokens)


def test_a_caption_has_at_least_and_at_most_as_many_pieces_as_asked_for(small: Small) -> None:
    long = generate(small.captioner, small.vocabulary, small.vectors, Generation(pieces_min=6))
    short = generate(small.captioner, small.vocabulary, small.vectors, Generation(pieces_max=2, beams=2))

    assert all(len(p) >= 6 for p in small.vocabulary.encode(long, 30))
    assert all(1 <= len(p) <= 2 for p in small.vocabulary.encode(short, 30))


def test_no_piece_comes_twice_where_single_pieces_may_not_repeat(small: Small) -> None:
    for caption in generate(
        small.captioner, small.vocabulary, small.vectors, Generation(ngram=1, pieces_min=6, beams=2)
    ):
        pieces = small.vocabulary.encode([caption], 30)[0]
        assert len(set(pieces)) == len(pieces)


def test_an_image_s_caption_does_not_depend_on_who_leaves_the_batch_before_it(small: Small) -> None:
    together = generate(small.captioner, small.vocabulary, small.vectors, Generation(beams=2))

    assert [
        generate(small.captioner, small.vocabulary, v[None], Generation(beams=2))[0] for v in small.vectors
    ] == together


def test_more_beams_never_find_a_less_likely_caption_than_one_of_two_words(small: Small) -> None:
    """Against every caption of two pieces: a beam as wide as the vocabulary is an exhaustive search."""
    captioner, codes = small.captioner, small.captioner.quantiser.codebook.codes
    seen = captioner.decoder.see(codes[torch.from_numpy(small.vectors[:1].astype(int))])
    words = range(MASK + 1, len(small.vocabulary))
    with torch.inference_mode():
        first = captioner.decoder.logits(torch.tensor([[START]]), seen)[0, -1].log_softmax(-1)
        second = torch.stack(
            [captioner.decoder.logits(torch.tensor([[START, w]]), seen)[0, -1].log_softmax(-1) for w in words]
        )
    pairs = {(a, b): float(first[a] + second[i, b]) for i, a in enumerate(words) for b in words if a != b}

    said = generate(
        captioner, small.vocabulary, small.vectors[:1],
        Generation(beams=len(small.vocabulary), guidance=1.0, pieces_min=2, pieces_max=2),
    )  # fmt: skip

    assert said == [small.vocabulary.decode(list(max(pairs.items(), key=lambda item: item[1])[0]))]


def test_captions_come_from_the_image_s_own_tokens_too(small: Small) -> None:
    codes = small.captioner.quantiser.codebook.codes
    quantised = codes[torch.from_numpy(small.vectors.astype(int))]

    from_codes = generate_from_tokens(small.captioner, small.vocabulary, quantised)
    nearby = generate_from_tokens(small.captioner, small.vocabulary, quantised + 1e-5)

    assert from_codes == nearby == generate(small.captioner, small.vocabulary, small.vectors)


@pytest.mark.parametrize("wrong", [{"beams": 0}, {"pieces_min": 5, "pieces_max": 4}, {"ngram": 0}])
def test_a_generation_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ShapeError):
        Generation(**wrong)


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


def test_a_decoder_that_is_shown_the_image_captions_from_its_tokens_a_bounded_part_at_a_time(tmp_path: Path) -> None:
    parts = CaptionerParts.of(*read_files(random_authors(tmp_path / "authors")))
    model = LoadedCaptioner(parts, torch.device("cpu"))
    pictures = [Picture(p) for p in np.random.default_rng(0).integers(256, size=(70, 48, 48, 3), dtype=np.uint8)]
    vectors = model.encode(pictures)

    said = model.caption(vectors, pictures)
    shown = list(model.seen(vectors, pictures))
    parts.captioner.quantiser.codebook.start_from(torch.randn(30, 24))

    features = torch.from_numpy(model.features(pictures))
    expected = generate_from_tokens(parts.captioner, parts.vocabulary, parts.captioner.quantiser.tokens(features))
    assert said == expected == model.caption(vectors, pictures) and len(set(said)) > 3
    assert max(len(part) for part in shown) <= model.batch and sum(map(len, shown)) == 70
    with pytest.raises(ShapeError, match="pass the pictures"):
        model.caption(vectors)
