"""How many code indices and clusters change when the encoder computes in another batch shape or number format.

    python benchmarks/flip_rate.py --images 512

The stream always computes in one way; this is what a change of it would cost. Printed as a table in Markdown.
"""

import argparse
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from models.threads import set_thread_environment

set_thread_environment()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from models.bundle import read_files  # noqa: E402
from models.clustering import Clustering  # noqa: E402
from models.codebook import look_up  # noqa: E402
from models.device import choose_device  # noqa: E402
from models.encoding import PaddedEncoder  # noqa: E402
from models.images import decode  # noqa: E402
from models.loaded import CaptionerParts, LoadedModel  # noqa: E402
from models.model import Pixels  # noqa: E402

ROOT = Path(__file__).parents[1]


def pictures(count: int, side: int) -> list[Pixels]:
    """Decoded images of the sample corpus."""
    found: list[Pixels] = []
    for shard in sorted((ROOT / "corpus" / "sample").glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                file = tar.extractfile(member) if member.name.endswith((".jpg", ".png")) else None
                if file is not None and len(found) < count:
                    found.append(decode(file.read(), side))
    return found


@torch.inference_mode()
def by_torch(
    parts: CaptionerParts, images: list[Pixels], batch: int, dtype: torch.dtype, device: str = "cpu"
) -> NDArray[np.uint16]:
    """Index vectors by the module itself, `batch` images at a time, the encoder in `dtype` and the look-up in float32."""
    encoder, quantiser = parts.captioner.encoder.to(device, dtype), parts.captioner.quantiser.to(device)
    vectors = []
    for first in range(0, len(images), batch):
        pixels = torch.from_numpy(np.stack(images[first : first + batch])).permute(0, 3, 1, 2).to(device, dtype)
        vectors.append(look_up(quantiser.tokens(encoder(pixels).float()), quantiser.codebook.codes).cpu().numpy())
    parts.captioner.encoder.float()
    return np.concatenate(vectors).astype(np.uint16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=ROOT / "bundles" / "sample")
    parser.add_argument("--images", type=int, default=256)
    options = parser.parse_args()
    manifest, contents = read_files(options.bundle)
    images = pictures(options.images, int(manifest.data["config"]["side"]))
    clustering: Clustering = LoadedModel.of(manifest, contents, "cpu")._clustering

    def fresh() -> CaptionerParts:
        return CaptionerParts.of(manifest, contents)

    served = PaddedEncoder(fresh().captioner, torch.device("cpu")).vectors(images)
    ways: dict[str, Callable[[], NDArray[np.uint16]]] = {
        "as served, images in another order": lambda: PaddedEncoder(fresh().captioner, torch.device("cpu")).vectors(
            images[::-1]
        )[::-1],
        "torch, float32, one image a batch": lambda: by_torch(fresh(), images, 1, torch.float32),
        "torch, float32, 16 images a batch": lambda: by_torch(fresh(), images, 16, torch.float32),
        "torch, float32, 64 images a batch": lambda: by_torch(fresh(), images, 64, torch.float32),
        "torch, bfloat16, 16 images a batch": lambda: by_torch(fresh(), images, 16, torch.bfloat16),
    }
    if torch.cuda.is_available():
        gpu = torch.device("cuda")
        choose_device()  # no TF32
        ways |= {
            "as served by a GPU": lambda: PaddedEncoder(fresh().captioner, gpu).vectors(images),
            "as served by a GPU, images in another order": lambda: PaddedEncoder(fresh().captioner, gpu).vectors(
                images[::-1]
            )[::-1],
            "GPU, float32, 16 images a batch": lambda: by_torch(fresh(), images, 16, torch.float32, "cuda"),
            "GPU, bfloat16, 256 images a batch": lambda: by_torch(fresh(), images, 256, torch.bfloat16, "cuda"),
        }
    print(f"{len(images)} images against the index vectors as served (bundle {manifest.version[:16]}):\n")
    print("| computed by | codes that differ | images with one or more | clusters that differ |")
    print("|---|---|---|---|")
    assigned = clustering.assign(served)
    for name, way in ways.items():
        vectors = way()
        other = vectors != served
        moved = (clustering.assign(vectors) != assigned).mean()
        print(f"| {name} | {other.mean():.4%} | {other.any(1).mean():.2%} | {moved:.2%} |", flush=True)


if __name__ == "__main__":
    main()
