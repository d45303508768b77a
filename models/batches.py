"""What a training step sees, as a function of the seed and the step's number: which pairs, and every draw made of them.

Nothing here remembers anything, so a resumed training goes on with the very batch that it was killed in, and several
processes agree on a batch without a word: each takes its part of it.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.augmentation import augmented
from models.distributed import rank, world
from models.errors import CorpusError
from models.images import decode
from models.pair_store import THREADS, PairStore
from models.vocabulary import MASK, PAD, START, STOP, Vocabulary

Rows = NDArray[np.int64]
POOL = 8  # batches that are sorted by length together: their captions are alike, so little padding is computed
DECODED_SIDE = 8 / 7  # of the side: what a random crop is cut from


@dataclass(frozen=True)
class Draws:
    """How much of a batch is left to chance."""

    seed: int
    batch: int  # pairs of a step, of all processes together
    accumulation: int  # parts in which each process computes its share
    caption_repeats_max: int  # pairs with the same caption in an epoch, 0: any
    words_dropped: float
    images_hidden: float
    augment: bool


@dataclass(frozen=True)
class Part:
    """What a process computes at once. Its losses are means; `language_share` and `share` are its weights in the batch's."""

    images: Tensor  # (B, L, F) features of a frozen encoder, or (B, 3, S, S) pixels
    inputs: Tensor  # (B, T) word pieces, some hidden so that the image has to say them
    targets: Tensor  # (B, T)
    hidden: Tensor  # (B,) bool: images that the decoder is not shown
    meanings: Tensor  # (B, E) captions' embeddings; E = 0 where no loss needs them
    language_share: float
    share: float


class Examples:
    """Pairs as training reads them, with the features of a frozen encoder and the captions' embeddings where there are any."""

    def __init__(
        self, store: PairStore, vocabulary: Vocabulary, pieces_max: int, side: int,
        features: NDArray[np.float16] | None, meanings: NDArray[np.float16] | None,
    ) -> None:  # fmt: skip
        self.store, self.vocabulary, self.pieces_max, self.side = store, vocabulary, pieces_max, side
        self.features, self.meanings = features, meanings
        self.centre = 0.0 if meanings is None else meanings.mean(0, dtype=np.float64)
        self._decoders = ThreadPoolExecutor(THREADS)

    def epoch(self, draws: Draws, phase: int, number: int) -> list[Rows]:
        """The rows of every batch of epoch `number`, each batch full. Raises CorpusError for fewer pairs than processes."""
        rng = np.random.default_rng([draws.seed, phase, number])
        order = rng.permutation(len(self.store))
        if draws.caption_repeats_max:
            order = at_most(self.store.caption_hashes, draws.caption_repeats_max, order)
        parts = world() * draws.accumulation
        batch = min(draws.batch, len(order)) // parts * parts
        if batch == 0:
            raise CorpusError(
                f"{len(order)} pairs are too few for {parts} parts of a batch: fewer processes, or more data"
            )
        batches: list[Rows] = []
        for start in range(0, len(order), POOL * batch):
            pool = order[start : start + POOL * batch]
            pool = pool[np.argsort(self.store.caption_bytes(pool), kind="stable")]
            batches += [pool[i : i + batch] for i in range(0, len(pool) - batch + 1, batch)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def parts(self, rows: Rows, draws: Draws, phase: int, step: int) -> list[Part]:
        """This process's parts of the batch `rows`."""
        rng = np.random.default_rng([draws.seed, phase, step, 1])
        pieces = self.vocabulary.encode(list(self.store.captions(rows)), self.pieces_max)
        inputs, targets = shifted(pieces, draws.words_dropped, rng)
        mirrored, hidden = rng.random(len(rows)) < 0.5, torch.from_numpy(rng.random(len(rows)) < draws.images_hidden)
        said = int((targets != PAD).sum())
        size = len(rows) // (world() * draws.accumulation)
        parts = []
        for number in range(draws.accumulation):
            first = (rank() * draws.accumulation + number) * size
            mine = slice(first, first + size)
            parts.append(
                Part(
                    self._images(rows[mine], mirrored[mine], draws, (phase, step, first)),
                    inputs[mine], targets[mine], hidden[mine], self._meanings(rows[mine]),
                    int((targets[mine] != PAD).sum()) / said, size / len(rows),
                )
            )  # fmt: skip
        return parts

    def _images(self, rows: Rows, mirrored: NDArray[np.bool_], draws: Draws, at: tuple[int, int, int]) -> Tensor:
        """Of cached features only a mirror image can be made: the map's columns are turned around."""
        if self.features is not None:
            features = torch.from_numpy(self.features[rows].astype(np.float32))
            edge = round(features.shape[1] ** 0.5)
            grid = features.unflatten(1, (edge, edge))
            return torch.where(torch.from_numpy(mirrored)[:, None, None, None], grid.flip(2), grid).flatten(1, 2)

        def one(number: int) -> NDArray[np.uint8]:
            image = self.store.image(int(rows[number]))
            if not draws.augment:
                return decode(image, self.side)
            rng = np.random.default_rng([draws.seed, *at, number])
            return augmented(decode(image, round(self.side * DECODED_SIDE)), self.side, rng)

        pixels = np.stack(list(self._decoders.map(one, range(len(rows)))))
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)

    def _meanings(self, rows: Rows) -> Tensor:
        if self.meanings is None:
            return torch.empty(len(rows), 0)
        away = torch.from_numpy(self.meanings[rows].astype(np.float32) - self.centre)
        return torch.nn.functional.normalize(away.float(), dim=-1)


def shifted(rows: Sequence[Sequence[int]], dropped: float, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T + 1), padded; a share of the input words hidden."""
    longest = max(map(len, rows)) + 1
    inputs = torch.tensor([[START, *row] + [PAD] * (longest - len(row) - 1) for row in rows])
    targets = torch.tensor([[*row, STOP] + [PAD] * (longest - len(row) - 1) for row in rows])
    hidden = torch.from_numpy(rng.random(inputs.shape) < dropped) & (inputs > MASK)
    return inputs.masked_fill(hidden, MASK), targets


def at_most(keys: NDArray[Any], times: int, order: Rows) -> Rows:
    """Those of `order` whose key has come up at most `times` times."""
    by_key = np.argsort(keys[order], kind="stable")
    sorted_keys = keys[order][by_key]
    first_of_key = np.searchsorted(sorted_keys, sorted_keys, side="left")
    kept = np.empty(len(order), bool)
    kept[by_key] = np.arange(len(order)) - first_of_key < times
    return order[kept]
