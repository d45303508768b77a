"""What a sample costs K-Means: inertia over all rows of the corpora, above that of the fit to all of them.

    python benchmarks/kmeans_sample.py

Index vectors of the sample bundle, of every image of corpus/full (`make corpus`), else of corpus/sample. Printed as a table in
Markdown: for each form and number of sampled rows a cluster the worst of the seeds and numbers of clusters.
"""

import argparse
import sys
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from models.threads import set_thread_environment

set_thread_environment()

import numpy as np  # noqa: E402
import torch  # noqa: E402

from models.bundle import read_files  # noqa: E402
from models.clustering import FORMS, fit_measured  # noqa: E402
from models.encoding import PaddedEncoder  # noqa: E402
from models.images import decode  # noqa: E402
from models.loaded import CaptionerParts  # noqa: E402
from models.model import Vectors  # noqa: E402

ROOT = Path(__file__).parents[1]
IMAGES_AT_ONCE = 256


def images() -> Iterator[bytes]:
    """Of the full corpora, or of the sample."""
    full = sorted((ROOT / "corpus" / "full").glob("noisy-*.tar")) + sorted(
        (ROOT / "corpus" / "full").glob("clean-*.tar")
    )
    for shard in full or sorted((ROOT / "corpus" / "sample").glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                file = tar.extractfile(member) if member.name.endswith((".jpg", ".png")) else None
                if file is not None:
                    yield file.read()


def encoded(parts: CaptionerParts) -> Vectors:
    """(n, L) index vectors."""
    encoder, remaining, vectors = PaddedEncoder(parts.captioner, torch.device("cpu")), images(), []
    with ThreadPoolExecutor(2) as pool:
        while some := list(islice(remaining, IMAGES_AT_ONCE)):
            vectors.append(encoder.vectors(list(pool.map(lambda image: decode(image, encoder.side), some))))
    return np.concatenate(vectors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=ROOT / "bundles" / "sample")
    parser.add_argument("--clusters", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 64, 96, 128, 192, 256], help="sampled, a cluster")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    manifest, contents = read_files(options.bundle)
    parts = CaptionerParts.of(manifest, contents)
    codes, vectors = parts.captioner.quantiser.codebook.codes.numpy(), encoded(parts)
    print(
        f"{len(vectors):,} images (bundle {manifest.version[:16]}), N = {', '.join(map(str, options.clusters))}, "
        f"{options.seeds} seeds each; the worst, and the mean:\n"
    )
    print("| form | " + " | ".join(f"{rows} rows a cluster" for rows in options.rows) + " |")
    print("|---|" + "---|" * len(options.rows))
    for form in FORMS:
        above: dict[int, list[float]] = {rows: [] for rows in options.rows}
        for clusters in options.clusters:
            for seed in range(options.seeds):
                whole = fit_measured(vectors, codes, clusters, form, seed, rows_max=len(vectors)).inertia
                for rows in options.rows:
                    sampled = fit_measured(vectors, codes, clusters, form, seed, rows_max=rows * clusters).inertia
                    above[rows].append(sampled / whole - 1)
        cells = [f"{max(above[rows]):.1%}, {np.mean(above[rows]):.1%}" for rows in options.rows]
        print(f"| {form} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
