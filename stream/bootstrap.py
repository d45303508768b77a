"""`bootstrap`: index vectors of a bootstrap shard → K-Means centroids → a model bundle that workers can load.

The shard also gives what later data is compared with: the gate (its median ITM) and the baselines of drift.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from state.settings import rule_named
from stream.errors import TldrError
from stream.pair_sources import BadEntry, SourcePair, open_source

if TYPE_CHECKING:
    from models.model import Pixels

IMAGES_AT_ONCE = 512
DEFAULT_CLUSTERS = 3000  # paper, Table 2f
DEFAULT_FORM = "mean"  # measured: bundles/FIGURES.md
# The paper clusters the indices as they are; the authors' code takes PCA with whitening of them.
RULE_FORMS = {"paper": "raw", "authors": "pca"}
HISTOGRAM_BINS = 20


@dataclass(frozen=True)
class BootstrapResult:
    """A bundle on disk and what its bootstrap shard looked like."""

    out: Path
    version: str
    pairs: int
    bad_images: int
    clusters: int
    smallest_cluster: int
    median_cluster: float
    largest_cluster: int
    gate: float
    codes_used: int
    bundle_bytes: int

    def lines(self) -> Iterator[str]:
        """For a person."""
        yield f"bundle {self.version[:16]} in {self.out}, {self.bundle_bytes / 1e6:.1f} MB"
        yield f"{self.pairs:,} pairs of the bootstrap shard, {self.bad_images} images that cannot be decoded"
        yield (
            f"{self.clusters} clusters of {self.smallest_cluster} to {self.largest_cluster} pairs, "
            f"median {self.median_cluster:.0f}"
        )
        yield f"gate (median ITM) {self.gate:.3f}; {self.codes_used} codes used"


def bootstrap(
    sources: Sequence[str],
    captioner: Path,
    out: Path,
    *,
    clusters: int | None = None,
    form: str | None = None,
    rule: str | None = None,
    exclude: Sequence[str] = (),
    seed: int = 0,
    device: str | None = None,
    progress: Callable[[str], None] = print,
) -> BootstrapResult:
    """Fit `clusters` clusters to the pairs of `sources` and write captioner and clusters as one bundle to `out`.

    rule       names clusters and form (state/settings.py); what is given beside it wins.
    captioner  a folder that `train` wrote, or another bundle whose clusters shall be replaced.
    Raises     ModelError for a damaged captioner or fewer pairs than clusters, TldrError for a source without pairs.
    """
    import numpy as np

    from models.bundle import read_files, write_bundle
    from models.clustering import fit
    from models.device import choose_device, fingerprint
    from models.encoding import PaddedEncoder
    from models.loaded import CaptionerParts, clusters_content
    from models.matching import match

    clusters = clusters or (rule_named(rule).clusters if rule else DEFAULT_CLUSTERS)
    form = form or (RULE_FORMS[rule] if rule else DEFAULT_FORM)
    manifest, contents = read_files(captioner)
    parts = CaptionerParts.of(manifest, contents)
    held_out = {p.id for source in exclude for p in _with_images(source)}
    encoder = PaddedEncoder(parts.captioner, choose_device(device))
    vectors, captions, bad = [], [], 0
    pairs = (p for source in sources for p in _with_images(source) if p.id not in held_out)
    for part in _chunks(pairs, IMAGES_AT_ONCE):
        decoded = _decoded(part, encoder.side)
        bad += len(part) - len(decoded)
        vectors.append(encoder.vectors([pixels for _, pixels in decoded]))
        captions += [p.caption for p, _ in decoded]
        progress(f"{len(captions):,} images encoded")
    if not captions:
        raise TldrError(f"no image of {', '.join(sources)} could be decoded: bootstrap needs a shard of good pairs")
    indices = np.concatenate(vectors)
    codes = parts.captioner.quantiser.codebook.codes.cpu()
    clustering = fit(indices, codes.numpy(), clusters, form, seed)
    occupancy = np.bincount(clustering.assign(indices), minlength=clusters)
    scores = match(parts.matching.cpu(), parts.vocabulary, codes, indices, captions)
    usage = np.bincount(indices.ravel(), minlength=len(codes))
    gate = round(float(np.median(scores)), 6)
    about = {k: v for k, v in manifest.data.items() if k not in ("version", "space", "files", "format")}
    about |= {
        "gate": gate,
        "fingerprint": fingerprint(encoder.device, encoder.batch),
        "clustering": {"form": form, "clusters": clusters, "seed": seed},
        "baselines": {
            "pairs": len(captions),
            "itm_histogram": np.histogram(scores, bins=HISTOGRAM_BINS, range=(0, 1))[0].tolist(),
            "cluster_occupancy": occupancy.tolist(),
            "code_usage": usage.tolist(),
        },
    }
    contents["clusters.safetensors"] = clusters_content(clustering)
    written = write_bundle(out, contents, about)
    return BootstrapResult(
        out, written.version, len(captions), bad, clusters, int(occupancy.min()), float(np.median(occupancy)),
        int(occupancy.max()), gate, int((usage > 0).sum()), sum(f["bytes"] for f in written.data["files"].values()),
    )  # fmt: skip


def _with_images(source: str) -> Iterator[SourcePair]:
    for entry in open_source(source):
        if not isinstance(entry, BadEntry) and entry.image is not None:
            yield entry


def _decoded(pairs: Sequence[SourcePair], side: int) -> list[tuple[SourcePair, Pixels]]:
    from models.errors import BadImage
    from models.images import decode

    def one(pair: SourcePair) -> tuple[SourcePair, Pixels] | None:
        try:
            return pair, decode(pair.image or b"", side)
        except BadImage:
            return None

    with ThreadPoolExecutor(2) as pool:
        return [p for p in pool.map(one, pairs) if p is not None]


def _chunks(pairs: Iterator[SourcePair], size: int) -> Iterator[list[SourcePair]]:
    chunk: list[SourcePair] = []
    for pair in pairs:
        chunk.append(pair)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
