"""The codebook-based captioner (paper §3.1): image encoder → codebook → BERT decoder over the quantised tokens.

Two architectures of one shape: "paper" (ViT-B/16, K = 3000, BERT-base) and "tiny" (EfficientNet-lite0's last feature map
and a decoder that two cores can train). What is not named in `CaptionerConfig` is the same for both.
"""

from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertLMHeadModel, EncoderDecoderCache, ViTConfig, ViTModel

from models.codebook import Codebook
from models.errors import ShapeError
from models.lite_encoder import SIDE, TOKENS, WIDTH, LiteEncoder
from models.vocabulary import PAD, START, STOP

IMAGENET_MEAN_GREY, IMAGENET_STD_GREY = 127.5, 127.5  # ViT's own preprocessing: [0, 255] → [-1, 1]


@dataclass(frozen=True)
class CaptionerConfig:
    """Every size of a captioner. Defaults are the paper's."""

    encoder: str = "vit"  # or "lite"
    encoder_frozen: bool = False
    side: int = 224
    tokens: int = 196
    feature_width: int = 768
    code_width: int = 768
    codes: int = 3000
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
TINY = CaptionerConfig(
    encoder="lite", encoder_frozen=True, side=SIDE, tokens=TOKENS, feature_width=WIDTH, code_width=64, codes=1000,
    decoder_layers=3, decoder_width=192, decoder_heads=4, caption_pieces_max=20,
    guidance=3.0, word_shortcut=True,
)  # fmt: skip
ARCHITECTURES = {"paper": PAPER, "tiny": TINY}


class VitEncoder(nn.Module):
    """ViT through transformers, the class token dropped."""

    def __init__(self, config: CaptionerConfig) -> None:
        super().__init__()
        self.vit = ViTModel(
            ViTConfig(
                hidden_size=config.feature_width, num_hidden_layers=config.vit_layers, num_attention_heads=config.vit_heads,
                intermediate_size=4 * config.feature_width, image_size=config.side, patch_size=config.vit_patch,
            ),
            add_pooling_layer=False,
        )  # fmt: skip

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) float in [0, 255] → (B, L, F)."""
        scaled = (pixels - IMAGENET_MEAN_GREY) / IMAGENET_STD_GREY
        out: Tensor = self.vit(pixel_values=scaled).last_hidden_state[:, 1:]
        return out


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
        votes = None
        if self.topic is not None:
            votes = F.linear(self.topic(quantised.mean(1)), self.bert.bert.embeddings.word_embeddings.weight)
        return self.bridge(quantised) + self.places, votes

    def logits(
        self, inputs: Tensor, seen: tuple[Tensor, Tensor | None], cache: EncoderDecoderCache | None = None
    ) -> Tensor:
        """(B, T, V) for the pieces (B, T) after what `cache` holds already."""
        tokens, votes = seen
        mask = (inputs != PAD).long() if cache is None else None
        out: Tensor = self.bert(
            input_ids=inputs, attention_mask=mask, encoder_hidden_states=tokens, past_key_values=cache,
            use_cache=cache is not None,
        ).logits  # fmt: skip
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
        if config.encoder not in ("vit", "lite"):
            raise ShapeError(f'encoder "{config.encoder}" is unknown; this version has "vit" and "lite"')
        self.config = config
        self.encoder: nn.Module = LiteEncoder() if config.encoder == "lite" else VitEncoder(config)
        self.quantiser = Quantiser(config)
        self.decoder = Decoder(config)

    def losses(
        self, features: Tensor, inputs: Tensor, targets: Tensor, hidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(language-modelling loss, commitment loss, tokens, indices) of a batch of encoder features.

        hidden  (B,) bool: images that the decoder is not shown, so that it also learns what captions are like without one.
        """
        tokens = self.quantiser.tokens(features)
        quantised, indices, commitment = self.quantiser.codebook(tokens)
        shown = quantised if hidden is None else quantised.masked_fill(hidden[:, None, None], 0.0)
        return self.decoder.loss(shown, inputs, targets), commitment, tokens, indices


def sized(config: CaptionerConfig, *, vocabulary: int, codes: int | None = None) -> CaptionerConfig:
    """`config` for a vocabulary of that many pieces, and that many codes."""
    return replace(config, vocabulary=vocabulary, codes=codes or config.codes)
