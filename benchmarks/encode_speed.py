"""How many JPEGs a second become index vectors, end to end: bytes → pixels → features → code indices.

python benchmarks/encode_speed.py --bundle bundles/sample --threads 2
"""

import argparse
import os
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from models.threads import set_thread_environment

set_thread_environment()

import torch  # noqa: E402

from models.bundle import load_model  # noqa: E402
from models.model import PairModel  # noqa: E402

ROOT = Path(__file__).parents[1]
IMAGES_AT_ONCE = 256  # as a worker takes them


def jpegs(count: int) -> list[bytes]:
    """JPEGs of the sample corpus."""
    found: list[bytes] = []
    for shard in sorted((ROOT / "corpus" / "sample").glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                file = tar.extractfile(member) if member.name.endswith(".jpg") else None
                found += [file.read()] if file else []
    return (found * (count // len(found) + 1))[:count]


def images_per_second(model: PairModel, images: list[bytes], threads: int) -> tuple[float, float]:
    """One pass over `images`, decoded by as many threads as encode: per second on the wall, and of processor time."""
    with ThreadPoolExecutor(threads) as pool:
        started, used = time.perf_counter(), time.process_time()
        for first in range(0, len(images), IMAGES_AT_ONCE):
            model.encode(list(pool.map(model.decode, images[first : first + IMAGES_AT_ONCE])))
        return len(images) / (time.perf_counter() - started), len(images) / (time.process_time() - used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=ROOT / "bundles" / "sample")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--passes", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load_model(options.bundle, "cpu")
    images = jpegs(options.images)
    model.encode([model.decode(i) for i in images[:32]])
    passes = [images_per_second(model, images, options.threads) for _ in range(options.passes)]
    walls, processors = (sorted(rates) for rates in zip(*passes, strict=True))
    print(
        f"{len(images)} JPEGs of {sum(map(len, images)) / len(images) / 1000:.0f} kB on average, {options.threads} threads: "
        f"median {walls[len(walls) // 2]:.0f} images/s of {options.passes} passes ({walls[0]:.0f} to {walls[-1]:.0f}), "
        f"{processors[len(processors) // 2]:.0f} a second of processor time (load {os.getloadavg()[0]:.1f})"
    )


if __name__ == "__main__":
    main()
