"""One image of a package → the bytes that a crawl would hold: on white, at most 256 pixels, JPEG or PNG.

The smaller of the two encodings wins, so flat clip art becomes PNG and shaded pictures become JPEG.
"""

import io
import re
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

SIDE_MAX = 256
SIDE_MIN = 16  # as models.images: below that a picture is a dead letter
JPEG_QUALITY = 82
SVG_TAG = re.compile(r"<svg\b[^>]*>", re.DOTALL)
LENGTH = re.compile(r"""\b(width|height)\s*=\s*["']\s*([0-9.eE+]+)\s*(px|pt|pc|mm|cm|in)?\s*["']""")
PIXELS_PER_UNIT = {"px": 1.0, "pt": 4 / 3, "pc": 16.0, "mm": 96 / 25.4, "cm": 96 / 2.54, "in": 96.0}


def render(file: Path) -> tuple[bytes, str] | None:
    """(image bytes, "jpg" or "png") of one SVG or PNG; None where it cannot be drawn or shows nothing."""
    try:
        image = _from_svg(file) if file.suffix == ".svg" else _on_white(Image.open(file))
    except (ValueError, OSError):
        return None
    image.thumbnail((SIDE_MAX, SIDE_MAX), Image.Resampling.LANCZOS)
    if min(image.size) < SIDE_MIN or np.asarray(image, np.float32).std() < 2:
        return None
    return _smaller_encoding(image)


def thumbnail(image: bytes, side: int = 16) -> np.ndarray:
    """(side · side · 3,) float32: the picture in a few large pixels, to tell near-identical images."""
    small = Image.open(io.BytesIO(image)).convert("RGB").resize((side, side), Image.Resampling.BOX)
    return np.asarray(small, np.float32).ravel()


def _from_svg(file: Path) -> Image.Image:
    svg = file.read_text("utf-8", errors="replace")
    width, height = _target_size(svg)
    png = resvg_py.svg_to_bytes(
        svg_string=_with_view_box(svg),
        background="white",
        dpi=96.0,  # its default of 0 makes every size in points or millimetres an invalid one
        skip_system_fonts=True,  # the same bytes whatever fonts the machine has
        width=width,
        height=height,
    )
    return _on_white(Image.open(io.BytesIO(png)))


def _size(svg: str) -> tuple[float, float] | None:
    tag = SVG_TAG.search(svg)
    found = {
        name: float(v) * PIXELS_PER_UNIT[unit or "px"] for name, v, unit in LENGTH.findall(tag.group(0) if tag else "")
    }
    return (found["width"], found["height"]) if found.keys() >= {"width", "height"} else None


def _with_view_box(svg: str) -> str:
    """resvg refuses a picture whose size has a unit and that has no viewBox: state what the size implies."""
    tag = SVG_TAG.search(svg)
    size = _size(svg)
    if tag is None or size is None or "viewBox" in tag.group(0):
        return svg
    return svg.replace(tag.group(0), f'<svg viewBox="0 0 {size[0]} {size[1]}"' + tag.group(0)[4:], 1)


def _target_size(svg: str) -> tuple[int | None, int | None]:
    """(width, height) to draw at: twice the final size on the longer side, then scaled down once, which is sharper."""
    size = _size(svg)
    if size is None or min(size) <= 0:
        return 2 * SIDE_MAX, None
    return (2 * SIDE_MAX, None) if size[0] >= size[1] else (None, 2 * SIDE_MAX)


def _on_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def _smaller_encoding(image: Image.Image) -> tuple[bytes, str]:
    jpeg, png = io.BytesIO(), io.BytesIO()
    image.save(jpeg, "JPEG", quality=JPEG_QUALITY, optimize=True)
    image.save(png, "PNG", optimize=True)
    return (png.getvalue(), "png") if png.tell() <= jpeg.tell() else (jpeg.getvalue(), "jpg")
