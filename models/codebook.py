"""The codebook (paper §3.1): nearest-code look-up, quantisation that gradients pass through, and how codes learn.

Codes learn by the gradient of the commitment loss, or follow the tokens by exponential moving averages (van den Oord et al.
2017, appendix A.1); a code that no token chooses can be revived on a token of the batch (Dhariwal et al. 2020, Jukebox). With
gradients alone few codes stay in use: docs/stage1.md.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.distributed import rank, summed, world
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
    """K codes of width D. They learn by moving averages of the tokens that chose them, or by gradients.

    decay        of the moving averages
    commitment   weight of the pull between tokens and codes (β of VQ-VAE)
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
        indices = look_up(tokens.detach(), self.codes.detach())
        quantised = F.embedding(indices, self.codes)
        loss = self.commitment * symmetric_commitment_loss(tokens, quantised)
        return tokens + (quantised - tokens).detach(), indices, loss

    def learn_by(self, update: str) -> None:
        """ "gradient": the codes become a parameter, which the commitment loss pulls; "ema": they follow, as they start."""
        codes = self.codes.detach()
        del self.codes
        if update == "gradient":
            self.codes = nn.Parameter(codes)
        else:
            self.register_buffer("codes", codes)

    @torch.no_grad()
    def start_from(self, codes: Tensor) -> None:
        """Put the codes, and their moving averages, on `codes` (K, D)."""
        self.codes.copy_(codes)
        self.sums.copy_(codes)
        self.counts.fill_(1.0)

    @torch.no_grad()
    def follow(self, tokens: Tensor, indices: Tensor) -> None:
        """One step of the moving averages: every code towards the mean of the tokens that chose it, in all processes.

        Codes that learn by gradients are only counted, so that dead ones are known.
        """
        flat, chosen = tokens.reshape(-1, tokens.shape[-1]), indices.reshape(-1)
        counts = summed(torch.bincount(chosen, minlength=len(self.codes)).to(self.counts))
        self.counts.lerp_(counts, 1 - self.decay)
        if isinstance(self.codes, nn.Parameter):
            return
        sums = summed(torch.zeros_like(self.sums).index_add_(0, chosen, flat.to(self.sums)))
        self.sums.lerp_(sums, 1 - self.decay)
        smoothed = (self.counts + 1e-5) / (self.counts.sum() + 1e-5 * len(self.codes)) * self.counts.sum()
        self.codes.copy_(self.sums / smoothed.clamp(min=1e-5)[:, None])

    @torch.no_grad()
    def revive(self, tokens: Tensor, below: float, generator: torch.Generator) -> int:
        """Put every code with a moving count under `below` on a token of the batch of all processes; returns how many.

        generator  in the same state in every process: all draw the same places, and each gives the tokens that it has.
        """
        dead = (self.counts < below).nonzero().ravel()
        flat = tokens.reshape(-1, tokens.shape[-1]).to(self.sums)
        chosen = torch.randint(len(flat) * world(), (len(dead),), generator=generator) - rank() * len(flat)
        mine = ((chosen >= 0) & (chosen < len(flat))).to(flat.device)
        found = summed(flat[chosen.to(flat.device).clamp(0, len(flat) - 1)] * mine[:, None])
        self.codes[dead] = found
        self.sums[dead] = found
        self.counts[dead] = 1.0
        return len(dead)


def symmetric_commitment_loss(tokens: Tensor, quantised: Tensor) -> Tensor:
    """Both ways: tokens towards codes and codes towards tokens (paper §3.1; the second moves codes that learn by gradients)."""
    return F.mse_loss(tokens, quantised.detach()) + F.mse_loss(quantised, tokens.detach())
