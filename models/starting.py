"""How a captioner starts: codes from keywords (paper §3.1), xavier or a word list (Table 2c); projection and words.

How the parts start matters more than how long they learn (docs/tried.md): the projection by a ridge regression onto the
captions' embeddings, the codes by the embeddings of frequent keywords, the decoder's words by those of a larger model.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from models.batches import Examples
from models.captioner import Captioner
from models.keywords import listed, top_keywords
from models.pair_store import PairStore
from models.text_embeddings import TextEncoder
from models.vocabulary import Vocabulary

Floats = NDArray[np.floating[Any]]
SAMPLE = 20_000  # pairs that statistics and the ridge regression look at


def words_of_codes(start: str, count: int, stores: Sequence[PairStore]) -> list[str]:
    """The words whose embeddings the codes start from; none for "xavier" and "uniform".

    start  "keywords", "xavier", "uniform" (the authors' code), or the path of a word list.
    """
    if start in ("xavier", "uniform"):
        return []
    if start == "keywords":
        return top_keywords((c for store in stores for c in store.captions()), count)
    return listed(Path(start), count)


def start_codes(
    captioner: Captioner, start: str, words: Sequence[str], text_encoder: TextEncoder, axes: "Axes"
) -> None:
    """Put the codes where `words` are, along the captions' principal axes, or at random."""
    codes = captioner.quantiser.codebook.codes.detach().clone()
    width = codes.shape[1]
    if words:
        codes = widened(standardised(axes.along(text_encoder.embed(words))), width)
    elif start == "xavier":
        nn.init.xavier_uniform_(codes)
    else:
        nn.init.uniform_(codes, -1 / len(codes), 1 / len(codes))  # van den Oord et al.'s own start
    # tokens are layer-normed, so codes must be of their length: else one of them is nearest to all tokens
    captioner.quantiser.codebook.start_from(F.layer_norm(codes, (width,)))


def start_projection(
    captioner: Captioner,
    examples: Examples,
    sentences: Floats,
    axes: "Axes",
    ridge: float,
    progress: Callable[[str], None],
) -> None:
    """Standardise the features of a frozen encoder and project them to where their captions are.

    sentences  embeddings of the first captions of `examples`.
    """
    quantiser, width = captioner.quantiser, captioner.config.code_width
    if examples.features is None:
        return
    sample = examples.features[: len(sentences)].astype(np.float32)
    quantiser.mean.copy_(torch.from_numpy(sample.mean((0, 1))))
    quantiser.std.copy_(torch.from_numpy(sample.std((0, 1)) + 1e-3))
    if ridge == 0:
        return
    means = (sample.mean(1) - quantiser.mean.numpy()) / quantiser.std.numpy()
    weight, explained = regressed(means, standardised(axes.along(sentences)), ridge)
    with torch.no_grad():
        quantiser.project.weight.copy_(widened(weight, width).T)
        quantiser.project.bias.zero_()
    progress(f"ridge regression of captions on features explains {explained:.3f} of their variance")


@torch.no_grad()
def start_words(captioner: Captioner, vocabulary: Vocabulary, text_encoder: TextEncoder) -> None:
    """The decoder's word embeddings from those of a larger model, at the scale of BERT's own start."""
    width = captioner.config.decoder_width
    words = text_encoder.words(vocabulary.pieces)
    reduced = widened(Axes(words, width).along(words), width)
    captioner.decoder.bert.bert.embeddings.word_embeddings.weight.copy_(reduced * (0.02 / reduced.std()))


class Axes:
    """The `count` directions of largest variance of x (n, width), signs fixed so that a rerun agrees."""

    def __init__(self, x: Floats, count: int) -> None:
        self.centre = x.mean(0)
        _, vectors = np.linalg.eigh(np.cov((x - self.centre).T.astype(np.float64)))
        axes = vectors[:, ::-1][:, : min(count, x.shape[1])]
        self.axes = (axes * np.sign(axes[np.abs(axes).argmax(0), range(axes.shape[1])])).astype(np.float32)

    def along(self, x: Floats) -> Floats:
        """(n, count) places of x on the axes."""
        placed: Floats = (x - self.centre) @ self.axes
        return placed


def standardised(x: Floats) -> Floats:
    """Every column with mean 0 and variance 1."""
    standard: Floats = (x - x.mean(0)) / (x.std(0) + 1e-6)
    return standard


def widened(x: Floats, width: int) -> Tensor:
    """Columns of zeros added up to `width`: where a text encoder is narrower than the codes."""
    return torch.from_numpy(np.pad(x, ((0, 0), (0, max(0, width - x.shape[1]))))).float()


def regressed(x: Floats, y: Floats, strength: float) -> tuple[Floats, float]:
    """(weights (F, D), explained share of the variance) of the ridge regression y ≈ x·w."""
    left, right = x.astype(np.float64), y.astype(np.float64)
    weight = np.linalg.solve(left.T @ left + strength * np.eye(left.shape[1]), left.T @ right)
    return weight.astype(np.float32), float(1 - ((right - left @ weight) ** 2).sum() / (right**2).sum())
