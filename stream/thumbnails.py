"""Image bytes → a small JPEG as a data URI, for the report. Decoding is the models' own path, which trusts no image."""

from __future__ import annotations

import base64
import io
from typing import NamedTuple

from PIL import Image

from models.errors import BadImage
from models.images import FORMATS, decode

SIDE = 128  # pixels of the longer side
JPEG_QUALITY = 72
# models.images gives squares; decoded larger than shown, they lose nothing when they get their own shape back.
DECODED_SIDE = 2 * SIDE


class Thumbnail(NamedTuple):
    """A picture of at most SIDE × SIDE pixels. uri  data:image/jpeg;base64,…"""

    uri: str
    width: int
    height: int


def thumbnail(image: bytes) -> Thumbnail | None:
    """A thumbnail of `image` in its own proportions; None for bytes that cannot be decoded."""
    try:
        square = Image.fromarray(decode(image, DECODED_SIDE))
        with Image.open(io.BytesIO(image), formats=FORMATS) as opened:  # reads the header only, which decode has judged
            width, height = opened.size
    except (BadImage, OSError):
        return None
    scale = min(1.0, SIDE / max(width, height))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    out = io.BytesIO()
    square.resize(size, Image.Resampling.LANCZOS).save(out, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return Thumbnail(f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}", *size)
