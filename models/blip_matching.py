"""Image-text matching by a BLIP ITM checkpoint from a local folder (Li et al. 2022), as the paper and its authors use it.

Must not know bundles or streams. It looks at pixels in a size of its own, one padded shape at a time, so that a pair's score
does not depend on the pairs beside it: a gate that is compared with it decides the same in every batch.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import BlipForImageTextRetrieval
from transformers.utils import logging as transformers_logging

from models.errors import BundleError, ShapeError
from models.model import Picture, Pixels, Vectors

BATCH = 16
TEXT_PIECES_MAX = 35  # BLIP's own
TEXT_CHARACTERS_MAX = 16 * TEXT_PIECES_MAX  # a 100 kB caption must not cost 100 kB of work
# (mean, standard deviation) of red, green and blue in [0, 255]: those of CLIP, which BLIP was trained with
PIXEL_SCALE = ((122.7709, 116.7460, 104.0937), (68.5005, 66.6322, 70.3232))
FILES = ("config.json", "model.safetensors", "tokenizer.json")


class BlipScorer:
    """models.matching.Scorer of pictures. `files` has the SHA-256 of each file that a score depends on."""

    def __init__(self, folder: Path, device: torch.device, files: Mapping[str, str] | None = None) -> None:
        """Raises BundleError where `folder` has no BLIP in safetensors with its tokenizer.json, or another one than `files`."""
        for name in FILES:
            if not (folder / name).is_file():
                raise BundleError(f"{folder} has no {name}: save the BLIP checkpoint there with save_pretrained")
        self.folder = folder.resolve()
        self.files = {name: _sha256(folder / name) for name in FILES}
        for name in FILES:
            if files is not None and self.files[name] != files.get(name):
                raise BundleError(
                    f"{folder} is not the BLIP that the bundle's gate and baselines are of: its {name} has another SHA-256; "
                    "name the folder of the right one with --blip, or bootstrap with this one"
                )
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            model: Any = BlipForImageTextRetrieval.from_pretrained(
                str(folder), use_safetensors=True, local_files_only=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise BundleError(f"{folder} cannot be loaded as a BLIP: {' '.join(str(error).split())[:200]}") from error
        self._model = model.to(device).eval()
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(TEXT_PIECES_MAX)
        self._tokenizer.no_padding()
        self._device = device
        self.side = int(self._model.config.vision_config.image_size)
        self._mean, self._std = (torch.tensor(v, device=device).view(3, 1, 1) for v in PIXEL_SCALE)

    def about(self) -> dict[str, object]:
        """For a bundle's manifest."""
        return {"scorer": "blip", "folder": str(self.folder), "files": self.files}

    @torch.inference_mode()
    def scores(self, vectors: Vectors, captions: Sequence[str], pictures: Sequence[Picture]) -> NDArray[np.float32]:
        """(n,) probability that caption and image belong together; of a picture `judged`, (S, S, 3) with S = `side`, counts."""
        if len(pictures) != len(captions):
            raise ShapeError(f"{len(captions)} captions and {len(pictures)} pictures: a BLIP judges both")
        images = [p.judged for p in pictures if p.judged is not None and p.judged.shape == (self.side, self.side, 3)]
        if len(images) != len(pictures):
            raise ShapeError(f"pictures that were not decoded for a BLIP of side {self.side}")
        parts = [
            self._batch(images[start : start + BATCH], captions[start : start + BATCH])
            for start in range(0, len(images), BATCH)
        ]
        return np.concatenate(parts) if parts else np.empty(0, np.float32)

    def _batch(self, images: Sequence[Pixels], captions: Sequence[str]) -> NDArray[np.float32]:
        block = np.zeros((BATCH, self.side, self.side, 3), np.uint8)
        block[: len(images)] = np.stack(images)
        pixels = torch.from_numpy(block).to(self._device).permute(0, 3, 1, 2).float()
        pieces = torch.zeros(BATCH, TEXT_PIECES_MAX, dtype=torch.int64)
        mask = torch.zeros(BATCH, TEXT_PIECES_MAX, dtype=torch.int64)
        mask[:, 0] = 1  # rows without a caption, too: a row that attends to nothing is not a number
        for row, encoded in enumerate(self._tokenizer.encode_batch([c[:TEXT_CHARACTERS_MAX] for c in captions])):
            pieces[row, : len(encoded.ids)] = torch.tensor(encoded.ids)
            mask[row, : len(encoded.ids)] = 1
        out = self._model(
            input_ids=pieces.to(self._device), attention_mask=mask.to(self._device),
            pixel_values=(pixels - self._mean) / self._std, use_itm_head=True,
        )  # fmt: skip
        scores: NDArray[np.float32] = out.itm_score.float().softmax(-1)[: len(images), 1].cpu().numpy()
        return scores


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
