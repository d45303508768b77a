"""The decoder one piece at a time: keys and values of what was said, and of what is seen, are kept.

The same network as `Decoder.logits`, from the same modules; only attention is written out, for a batch that all stands at
the same piece. Nothing in it waits for the device.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.captioner import Decoder

KeysAndValues = tuple[Tensor, Tensor]


class Steps:
    """A batch of captions on their way. `look` begins one, `logits` takes the next piece of each, `keep` goes on with some."""

    fixed = False  # whether a batch can lose rows

    def __init__(self, decoder: Decoder, pieces_max: int, *, guided: bool) -> None:
        """guided  a second half of the batch, row B + i for row i, is shown no image at all"""
        network: Any = decoder.bert
        self.decoder, self.guided, self.pieces_max = decoder, guided, pieces_max
        self.length = 0  # pieces of each caption so far
        self._network = network
        self._layers = list(network.bert.encoder.layer)
        self._heads: int = network.config.num_attention_heads
        self._seen: list[KeysAndValues] = []  # (B, H, L, d) of each layer
        self._blind: list[KeysAndValues] = []  # (1, H, L, d): all that see no image see the same
        self._votes: Tensor | None = None
        self._blind_votes: Tensor | None = None
        self._said = torch.empty(0)  # (layers, keys and values, R, H, pieces_max, d)

    def look(self, tokens: Tensor) -> None:
        """Begins captions of what the decoder is shown, (B, L, D)."""
        seen, self._votes = self.decoder.see(tokens)
        self._seen = self._keys_and_values_of(seen)
        if self.guided:
            nothing, self._blind_votes = self.decoder.see(torch.zeros_like(tokens[:1]))
            self._blind = self._keys_and_values_of(nothing)
        self._said = self._room(len(tokens) * (1 + self.guided), seen)
        self.length = 0

    def logits(self, pieces: Tensor) -> Tensor:
        """(R, V) of what follows `pieces` (R,), which follow those of the calls before; R = B, guided 2 B."""
        logits = self._step(pieces, self.length)
        self.length += 1
        return logits

    def keep(self, rows: Tensor) -> None:
        """Goes on with these of the B rows, in this order; a row may come twice."""
        here = torch.cat([rows, rows + len(self._seen[0][0])]) if self.guided else rows
        self._said = self._said[:, :, here]
        # One after the other, since these are what takes memory.
        for number, (keys, values) in enumerate(self._seen):
            self._seen[number] = keys[rows], values[rows]
        self._votes = None if self._votes is None else self._votes[rows]

    def _step(self, pieces: Tensor, length: int) -> Tensor:
        hidden = self._network.bert.embeddings(input_ids=pieces[:, None], past_key_values_length=length)
        for number, layer in enumerate(self._layers):
            hidden = layer.attention.output(self._of_said(number, layer.attention.self, hidden, length), hidden)
            hidden = layer.crossattention.output(self._of_seen(number, layer.crossattention.self, hidden), hidden)
            hidden = layer.feed_forward_chunk(hidden)
        logits: Tensor = self._network.cls(hidden)[:, 0].float()
        if self._votes is None:
            return logits
        if not self.guided or self._blind_votes is None:
            return logits + self._votes
        return logits + torch.cat([self._votes, self._blind_votes.expand_as(self._votes)])

    def _of_said(self, number: int, attention: Any, hidden: Tensor, length: int) -> Tensor:
        keys, values = self._said[number]
        new_keys, new_values = self._keys_and_values(attention, hidden)
        keys[:, :, length : length + 1], values[:, :, length : length + 1] = new_keys, new_values
        query = self._by_heads(attention.query(hidden))
        context = F.scaled_dot_product_attention(query, keys[:, :, : length + 1], values[:, :, : length + 1])
        return context.transpose(1, 2).flatten(2)

    def _of_seen(self, number: int, attention: Any, hidden: Tensor) -> Tensor:
        query = self._by_heads(attention.query(hidden))
        keys, values = self._seen[number]
        context = F.scaled_dot_product_attention(query[: len(keys)], keys, values)
        if self.guided:
            # (B, H, 1, d) as (1, H, B, d): the rows are so many questions to the one row of keys.
            blind = F.scaled_dot_product_attention(query[len(keys) :].transpose(0, 2), *self._blind[number])
            context = torch.cat([context, blind.transpose(0, 2)])
        return context.transpose(1, 2).flatten(2)

    def _keys_and_values_of(self, seen: Tensor) -> list[KeysAndValues]:
        return [self._keys_and_values(layer.crossattention.self, seen) for layer in self._layers]

    def _keys_and_values(self, attention: Any, hidden: Tensor) -> KeysAndValues:
        return self._by_heads(attention.key(hidden)), self._by_heads(attention.value(hidden))

    def _by_heads(self, columns: Tensor) -> Tensor:
        """(B, T, width) → (B, H, T, d)."""
        return columns.view(*columns.shape[:2], self._heads, -1).transpose(1, 2)

    def _room(self, rows: int, like: Tensor) -> Tensor:
        width = like.shape[-1] // self._heads
        return like.new_empty(len(self._layers), 2, rows, self._heads, self.pieces_max, width)


class GraphSteps(Steps):
    """The same on a GPU for up to `rows` captions at a time, each step recorded once as a CUDA graph and replayed.

    A step is some 300 short kernels, and to start them one by one takes five times as long as they take. All batches have the
    same places in memory; rows beyond those of a batch compute nothing that is looked at. Where nothing can be recorded, a
    warning says so and the same steps are run one by one.
    """

    fixed = True

    def __init__(self, decoder: Decoder, pieces_max: int, *, guided: bool, rows: int) -> None:
        super().__init__(decoder, pieces_max, guided=guided)
        self.rows = rows
        self._count = rows
        self._replays: list[Callable[[], object]] = []  # of each length
        self._pieces = torch.zeros(rows * (1 + guided), dtype=torch.long, device=decoder.places.device)
        self._logits = torch.empty(0)

    def look(self, tokens: Tensor) -> None:
        """Begins captions of (B, L, D), B ≤ rows."""
        self._count, self.length = len(tokens), 0
        if not self._replays:
            super().look(F.pad(tokens, (0, 0, 0, 0, 0, self.rows - len(tokens))))
            self._logits = self._step(self._pieces, 0)
            self._replays = self._recorded()
            return
        seen, votes = self.decoder.see(tokens)
        for layer, kept in zip(self._layers, self._seen, strict=True):
            for place, values in zip(kept, self._keys_and_values(layer.crossattention.self, seen), strict=True):
                place[: self._count] = values
        if self._votes is not None and votes is not None:
            self._votes[: self._count] = votes

    def logits(self, pieces: Tensor) -> Tensor:
        """As `Steps.logits`; the answer of one call is gone with the next one."""
        for half, its in enumerate(pieces.chunk(1 + self.guided)):
            self._pieces[half * self.rows : half * self.rows + self._count] = its
        self._replays[self.length]()
        self.length += 1
        if not self.guided:
            return self._logits[: self._count]
        return torch.cat([half[: self._count] for half in self._logits.chunk(2)])

    def keep(self, rows: Tensor) -> None:
        """Raises TypeError: such a batch keeps its rows."""
        raise TypeError("a batch of fixed places keeps its rows")

    def _recorded(self) -> list[Callable[[], object]]:
        steps = [partial(self._step_in_place, length) for length in range(self.pieces_max)]
        try:
            if self._pieces.device.type != "cuda":
                raise RuntimeError("the decoder is not on a GPU")
            pool = torch.cuda.graph_pool_handle()
            return [_recorded(step, pool) for step in steps]
        except RuntimeError as error:
            why = str(error).partition("\n")[0]
            warnings.warn(f"captions take several times as long: no CUDA graph could be recorded ({why})", stacklevel=2)
            return list(steps)

    def _step_in_place(self, length: int) -> None:
        self._logits.copy_(self._step(self._pieces, length))


def _recorded(step: Callable[[], None], pool: Any) -> Callable[[], object]:
    """What replays the step."""
    step()  # libraries prepare themselves for new shapes, which cannot be recorded
    graph = torch.cuda.CUDAGraph()
    # Other threads may load the next bundle meanwhile.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        step()
    return graph.replay
