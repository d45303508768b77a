"""Augmentation of training images as in the paper (§4): RandAugment without colour inversion, a random crop, mirroring.

RandAugment (Cubuk et al. 2020) draws OPERATIONS times one of its policies at one magnitude. Left out are Invert and
Solarize, which inverts what is bright: "the crucial role that color information plays". Every draw comes from the caller.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from models.model import Pixels

OPERATIONS = 2
MAGNITUDE = 0.5  # of 1; the two are what BLIP and its descendants train with (2 and 5 of 10)
GREY = (127, 127, 127)  # of what a shift or a turn uncovers
CROP_AREA = (0.5, 1.0)  # share of the image that a crop shows
CROP_ASPECT = (3 / 4, 4 / 3)

Policy = Callable[[Image.Image, float], Image.Image]  # (image, signed magnitude in [-1, 1])


def _affine(a: float, b: float, c: float, d: float) -> Callable[[Image.Image, float], Image.Image]:
    """x shifted by `a` of the width and sheared by `b`, y shifted by `c` of the height and sheared by `d`."""

    def apply(image: Image.Image, m: float) -> Image.Image:
        matrix = (1, b * m, a * m * image.width, d * m, 1, c * m * image.height)
        return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=GREY)

    return apply


def _enhanced(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Policy:
    return lambda image, m: kind(image).enhance(1 + 0.9 * m)


POLICIES: dict[str, Policy] = {
    "identity": lambda image, _: image,
    "auto-contrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
    "rotate": lambda image, m: image.rotate(30 * m, Image.Resampling.BILINEAR, fillcolor=GREY),
    "posterize": lambda image, m: ImageOps.posterize(image, 8 - round(4 * abs(m))),
    "color": _enhanced(ImageEnhance.Color),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "shear-x": _affine(0, 0.3, 0, 0),
    "shear-y": _affine(0, 0, 0, 0.3),
    "translate-x": _affine(0.45, 0, 0, 0),
    "translate-y": _affine(0, 0, 0.45, 0),
}


def augmented(pixels: Pixels, side: int, rng: np.random.Generator) -> Pixels:
    """A crop of (S, S, 3) `pixels` at side × side, mirrored half of the time, with OPERATIONS random policies."""
    box = _crop(pixels.shape[0], pixels.shape[1], rng)
    image = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC, box)
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    for name in rng.choice(list(POLICIES), OPERATIONS):
        image = POLICIES[name](image, MAGNITUDE * rng.choice([-1.0, 1.0]))
    return np.asarray(image, np.uint8)


def _crop(height: int, width: int, rng: np.random.Generator) -> tuple[float, float, float, float]:
    area = height * width * rng.uniform(*CROP_AREA)
    aspect = np.exp(rng.uniform(*np.log(CROP_ASPECT)))
    w, h = min(width, float(np.sqrt(area * aspect))), min(height, float(np.sqrt(area / aspect)))
    left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
    return (left, top, left + w, top + h)
