"""`bootstrap`: index vectors of a bootstrap shard → K-Means centroids → a model bundle that workers can load.

The shard also gives what later data is compared with: the gate (its median ITM) and the baselines of drift. Its index vectors,
or features, lie on disk while clusters are fitted; memory is bounded by IMAGES_AT_ONCE, by the sample that is judged, and by
what K-Means holds (models/clustering.py). Only ids grow with it: those of excluded pairs, and a topic's, some 100 bytes each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from state.settings import rule_named
from stream.allocator import bound_heaps, give_back
from stream.errors import TldrError
from stream.pair_sources import BadEntry, SourcePair, open_source

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from models.blip_matching import BlipScorer
    from models.bundle import Manifest
    from models.clustering import FeatureFit, Fit
    from models.loaded import LoadedCaptioner
    from models.model import Picture, Vectors
    from models.shard_files import PairSample
    from models.text_embeddings import TextEncoder

IMAGES_AT_ONCE = 256
JUDGED_AT_ONCE = 64
# Pairs that gate and baselines are taken from, a uniform sample: the median is then within 1 % of all pairs' (95 %).
JUDGED_MAX = 10_000
DEFAULT_CLUSTERS = 3000  # paper, Table 2f
DEFAULT_FORM = "mean"  # measured: bundles/FIGURES.md
# The paper clusters the indices as they are; the authors' code takes PCA with whitening of them.
RULE_FORMS = {"paper": "raw", "authors": "pca"}
HISTOGRAM_BINS = 20
FEATURES = ("codes", "image", "text")
EXAMPLES = 8


@dataclass(frozen=True)
class MatchingFigures:
    """How the bundle's scorer and the agreement of T_o and T_g (SIEVE) judge pairs, and whether training has seen them."""

    scorer: str
    pairs: int
    held_out: bool
    median: float
    auc: float
    agreement_median: float | None  # None: no text encoder was at hand
    agreement_auc: float | None

    def line(self) -> str:
        """For a person."""
        of = "held-out pairs" if self.held_out else "pairs of the shard itself (held none out: --held-out)"
        agreement = "not measured" if self.agreement_auc is None else f"{self.agreement_auc:.3f}"
        scorer = "the bundle's head" if self.scorer == "own" else "BLIP"
        return (
            f"gate (median ITM) {self.median:.3f}; AUC against shuffled captions: {scorer} {self.auc:.3f}, agreement of T_o "
            f"and T_g {agreement}; of {self.pairs:,} {of}"
        )


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
    itm: str | None = None,
    text_encoder: str | None = None,
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
    itm          "own", the bundle's head, or "blip:FOLDER"; None: what `captioner` has.
    text_encoder a BERT that embeds captions; None: the packaged one.
    Raises       ModelError for a damaged captioner or fewer pairs than clusters, TldrError for a source without pairs.
    """
    import numpy as np

    from models.bundle import write_bundle
    from models.clustering import coarse_sample, fit_features, fit_measured, held_out_errors, too_small
    from models.drift import error_baseline
    from models.loaded import centroids_content, clusters_content

    clusters = clusters or (rule_named(rule).clusters if rule else DEFAULT_CLUSTERS)
    form = form or (RULE_FORMS[rule] if rule else DEFAULT_FORM)
    if feature not in FEATURES:
        raise TldrError(f"--feature {feature}: use one of {', '.join(FEATURES)}")
    bound_heaps()
    shard = _Shard(captioner, device, exclude, progress, itm=itm, text_encoder=text_encoder)
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.bootstrap-", dir=out.parent) as work:
        encoded = shard.of(
            sources,
            topic_pairs,
            Path(work) / "shard",
            feature=feature,
            sampled=0 if held_out else JUDGED_MAX,
            seed=seed,
        )
        if encoded.pairs < clusters:
            raise TldrError(
                f"{encoded.pairs:,} pairs cannot make {clusters:,} clusters: a larger shard, "
                f"or --clusters {max(1, encoded.pairs // 39)}"
            )
        judged = encoded.sample
        if held_out:
            judged = shard.encoded(_all(held_out, None), Path(work) / "held-out", sampled=JUDGED_MAX, seed=seed).sample
        codes = shard.parts.captioner.quantiser.codebook.codes.cpu().numpy()
        contents = dict(shard.contents)
        fitted: Fit | FeatureFit
        if feature == "codes":
            fitted = fit_measured(encoded.vectors, codes, clusters, form, seed)
            contents["clusters.safetensors"] = clusters_content(fitted.clustering)
            errors = error_baseline(held_out_errors(encoded.vectors, codes, clusters, form, seed))
        else:
            form, errors = "as it is", None
            fitted = fit_features(encoded.features, clusters, seed)
            contents["clusters.safetensors"] = centroids_content(fitted.centroids)
        judgement = _judge(shard, judged, seed)
    scores, matching = judgement.scores, judgement.figures(held_out=bool(held_out))
    about = {k: v for k, v in shard.manifest.data.items() if k not in ("version", "space", "files", "format")}
    about |= {
        "gate": matching.median,
        "itm": shard.itm,
        "fingerprint": shard.model.fingerprint,
        "clustering": {
            "feature": feature, "form": form, "clusters": clusters, "seed": seed, "inertia": fitted.inertia,
            "rows": fitted.rows_fitted,
        },
        "baselines": {
            "pairs": encoded.pairs,
            "itm_pairs": matching.pairs,
            "itm_held_out": matching.held_out,
            "itm_auc": matching.auc,
            "itm_histogram": np.histogram(scores, bins=HISTOGRAM_BINS, range=(0, 1))[0].tolist(),
            "agreement_auc": matching.agreement_auc,
            "agreement_median": matching.agreement_median,
            "cluster_occupancy": fitted.occupancy.tolist(),
            "code_usage": encoded.usage.tolist(),
            **({} if errors is None else {"quantisation_error": errors}),
        },
        "examples": judgement.examples(),
    }  # fmt: skip
    written = write_bundle(out, contents, about)
    occupancy = fitted.occupancy
    return BootstrapResult(
        out, written.version, feature, form, encoded.pairs, fitted.rows_fitted, encoded.bad, clusters,
        int((occupancy == 0).sum()), int(occupancy.min()), float(np.median(occupancy)), int(occupancy.max()), fitted.inertia,
        too_small(encoded.pairs, clusters) or coarse_sample(encoded.pairs, fitted.rows_fitted, clusters), matching.median,
        matching, int((encoded.usage > 0).sum()), sum(f["bytes"] for f in written.data["files"].values()),
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

    bound_heaps()
    shard, found = _Shard(captioner, device, exclude, progress, judges=False), []
    codes = shard.parts.captioner.quantiser.codebook.codes.cpu().numpy()
    with TemporaryDirectory(prefix="tldr-sweep-") as work:
        encoded = shard.of(sources, topic_pairs, Path(work) / "shard")
        for count in clusters:
            fitted = fit_measured(encoded.vectors, codes, count, form or DEFAULT_FORM, seed)
            sizes = fitted.occupancy
            progress(f"{count:,} clusters fitted")
            cell = float(np.median(sizes)) / encoded.pairs * volume / partitions
            least, median, most, empty = sizes.min(), np.median(sizes), sizes.max(), (sizes == 0).sum()
            found.append(Sweep(count, fitted.inertia, int(least), float(median), int(most), int(empty), cell))
    return SweepResult(encoded.pairs, volume, partitions, found)


@dataclass(frozen=True)
class _Encoded:
    """The pairs of a shard whose images decode; rows and sample lie on disk, in the folder that was given."""

    pairs: int
    bad: int
    vectors: Vectors  # (n, L), mapped
    features: NDArray[
        np.float32
    ]  # (n, F) mean features of the encoder or embeddings of the captions, mapped; else empty
    usage: NDArray[np.int64]  # (K,) how often each code was chosen
    sample: PairSample


class _Shard:
    """A captioner, and what it makes of pairs. Memory holds IMAGES_AT_ONCE of them, whatever the shard's size."""

    def __init__(
        self,
        captioner: Path,
        device: str | None,
        exclude: Sequence[str],
        progress: Callable[[str], None],
        *,
        judges: bool = True,
        itm: str | None = None,
        text_encoder: str | None = None,
    ) -> None:
        from models.bundle import read_files
        from models.device import choose_device
        from models.loaded import CaptionerParts, LoadedCaptioner

        self.manifest, self.contents = read_files(captioner)
        self.parts = CaptionerParts.of(self.manifest, self.contents)
        chosen = choose_device(device)
        scorer = _blip(self.manifest, itm, chosen) if judges else None
        self.itm = scorer.about() if scorer else {"scorer": "own"}
        self.model = LoadedCaptioner(self.parts, chosen, scorer)
        self.excluded = {p.id for p in _all(exclude, None)}
        self._text_encoder_at = text_encoder
        self.progress = progress

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """Raises CorpusError where there is none."""
        from models.text_embeddings import TextEncoder, packaged_text_encoder

        return TextEncoder(self._text_encoder_at or packaged_text_encoder())

    def of(
        self,
        sources: Sequence[str],
        topic_pairs: Callable[[], Iterable[SourcePair | BadEntry]] | None,
        folder: Path,
        *,
        feature: str = "codes",
        sampled: int = 0,
        seed: int = 0,
    ) -> _Encoded:
        """The bootstrap shard without what is excluded. Raises TldrError where no image can be decoded."""
        pairs = (p for p in _all(sources, topic_pairs) if p.id not in self.excluded)
        return self.encoded(pairs, folder, feature=feature, sampled=sampled, seed=seed)

    def encoded(
        self, pairs: Iterator[SourcePair], folder: Path, *, feature: str = "codes", sampled: int = 0, seed: int = 0
    ) -> _Encoded:
        """Raises TldrError where no image can be decoded."""
        import numpy as np

        from models.shard_files import PairSample, RowFile

        folder.mkdir()
        rows, features = RowFile(folder / "vectors", np.uint16), RowFile(folder / "features", np.float32)
        sample = PairSample(folder / "sample", sampled, seed)
        usage, count, bad = np.zeros(self.model.codebook_size, np.int64), 0, 0
        for part in _chunks(pairs, IMAGES_AT_ONCE):
            decoded = _decoded(part, self.model)
            bad += len(part) - len(decoded)
            if not decoded:
                continue
            pictures = [picture for _, picture in decoded]
            vectors = self.model.encode(pictures)
            rows.append(vectors)
            usage += np.bincount(vectors.ravel(), minlength=len(usage))
            if feature == "image":
                features.append(self.model.features(pictures).mean(1))
            elif feature == "text":
                features.append(self.text_encoder.embed([pair.caption for pair, _ in decoded]))
            for (pair, _), vector in zip(decoded, vectors, strict=True):
                sample.offer(pair.image or b"", pair.caption, vector)
            count += len(decoded)
            give_back()  # else holes in the heaps grow by 4 kB an image (docs/tried.md)
            self.progress(f"{count:,} images encoded")
        if not count:
            raise TldrError("no image of the source could be decoded: bootstrap needs a shard of good pairs")
        return _Encoded(count, bad, rows.mapped(), features.mapped(), usage, sample)


@dataclass(frozen=True)
class _Judgement:
    """What the scorer, and the agreement in text space, say of a sample of pairs and of the same with captions shuffled."""

    scorer: str
    scores: NDArray[np.float32]
    auc: float
    agreement: NDArray[np.float32] | None  # None where there is no text encoder
    agreement_auc: float | None
    captions: list[str]  # the first EXAMPLES
    generated: list[str]  # the same

    def figures(self, *, held_out: bool) -> MatchingFigures:
        import numpy as np

        agreement = None if self.agreement is None else round(float(np.median(self.agreement)), 6)
        agreement_auc = None if self.agreement_auc is None else round(self.agreement_auc, 6)
        return MatchingFigures(
            self.scorer, len(self.scores), held_out, round(float(np.median(self.scores)), 6), round(self.auc, 6),
            agreement, agreement_auc,
        )  # fmt: skip

    def examples(self) -> list[dict[str, object]]:
        """For `bundle inspect`."""
        return [
            {"caption": caption, "generated": text, "itm": round(float(score), 4)}
            for caption, text, score in zip(self.captions, self.generated, self.scores, strict=False)
        ]


def _judge(shard: _Shard, sample: PairSample, seed: int) -> _Judgement:
    import numpy as np

    from models.errors import CorpusError
    from models.evaluation import auc
    from models.matching import text_agreement

    model, count = shard.model, len(sample)
    captions = [sample.caption(i) for i in range(count)]
    order = np.random.default_rng(seed).permutation(count)
    scores, shuffled, generated = [], [], list[str]()
    for start in range(0, count, JUDGED_AT_ONCE):
        rows = range(start, min(start + JUDGED_AT_ONCE, count))
        vectors = sample.vectors(rows.start, rows.stop)
        pictures = [model.decode(sample.image(i)) for i in rows] if model.needs_pictures else []
        scores.append(model.match(vectors, [captions[i] for i in rows], pictures))
        shuffled.append(model.match(vectors, [captions[order[i]] for i in rows], pictures))
        generated += model.caption(vectors, pictures)
        shard.progress(f"{rows.stop:,} of {count:,} pairs judged")
    agreement = agreement_auc = None
    try:
        own, said = shard.text_encoder.embed(captions), shard.text_encoder.embed(generated)
    except CorpusError as error:
        shard.progress(f"the agreement of T_o and T_g is not measured: {error}")
    else:
        agreement = text_agreement(own, said)
        agreement_auc = auc(agreement, text_agreement(own[order], said))
    all_scores = np.concatenate(scores)
    return _Judgement(
        str(shard.itm["scorer"]), all_scores, auc(all_scores, np.concatenate(shuffled)), agreement, agreement_auc,
        captions[:EXAMPLES], generated[:EXAMPLES],
    )  # fmt: skip


def _blip(manifest: Manifest, itm: str | None, device: torch.device) -> BlipScorer | None:
    """The scorer that `--itm` names, or without it the one that the bundle has; None for the bundle's own head."""
    from models.blip_matching import BlipScorer

    if itm is None:
        return None if manifest.blip is None else BlipScorer(manifest.blip[0], device, manifest.blip[1])
    kind, _, folder = itm.partition(":")
    if kind == "own" and not folder:
        return None
    if kind == "blip" and folder:
        return BlipScorer(Path(folder), device)
    raise TldrError(f"--itm {itm}: use `own` (the bundle's head) or `blip:FOLDER` (a BLIP ITM checkpoint)")


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


def _decoded(pairs: Sequence[SourcePair], model: LoadedCaptioner) -> list[tuple[SourcePair, Picture]]:
    from models.errors import BadImage

    def one(pair: SourcePair) -> tuple[SourcePair, Picture] | None:
        try:
            return pair, model.decode(pair.image or b"")
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
