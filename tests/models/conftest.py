"""A tiny captioner for the tests of this folder, trained on eight pictures in seconds."""

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from models.captioner import TINY, Captioner
from models.codebook import look_up
from models.matching import MatchingHead
from models.vocabulary import PAD, START, STOP, Vocabulary, of_pieces

CAPTIONS = [
    "a red circle", "a blue circle", "a green square", "a red square", "a blue triangle", "a green triangle",
    "black stripes on white", "a yellow cross",
]  # fmt: skip


def drawing(number: int, side: int = 224) -> np.ndarray:
    """The picture of CAPTIONS[number]."""
    image = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(image)
    words = CAPTIONS[number].split()
    box = (side // 5, side // 5, side * 4 // 5, side * 4 // 5)
    if words[-1] == "circle":
        draw.ellipse(box, fill=words[1])
    elif words[-1] == "square":
        draw.rectangle(box, fill=words[1])
    elif words[-1] == "triangle":
        draw.polygon([(side // 2, 20), (20, side - 20), (side - 20, side - 20)], fill=words[1])
    elif words[-1] == "cross":
        draw.line((20, 20, side - 20, side - 20), fill="yellow", width=30)
        draw.line((20, side - 20, side - 20, 20), fill="yellow", width=30)
    else:
        for x in range(0, side, 32):
            draw.rectangle((x, 0, x + 16, side), fill="black")
    return np.asarray(image)


def jpeg(number: int) -> bytes:
    """The same as an image file."""
    out = io.BytesIO()
    Image.fromarray(drawing(number)).save(out, "JPEG", quality=95)
    return out.getvalue()


@dataclass
class Small:
    """What the tests need of a trained model."""

    captioner: Captioner
    vocabulary: Vocabulary
    matching: MatchingHead
    vectors: np.ndarray
    losses: list[float]


@pytest.fixture(scope="session")
def small() -> Iterator[Small]:
    """Overfitted to the eight drawings: random frozen encoder, real quantiser and decoder."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    vocabulary = of_pieces(sorted({w for c in CAPTIONS for w in c.split()}))
    config = replace(
        TINY, codes=64, code_width=16, decoder_layers=1, decoder_width=48, decoder_heads=2,
        vocabulary=len(vocabulary), caption_pieces_max=8,
    )  # fmt: skip
    captioner = Captioner(config)
    for parameter in captioner.encoder.parameters():  # wide enough that the signal survives seventeen random layers
        if parameter.ndim > 1:
            torch.nn.init.kaiming_normal_(parameter)
    pixels = torch.from_numpy(np.stack([drawing(i) for i in range(8)])).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        features = captioner.encoder(pixels)
    captioner.quantiser.mean.copy_(features.mean((0, 1)))
    captioner.quantiser.std.copy_(features.std((0, 1)) + 1e-3)
    rows = vocabulary.encode(CAPTIONS, 8)
    longest = max(map(len, rows)) + 1
    inputs = torch.tensor([[START, *r] + [PAD] * (longest - 1 - len(r)) for r in rows])
    targets = torch.tensor([[*r, STOP] + [PAD] * (longest - 1 - len(r)) for r in rows])
    learning = [p for n, p in captioner.named_parameters() if not n.startswith("encoder")]
    optimiser = torch.optim.AdamW(learning, lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    captioner.decoder.train()
    losses = []
    for step in range(150):
        language, commitment, tokens, indices = captioner.losses(features, inputs, targets)
        optimiser.zero_grad()
        (language + commitment).backward()
        optimiser.step()
        if step < 100:
            captioner.quantiser.codebook.follow(tokens.detach(), indices)
        if step < 50:
            captioner.quantiser.codebook.revive(tokens.detach(), 0.05, generator)
        losses.append(float(language.detach()))
    captioner.eval()
    with torch.no_grad():
        vectors = look_up(captioner.quantiser.tokens(features), captioner.quantiser.codebook.codes)
    matching = MatchingHead(config.codes, config.code_width, len(vocabulary)).eval()
    yield Small(captioner, vocabulary, matching, vectors.numpy().astype(np.uint16), losses)
    torch.set_num_threads(before)
