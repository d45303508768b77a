"""How many JPEGs a second one core decodes to the encoder's size, by a process's own time.

    python benchmarks/decode_speed.py

Noisy synthetic pictures at quality 90, which are larger and slower than most photographs of their size.
"""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from models.images import decode

SIDE = 224
PICTURES = 40
PASSES = 10


def jpeg(width: int, height: int, dice: np.random.Generator) -> bytes:
    coarse = dice.integers(0, 255, (height // 16, width // 16, 3), dtype=np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.int16)
    noisy = np.clip(smooth + dice.normal(0, 9, smooth.shape), 0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(noisy).save(out, "JPEG", quality=90)
    return out.getvalue()


def main() -> None:
    dice = np.random.default_rng(0)
    for width, height in ((512, 384), (1024, 768)):
        pictures = [jpeg(width, height, dice) for _ in range(PICTURES)]
        began = time.process_time()
        for _ in range(PASSES):
            for picture in pictures:
                decode(picture, SIDE)
        took = time.process_time() - began
        size = sum(map(len, pictures)) / PICTURES / 1000
        print(f"{width} x {height}, {size:.0f} kB: {PASSES * PICTURES / took:,.0f} images per CPU second")


if __name__ == "__main__":
    main()
