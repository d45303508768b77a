"""The decoder one piece at a time: keys and values of what was said, and of what is seen, are kept.

The same network as `Decoder.logits`, from the same modules; only attention is written out, for a batch that all stands at
the same piece. Nothing waits for the device: on a GPU a step is a queue of kernels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.captioner import Decoder


class Steps:
    """A batch of captions on their way. `logits` takes the next piece of each, `keep` goes on with some of them."""

    def __init__(self, decoder: Decoder, tokens: Tensor, pieces_max: int, *, guided: bool) -> None:
        """tokens  (B, L, D) that the decoder is shown
        guided  a second half of the batch, row B + i for row i, is shown no image at all
        """
        self.guided = guided
        network: Any = decoder.bert
        self._network = network
        self._layers = list(network.bert.encoder.layer)
        self._heads: int = network.config.num_attention_heads
        seen, self._votes = decoder.see(tokens)
        self._blind_votes: Tensor | None = None
        self._seen = [self._keys_and_values(layer.crossattention.self, seen) for layer in self._layers]
        if guided:
            # All that see no image see the same, so one row of keys and values is enough for them.
            nothing, votes_of_nothing = decoder.see(torch.zeros_like(tokens[:1]))
            self._blind_votes = votes_of_nothing
            self._blind = [self._keys_and_values(layer.crossattention.self, nothing) for layer in self._layers]
        rows, width = len(tokens) * (1 + guided), seen.shape[-1]
        said = (len(self._layers), 2, rows, self._heads, pieces_max, width // self._heads)
        self._said = seen.new_empty(said)
        self.length = 0

    def logits(self, pieces: Tensor) -> Tensor:
        """(R, V) of what follows `pieces` (R,), which follow those of the calls before; R = B, guided 2 B."""
        hidden = self._network.bert.embeddings(input_ids=pieces[:, None], past_key_values_length=self.length)
        self.length += 1
        for number, layer in enumerate(self._layers):
            hidden = layer.attention.output(self._of_said(number, layer.attention.self, hidden), hidden)
            hidden = layer.crossattention.output(self._of_seen(number, layer.crossattention.self, hidden), hidden)
            hidden = layer.feed_forward_chunk(hidden)
        logits: Tensor = self._network.cls(hidden)[:, 0].float()
        if self._votes is None:
            return logits
        if not self.guided or self._blind_votes is None:
            return logits + self._votes
        return logits + torch.cat([self._votes, self._blind_votes.expand_as(self._votes)])

    def keep(self, rows: Tensor) -> None:
        """Goes on with these of the B rows, in this order; a row may come twice."""
        here = torch.cat([rows, rows + len(self._seen[0][0])]) if self.guided else rows
        self._said = self._said[:, :, here]
        # One after the other, since these are what takes memory.
        for number, (keys, values) in enumerate(self._seen):
            self._seen[number] = keys[rows], values[rows]
        self._votes = None if self._votes is None else self._votes[rows]

    def _of_said(self, number: int, attention: Any, hidden: Tensor) -> Tensor:
        keys, values = self._said[number]
        new_keys, new_values = self._keys_and_values(attention, hidden)
        keys[:, :, self.length - 1 : self.length], values[:, :, self.length - 1 : self.length] = new_keys, new_values
        query = self._by_heads(attention.query(hidden))
        context = F.scaled_dot_product_attention(query, keys[:, :, : self.length], values[:, :, : self.length])
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

    def _keys_and_values(self, attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self._by_heads(attention.key(hidden)), self._by_heads(attention.value(hidden))

    def _by_heads(self, columns: Tensor) -> Tensor:
        """(B, T, width) → (B, H, T, d)."""
        return columns.view(*columns.shape[:2], self._heads, -1).transpose(1, 2)
