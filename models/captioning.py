"""Captions from index vectors: greedy, in batches, with cached keys and values (paper §3.2: T_g from quantised tokens).

With a guidance g other than 1, each word is chosen by log p(w) + g · (log p(w | image) - log p(w)): a corpus full of stock
phrases makes the plain decoder say them of everything. p(w) is the same decoder's, shown no image (Ho & Salimans 2022).
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from models.captioner import Captioner
from models.vocabulary import MASK, PAD, START, STOP, UNK, Vocabulary

BATCH = 32
NEVER = -torch.inf
LEAST = -3.0  # log of a twentieth of the likeliest word's probability (Li et al. 2023, contrastive decoding: a tenth)


@torch.inference_mode()
def generate(
    captioner: Captioner, vocabulary: Vocabulary, vectors: NDArray[np.uint16], guidance: float | None = None
) -> list[str]:
    """One caption a row of `vectors` (n, L). Always at least one piece, no pair of pieces twice, no piece twice in a row.

    guidance  the captioner's own where it is None.
    """
    guidance = captioner.config.guidance if guidance is None else guidance
    device = captioner.quantiser.codebook.codes.device
    captions = []
    for start in range(0, len(vectors), BATCH):
        rows = torch.from_numpy(vectors[start : start + BATCH].astype(np.int64)).to(device)
        quantised = F.embedding(rows, captioner.quantiser.codebook.codes)
        captions += [vocabulary.decode(ids) for ids in _greedy(captioner, quantised, guidance).tolist()]
    return captions


def _greedy(captioner: Captioner, quantised: Tensor, guidance: float) -> Tensor:
    """(B, T) piece numbers without the start, padded after the stop."""
    config = captioner.decoder.bert.config
    guided = guidance != 1.0
    seen = captioner.decoder.see(torch.cat([quantised, torch.zeros_like(quantised)]) if guided else quantised)
    # a fresh cache a call: transformers 5 crashes without one and mixes images up with a used one
    cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
    rows = torch.arange(len(quantised), device=quantised.device)
    said = torch.full((len(quantised), 1), START, device=quantised.device)
    done = torch.zeros(len(quantised), dtype=torch.bool, device=quantised.device)
    for step in range(captioner.config.caption_pieces_max):
        last = said[:, -1:].repeat(2, 1) if guided else said[:, -1:]
        logits = captioner.decoder.logits(last, seen, cache)[:, -1]
        if guided:
            shown, blind = logits.log_softmax(-1).chunk(2)
            logits = blind + guidance * (shown - blind)
            # what the decoder would hardly say of this image must not win by being even rarer without it
            logits = logits.masked_fill(shown < shown.max(-1, keepdim=True).values + LEAST, NEVER)
        logits[:, [PAD, UNK, START, MASK]] = NEVER
        if step == 0:
            logits[:, STOP] = NEVER
        _forbid_repetition(logits, said)
        chosen = torch.where(done, PAD, logits.argmax(-1))
        said = torch.cat([said, chosen[:, None]], 1)
        done |= said[rows, -1] == STOP
        if bool(done.all()):
            break
    return said[:, 1:]


def _forbid_repetition(logits: Tensor, said: Tensor) -> None:
    """No piece directly after itself, and none that would complete a pair of pieces said before."""
    last = said[:, -1]
    logits.scatter_(1, last[:, None], NEVER)
    for earlier in range(1, said.shape[1] - 1):
        again = (said[:, earlier] == last).nonzero().ravel()
        follower = said[again, earlier + 1]
        keep = follower > MASK  # a stop may always come
        logits[again[keep], follower[keep]] = NEVER
