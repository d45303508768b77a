"""`bootstrap`: index vectors of a bootstrap shard → K-Means centroids → a model bundle that workers can load.

The shard also gives what later data is compared with: the gate (its median ITM) and the baselines of drift.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from state.settings import rule_named
from stream.errors import TldrError
from stream.pair_sources import BadEntry, SourcePair, open_source

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from models.model import Pixels, Vectors

IMAGES_AT_ONCE = 512
DEFAULT_CLUSTERS = 3000  # paper, Table 2f
DEFAULT_FORM = "mean"  # measured: bundles/FIGURES.md
# The paper clusters the indices as they are; the authors' code takes PCA with whitening of them.
RULE_FORMS = {"paper": "raw", "authors": "pca"}
HISTOGRAM_BINS = 20
FEATURES = ("codes", "image", "text")
EXAMPLES = 8


@dataclass(frozen=True)
class MatchingFigures:
    """How the bundle's own scorer judges pairs, and whether training has seen them."""

    pairs: int
    held_out: bool
    median: float
    auc: float

    def line(self) -> str:
        """For a person."""
        of = "held-out pairs" if self.held_out else "pairs of the shard itself (held none out: --held-out)"
        return f"gate (median ITM) {self.median:.3f} and AUC {self.auc:.3f} against shuffled captions, of {self.pairs:,} {of}"


@dataclass(frozen=True)
class BootstrapResult:
    """A bundle on disk and what its bootstrap shard looked like."""

    out: Path
    version: str
    feature: str
    form: str
    pairs: int
    pairs_fitted: int
    bad_images: int
    clusters: int
    empty_clusters: int
    smallest_cluster: int
    median_cluster: float
    largest_cluster: int
    inertia: float
    warning: str | None
    gate: float
    matching: MatchingFigures
    codes_used: int
    bundle_bytes: int

    def lines(self) -> Iterator[str]:
        """For a person."""
        yield f"bundle {self.version[:16]} in {self.out}, {self.bundle_bytes / 1e6:.1f} MB"
        yield f"{self.pairs:,} pairs of the bootstrap shard, {self.bad_images} images that cannot be decoded"
        yield (
            f"{self.clusters} clusters of {self.feature} ({self.form}) with {self.smallest_cluster} to "
            f"{self.largest_cluster} pairs, median {self.median_cluster:.0f}, {self.empty_clusters} empty"
        )
        yield f"inertia {self.inertia:.4g} a pair, fitted to {self.pairs_fitted:,} of them"
        yield f"{self.matching.line()}; {self.codes_used} codes used"
        if self.warning:
            yield f"warning: {self.warning}"


@dataclass(frozen=True)
class Sweep:
    """One N of a `--sweep`."""

    clusters: int
    inertia: float
    smallest: int
    median: float
    largest: int
    empty: int
    cell_median: float


@dataclass(frozen=True)
class SweepResult:
    """What several N come to on one shard."""

    pairs: int
    volume: int
    partitions: int
    sweeps: list[Sweep]

    def lines(self) -> Iterator[str]:
        """For a person."""
        yield f"{self.pairs:,} pairs; cells for {self.volume:,} records in {self.partitions} partitions"
        yield f"{'N':>6} {'inertia':>10} {'least':>6} {'median':>7} {'most':>7} {'empty':>6} {'pairs a cell':>13}"
        for s in self.sweeps:
            yield (
                f"{s.clusters:>6} {s.inertia:>10.4g} {s.smallest:>6} {s.median:>7.0f} {s.largest:>7} {s.empty:>6} "
                f"{s.cell_median:>13.1f}"
            )
        yield "a cell of fewer pairs than 1/M keeps one or none of them: the fewer, the more chance decides"


@dataclass(frozen=True)
class _Encoded:
    """The pairs of a shard whose images decode."""

    vectors: Vectors
    captions: list[str]
    images: NDArray[np.float32]  # (n, F) mean features of the encoder, where they were asked for
    bad: int


def bootstrap(
    sources: Sequence[str],
    captioner: Path,
    out: Path,
    *,
    clusters: int | None = None,
    form: str | None = None,
    rule: str | None = None,
    feature: str = "codes",
    exclude: Sequence[str] = (),
    held_out: Sequence[str] = (),
    topic_pairs: Callable[[], Iterable[SourcePair | BadEntry]] | None = None,
    seed: int = 0,
    device: str | None = None,
    progress: Callable[[str], None] = print,
) -> BootstrapResult:
    """Fit `clusters` clusters to the pairs of `sources` and write captioner and clusters as one bundle to `out`.

    rule         names clusters and form (state/settings.py); what is given beside it wins.
    feature      what is clustered (paper, Table 2d): codes; or image or text, for comparison, which no worker can use.
    captioner    a folder that `train` wrote, or another bundle whose clusters shall be replaced.
    held_out     pairs that training has not seen, for the gate and the baseline of ITM; the shard itself without any.
    topic_pairs  more pairs of the shard, those of a Kafka topic.
    Raises       ModelError for a damaged captioner or fewer pairs than clusters, TldrError for a source without pairs.
    """
    import numpy as np

    from models.bundle import write_bundle
    from models.clustering import fit_measured, held_out_errors, kmeans, too_small
    from models.device import fingerprint
    from models.drift import error_baseline
    from models.evaluation import auc
    from models.loaded import centroids_content, clusters_content
    from models.matching import OwnScorer

    clusters = clusters or (rule_named(rule).clusters if rule else DEFAULT_CLUSTERS)
    form = form or (RULE_FORMS[rule] if rule else DEFAULT_FORM)
    if feature not in FEATURES:
        raise TldrError(f"--feature {feature}: use one of {', '.join(FEATURES)}")
    shard = _Shard(captioner, device, exclude, progress)
    encoded = shard.of(sources, topic_pairs, images=feature == "image")
    if len(encoded.captions) < clusters:
        raise TldrError(
            f"{len(encoded.captions):,} pairs cannot make {clusters:,} clusters: a larger shard, "
            f"or --clusters {max(1, len(encoded.captions) // 39)}"
        )
    judged = shard.encoded(_all(held_out, None)) if held_out else encoded
    codes = shard.parts.captioner.quantiser.codebook.codes.cpu()
    contents = dict(shard.contents)
    if feature == "codes":
        fitted = fit_measured(encoded.vectors, codes.numpy(), clusters, form, seed)
        occupancy, inertia, rows = fitted.occupancy, fitted.inertia, fitted.rows_fitted
        contents["clusters.safetensors"] = clusters_content(fitted.clustering)
        errors = error_baseline(held_out_errors(encoded.vectors, codes.numpy(), clusters, form, seed))
    else:
        form, errors = "as it is", None
        features = encoded.images if feature == "image" else _embedded(encoded.captions)
        centroids = kmeans(features, clusters, seed)
        occupancy, inertia = _nearest(features, centroids)
        rows = len(features)
        contents["clusters.safetensors"] = centroids_content(centroids)
    scorer = OwnScorer(shard.parts.matching.cpu(), shard.parts.vocabulary, codes)
    scores = scorer.scores(judged.vectors, judged.captions)
    order = np.random.default_rng(seed).permutation(len(scores))
    shuffled = scorer.scores(judged.vectors, [judged.captions[i] for i in order])
    matching = MatchingFigures(
        len(scores), bool(held_out), round(float(np.median(scores)), 6), round(auc(scores, shuffled), 6)
    )
    usage = np.bincount(encoded.vectors.ravel(), minlength=len(codes))
    about = {k: v for k, v in shard.manifest.data.items() if k not in ("version", "space", "files", "format")}
    about |= {
        "gate": matching.median,
        "fingerprint": fingerprint(shard.encoder.device, shard.encoder.batch, shard.encoder.dtype),
        "clustering": {"feature": feature, "form": form, "clusters": clusters, "seed": seed, "inertia": inertia},
        "baselines": {
            "pairs": len(encoded.captions),
            "itm_pairs": matching.pairs,
            "itm_held_out": matching.held_out,
            "itm_auc": matching.auc,
            "itm_histogram": np.histogram(scores, bins=HISTOGRAM_BINS, range=(0, 1))[0].tolist(),
            "cluster_occupancy": occupancy.tolist(),
            "code_usage": usage.tolist(),
            **({} if errors is None else {"quantisation_error": errors}),
        },
        "examples": _examples(shard, judged, scores),
    }
    written = write_bundle(out, contents, about)
    return BootstrapResult(
        out, written.version, feature, form, len(encoded.captions), rows, encoded.bad, clusters,
        int((occupancy == 0).sum()), int(occupancy.min()), float(np.median(occupancy)), int(occupancy.max()), inertia,
        too_small(rows, clusters), matching.median, matching, int((usage > 0).sum()),
        sum(f["bytes"] for f in written.data["files"].values()),
    )  # fmt: skip


def sweep(
    sources: Sequence[str],
    captioner: Path,
    clusters: Sequence[int],
    *,
    form: str | None = None,
    exclude: Sequence[str] = (),
    topic_pairs: Callable[[], Iterable[SourcePair | BadEntry]] | None = None,
    volume: int = 1_000_000,
    partitions: int = 8,
    seed: int = 0,
    device: str | None = None,
    progress: Callable[[str], None] = print,
) -> SweepResult:
    """Inertia, sizes and empty clusters for each N of `clusters`, and the median cell of `volume` records. Writes nothing.

    Raises as `bootstrap` does.
    """
    import numpy as np

    from models.clustering import fit_measured

    shard = _Shard(captioner, device, exclude, progress)
    encoded = shard.of(sources, topic_pairs)
    codes = shard.parts.captioner.quantiser.codebook.codes.cpu().numpy()
    found = []
    for count in clusters:
        fitted = fit_measured(encoded.vectors, codes, count, form or DEFAULT_FORM, seed)
        sizes = fitted.occupancy
        progress(f"{count:,} clusters fitted")
        cell = float(np.median(sizes)) / len(encoded.captions) * volume / partitions
        least, median, most, empty = sizes.min(), np.median(sizes), sizes.max(), (sizes == 0).sum()
        found.append(Sweep(count, fitted.inertia, int(least), float(median), int(most), int(empty), cell))
    return SweepResult(len(encoded.captions), volume, partitions, found)


class _Shard:
    """A captioner, and what it makes of pairs."""

    def __init__(
        self, captioner: Path, device: str | None, exclude: Sequence[str], progress: Callable[[str], None]
    ) -> None:
        from models.bundle import read_files
        from models.device import choose_device
        from models.encoding import PaddedEncoder
        from models.loaded import CaptionerParts

        self.manifest, self.contents = read_files(captioner)
        self.parts = CaptionerParts.of(self.manifest, self.contents)
        self.encoder = PaddedEncoder(self.parts.captioner, choose_device(device))
        self.excluded = {p.id for p in _all(exclude, None)}
        self._progress = progress

    def of(
        self, sources: Sequence[str], topic_pairs: Callable[[], Iterable[SourcePair | BadEntry]] | None, *,
        images: bool = False,
    ) -> _Encoded:  # fmt: skip
        """The bootstrap shard without what is excluded. Raises TldrError where no image can be decoded."""
        return self.encoded((p for p in _all(sources, topic_pairs) if p.id not in self.excluded), images=images)

    def encoded(self, pairs: Iterator[SourcePair], *, images: bool = False) -> _Encoded:
        """Raises TldrError where no image can be decoded."""
        import numpy as np

        vectors, features, captions, bad = [], [], [], 0
        for part in _chunks(pairs, IMAGES_AT_ONCE):
            decoded = _decoded(part, self.encoder.side)
            bad += len(part) - len(decoded)
            pixels = [p for _, p in decoded]
            vectors.append(self.encoder.vectors(pixels))
            if images:
                features.append(self.encoder.features(pixels).mean(1))
            captions += [p.caption for p, _ in decoded]
            self._progress(f"{len(captions):,} images encoded")
        if not captions:
            raise TldrError("no image of the source could be decoded: bootstrap needs a shard of good pairs")
        pooled = np.concatenate(features) if images else np.empty((0, 0), np.float32)
        return _Encoded(np.concatenate(vectors), captions, pooled, bad)


def _examples(shard: _Shard, judged: _Encoded, scores: NDArray[np.float32]) -> list[dict[str, object]]:
    """The first pairs with what is generated for them: `bundle inspect` shows them."""
    from models.captioning import generate

    generated = generate(shard.parts.captioner, shard.parts.vocabulary, judged.vectors[:EXAMPLES])
    return [
        {"caption": caption, "generated": text, "itm": round(float(score), 4)}
        for caption, text, score in zip(judged.captions, generated, scores, strict=False)
    ]


def _embedded(captions: Sequence[str]) -> NDArray[np.float32]:
    from models.text_embeddings import TextEncoder, packaged_text_encoder

    return TextEncoder(packaged_text_encoder()).embed(captions)


def _nearest(features: NDArray[np.float32], centroids: NDArray[np.float32]) -> tuple[NDArray[np.int64], float]:
    """(pairs of each cluster, mean squared distance to the nearest centroid)."""
    import faiss
    import numpy as np

    distances, nearest = faiss.knn(np.ascontiguousarray(features), centroids, 1)
    return np.bincount(nearest.ravel(), minlength=len(centroids)), float(distances.mean())


def _all(
    sources: Sequence[str], topic_pairs: Callable[[], Iterable[SourcePair | BadEntry]] | None
) -> Iterator[SourcePair]:
    for source in sources:
        yield from _with_images(open_source(source))
    if topic_pairs is not None:
        yield from _with_images(topic_pairs())


def _with_images(entries: Iterable[SourcePair | BadEntry]) -> Iterator[SourcePair]:
    for entry in entries:
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
