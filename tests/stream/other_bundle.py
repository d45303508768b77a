"""Bundles that the sample bundle's stream can switch to: the same networks, other centroids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load, save

from models.bundle import read_files, write_bundle

SAMPLE = Path(__file__).resolve().parents[2] / "bundles" / "sample"


def bundle_with_other_centroids(out: Path, seed: int, *, gate: float | None = None) -> Path:
    """The sample bundle with its centroids moved a little towards each other at random."""
    manifest, contents = read_files(SAMPLE)
    clusters = load(contents["clusters.safetensors"])
    dice = np.random.default_rng(seed)
    centroids = clusters["centroids"]
    partners = centroids[dice.permutation(len(centroids))]
    clusters["centroids"] = np.rint(centroids + 0.4 * (partners - centroids))
    about = {k: v for k, v in manifest.data.items() if k not in ("format", "space", "files", "version")}
    write_bundle(out, contents | {"clusters.safetensors": save(clusters)}, about | ({"gate": gate} if gate else {}))
    return out
