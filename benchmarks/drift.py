"""`make drift`: false alarms, delays, churn and what reclustering is worth, on the corpora; writes docs/drift.md.

Everything is made of the product's own functions: the sample bundle's encoder and matching head, models/drift.py,
models/clustering.py and the batch reference. A unit is one measurement with its seeds and is written as soon as it is done;
a run stops before its minutes are over: type the command again until nothing is left. Images are encoded once.
"""

# ruff: noqa: E501  (a row of a table is a line)

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from models.threads import set_thread_environment

set_thread_environment()

import numpy as np  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from corpus.shards import read_json_members  # noqa: E402
from models.bundle import load_model, read_manifest  # noqa: E402
from models.clustering import FORMS, Clustering, fit, held_out_errors, refit  # noqa: E402
from models.drift import (  # noqa: E402
    LOOKS_A_WINDOW,
    SIGNALS,
    THRESHOLDS,
    WINDOW_PAIRS,
    Baseline,
    DriftWindow,
    error_baseline,
)
from models.errors import BadImage  # noqa: E402
from models.loaded import LoadedModel  # noqa: E402
from stream.batch_tldr import Row, reduce_partition  # noqa: E402
from stream.recluster import churn  # noqa: E402

ROOT = Path(__file__).parents[1]
WORK = ROOT / ".build" / "drift"
CORPUS = ROOT / "corpus" / "full"
BUNDLE = ROOT / "bundles" / "sample"
DATA = ROOT / "docs" / "drift.jsonl"
PAGE = ROOT / "docs" / "drift.md"
PICTURES = ROOT / "docs" / "drift"


@dataclass(frozen=True)
class Corpus:
    """Pairs of one corpus, in the order of its shards; about: a dict a pair (title, keywords, description, family)."""

    vectors: NDArray[np.uint16]
    captions: list[str]
    about: list[dict[str, Any]]


def encoded(prefix: str, pieces_max: int | None = None) -> Corpus:
    """All pairs of `corpus/full/PREFIX-*.tar` whose image decodes, encoded by the sample bundle; cached piece by piece."""
    tars = sorted(CORPUS.glob(f"{prefix}-*.tar"))
    if not tars:
        raise SystemExit(f"{CORPUS} has no {prefix}-*.tar: run `make corpus` first")
    space = read_manifest(BUNDLE).space[:12]
    parts: list[tuple[NDArray[np.uint16], list[dict[str, Any]]]] = []
    fresh = 0
    for tar in tars:
        keys = _keys(tar)
        for start in range(0, len(keys), PIECE_PAIRS):
            file = WORK / f"{tar.stem}-{start}-{space}.npz"
            if not file.exists():
                if pieces_max is not None and fresh >= pieces_max:
                    continue
                fresh += 1
                _encode(tar, keys[start : start + PIECE_PAIRS], file)
            with np.load(file) as stored:
                parts.append((stored["vectors"], [json.loads(text) for text in stored["about"].tolist()]))
    about = [one for _, its in parts for one in its]
    return Corpus(np.concatenate([v for v, _ in parts]), [str(one["caption"]) for one in about], about)


def _keys(tar: Path) -> list[str]:
    with tarfile.open(tar) as members:
        return sorted({member.name.partition(".")[0] for member in members})


def _encode(tar: Path, keys: list[str], file: Path) -> None:
    model, pixels, about = _model(), [], []
    with tarfile.open(tar) as members:
        found: dict[str, dict[str, bytes]] = {key: {} for key in keys}
        for member in members:
            key, _, extension = member.name.partition(".")
            if key in found and (content := members.extractfile(member)):
                found[key][extension] = content.read()
    for pair in found.values():
        image = next(v for k, v in pair.items() if k not in ("txt", "json"))
        try:
            pixels.append(model.decode(image))
        except BadImage:
            continue
        about.append(json.loads(pair["json"]))
    WORK.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{os.getpid()}.partial.npz")
    np.savez(partial, vectors=model.encode(pixels), about=np.array([json.dumps(a) for a in about]))
    partial.rename(file)
    print(f"{file.stem}: {len(about)} pairs encoded", file=sys.stderr, flush=True)


@functools.cache
def _model() -> LoadedModel:
    model = load_model(BUNDLE, "cpu")
    if not isinstance(model, LoadedModel):
        raise SystemExit(f"{BUNDLE} is no bundle")
    return model


@dataclass(frozen=True)
class Pairs:
    """Pairs of a stream: index vectors, ITM scores, and the near-duplicate family of each."""

    vectors: NDArray[np.uint16]
    itms: NDArray[np.float32]
    families: NDArray[np.str_]

    def at(self, rows: NDArray[Any]) -> Pairs:
        """Some of them."""
        return Pairs(self.vectors[rows], self.itms[rows], self.families[rows])

    def and_(self, other: Pairs) -> Pairs:
        """These, then those."""
        return Pairs(
            np.concatenate([self.vectors, other.vectors]),
            np.concatenate([self.itms, other.itms]),
            np.concatenate([self.families, other.families]),
        )


class Material:
    """The corpora as the sample bundle sees them; loaded once, when first needed."""

    def __init__(self) -> None:
        self.model = model = _model()
        self.clustering: Clustering = model._clustering
        self.codebook = (self.clustering.codebook / 256.0).astype(np.float32)
        noisy, clean = encoded("noisy"), encoded("clean")
        # what the captioner has not seen in training: its scores are those that a stream's new pairs have
        sample, shard = ({str(one["uid"]) for tar in sorted(at) for one in read_json_members(tar)} for at in HELD_OUT)
        uids = [str(one["uid"]) for one in noisy.about]
        self.of_sample = np.flatnonzero([uid in sample for uid in uids])
        self.held_out = np.flatnonzero([uid in sample or uid in shard for uid in uids])
        self.noisy, self.clean = self._pairs(noisy, noisy.captions), self._pairs(clean, clean.captions)
        order = np.random.default_rng(0).permutation(len(noisy.captions))
        self.shuffled = self._pairs(noisy, [noisy.captions[i] for i in order])
        half = np.random.default_rng(1).random(len(noisy.captions)) < 0.5
        shop = [SHOP.format(about.get("title") or about["caption"]) for about in noisy.about]
        tags = [", ".join(about.get("keywords") or [about["caption"]]) for about in noisy.about]
        own = noisy.captions
        self.shop = self._pairs(noisy, [s if h else c for s, c, h in zip(shop, own, half, strict=True)])
        self.tags = self._pairs(noisy, [t if h else c for t, c, h in zip(tags, own, half, strict=True)])

    def _pairs(self, corpus: Corpus, captions: list[str]) -> Pairs:
        families = np.array([f"{one['source']}/{one['family']}" for one in corpus.about])
        parts = [
            self.model.match(corpus.vectors[i : i + 1000], captions[i : i + 1000])
            for i in range(0, len(captions), 1000)
        ]
        return Pairs(corpus.vectors, np.concatenate(parts), families)

    def bundle_of(self, pairs: Pairs, clusters: int, form: str, seed: int) -> tuple[Clustering, Baseline]:
        """Clusters and baselines as `bootstrap` makes them of these pairs."""
        clustering = fit(pairs.vectors, self.codebook, clusters, form, seed)
        return clustering, self.baseline_of(
            clustering, pairs, held_out_errors(pairs.vectors, self.codebook, clusters, form, seed)
        )

    def baseline_of(self, clustering: Clustering, pairs: Pairs, errors: NDArray[np.float64]) -> Baseline:
        """What a manifest would say of these pairs."""
        told = {
            "pairs": len(pairs.itms),
            "itm_histogram": np.histogram(pairs.itms, 20, (0, 1))[0].tolist(),
            "cluster_occupancy": np.bincount(
                clustering.assign(pairs.vectors), minlength=len(clustering.centroids)
            ).tolist(),
            "code_usage": np.bincount(pairs.vectors.ravel(), minlength=len(self.codebook)).tolist(),
            "quantisation_error": error_baseline(errors),
        }
        return Baseline.of({"baselines": told})


HELD_OUT = ((ROOT / "corpus" / "sample").glob("sample-*.tar"), CORPUS.glob("bootstrap-*.tar"))
SHOP = "{} - free download, royalty free vector clip art, buy online"
PIECE_PAIRS = 500
CLUSTERS = 16  # as the sample bundle has
UNDRIFTED_PAIRS = 20_000  # of a stream in which false alarms are counted
ONSET, AFTER = 3000, 6000  # pairs before and after a drift begins
DRIFTS = {
    "captions shuffled": "every caption is another pair's",
    "new kind of image, all": "all pairs are tuxpaint's instead of openclipart's",
    "new kind of image, 30 %": "three of ten pairs are tuxpaint's",
    "half in shop style": f"half of the captions read `{SHOP.format('TITLE')}`",
    "half as tags": "half of the captions are the picture's tags with commas",
}
ALARM_SEEDS, DELAY_SEEDS, CHURN_SEEDS, HELP_SEEDS = range(10), range(5), range(2), range(5)


# -- measurements ------------------------------------------------------------------------------------------------------


def false_alarms(material: Material, pool: str, seed: int) -> dict[str, Any]:
    """A bundle of one half of the pool, a stream of the other: looks and alarms by signal, and the largest effects."""
    rng = np.random.default_rng(seed)
    rows = material.held_out if pool == "held out" else np.arange(len(material.noisy.itms))
    past, now = np.array_split(rng.permutation(rows), 2)
    clustering, baseline = material.bundle_of(material.noisy.at(past), CLUSTERS, "mean", seed)
    stream = material.noisy.at(rng.choice(now, UNDRIFTED_PAIRS))
    looks = _looks(clustering, baseline, stream)
    found: dict[str, Any] = {"pool": pool, "pairs": len(rows), "looks": len(looks), "alarms": {}, "largest": {}}
    for name in SIGNALS:
        seen = [signal for _, look in looks for signal in look if signal.name == name]
        found["alarms"][name] = sum(signal.alarm for signal in seen)
        found["largest"][name] = max(abs(signal.effect) for signal in seen)
    return found


def delay(material: Material, kind: str, seed: int) -> dict[str, Any]:
    """Pairs from the beginning of a drift to each signal's first alarm (None: not within AFTER pairs)."""
    rng = np.random.default_rng(100 + seed)
    images = kind.startswith("new kind")
    pool = np.arange(len(material.noisy.itms)) if images else material.held_out
    past, now = np.array_split(rng.permutation(pool), 2)
    clustering, baseline = material.bundle_of(material.noisy.at(past), CLUSTERS, "mean", seed)
    drifted = {
        "captions shuffled": material.shuffled,
        "half in shop style": material.shop,
        "half as tags": material.tags,
    }
    rows = rng.choice(now, AFTER)
    after = drifted.get(kind, material.noisy).at(rows)
    if images:
        new = material.clean.at(rng.integers(len(material.clean.itms), size=AFTER))
        taken = rng.random(AFTER) < (1.0 if kind.endswith("all") else 0.3)
        both = after.and_(new)
        after = both.at(np.where(taken, AFTER + np.arange(AFTER), np.arange(AFTER)))
    stream = material.noisy.at(rng.choice(now, ONSET)).and_(after)
    looks = _looks(clustering, baseline, stream)
    first: dict[str, int | None] = {}
    early = 0
    for name in SIGNALS:
        alarmed = [at for at, look in looks for signal in look if signal.name == name and signal.alarm]
        early += sum(at <= ONSET for at in alarmed)
        first[name] = next((at - ONSET for at in alarmed if at > ONSET), None)
    course = (
        {n: [round(s.effect, 4) for _, look in looks for s in look if s.name == n] for n in SIGNALS} if not seed else {}
    )
    return {
        "kind": kind,
        "delay": first,
        "early": early,
        "at": [at for at, _ in looks] if not seed else [],
        "course": course,
    }


def as_shipped(material: Material) -> dict[str, Any]:
    """The sample bundle's own baselines, of 605 pairs in whole title families, against other pairs of the same corpus."""
    baseline = Baseline.of(read_manifest(BUNDLE).data)
    everything = np.random.default_rng(7).permutation(len(material.noisy.itms))[:WINDOW_PAIRS]
    found: dict[str, Any] = {"missing": list(baseline.missing)}
    for name, rows in (("sample", material.of_sample), ("all", everything)):
        pairs = material.noisy.at(rows)
        window = DriftWindow(baseline, material.clustering, pairs.vectors.shape[1])
        window.add(pairs.itms, material.clustering.assign(pairs.vectors), pairs.vectors)
        found[name] = {s.name: [s.effect, s.p_value, s.alarm] for s in window.look()}
        found[f"{name}_pairs"] = len(rows)
    return found


def churn_of(material: Material, form: str, clusters: int, seed: int) -> dict[str, Any]:
    """A refit on unchanged data, and one on drifted data: numbers kept, and the churn foretold against what happens."""
    rng = np.random.default_rng(200 + seed)
    past, window, fresh = np.array_split(rng.permutation(len(material.noisy.itms)), 3)
    live = fit(material.noisy.vectors[past], material.codebook, clusters, form, seed)
    found: dict[str, Any] = {"form": form, "clusters": clusters}
    new_kind = rng.permutation(len(material.clean.itms))
    for name in ("unchanged", "drifted"):
        vectors, later = material.noisy.vectors[window], material.noisy.vectors[fresh]
        if name == "drifted":
            a, b = np.array_split(new_kind, 2)
            vectors = np.concatenate([vectors[: len(a)], material.clean.vectors[a]])
            later = np.concatenate([later[: len(b)], material.clean.vectors[b]])
            vectors, later = rng.permutation(vectors), rng.permutation(later)
        apart, fitted = np.split(vectors, [len(vectors) // 5])
        new = refit(live, fitted, apart, seed)
        told = churn(live, new, apart, np.zeros(len(apart), np.int64), len(later))
        happened = churn(live, new, later, np.zeros(len(later), np.int64), len(later))
        # what was there when the switch came: every pair that the stream has seen
        seen = np.concatenate([material.noisy.vectors[past], vectors])
        all_told = churn(
            live, new, rng.permutation(seen)[: len(seen) // 2], np.zeros(len(seen) // 2, np.int64), len(seen)
        )
        all_happened = churn(live, new, seen, np.zeros(len(seen), np.int64), len(seen))
        found[name] = {
            "foretold": told.moved, "margin": told.margin, "happened": happened.moved,
            "quota_foretold": told.quota_moved, "quota_happened": happened.quota_moved,
            "entries_foretold": all_told.moved, "entries_happened": all_happened.moved,
            "emptied": [told.cells_emptied, happened.cells_emptied], "made": [told.cells_made, happened.cells_made],
        }  # fmt: skip
    return found


def worth(material: Material, clusters: int, share: float, seed: int) -> dict[str, Any]:
    """A stream that drifts: inertia, balance and near-duplicates of its last part, with a recluster in between and without.

    share  of tuxpaint's pairs in the drifted part; no pair comes twice
    """
    rng = np.random.default_rng(300 + seed)
    noisy, clean = rng.permutation(len(material.noisy.itms)), rng.permutation(len(material.clean.itms))
    past, rest = noisy[:3000], noisy[3000:]
    live = fit(material.noisy.vectors[past], material.codebook, clusters, "mean", seed)
    others = min(len(rest), round(len(clean) * (1 - share) / share))
    drifted = material.clean.at(clean).and_(material.noisy.at(rest[:others]))
    window, last = (drifted.at(rows) for rows in np.array_split(rng.permutation(len(drifted.itms)), 2))
    apart, fitted = np.split(window.vectors, [len(window.vectors) // 5])
    new = refit(live, fitted, apart, seed)
    stream = material.noisy.at(past).and_(window).and_(last)
    old_part = len(past) + len(window.itms)
    found: dict[str, Any] = {"clusters": clusters, "share": share, "pairs": len(last.itms)}
    for name, clustering, switches in (("without", live, ((0, 0),)), ("with", new, ((0, 0), (old_part, 1)))):
        at_first, at_last = live.assign(stream.vectors[:old_part]), clustering.assign(last.vectors)
        numbers = np.concatenate([at_first, at_last]).tolist()
        rows = [Row(i, f"pair-{seed}-{i}", c) for i, c in enumerate(numbers)]
        _, outcomes = reduce_partition(rows, seed=seed, partition=0, p=1, q=4, switches=switches)
        kept = np.array([outcomes[i].fate == "kept" for i in range(old_part, len(rows))])
        found[name] = _quality(clustering, last, at_last, kept)
    chosen = np.random.default_rng(seed).permutation(len(last.itms)) < len(last.itms) // 4
    found["random"] = _near_duplicates(last.families, chosen)
    return found


def _quality(
    clustering: Clustering, pairs: Pairs, clusters: NDArray[np.int32], kept: NDArray[np.bool_]
) -> dict[str, float]:  # fmt: skip
    share = np.bincount(clusters, minlength=len(clustering.centroids)) / len(clusters)
    some = share[share > 0]
    return {
        "inertia": float(clustering.errors(pairs.vectors, clusters).mean()),
        # as many equal cells would be as uneven: the exponential of the entropy
        "effective_cells": float(np.exp(-(some * np.log(some)).sum())),
        "largest": float(share.max()),
        "kept": float(kept.mean()),
        "near_duplicates": _near_duplicates(pairs.families, kept),
    }


def _near_duplicates(families: NDArray[np.str_], kept: NDArray[np.bool_]) -> float:
    """Of the kept pairs, the share whose family has another kept pair."""
    _, family, sizes = np.unique(families[kept], return_inverse=True, return_counts=True)
    return float((sizes[family] > 1).mean()) if kept.any() else 0.0


def _looks(clustering: Clustering, baseline: Baseline, stream: Pairs) -> list[tuple[int, list[Any]]]:
    """(pairs seen, signals) at each look of a sliding window."""
    window = DriftWindow(baseline, clustering, stream.vectors.shape[1])
    clusters, step, found = clustering.assign(stream.vectors), WINDOW_PAIRS // LOOKS_A_WINDOW, []
    for start in range(0, len(clusters), step):
        rows = slice(start, start + step)
        window.add(stream.itms[rows], clusters[rows], stream.vectors[rows])
        if window.pairs == WINDOW_PAIRS:
            found.append((start + step, window.look()))
    return found


# -- units -------------------------------------------------------------------------------------------------------------


def units() -> Iterator[tuple[str, Callable[[Material], dict[str, Any]]]]:
    """(name, measurement), in the order in which they are done."""
    yield "as-shipped", as_shipped
    for pool in ("all", "held out"):
        for seed in ALARM_SEEDS:
            yield f"false-alarms/{pool}/{seed}", lambda m, p=pool, s=seed: false_alarms(m, p, s)  # type: ignore[misc]
    for kind in DRIFTS:
        for seed in DELAY_SEEDS:
            yield f"delay/{kind}/{seed}", lambda m, k=kind, s=seed: delay(m, k, s)  # type: ignore[misc]
    for clusters, share in ((16, 0.5), (16, 1.0), (64, 0.5), (64, 1.0)):
        for seed in HELP_SEEDS:
            yield f"worth/{clusters}/{share}/{seed}", lambda m, c=clusters, q=share, s=seed: worth(m, c, q, s)  # type: ignore[misc]
    for form in FORMS:
        for clusters in (16, 64):
            for seed in CHURN_SEEDS:
                yield f"churn/{form}/{clusters}/{seed}", lambda m, f=form, c=clusters, s=seed: churn_of(m, f, c, s)  # type: ignore[misc]


def done() -> dict[str, dict[str, Any]]:
    """What is measured, by unit."""
    lines = DATA.read_text("utf-8").splitlines() if DATA.exists() else []
    return {one["unit"]: one for one in map(json.loads, lines)}


# -- the page ----------------------------------------------------------------------------------------------------------


def render() -> None:
    """docs/drift.md and its pictures, of what is measured by now."""
    measured = done()
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, one in measured.items():
        groups.setdefault(name.split("/")[0], []).append(one)
    PICTURES.mkdir(parents=True, exist_ok=True)
    dates = sorted({one["date"] for one in measured.values()})
    left = sum(name not in measured for name, _ in units())
    lines = [
        "# Drift, and what reclustering is worth", "",
        f"Written by `make drift` ({', '.join(dates)}; bundle {', '.join(sorted({o['bundle'] for o in measured.values()}))}; "
        f"{len(measured)} units in [drift.jsonl](drift.jsonl), {left or 'none'} left to measure). What the signals, effects and "
        "thresholds are: [reference.md](reference.md#drift-and-reclustering). Unless a line says otherwise a window has "
        f"{WINDOW_PAIRS:,} pairs, a look comes every {WINDOW_PAIRS // LOOKS_A_WINDOW}, a bundle has {CLUSTERS} clusters of the form `mean`. The "
        "corpora are those of `make corpus`: openclipart (noisy) and tuxpaint (clean). The sample bundle's captioner has seen all of "
        "them in training but for openclipart's sample and bootstrap shard (*held out*).", "",
        *FINDINGS, "",
        *_false_alarm_lines(groups.get("false-alarms", []), groups.get("as-shipped", [])),
        *_delay_lines(groups.get("delay", [])),
        *_churn_lines(groups.get("churn", [])),
        *_worth_lines(groups.get("worth", [])),
    ]  # fmt: skip
    PAGE.write_text("\n".join(lines).rstrip() + "\n", "utf-8")


def _false_alarm_lines(found: list[dict[str, Any]], shipped: list[dict[str, Any]]) -> list[str]:
    if not found:
        return []
    lines = [
        "## False alarms", "",
        f"The bundle from a random half of a pool of openclipart's pairs, {UNDRIFTED_PAIRS:,} pairs drawn from the other half. *Held out*: "
        "only pairs that the captioner has not seen in training, whose ITM scores are what a stream's new pairs have.", "",
        "| pool | seeds | windows | signal | alarms | in a thousand windows | largest effect seen | threshold |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for pool in ("all", "held out"):
        its = [one for one in found if one["pool"] == pool]
        if not its:
            continue
        windows = sum(one["looks"] for one in its) / LOOKS_A_WINDOW
        for name in SIGNALS:
            alarms, largest = sum(one["alarms"][name] for one in its), max(one["largest"][name] for one in its)
            rate = (
                f"{1000 * alarms / windows:.1f}" if alarms else f"0 (at 95 % under {3000 / windows:.0f})"
            )  # the rule of three
            head = f"{pool}, {its[0]['pairs']:,} pairs | {len(its)} | {windows:,.0f}" if name == SIGNALS[0] else " | | "
            lines.append(f"| {head} | `{name}` | {alarms} | {rate} | {largest:.1%} | {THRESHOLDS[name]:.0%} |")
    for one in shipped:
        told = {
            of: ", ".join(
                f"`{n}` {effect:+.1%}{' (alarm)' if alarm else ''}" for n, (effect, _, alarm) in one[of].items()
            )
            for of in ("sample", "all")
        }
        lines += [
            "", "The sample bundle as it is committed, whose baselines are 605 pairs in whole title families that its captioner never "
            f"saw: against the {one['sample_pairs']:,} held-out pairs of the sample {told['sample']}; against {one['all_pairs']:,} of the "
            f"whole of openclipart, most of them training pairs, {told['all']}."
            + (f" It has no baseline of {', '.join(one['missing'])}." if one["missing"] else ""),
        ]  # fmt: skip
    return [*lines, ""]


def _delay_lines(found: list[dict[str, Any]]) -> list[str]:
    if not found:
        return []
    early = sum(one["early"] for one in found)
    lines = [
        "## Delay", "",
        f"The drift begins after {ONSET:,} pairs and lasts {AFTER:,}. Pairs from its beginning to a signal's first alarm: median "
        f"(least to most), and in how many of the seeds it alarmed at all. Drifts of captions are of held-out pairs. Alarms before the beginning, over all: {early}.", "",
        "| drift | seeds | " + " | ".join(f"`{n}`" for n in SIGNALS) + " | first of all |", "|---" * (3 + len(SIGNALS)) + "|",
    ]  # fmt: skip
    for kind, what in DRIFTS.items():
        its = [one for one in found if one["kind"] == kind]
        if not its:
            continue
        cells = [_delays([one["delay"][name] for one in its]) for name in SIGNALS]
        first = [min((d for d in one["delay"].values() if d is not None), default=None) for one in its]
        lines.append(f"| {kind}: {what} | {len(its)} | {' | '.join(cells)} | {_delays(first)} |")
    if _plot_courses([one for one in found if one["at"]]):
        lines += ["", "![Effects over time](drift/courses.svg)"]
    return [*lines, ""]


def _delays(delays: list[int | None]) -> str:
    seen = [d for d in delays if d is not None]
    if not seen:
        return "never"
    return f"{np.median(seen):,.0f} ({min(seen):,} to {max(seen):,}), {len(seen)}/{len(delays)}"


def _churn_lines(found: list[dict[str, Any]]) -> list[str]:
    if not found:
        return []
    lines = [
        "## Churn, and how well it is foretold", "",
        "Openclipart in thirds: the bundle, the window, and fresh pairs. *Drifted*: half of window and fresh pairs are tuxpaint's. *Kept*: "
        "fresh pairs whose cluster has the same number before and after, least of the seeds. *Off by*: the largest difference between "
        "what `--dry-run` says and what then happens, in points: of fresh pairs (in brackets the ± that it says itself), and of "
        "the quota; *entries*: of all pairs that came before, where half of them are sampled.", "",
        "| form | N | kept, unchanged | kept, drifted | pairs off by | quota off by | entries off by |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for form in FORMS:
        for clusters in (16, 64):
            its = [one for one in found if (one["form"], one["clusters"]) == (form, clusters)]
            if not its:
                continue
            both = [one[name] for one in its for name in ("unchanged", "drifted")]

            def off(what: str, both: list[dict[str, Any]] = both) -> str:
                ends = {"": ("foretold", "happened")}.get(what, (f"{what}_foretold", f"{what}_happened"))
                return f"{100 * max(abs(o[ends[0]] - o[ends[1]]) for o in both):.1f}"

            kept = [1 - max(o[n]["happened"] for o in its) for n in ("unchanged", "drifted")]
            margin = f"± {100 * max(o['margin'] for o in both):.1f}"
            lines.append(
                f"| {form} | {clusters} | {kept[0]:.1%} | {kept[1]:.1%} | {off('')} ({margin}) | {off('quota')} | {off('entries')} |"
            )
    return [*lines, ""]


def _worth_lines(found: list[dict[str, Any]]) -> list[str]:
    if not found:
        return []
    lines = [
        "## Does it help?", "",
        "3,000 pairs of openclipart, then a drifted part; a switch in its middle, to clusters fitted to its first half, or none. "
        "Measured on its second half, mean ± standard deviation over the seeds: inertia (mean squared distance to the centroid), "
        "effective cells (exponential of the entropy of their shares), the largest cell, and near-duplicates kept: of the pairs that the "
        "batch reference keeps (M = 1/4), the share whose title family has another kept pair. *Random*: a quarter drawn without any clusters.", "",
        "| N | tuxpaint in the drifted part | seeds | inertia with ÷ without | effective cells without → with | largest cell | near-duplicates kept, without → with | random |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for clusters, share in sorted({(one["clusters"], one["share"]) for one in found}):
        its = [one for one in found if (one["clusters"], one["share"]) == (clusters, share)]

        def of(what: str, name: str, its: list[dict[str, Any]] = its) -> NDArray[np.float64]:
            return np.array([one[name][what] for one in its])

        ratio = of("inertia", "with") / of("inertia", "without")
        cells, largest, near = (
            [of(what, name) for name in ("without", "with")]
            for what in ("effective_cells", "largest", "near_duplicates")
        )
        gain = near[1] - near[0]
        lines.append(
            f"| {clusters} | {share:.0%} | {len(its)} | {ratio.mean():.3f} ± {ratio.std():.3f} | "
            f"{cells[0].mean():.1f} → {cells[1].mean():.1f} | {largest[0].mean():.1%} → {largest[1].mean():.1%} | "
            f"{near[0].mean():.1%} → {near[1].mean():.1%} ({100 * gain.mean():+.1f} ± {100 * gain.std():.1f} points) | "
            f"{np.mean([one['random'] for one in its]):.1%} |"
        )
    _plot_worth(found)
    return [*lines, "", "![With and without reclustering](drift/worth.svg)", ""]


def _plot_courses(found: list[dict[str, Any]]) -> bool:
    from matplotlib.figure import Figure

    if not found:
        return False
    figure = Figure(figsize=(9, 2.3 * len(found)), layout="constrained")
    for axes, one in zip(np.atleast_1d(figure.subplots(len(found), 1, sharex=True)), found, strict=True):
        for name in SIGNALS:
            axes.plot(
                one["at"], np.array(one["course"][name]) / THRESHOLDS[name], ".-", markersize=3, linewidth=1, label=name
            )
        for level in (-1, 1):
            axes.axhline(level, color="black", linewidth=0.8, linestyle="--")
        axes.axvline(ONSET, color="grey", linewidth=0.8)
        axes.set_yscale("symlog", linthresh=2)
        axes.set_title(one["kind"], fontsize=10, loc="left")
        axes.set_ylabel("effect ÷ threshold", fontsize=8)
    axes.set_xlabel("pairs")
    axes.legend(fontsize=8, ncols=4, frameon=False)
    figure.savefig(PICTURES / "courses.svg", metadata={"Date": None})
    return True


def _plot_worth(found: list[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    groups = sorted({(one["clusters"], one["share"]) for one in found})
    for axes, what, title in zip(
        figure.subplots(1, 3), ("inertia", "effective_cells", "near_duplicates"),
        ("inertia", "effective cells", "near-duplicates kept"), strict=True,
    ):  # fmt: skip
        for at, (name, shift) in enumerate((("without", -0.15), ("with", 0.15))):
            for x, group in enumerate(groups):
                y = [one[name][what] for one in found if (one["clusters"], one["share"]) == group]
                axes.plot(np.full(len(y), x + shift), y, ".", color=f"C{at}", alpha=0.5, label=name if not x else None)
        axes.set_xticks(range(len(groups)), [f"N {n}\n{share:.0%}" for n, share in groups], fontsize=8)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(PICTURES / "worth.svg", metadata={"Date": None})


# What a person reads out of the tables below; written by hand on 2026-11-25, look at it again when they change.
FINDINGS = [
    "What was found on 2026-11-25, good and bad:",
    "",
    "- No false alarm in 91 windows of either pool. That bounds the rate by 33 in a thousand at 95 %, far above the one that the "
    "level is set for: more seeds would tell. Effects alone would have alarmed: the median ITM of held-out pairs strays by up to 11 "
    "points from bundle to bundle, since its baseline is of 885 pairs; only the test kept it quiet.",
    "- Shuffled captions and a wholly new kind of image alarm within a quarter of a window; three new images in ten or a new caption "
    "style in half a window to a whole one. Captions that become tags are never noticed: their scores hardly move.",
    "- Each drift of captions alarms by ITM alone and each of images by all others, so the alarm names what to look at; ITM is blind "
    "to tuxpaint's images, whose captions fit.",
    "- A bundle's ITM baseline is worth nothing for pairs that its captioner was trained on (33 points), and baselines from whole title "
    "families stand 1 to 8 % from other families of the same corpus before anything has drifted.",
    "- Unchanged data keeps 97.4 % of its cluster numbers or more, in every form and for both N.",
    "- The churn of all pairs that came before is foretold within 1.2 points in all 32 cases. That of fresh pairs is off by more than "
    "two points in 6 of the 32, all of them drifted windows of a thousand pairs, a fifth of which is about 200 to foretell by, and twice "
    "(2.7 and 8.8 points) by more than the ± that is said: take a window of tens of thousands.",
    "- `raw` and `pca` hardly answer to a new kind of image: 96.4 % of the numbers or more stay though half of the pairs are new; `mean` moves "
    "up to 41 %.",
    "- Reclustering lowers the inertia of what comes then by 31 to 66 % and makes the cells more even.",
    "- It does **not** lower the share of near-duplicates kept: every difference is within its spread over the seeds, and both differ "
    "little from a random quarter. The quota takes the same share of each cell, so clusters of whole kinds of image thin families "
    "no more than chance does.",
]


def main() -> int:
    """The command line of `make drift`."""
    parser = argparse.ArgumentParser(prog="benchmarks/drift.py", description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0, help="stop before this many minutes are over")
    parser.add_argument("--only", default="", help="prefixes of units, with commas")
    parser.add_argument("--render", action="store_true", help="only write the page anew from the data")
    options = parser.parse_args()
    began, material, measured = time.monotonic(), None, done()
    for name, unit in units():
        if options.render or name in measured or not name.startswith(tuple(options.only.split(","))):
            continue
        if time.monotonic() - began > 60 * options.minutes:
            print("the time is over; type the command again to go on", file=sys.stderr)
            break
        material = material or Material()
        started = time.monotonic()
        result = unit(material)
        about = {
            "unit": name,
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "seconds": round(time.monotonic() - started, 1),
        }
        with open(DATA, "a", encoding="utf-8") as out:
            out.write(json.dumps(about | {"bundle": material.model.version} | result) + "\n")
        print(f"{name} {about['seconds']} s", file=sys.stderr, flush=True)
    render()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
