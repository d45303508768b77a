"""Image bytes → S×S RGB pixels: the one path that training and serving share, since decoders differ by grey levels.

Everything here is untrusted. The header is judged before a pixel is decoded, only formats that decode inside this
process are opened (Pillow's EPS runs Ghostscript), and whatever a decoder throws becomes a BadImage with a reason.
Orientation in EXIF is ignored, as in the crawls that img2dataset writes.
"""

import io
import struct

import cv2
import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from models.errors import BadImage, Reason
from models.model import Pixels

PIXELS_MAX = 64_000_000  # 192 MB decoded; Pillow itself starts to warn of bombs at 89 million
SIDE_MIN = 16
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF")
JPEG_START = b"\xff\xd8\xff"
PNG_START = b"\x89PNG\r\n\x1a\n"
STARTS = (JPEG_START, PNG_START, b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
# libjpeg's warnings that leave the picture whole. All others mean that part of it is missing and was filled with grey.
HARMLESS_WARNINGS = ("extraneous bytes before marker", "unknown Adobe color transform")


def decode(image: bytes | memoryview, side: int) -> Pixels:
    """The first frame of `image` as (side, side, 3) uint8 RGB; transparent parts are white. Thread safe.

    Raises BadImage with the reason "not-an-image", "too-large", "too-small", "truncated" or "corrupt".
    """
    image = bytes(image)
    pixels = _decode_jpeg(image, side) if image.startswith(JPEG_START) else None
    if pixels is None:
        pixels = _decode_with_pillow(image)
    return _resize(pixels, side)


def _decode_jpeg(image: bytes, side: int) -> Pixels | None:
    """By libjpeg-turbo, already reduced to the smallest size that is not under `side`; None for CMYK, which it refuses."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(image)
    except ValueError as error:
        if b"\xff\xd9" not in image:  # no end of image anywhere: cut off before its size was told
            raise BadImage(Reason.TRUNCATED, f"{len(image)} bytes of a JPEG without its size") from error
        raise _unreadable(image, str(error)) from error
    _check_size(width, height)
    if colours in ("CMYK", "YCCK"):
        return None
    try:
        return _turbo(image, side, strict=True)
    except ValueError as error:
        if not any(harmless in str(error) for harmless in HARMLESS_WARNINGS):
            raise _unreadable(image, str(error)) from error
    try:
        return _turbo(image, side, strict=False)
    except ValueError as error:
        raise _unreadable(image, str(error)) from error


def _turbo(image: bytes, side: int, *, strict: bool) -> Pixels:
    pixels: Pixels = simplejpeg.decode_jpeg(
        image, "RGB", fastdct=False, fastupsample=False, min_height=side, min_width=side, min_factor=1, strict=strict
    )
    return pixels


def _decode_with_pillow(image: bytes) -> Pixels:
    if image.startswith(PNG_START) and len(image) >= 24:  # Pillow opens a PNG only when pixel data follows the header
        _check_size(*struct.unpack(">II", image[16:24]))
    try:
        with Image.open(io.BytesIO(image), formats=FORMATS) as opened:
            _check_size(*opened.size)
            return np.asarray(_rgb_on_white(opened))
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(Reason.TOO_LARGE, f"{error}") from error
    except UnidentifiedImageError as error:
        if image.startswith(STARTS):
            raise BadImage(
                Reason.TRUNCATED, f"{len(image)} bytes that begin like an image and end before it does"
            ) from error
        raise BadImage(Reason.NOT_AN_IMAGE, f"no known image format in {len(image)} bytes") from error
    except Exception as error:  # no decoder promises what it throws at bytes made to break it
        raise _unreadable(image, f"{type(error).__name__}: {error}") from error


def _rgb_on_white(image: Image.Image) -> Image.Image:
    """Eight-bit RGB, whatever the mode."""
    if image.mode in ("I;16", "I;16L", "I;16B", "I;16N", "I"):
        wide = np.asarray(image).astype(np.int64)  # 16-bit grey; convert("L") would clip it to white
        return Image.fromarray((wide >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _check_size(width: int, height: int) -> None:
    if width * height > PIXELS_MAX:
        raise BadImage(Reason.TOO_LARGE, f"{width} × {height} pixels; at most {PIXELS_MAX:,} are decoded")
    if min(width, height) < SIDE_MIN:
        raise BadImage(Reason.TOO_SMALL, f"{width} × {height} pixels; a side has at least {SIDE_MIN}")


def _unreadable(image: bytes, said: str) -> BadImage:
    """Truncated where the decoder says that data ends early, corrupt otherwise."""
    words = said.lower()
    early = ("premature", "truncated", "unexpected end", "end of file", "not enough", "bad header", "eof")
    reason = Reason.TRUNCATED if any(word in words for word in early) else Reason.CORRUPT
    return BadImage(reason, f"{len(image)} bytes cannot be decoded: {' '.join(said.split())[:200]}")


def _resize(pixels: Pixels, side: int) -> Pixels:
    """To side × side, the aspect ratio given up as captioners do; averages areas when shrinking, so nothing aliases."""
    if pixels.shape[:2] == (side, side):
        return np.ascontiguousarray(pixels)
    shrinking = pixels.shape[0] >= side and pixels.shape[1] >= side
    resized = cv2.resize(pixels, (side, side), interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR)
    return np.asarray(resized, np.uint8)
