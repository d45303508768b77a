"""The codebook-based captioner (paper §3.1): image encoder → codebook → BERT decoder over the quantised tokens.

Three architectures of one shape: "paper" (ViT-B/16, K = 3000, BERT-base), "authors" (what their published code does instead)
and "tiny" (EfficientNet-lite0's last feature map and a decoder that two cores can train).
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BlipVisionConfig,
    BlipVisionModel,
    ViTConfig,
    ViTModel,
)  # fmt: skip

from models.codebook import Codebook
from models.errors import ShapeError
from models.lite_encoder import SIDE, TOKENS, WIDTH, LiteEncoder
from models.vocabulary import PAD, START, STOP

# (mean, standard deviation) of red, green and blue in [0, 255], as the published checkpoints of each kind were trained
PIXEL_SCALES = {
    "vit": ((127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
    "blip": ((122.7709, 116.7460, 104.0937), (68.5005, 66.6322, 70.3232)),  # those of CLIP
}


@dataclass(frozen=True)
class CaptionerConfig:
    """Every size of a captioner. Defaults are the paper's."""

    encoder: str = "vit"  # or "blip", the vision tower of a BLIP, or "lite"
    encoder_frozen: bool = False
    class_token: bool = False  # kept as a token among the others, as the authors' code does
    side: int = 224
    tokens: int = 196  # follows from side, patch and class token: `sized`
    feature_width: int = 768
    code_width: int = 768
    codes: int = 3000
    conditioned_on: str = (
        "codes"  # what the decoder sees; "image": the tokens before the look-up, as in the authors' code
    )
    decoder_layers: int = 12
    decoder_width: int = 768
    decoder_heads: int = 12
    vocabulary: int = 30522
    caption_pieces_max: int = 30
    guidance: float = (
        1.0  # of captions: 1 is the plain decoder, more leans to what the image adds (models/captioning.py)
    )
    dropout: float = 0.1
    word_shortcut: bool = False  # the mean token also votes for words directly: eases learning from few pairs
    vit_layers: int = 12
    vit_heads: int = 12
    vit_patch: int = 16

    def as_dict(self) -> dict[str, object]:
        """For a manifest."""
        return asdict(self)


PAPER = CaptionerConfig()
AUTHORS = replace(PAPER, encoder="blip", class_token=True, tokens=197, codes=1024, conditioned_on="image")
TINY = CaptionerConfig(
    encoder="lite", encoder_frozen=True, side=SIDE, tokens=TOKENS, feature_width=WIDTH, code_width=64, codes=1000,
    decoder_layers=3, decoder_width=192, decoder_heads=4, caption_pieces_max=20,
    guidance=3.0, word_shortcut=True,
)  # fmt: skip
ARCHITECTURES = {"paper": PAPER, "authors": AUTHORS, "tiny": TINY}


def sized(config: CaptionerConfig, **changes: Any) -> CaptionerConfig:
    """`config` with these fields changed, and as many tokens as follow from them. Raises ShapeError for an impossible size."""
    changed = replace(config, **changes)
    if changed.encoder not in ("vit", "blip", "lite"):
        raise ShapeError(f'encoder "{changed.encoder}" is unknown; this version has "vit", "blip" and "lite"')
    if changed.conditioned_on not in ("codes", "image"):
        raise ShapeError(f'conditioned_on is "codes" (paper) or "image" (authors), not "{changed.conditioned_on}"')
    for width, heads in (("feature_width", "vit_heads"), ("decoder_width", "decoder_heads")):
        if (changed.encoder != "lite" or heads != "vit_heads") and getattr(changed, width) % getattr(changed, heads):
            raise ShapeError(f"{width}={getattr(changed, width)} is no multiple of {heads}={getattr(changed, heads)}")
    if changed.encoder == "lite":
        return changed
    if changed.side % changed.vit_patch:
        raise ShapeError(f"side={changed.side} is no multiple of vit_patch={changed.vit_patch}")
    return replace(changed, tokens=(changed.side // changed.vit_patch) ** 2 + changed.class_token)


class VitEncoder(nn.Module):
    """A vision transformer through transformers: ViT, or the vision tower of a BLIP. The class token is dropped."""

    def __init__(self, config: CaptionerConfig) -> None:
        super().__init__()
        sizes: dict[str, Any] = {
            "hidden_size": config.feature_width,
            "intermediate_size": 4 * config.feature_width,
            "num_hidden_layers": config.vit_layers,
            "num_attention_heads": config.vit_heads,
            "image_size": config.side,
            "patch_size": config.vit_patch,
        }
        self.vit: nn.Module = (
            BlipVisionModel(BlipVisionConfig(**sizes, initializer_range=0.02))  # its own default, 1e-10, learns nothing
            if config.encoder == "blip"
            else ViTModel(ViTConfig(**sizes), add_pooling_layer=False)
        )
        self.first = 0 if config.class_token else 1
        mean, std = PIXEL_SCALES[config.encoder]
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) float in [0, 255] → (B, L, F)."""
        hidden: Tensor = self.vit(pixel_values=(pixels - self.mean) / self.std).last_hidden_state
        return hidden[:, self.first :]


class Quantiser(nn.Module):
    """Features of the encoder → tokens in the space of the codes → codes. All that decides an index vector."""

    def __init__(self, config: CaptionerConfig) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(config.feature_width))
        self.register_buffer("std", torch.ones(config.feature_width))
        self.project = nn.Linear(config.feature_width, config.code_width)
        self.codebook = Codebook(F.layer_norm(torch.randn(config.codes, config.code_width), (config.code_width,)))

    def tokens(self, features: Tensor) -> Tensor:
        """(B, L, F) → (B, L, D), every token with mean 0 and variance 1, as the codes start."""
        projected = self.project((features - self.mean) / self.std)
        return F.layer_norm(projected, projected.shape[-1:])


class Decoder(nn.Module):
    """BERT as a language model that cross-attends to the quantised tokens and to nothing else of the image."""

    def __init__(self, config: CaptionerConfig) -> None:
        super().__init__()
        self.bridge = nn.Linear(config.code_width, config.decoder_width)
        self.places = nn.Parameter(torch.zeros(config.tokens, config.decoder_width))
        bert = BertConfig(
            vocab_size=config.vocabulary, hidden_size=config.decoder_width, num_hidden_layers=config.decoder_layers,
            num_attention_heads=config.decoder_heads, intermediate_size=4 * config.decoder_width,
            max_position_embeddings=config.caption_pieces_max + 2, type_vocab_size=1, is_decoder=True,
            add_cross_attention=True, pad_token_id=PAD, bos_token_id=START, eos_token_id=STOP,
            tie_word_embeddings=True, hidden_dropout_prob=config.dropout, attention_probs_dropout_prob=config.dropout,
        )  # fmt: skip
        self.bert = BertLMHeadModel(bert)
        self.topic = nn.Linear(config.code_width, config.decoder_width) if config.word_shortcut else None

    def see(self, quantised: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, L, D) → what the cross-attention reads, (B, L, width), and the votes for words, (B, V), if there are any.

        A code says what, its place says where.
        """
        quantised, votes = quantised.to(self.bridge.weight.dtype), None
        if self.topic is not None:
            votes = F.linear(self.topic(quantised.mean(1)), self.bert.bert.embeddings.word_embeddings.weight)
        return self.bridge(quantised) + self.places, votes

    def logits(self, inputs: Tensor, seen: tuple[Tensor, Tensor | None]) -> Tensor:
        """(B, T, V) for the pieces (B, T). One piece at a time: models/stepwise.py."""
        tokens, votes = seen
        out: Tensor = self.bert(
            input_ids=inputs, attention_mask=(inputs != PAD).long(), encoder_hidden_states=tokens, use_cache=False
        ).logits
        return out if votes is None else out + votes[:, None]

    def loss(self, quantised: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """Language-modelling loss (paper §3.1): mean over the pieces of `targets` that are not padding.

        inputs, targets  (B, T) int64; targets[:, t] follows inputs[:, : t + 1].
        """
        logits = self.logits(inputs, self.see(quantised))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PAD)


class Captioner(nn.Module):
    """Encoder, quantiser and decoder."""

    def __init__(self, config: CaptionerConfig) -> None:
        super().__init__()
        self.config = config = sized(config)
        self.encoder: nn.Module = LiteEncoder() if config.encoder == "lite" else VitEncoder(config)
        self.quantiser = Quantiser(config)
        self.decoder = Decoder(config)

    def losses(
        self, features: Tensor, inputs: Tensor, targets: Tensor, hidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(language-modelling loss, commitment loss, tokens, indices) of a batch of encoder features.

        hidden  (B,) bool: images that the decoder is not shown, so that it also learns what captions are like without one.
        """
        with torch.autocast(features.device.type, enabled=False):  # a code is chosen by small differences of large sums
            tokens = self.quantiser.tokens(features.float())
            quantised, indices, commitment = self.quantiser.codebook(tokens)
        shown = quantised if self.config.conditioned_on == "codes" else tokens
        if hidden is not None:
            shown = shown.masked_fill(hidden[:, None, None], 0.0)
        return self.decoder.loss(shown, inputs, targets), commitment, tokens, indices

    def checkpoint_activations(self) -> None:
        """Compute activations again in the backward pass instead of keeping them: a third more time, far less memory."""
        for network in (getattr(self.encoder, "vit", None), self.decoder.bert):
            if network is not None:
                network.gradient_checkpointing_enable({"use_reentrant": False})
