"""Captions from index vectors: greedy, in batches, with cached keys and values (paper §3.2: T_g from quantised tokens)."""

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


@torch.inference_mode()
def generate(captioner: Captioner, vocabulary: Vocabulary, vectors: NDArray[np.uint16]) -> list[str]:
    """One caption a row of `vectors` (n, L). Always at least one piece, no pair of pieces twice, no piece twice in a row."""
    device = captioner.quantiser.codebook.codes.device
    captions = []
    for start in range(0, len(vectors), BATCH):
        rows = torch.from_numpy(vectors[start : start + BATCH].astype(np.int64)).to(device)
        quantised = F.embedding(rows, captioner.quantiser.codebook.codes)
        captions += [vocabulary.decode(ids) for ids in _greedy(captioner, quantised).tolist()]
    return captions


def _greedy(captioner: Captioner, quantised: Tensor) -> Tensor:
    """(B, T) piece numbers without the start, padded after the stop."""
    bert, config = captioner.decoder.bert, captioner.decoder.bert.config
    seen = captioner.decoder.see(quantised)
    # a fresh cache a call: transformers 5 crashes without one and mixes images up with a used one
    cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
    rows = torch.arange(len(seen), device=seen.device)
    said = torch.full((len(seen), 1), START, device=seen.device)
    done = torch.zeros(len(seen), dtype=torch.bool, device=seen.device)
    for step in range(captioner.config.caption_pieces_max):
        logits = bert(
            input_ids=said[:, -1:], encoder_hidden_states=seen, past_key_values=cache, use_cache=True
        ).logits[:, -1]  # fmt: skip
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
