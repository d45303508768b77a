"""Image-text matching from the quantised tokens and the text alone: a small two-tower head.

It runs for every pair of a stream, at a hundredth of the cost of the captioner's own likelihood ratio; `corpus.evaluate`
prints how well both tell true pairs from shuffled ones. Trained by contrast within a batch (CLIP, Radford et al. 2021), then
calibrated so that 0.5 means "as likely a pair as not" among as many true as shuffled pairs.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from models.model import Picture, Vectors
from models.vocabulary import UNK, Vocabulary

TEXT_PIECES_MAX = 64  # of a long caption the beginning is judged


class Scorer(Protocol):
    """Says how well captions fit their images: a number in [0, 1] a pair, a function of that pair alone."""

    def scores(self, vectors: Vectors, captions: Sequence[str], pictures: Sequence[Picture]) -> NDArray[np.float32]:
        """(n,) of n images, each with the caption beside it. The bundle's own looks at index vectors, BLIP's at pictures."""
        ...


class OwnScorer:
    """The bundle's own head, from index vectors: what a stream uses unless its bundle was made with a BLIP."""

    def __init__(self, head: "MatchingHead", vocabulary: Vocabulary, codebook: Tensor) -> None:
        self._head, self._vocabulary, self._codebook = head, vocabulary, codebook

    def scores(
        self, vectors: Vectors, captions: Sequence[str], pictures: Sequence[Picture] = ()
    ) -> NDArray[np.float32]:
        """(n,) in [0, 1] of index vectors (n, L)."""
        return match(self._head, self._vocabulary, self._codebook, vectors, captions)


class MatchingHead(nn.Module):
    """Two bags of embeddings, each through one hidden layer; the scaled cosine through a sigmoid."""

    def __init__(self, codes: int, code_width: int, vocabulary: int, width: int = 96) -> None:
        super().__init__()
        self.code_bag = nn.EmbeddingBag(codes, width, mode="mean")
        self.word_bag = nn.EmbeddingBag(vocabulary, width, mode="mean")
        self.image = nn.Sequential(nn.Linear(width + code_width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.text = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.log_scale = nn.Parameter(torch.tensor(2.0))
        self.slope = nn.Parameter(torch.tensor(1.0), requires_grad=False)
        self.offset = nn.Parameter(torch.tensor(0.0), requires_grad=False)

    def images(self, vectors: Tensor, codebook: Tensor) -> Tensor:
        """(B, L) indices → (B, width), length 1."""
        mean = F.embedding(vectors, codebook).mean(1)
        return F.normalize(self.image(torch.cat([self.code_bag(vectors), mean], -1)), dim=-1)

    def texts(self, pieces: Tensor, starts: Tensor) -> Tensor:
        """Pieces of all texts one after the other, and where each starts → (B, width), length 1."""
        return F.normalize(self.text(self.word_bag(pieces, starts)), dim=-1)

    def score(self, images: Tensor, texts: Tensor) -> Tensor:
        """(B,) in [0, 1]."""
        return torch.sigmoid(self.slope * (images * texts).sum(-1) + self.offset)


def flat_pieces(vocabulary: Vocabulary, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The captions as nn.EmbeddingBag wants them; a caption without any piece becomes one unknown piece."""
    ids = [pieces or [UNK] for pieces in vocabulary.encode(captions, TEXT_PIECES_MAX)]
    starts = np.cumsum([0, *map(len, ids[:-1])])
    return torch.tensor([i for row in ids for i in row], dtype=torch.int64), torch.from_numpy(starts.astype(np.int64))


@torch.inference_mode()
def match(
    head: MatchingHead, vocabulary: Vocabulary, codebook: Tensor, vectors: NDArray[np.uint16], captions: Sequence[str]
) -> NDArray[np.float32]:
    """(n,) score of each image with the caption beside it."""
    if len(captions) == 0:
        return np.empty(0, np.float32)
    device = codebook.device
    pieces, starts = flat_pieces(vocabulary, captions)
    images = head.images(torch.from_numpy(vectors.astype(np.int64)).to(device), codebook)
    scores: NDArray[np.float32] = head.score(images, head.texts(pieces.to(device), starts.to(device))).cpu().numpy()
    return scores


def text_agreement(original: NDArray[np.float32], generated: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n,) cosine of T_o and T_g in the space of a text encoder, (n, d) each, of length 1 (Mahmoud et al. 2024, SIEVE).

    A second opinion on a pair that costs no look at the image: a caption that agrees with none that was generated is noise.
    """
    cosines: NDArray[np.float32] = (original * generated).sum(-1)
    return cosines


def train_head(
    head: MatchingHead,
    vocabulary: Vocabulary,
    codebook: Tensor,
    vectors: NDArray[np.uint16],
    captions: Sequence[str],
    meanings: Tensor,
    *,
    epochs: int,
    seed: int,
    meaning_weight: float = 3.0,
    dropped: float = 0.2,
    batch: int = 256,
    rate: float = 2e-3,
) -> float:
    """Fit `head` to true pairs; returns the last epoch's mean loss. Equal captions are never each other's negatives.

    meanings  (n, width) embeddings of the captions by a larger model, of length 1: both towers are drawn towards them, so
              that words and pictures that training has hardly seen find their place among those it has.
    """
    rows = torch.from_numpy(vectors.astype(np.int64))
    number = {c: i for i, c in enumerate(dict.fromkeys(captions))}
    same = torch.tensor([number[c] for c in captions])
    learning = [p for p in head.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learning, lr=rate, weight_decay=0.05)
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(rows) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps + 1)
    mean_loss = 0.0
    for _ in range(epochs):
        losses = []
        for chosen in torch.randperm(len(rows), generator=generator).split(batch):
            pieces, starts = flat_pieces(vocabulary, [captions[i] for i in chosen.tolist()])
            known = torch.where(torch.rand(pieces.shape, generator=generator) < dropped, UNK, pieces)
            codes = rows[chosen]
            codes = torch.where(torch.rand(codes.shape, generator=generator) < dropped, codes[:, :1], codes)
            images, texts = head.images(codes, codebook), head.texts(known, starts)
            logits = head.log_scale.exp() * images @ texts.T
            twins = (same[chosen][:, None] == same[chosen][None]) & ~torch.eye(len(chosen), dtype=torch.bool)
            logits = logits.masked_fill(twins, -torch.inf)
            truth = torch.arange(len(chosen))
            contrast = (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2
            meant = meanings[chosen]
            far = (1 - (images * meant).sum(-1).mean()) + (1 - (texts * meant).sum(-1).mean())
            optimiser.zero_grad()
            (contrast + meaning_weight * far).backward()
            optimiser.step()
            schedule.step()
            losses.append(float(contrast.detach()))
        mean_loss = sum(losses) / len(losses)
    return mean_loss


def calibrate(
    head: MatchingHead, vocabulary: Vocabulary, codebook: Tensor, vectors: NDArray[np.uint16], captions: Sequence[str],
    seed: int,
) -> None:  # fmt: skip
    """Slope and offset by logistic regression on true against shuffled pairs, best on pairs the head was not fitted to."""
    with torch.no_grad():
        images = head.images(torch.from_numpy(vectors.astype(np.int64)), codebook)
        texts = head.texts(*flat_pieces(vocabulary, captions))
        shuffled = texts[torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))]
        cosines = torch.cat([(images * texts).sum(-1), (images * shuffled).sum(-1)])
        labels = torch.cat([torch.ones(len(texts)), torch.zeros(len(texts))])
    line = torch.tensor([5.0, 0.0], requires_grad=True)
    optimiser = torch.optim.LBFGS([line], max_iter=100)

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.binary_cross_entropy_with_logits(line[0] * cosines + line[1], labels)
        loss.backward()
        return loss

    optimiser.step(closure)
    with torch.no_grad():
        head.slope.copy_(line[0])
        head.offset.copy_(line[1])
