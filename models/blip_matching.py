"""Image-text matching by a BLIP ITM checkpoint from a local folder (Li et al. 2022), as the paper and its authors use it.

Must not know bundles or streams: it looks at pixels, so it can judge a corpus, but not a stream's recorded index vectors.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import BlipForImageTextRetrieval

from models.errors import BundleError, ShapeError
from models.model import Pixels

BATCH = 16
TEXT_PIECES_MAX = 35  # BLIP's own
# (mean, standard deviation) of red, green and blue in [0, 255]: those of CLIP, which BLIP was trained with
PIXEL_SCALE = ((122.7709, 116.7460, 104.0937), (68.5005, 66.6322, 70.3232))


class BlipScorer:
    """models.matching.Scorer of pixels."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        """Raises BundleError where `folder` has no BLIP in safetensors with its tokenizer.json."""
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            if not (folder / name).is_file():
                raise BundleError(f"{folder} has no {name}: save the BLIP checkpoint there with save_pretrained")
        model: Any = BlipForImageTextRetrieval.from_pretrained(str(folder), use_safetensors=True, local_files_only=True)
        self._model = model.to(device).eval()
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(TEXT_PIECES_MAX)
        self._tokenizer.no_padding()
        self._device = device
        self.side = int(self._model.config.vision_config.image_size)
        self._mean, self._std = (torch.tensor(v, device=device).view(3, 1, 1) for v in PIXEL_SCALE)

    @torch.inference_mode()
    def scores(self, images: Sequence[Pixels], captions: Sequence[str]) -> NDArray[np.float32]:
        """(n,) probability that caption and image belong together; images are (S, S, 3) RGB, S = `side`."""
        parts = [
            self._batch(images[start : start + BATCH], captions[start : start + BATCH])
            for start in range(0, len(images), BATCH)
        ]
        return np.concatenate(parts) if parts else np.empty(0, np.float32)

    def _batch(self, images: Sequence[Pixels], captions: Sequence[str]) -> NDArray[np.float32]:
        if wrong := [p.shape for p in images if p.shape != (self.side, self.side, 3)]:
            raise ShapeError(f"pixels of shape {wrong[0]} for a BLIP of side {self.side}")
        pixels = torch.from_numpy(np.stack(images)).to(self._device).permute(0, 3, 1, 2).float()
        rows = [e.ids for e in self._tokenizer.encode_batch(list(captions))]
        longest = max(map(len, rows))
        pieces = torch.tensor([r + [0] * (longest - len(r)) for r in rows], device=self._device)
        mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows], device=self._device)
        out = self._model(
            input_ids=pieces, attention_mask=mask, pixel_values=(pixels - self._mean) / self._std, use_itm_head=True
        )
        scores: NDArray[np.float32] = out.itm_score.float().softmax(-1)[:, 1].cpu().numpy()
        return scores
