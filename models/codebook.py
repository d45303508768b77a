"""The codebook (paper §3.1): nearest-code look-up, quantisation that gradients pass through, and how codes learn.

Codes follow the tokens by exponential moving averages (van den Oord et al. 2017, appendix A.1), and a code that no token
chooses is revived on a token of the batch (Dhariwal et al. 2020, Jukebox): with gradients alone few codes stay in use.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import ShapeError


def look_up(tokens: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code of every image token (paper §3.1).

    tokens    (B, L, D) float, the class token already dropped; codebook (K, D).
    Returns   (B, L) int64 in [0, K). Equal distances go to the lower index, so that a replay agrees.
    Raises    ShapeError where D differs: bundle and encoder do not belong together.
    """
    if tokens.shape[-1] != codebook.shape[-1]:
        raise ShapeError(f"tokens have width {tokens.shape[-1]}, the codebook {codebook.shape[-1]}: not of one bundle")
    # |x - c|² without |x|², which is the same for every code. argmin returns the first of equal minima.
    distances = (codebook * codebook).sum(-1) - 2 * tokens @ codebook.T
    return distances.argmin(-1)


@dataclass(frozen=True)
class Usage:
    """How evenly the codes are used: how many at all, and the exponential of the entropy."""

    used: int
    perplexity: float


def usage(counts: Tensor) -> Usage:
    """counts  (K,) how often each code was chosen."""
    share = counts.double() / counts.sum().clamp(min=1)
    entropy = -(share * share.clamp(min=1e-12).log()).sum()
    return Usage(int((counts > 0).sum()), float(entropy.exp()))


class Codebook(nn.Module):
    """K codes of width D, learnt by moving averages of the tokens that chose them.

    decay        of the moving averages
    commitment   weight of the pull of tokens towards their codes (β of VQ-VAE)
    """

    def __init__(self, codes: Tensor, decay: float = 0.97, commitment: float = 0.25) -> None:
        super().__init__()
        self.codes: Tensor
        self.counts: Tensor
        self.sums: Tensor
        self.register_buffer("codes", codes.clone())
        self.register_buffer("counts", torch.ones(len(codes)), persistent=False)
        self.register_buffer("sums", codes.clone(), persistent=False)
        self.decay = decay
        self.commitment = commitment

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantised tokens (B, L, D) with the tokens' gradient, indices (B, L), loss."""
        indices = look_up(tokens.detach(), self.codes)
        quantised = F.embedding(indices, self.codes)
        loss = self.commitment * symmetric_commitment_loss(tokens, quantised)
        return tokens + (quantised - tokens).detach(), indices, loss

    @torch.no_grad()
    def follow(self, tokens: Tensor, indices: Tensor) -> None:
        """One step of the moving averages: every code towards the mean of the tokens that chose it."""
        flat, chosen = tokens.reshape(-1, tokens.shape[-1]), indices.reshape(-1)
        counts = torch.bincount(chosen, minlength=len(self.codes)).to(self.counts)
        sums = torch.zeros_like(self.sums).index_add_(0, chosen, flat.to(self.sums))
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        smoothed = (self.counts + 1e-5) / (self.counts.sum() + 1e-5 * len(self.codes)) * self.counts.sum()
        self.codes.copy_(self.sums / smoothed.clamp(min=1e-5)[:, None])

    @torch.no_grad()
    def revive(self, tokens: Tensor, below: float, generator: torch.Generator) -> int:
        """Put every code with a moving count under `below` on a token of the batch; returns how many."""
        dead = (self.counts < below).nonzero().ravel()
        flat = tokens.reshape(-1, tokens.shape[-1])
        chosen = torch.randint(len(flat), (len(dead),), generator=generator)
        self.codes[dead] = flat[chosen]
        self.sums[dead] = flat[chosen]
        self.counts[dead] = 1.0
        return len(dead)


def symmetric_commitment_loss(tokens: Tensor, quantised: Tensor) -> Tensor:
    """Both ways: tokens towards codes and codes towards tokens (paper §3.1; the second is 0 where codes do not learn)."""
    return F.mse_loss(tokens, quantised.detach()) + F.mse_loss(quantised, tokens.detach())
