"""What becomes of every kind of image: which are pixels, which are dead letters, and for what reason."""

import contextlib
import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from models.errors import BadImage
from models.images import decode

SIDE = 64


def picture(width: int = 120, height: int = 90) -> Image.Image:
    """Smooth colours: every decoder agrees on them within a few grey levels."""
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.stack([x * 255 / width, y * 255 / height, 255 - x * 255 / width], -1)
    return Image.fromarray(rgb.astype(np.uint8))


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises pixels and has none."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))


def reason(image: bytes) -> str:
    with pytest.raises(BadImage) as caught:
        decode(image, SIDE)
    assert "\n" not in str(caught.value)
    return caught.value.reason


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_every_common_format_becomes_the_same_picture(form: str) -> None:
    expected = decode(encoded(picture(), "PNG"), SIDE).astype(int)

    pixels = decode(encoded(picture(), form), SIDE)

    assert pixels.shape == (SIDE, SIDE, 3) and pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    assert np.abs(pixels.astype(int) - expected).mean() < 8


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_counts(form: str) -> None:
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue", "blue")]

    pixels = decode(encoded(frames[0], form, save_all=True, append_images=frames[1:]), SIDE)

    assert pixels[..., 0].min() > 240 and pixels[..., 2].max() < 15


def test_cmyk_becomes_rgb() -> None:
    pixels = decode(encoded(Image.new("CMYK", (40, 40), (0, 255, 255, 0)), "JPEG"), SIDE)

    assert np.abs(pixels.reshape(-1, 3).mean(0) - (254, 0, 0)).max() < 12


def test_sixteen_bits_become_eight() -> None:
    grey = Image.fromarray(np.full((40, 40), 0x8080, np.uint16))

    assert set(np.unique(decode(encoded(grey, "PNG"), SIDE))) == {0x80}


def test_transparent_parts_are_white_whatever_colour_hides_there() -> None:
    palette = Image.new("P", (40, 40), 0)
    palette.putpalette([200, 0, 0] + [0] * 765)

    assert decode(encoded(Image.new("RGBA", (40, 40), (200, 0, 0, 0)), "PNG"), SIDE).min() == 255
    assert decode(encoded(Image.new("LA", (40, 40), (0, 0)), "PNG"), SIDE).min() == 255
    assert decode(encoded(palette, "PNG", transparency=0), SIDE).min() == 255


def test_a_palette_becomes_its_colours() -> None:
    palette = Image.new("P", (40, 40), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30] + [0] * 762)

    assert (decode(encoded(palette, "PNG"), SIDE) == (10, 200, 30)).all()


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.99])
def test_a_truncated_jpeg_is_refused_and_never_filled_with_grey(share: float, progressive: bool) -> None:
    whole = encoded(picture(400, 300), "JPEG", progressive=progressive)

    assert reason(whole[: int(len(whole) * share)]) == "truncated"


def test_a_jpeg_without_its_last_two_bytes_is_truncated() -> None:
    assert reason(encoded(picture(), "JPEG")[:-2]) == "truncated"
    assert reason(encoded(picture(), "JPEG")[:30]) == "truncated"


def test_a_truncated_cmyk_jpeg_and_a_truncated_png_are_refused() -> None:
    cmyk, png = encoded(picture(400, 300).convert("CMYK"), "JPEG"), encoded(picture(400, 300), "PNG")

    assert reason(cmyk[: len(cmyk) // 2]) == "truncated"
    assert reason(png[: len(png) // 2]) == "truncated"


def test_a_whole_jpeg_with_bytes_after_its_end_is_whole() -> None:
    image = encoded(picture(), "JPEG")

    assert (decode(image + b"comment", SIDE) == decode(image, SIDE)).all()


def test_a_header_of_50000_by_50000_pixels_is_refused_before_decoding() -> None:
    assert reason(png_header(50_000, 50_000)) == "too-large"
    assert reason(png_header(9_000, 9_000)) == "too-large"
    assert reason(png_header(900, 900)) == "truncated"


@pytest.mark.parametrize("size", [(15, 300), (300, 15), (1, 1)])
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_side_under_16_pixels_is_refused(size: tuple[int, int], form: str) -> None:
    assert reason(encoded(picture().resize(size), form)) == "too-small"


def test_a_side_of_16_pixels_is_enough() -> None:
    assert decode(encoded(picture(16, 16), "PNG"), SIDE).shape == (SIDE, SIDE, 3)


@pytest.mark.parametrize("image", [b"", b"<html>404</html>", b"%!PS-Adobe-3.0 EPSF-3.0\n", bytes(1000)])
def test_what_is_no_image_is_refused(image: bytes) -> None:
    assert reason(image) == "not-an-image"


def test_no_mangled_image_raises_anything_but_bad_image() -> None:
    rng = np.random.default_rng(7)
    for form in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"):
        whole = np.frombuffer(encoded(picture(), form), np.uint8)
        for _ in range(40):
            mangled = whole.copy()
            mangled[rng.integers(len(whole), size=8)] = rng.integers(256, size=8)
            with contextlib.suppress(BadImage):
                decode(mangled.tobytes(), SIDE)


def test_threads_decode_to_the_same_pixels() -> None:
    images = [encoded(picture(100 + i, 80), form) for i in range(10) for form in ("JPEG", "PNG", "GIF")]

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda i: decode(i, SIDE), images * 3))

    assert all((a == decode(b, SIDE)).all() for a, b in zip(together, images * 3, strict=True))
