"""Captions from image tokens: greedy or by beam search, in batches, with cached keys and values.

As in the paper (§3.2) T_g is generated from the quantised tokens; `generate_from_tokens` also takes the image's own, as the
authors' code does. With a guidance g other than 1, each word is chosen by log p(w) + g · (log p(w | image) - log p(w)): a
corpus full of stock phrases makes the plain decoder say them of everything. p(w) is the same decoder's, shown no image
(Ho & Salimans 2022).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from models.captioner import Captioner
from models.errors import ShapeError
from models.stepwise import GraphSteps, Steps
from models.vocabulary import MASK, PAD, START, STOP, UNK, Vocabulary

# Captions at once. On a GPU a step of few takes as long as one of many; what 128 images are seen as takes 0.9 GiB at the
# paper's size.
BATCH, GPU_BATCH = 32, 128
# Once this share of a batch has ended, it leaves: what is kept of the others is copied then.
LEAVING = 0.25
NEVER = -torch.inf
LEAST = -3.0  # log of a twentieth of the likeliest word's probability (Li et al. 2023, contrastive decoding: a tenth)


@dataclass(frozen=True)
class Generation:
    """How captions are generated. Raises ShapeError for what cannot be.

    beams       1 is greedy; more follow that many beginnings at once and take the best by mean log-probability a piece
    pieces_min  pieces before a caption may end; pieces_max  None: as many as the captioner was trained for
    ngram       no run of so many pieces comes twice in a caption; no piece ever follows itself
    guidance    None: the captioner's own
    cached      keys and values of earlier pieces are kept; without, all is computed again at each step: for tests
    """

    beams: int = 1
    pieces_min: int = 1
    pieces_max: int | None = None
    ngram: int = 2
    guidance: float | None = None
    cached: bool = True

    def __post_init__(self) -> None:
        if self.beams < 1 or self.ngram < 1:
            raise ShapeError(f"beams={self.beams} and ngram={self.ngram} must be at least 1")
        if not 1 <= self.pieces_min <= (self.pieces_max or self.pieces_min):
            raise ShapeError(f"pieces_min={self.pieces_min} must lie between 1 and pieces_max={self.pieces_max}")


GREEDY = Generation()


def generate(
    captioner: Captioner, vocabulary: Vocabulary, vectors: NDArray[np.uint16], how: Generation = GREEDY
) -> list[str]:
    """One caption a row of `vectors` (n, L), from the quantised tokens (paper). Never empty."""
    captions: list[str] = []
    for tokens in quantised(captioner, vectors):
        captions += generate_from_tokens(captioner, vocabulary, tokens, how)
    return captions


def at_once(device: torch.device) -> int:
    """How many captions are generated together on this device."""
    return GPU_BATCH if device.type == "cuda" else BATCH


def quantised(captioner: Captioner, vectors: NDArray[np.uint16]) -> Iterator[Tensor]:
    """(b, L, D) codes of the index vectors (n, L), as many at a time as are captioned together."""
    codes = captioner.quantiser.codebook.codes
    count = at_once(codes.device)
    for start in range(0, len(vectors), count):
        rows = torch.from_numpy(vectors[start : start + count].astype(np.int64)).to(codes.device)
        yield F.embedding(rows, codes)


@torch.inference_mode()
def generate_from_tokens(
    captioner: Captioner, vocabulary: Vocabulary, tokens: Tensor, how: Generation = GREEDY, steps: Steps | None = None
) -> list[str]:
    """One caption a row of `tokens` (B, L, D): quantised ones, or the image's own (`Quantiser.tokens`) where the captioner
    was trained on those.

    steps  of `steps_of`, to be used again for the next batch
    """
    return [vocabulary.decode(pieces) for pieces in _Search(captioner, how, steps).captions(tokens)]


def steps_of(captioner: Captioner, how: Generation = GREEDY) -> Steps:
    """What greedy captions of many batches are generated with, as long as the captioner's weights stay as they are."""
    guided, device = _guidance(captioner, how) != 1.0, captioner.decoder.places.device
    if device.type == "cuda":
        return GraphSteps(captioner.decoder, _pieces_max(captioner, how), guided=guided, rows=at_once(device))
    return Steps(captioner.decoder, _pieces_max(captioner, how), guided=guided)


def _pieces_max(captioner: Captioner, how: Generation) -> int:
    most = captioner.config.caption_pieces_max
    return min(how.pieces_max or most, most)


def _guidance(captioner: Captioner, how: Generation) -> float:
    return captioner.config.guidance if how.guidance is None else how.guidance


class _Search:
    """Beam search over a batch of images. A beam of one is greedy decoding."""

    def __init__(self, captioner: Captioner, how: Generation, steps: Steps | None = None) -> None:
        self.decoder = captioner.decoder
        self.how = how
        self.pieces_max = _pieces_max(captioner, how)
        self.guidance = _guidance(captioner, how)
        self._guided = self.guidance != 1.0
        self._steps = steps
        if steps is None and how.cached:
            self._steps = Steps(captioner.decoder, self.pieces_max, guided=self._guided)

    def captions(self, tokens: Tensor) -> list[list[int]]:
        """Piece numbers of each image's best caption. Images whose beams have all ended leave the batch now and then."""
        found: list[list[int]] = [[] for _ in tokens]
        if not found:
            return found
        images, beams, device = list(range(len(tokens))), self.how.beams, tokens.device
        self._look(tokens.repeat_interleave(beams, 0))
        said = torch.full((len(tokens), beams, 1), START, device=device)
        scores = torch.full((len(tokens), beams), NEVER, device=device)
        scores[:, 0] = 0.0  # all beams begin alike: one of them counts
        for step in range(self.pieces_max):
            said, scores = self._extended(said, scores, step)
            # The one answer that a step waits for.
            ended = (said == STOP).any(-1).all(-1).tolist()
            last = all(ended) or step + 1 == self.pieces_max
            if not last and (sum(ended) < LEAVING * len(ended) or (self._steps is not None and self._steps.fixed)):
                continue
            leaving = [row for row, gone in enumerate(ended) if gone or last]
            for row, pieces in zip(leaving, _best(said[leaving], scores[leaving]), strict=True):
                found[images[row]] = pieces
            if last:
                break
            staying = [row for row, gone in enumerate(ended) if not gone]
            rows = torch.tensor(staying, device=device)
            images, said, scores = [images[row] for row in staying], said[rows], scores[rows]
            self._keep((rows[:, None] * beams + torch.arange(beams, device=device)).ravel())
        return found

    def _extended(self, said: Tensor, scores: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The best beginnings (n, beams, T + 1) that continue those of `said`, with their log-probabilities."""
        count, beams, length = said.shape
        flat = said.flatten(0, 1)
        ended = (flat == STOP).any(-1)
        forbidden = _repeated(flat, self.how.ngram, self.decoder.bert.config.vocab_size)
        for special in (PAD, UNK, START, MASK):
            forbidden[:, special] = True
        forbidden[:, STOP] = step < self.how.pieces_min
        gained = self._log_probabilities(flat, forbidden)
        gained = gained.masked_fill(ended[:, None], NEVER)
        gained[:, PAD] = gained[:, PAD].masked_fill(ended, 0.0)
        total = (scores.flatten()[:, None] + gained).view(count, -1)
        scores, chosen = (total.max(-1, keepdim=True)) if beams == 1 else total.topk(beams, -1)
        parent = torch.div(chosen, gained.shape[-1], rounding_mode="floor")
        if beams > 1:
            offsets = torch.arange(count, device=parent.device)[:, None] * beams
            self._keep((parent + offsets).ravel())
        before = said.gather(1, parent[..., None].expand(-1, -1, length))
        return torch.cat([before, (chosen % gained.shape[-1])[..., None]], -1), scores

    def _log_probabilities(self, said: Tensor, forbidden: Tensor) -> Tensor:
        """(B, V) of the next piece; -inf for what must not come."""
        doubled = said.repeat(2, 1) if self._guided else said
        if self._steps is not None:
            logits = self._steps.logits(doubled[:, -1])
        else:
            logits = self.decoder.logits(doubled, self._seen)[:, -1].float()
        logits = logits.log_softmax(-1)
        if not self._guided:
            return logits.masked_fill(forbidden, NEVER)
        shown, blind = logits.chunk(2)
        shown = shown.masked_fill(forbidden, NEVER)
        guided = (blind + self.guidance * (shown - blind)).log_softmax(-1)
        # what the decoder would hardly say of this image must not win by being even rarer without it
        return guided.masked_fill(shown < shown.max(-1, keepdim=True).values + LEAST, NEVER)

    def _look(self, tokens: Tensor) -> None:
        if self._steps is not None:
            self._steps.look(tokens)
        else:
            self._seen = self.decoder.see(torch.cat([tokens, torch.zeros_like(tokens)]) if self._guided else tokens)

    def _keep(self, rows: Tensor) -> None:
        """Beams at these places are continued, in this order; of images that ended nothing more is computed."""
        if self._steps is not None:
            self._steps.keep(rows)
            return
        if self._guided:
            rows = torch.cat([rows, rows + len(self._seen[0]) // 2])
        self._seen = (self._seen[0][rows], None if self._seen[1] is None else self._seen[1][rows])


def _best(said: Tensor, scores: Tensor) -> list[list[int]]:
    """Of each image (n, beams, T) the beam with the highest log-probability a piece, without start and stop."""
    lengths = (said[:, :, 1:] != PAD).sum(-1)
    best = (scores / lengths).argmax(-1)
    rows: list[list[int]] = said[torch.arange(len(said), device=said.device), best, 1:].tolist()
    return [[p for p in pieces if p not in (PAD, STOP)] for pieces in rows]


def _repeated(said: Tensor, ngram: int, vocabulary: int) -> Tensor:
    """(B, V) pieces that would follow themselves, or complete a run of `ngram` pieces that was said before."""
    times = torch.zeros(len(said), vocabulary, dtype=torch.uint8, device=said.device)
    context = ngram - 1
    followers = said[:, ngram:]  # the first piece is START: it is no part of a run
    if count := followers.shape[1]:
        same = torch.ones_like(followers, dtype=torch.bool)
        for place in range(context):
            same &= said[:, 1 + place : 1 + place + count] == said[:, place - context, None]
        times.scatter_add_(1, followers, same.to(times.dtype))
    return times.scatter_(1, said[:, -1:], 1).bool()
