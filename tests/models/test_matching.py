"""The matching head tells true pairs from shuffled ones, and its score means something."""

import numpy as np
import torch

from models.evaluation import auc
from models.matching import MatchingHead, calibrate, match, train_head
from models.vocabulary import of_pieces

WORDS = [f"word{i}" for i in range(20)]
VOCABULARY = of_pieces(w for w in WORDS)
RNG = np.random.default_rng(2)
KINDS = RNG.integers(20, size=600)
# an image of kind k shows mostly the codes 3k, 3k + 1, 3k + 2
TYPICAL, ANY = KINDS[:, None] * 3 + RNG.integers(3, size=(600, 16)), RNG.integers(60, size=(600, 16))
VECTORS = np.where(RNG.random((600, 16)) < 0.7, TYPICAL, ANY).astype(np.uint16)
CAPTIONS = [f"a {WORDS[k]} {WORDS[RNG.integers(20)]}" for k in KINDS]
CODES = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
# what a larger model would say of the captions: equal kinds, equal embeddings
MEANINGS = torch.nn.functional.normalize(torch.randn(20, 24, generator=torch.Generator().manual_seed(1)), dim=-1)[KINDS]


def trained() -> MatchingHead:
    torch.manual_seed(0)
    head = MatchingHead(60, 8, len(VOCABULARY), width=24)
    train_head(head, VOCABULARY, CODES, VECTORS[:500], CAPTIONS[:500], MEANINGS[:500], epochs=15, seed=1, batch=64)
    calibrate(head, VOCABULARY, CODES, VECTORS[:500], CAPTIONS[:500], seed=1)
    return head.eval()


def test_true_pairs_score_above_shuffled_ones_that_it_never_saw() -> None:
    head = trained()

    true = match(head, VOCABULARY, CODES, VECTORS[500:], CAPTIONS[500:])
    shuffled = match(head, VOCABULARY, CODES, VECTORS[500:], CAPTIONS[:100])

    assert auc(true, shuffled) > 0.85
    assert true.mean() > 0.6 and shuffled.mean() < 0.4
    assert true.dtype == np.float32 and true.min() >= 0 and true.max() <= 1


def test_captions_without_any_known_word_and_very_long_ones_have_a_score() -> None:
    head = MatchingHead(60, 8, len(VOCABULARY)).eval()

    scores = match(head, VOCABULARY, CODES, VECTORS[:3], ["", "漢字 🙂", "word1 " * 20_000])

    assert np.isfinite(scores).all() and ((scores >= 0) & (scores <= 1)).all()
    assert match(head, VOCABULARY, CODES, VECTORS[:0], []).shape == (0,)
