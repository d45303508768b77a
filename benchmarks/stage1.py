"""`make stage1`: the choices of stage 1 measured on the corpora of `make corpus`, into docs/stage1.md, its data and pictures.

A unit is one training with one seed, or one look at the sample bundle. Each is written as soon as it is done, and a run stops
before its minutes are over: type the command again until nothing is left. Features of the frozen encoder are computed once.
Held out: the sample (noisy) and every fifth title family of the clean corpus; neither is seen by a training, and no choice of
the recipe was made on them in this file.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from models.threads import set_thread_environment

set_thread_environment()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from PIL import Image  # noqa: E402

from models.bundle import load_model, read_manifest  # noqa: E402
from models.captioner import ARCHITECTURES, TINY, Captioner  # noqa: E402
from models.captioning import generate_from_tokens  # noqa: E402
from models.clustering import FORMS, fit  # noqa: E402
from models.codebook import look_up  # noqa: E402
from models.encoding import PaddedEncoder  # noqa: E402
from models.evaluation import auc, rate_by_family, wins  # noqa: E402
from models.images import decode  # noqa: E402
from models.pair_store import TrainingPair  # noqa: E402
from models.refine import refine  # noqa: E402
from models.text_embeddings import TextEncoder, packaged_text_encoder  # noqa: E402
from models.training import RECIPES, Pretrained, TrainingConfig, tidy, train_captioner  # noqa: E402
from models.vocabulary import PAD, START, STOP, Vocabulary  # noqa: E402

ROOT = Path(__file__).parents[1]
WORK = ROOT / ".build" / "stage1"
DATA = ROOT / "docs" / "stage1.jsonl"
PAGE = ROOT / "docs" / "stage1.md"
PICTURES = ROOT / "docs" / "stage1"
BUNDLE = ROOT / "bundles" / "sample"
SEEDS = (0, 1, 2)
EPOCHS = 5  # of noisy training: the bundle takes ten; differences show earlier, and a training then takes two minutes
CAPTIONED = 200  # held-out images that each captioner describes
CLUSTERS = 50
CANDIDATES = 100

# revival begins after a hundred steps, when a code's first count has faded: in so short a training it ends later, too
SHORT = replace(RECIPES["tiny"], epochs_noisy=EPOCHS, epochs_clean=1, epochs_matching=0, revive_share=0.8)
# name → (what it is, sizes, recipe)
VARIANTS: dict[str, tuple[str, Any, TrainingConfig]] = {
    "keywords": ("keywords, moving averages and revival: the bundle's", TINY, SHORT),
    "xavier": ("xavier, moving averages and revival", TINY, replace(SHORT, codebook_start="xavier")),
    "none": ("no codebook: the decoder sees the tokens", replace(TINY, conditioned_on="image"), replace(SHORT, commitment=0.0)),
    "keywords-gradient": (
        "keywords, gradients alone: the paper's letter", TINY, replace(SHORT, codebook_update="gradient", revive_share=0.0),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class HeldOut:
    """Pairs that no training has seen."""

    images: list[bytes]
    captions: list[str]
    families: list[str]
    features: NDArray[np.float32]
    own: NDArray[np.float32]  # embeddings of the captions


def main() -> int:
    """The command line of `make stage1`."""
    parser = argparse.ArgumentParser(prog="benchmarks/stage1.py", description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0, help="stop before this many minutes are over")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--render", action="store_true", help="only write the tables anew from the data")
    parser.add_argument(
        "--only", default="", help="prefixes of units, with commas: the others are left for another process"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    began, longest = time.monotonic(), 0.0
    for name, unit in _units():
        if (
            options.render
            or name in {u["unit"] for u in _done()}
            or not name.startswith(tuple(options.only.split(",")))
        ):
            continue
        if longest and time.monotonic() - began + longest > 60 * options.minutes:
            print("the time is over; type the command again to go on", file=sys.stderr)
            break
        started = time.monotonic()
        print(f"{name} …", file=sys.stderr, flush=True)
        result = unit()
        seconds = round(time.monotonic() - started)
        longest = max(longest, seconds)
        about = {"unit": name, "date": datetime.now(UTC).strftime("%Y-%m-%d"), "seconds": seconds}
        with open(DATA, "a", encoding="utf-8") as out:
            out.write(json.dumps(about | result) + "\n")
    _render()
    return 0


def _units() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    for pair in (("keywords", "xavier"), ("none", "keywords-gradient")):  # what is compared first is measured first
        for seed in SEEDS:
            for name in pair:
                yield f"{name}/{seed}", lambda name=name, seed=seed: _train(name, seed)  # type: ignore[misc]
    yield f"bundle/{read_manifest(BUNDLE).version[:16]}", _bundle  # another bundle is another unit


def _done() -> list[dict[str, Any]]:
    return [json.loads(line) for line in DATA.read_text("utf-8").splitlines()] if DATA.exists() else []


# --- one training -----------------------------------------------------------------------------------------------------------


def _train(name: str, seed: int) -> dict[str, Any]:
    _, config, training = VARIANTS[name]
    sample, clean_sample = _held_out("sample"), _held_out("clean")
    result: dict[str, Any] = {}

    def after_phase(phase: str, captioner: Captioner, words: Vocabulary) -> None:
        result[phase] = _judge(captioner, words, sample, clean_sample, seed)

    work = WORK / f"{name}-{seed}"
    trained = train_captioner(
        config, replace(training, seed=seed), _noisy(), _clean(held_out=False), Pretrained(str(packaged_text_encoder())),
        work, WORK / "cache", lambda line: print(line, file=sys.stderr, flush=True), after_phase=after_phase,
    )  # fmt: skip
    assert trained is not None
    result["pairs"] = trained.pairs
    result["curve"] = [(e.phase, e.epoch, e.codes_used, round(e.code_perplexity, 1)) for e in trained.log]
    if name == "keywords":
        result["clusters"] = _clusters(trained.captioner, sample, seed)
    tidy(work)
    return result


@torch.inference_mode()
def _judge(captioner: Captioner, words: Vocabulary, sample: HeldOut, clean: HeldOut, seed: int) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(sample.captions))[:CAPTIONED]
    own, families = sample.own[chosen], [sample.families[i] for i in chosen]
    texts = [sample.captions[i] for i in chosen]
    tokens, vectors = _tokens(captioner, sample.features)
    said = _say(captioner, words, _seen(captioner, tokens[chosen], vectors[chosen]))
    spoken = _text_encoder().embed(said)
    bleu = corpus_bleu(
        [[t.lower().split()] for t in texts], [s.split() for s in said], smoothing_function=SmoothingFunction().method1
    )
    ranks = _ranks(spoken, own, rng)
    counts = np.bincount(vectors.ravel(), minlength=captioner.config.codes)
    share = counts[counts > 0] / counts.sum()
    clean_tokens, clean_vectors = _tokens(captioner, clean.features)
    return {
        "loss": _loss(captioner, words, sample.captions, tokens, vectors),
        "clean_loss": _loss(captioner, words, clean.captions, clean_tokens, clean_vectors),
        "codes_used": float((counts > 0).sum()),
        "code_perplexity": float(np.exp(-(share * np.log(share)).sum())),
        "bleu4": float(bleu),
        "similarity": float((spoken * own).sum(1).mean()),
        "nearer": float(wins(spoken, own, families).mean()),
        "found_first": float((ranks == 1).mean()),
        "found_in_ten": float((ranks <= 10).mean()),
        "median_rank": float(np.median(ranks)),
        "distinct_captions": float(len(set(said))),
    }


def _tokens(captioner: Captioner, features: NDArray[np.float32]) -> tuple[torch.Tensor, NDArray[np.uint16]]:
    tokens = torch.cat([captioner.quantiser.tokens(part) for part in torch.from_numpy(features).split(64)])
    return tokens, look_up(tokens, captioner.quantiser.codebook.codes.detach()).numpy().astype(np.uint16)


def _seen(captioner: Captioner, tokens: torch.Tensor, vectors: NDArray[np.uint16]) -> torch.Tensor:
    if captioner.config.conditioned_on == "image":
        return tokens
    return F.embedding(torch.from_numpy(vectors.astype(np.int64)), captioner.quantiser.codebook.codes)


def _loss(
    captioner: Captioner, words: Vocabulary, captions: Sequence[str], tokens: torch.Tensor, vectors: NDArray[np.uint16]
) -> float:
    """Nats a piece of held-out captions, the stop included."""
    nats, pieces = 0.0, 0
    for start in range(0, len(captions), 64):
        rows = words.encode(captions[start : start + 64], captioner.config.caption_pieces_max)
        longest = max(map(len, rows)) + 1
        inputs = torch.tensor([[START, *r] + [PAD] * (longest - 1 - len(r)) for r in rows])
        targets = torch.tensor([[*r, STOP] + [PAD] * (longest - 1 - len(r)) for r in rows])
        seen = _seen(captioner, tokens[start : start + 64], vectors[start : start + 64])
        count = int((targets != PAD).sum())
        nats += float(captioner.decoder.loss(seen, inputs, targets)) * count
        pieces += count
    return nats / pieces


def _say(captioner: Captioner, words: Vocabulary, seen: torch.Tensor) -> list[str]:
    return [caption for part in seen.split(32) for caption in generate_from_tokens(captioner, words, part)]


def _ranks(spoken: NDArray[np.float32], own: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.int64]:
    """Place of the right image among CANDIDATES, sought by its caption as found among the generated ones."""
    ranks: list[int] = []
    order = rng.permutation(len(own))
    for start in range(0, len(order) - CANDIDATES + 1, CANDIDATES):
        some = order[start : start + CANDIDATES]
        nearness = own[some] @ spoken[some].T
        ranks += ((nearness > np.diag(nearness)[:, None] + 1e-6).sum(1) + 1).tolist()
    return np.array(ranks)


def _clusters(captioner: Captioner, sample: HeldOut, seed: int) -> dict[str, tuple[float, float]]:
    """Mean similarity of captions (inside a cluster, across clusters), K-Means over each feature and form."""
    import faiss

    _, vectors = _tokens(captioner, sample.features)
    codes = captioner.quantiser.codebook.codes.detach().numpy()
    names = np.array(sample.families)
    apart, similarity = names[:, None] != names[None], sample.own @ sample.own.T
    assigned: dict[str, NDArray[Any]] = {
        f"codes, {form}": fit(vectors, codes, CLUSTERS, form, seed).assign(vectors) for form in FORMS
    }
    means = sample.features.mean(1)
    for feature, x in (("image (encoder, mean token)", means - means.mean(0)), ("text (caption as found)", sample.own)):
        unit = np.ascontiguousarray(x / np.linalg.norm(x, axis=1, keepdims=True), np.float32)
        kmeans = faiss.Kmeans(unit.shape[1], CLUSTERS, niter=25, nredo=3, seed=seed)
        kmeans.train(unit)
        assigned[feature] = kmeans.index.search(unit, 1)[1].ravel()
    assigned["at random"] = np.random.default_rng(seed).integers(CLUSTERS, size=len(names))
    result = {}
    for name, of in assigned.items():
        together = (of[:, None] == of[None]) & apart
        result[name] = (float(similarity[together].mean()), float(similarity[~together & apart].mean()))
    return result


# --- the sample bundle --------------------------------------------------------------------------------------------------------


def _bundle() -> dict[str, Any]:
    """ITM of captions as found, generated and refined; pictures of both, and of examples."""
    model, sample = load_model(BUNDLE, "cpu"), _held_out("sample")
    pictures = [model.decode(i) for i in sample.images]
    vectors = model.encode(pictures)
    said = model.caption(vectors, pictures)
    refined = [refine(o, g) for o, g in zip(sample.captions, said, strict=True)]
    scores = {
        n: model.match(vectors, c, pictures)
        for n, c in (("original", sample.captions), ("refined", refined), ("generated", said))
    }
    shuffled = np.random.default_rng(0).permutation(len(said))
    wrong = model.match(vectors, [sample.captions[i] for i in shuffled], pictures)
    spoken = _text_encoder().embed(said)
    near = (spoken * sample.own).sum(1)
    _draw_itm(scores)
    _draw_examples(sample, said, near, scores["original"])
    return {
        "bundle": model.version,
        "gate": model.gate,
        "itm_auc": auc(scores["original"], wrong),
        "agreement_auc": auc(near.astype(np.float32), (spoken[shuffled] * sample.own).sum(1).astype(np.float32)),
        "itm_median": {n: float(np.median(s)) for n, s in scores.items()},
        "itm_below_a_tenth": {n: float((s < 0.1).mean()) for n, s in scores.items()},
        "nearer": str(rate_by_family(wins(spoken, sample.own, sample.families), sample.families)),
    }


def _draw_itm(scores: dict[str, NDArray[np.float32]]) -> None:
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for name, colour in (("original", "#888888"), ("refined", "#1f6fb4")):
        axes.hist(scores[name], bins=20, range=(0, 1), alpha=0.6, color=colour, label=f"{name} captions")
    axes.set_xlabel("ITM score (the bundle's own head)")
    axes.set_ylabel("held-out pairs")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURES / "itm.png", dpi=110)
    plt.close(figure)


def _draw_examples(sample: HeldOut, said: list[str], near: NDArray[np.float32], itm: NDArray[np.float32]) -> None:
    """Four each of the best, the middle and the worst tenth by agreement with the caption as found, drawn by seed."""
    plt, rng = _pyplot(), np.random.default_rng(4)
    order = np.argsort(-near)
    tenth = len(order) // 10
    middle = order[len(order) // 2 - tenth // 2 : len(order) // 2 + tenth // 2]
    groups = (("good", order[:tenth]), ("middling", middle), ("bad", order[-tenth:]))
    figure, axes = plt.subplots(3, 4, figsize=(12, 10.5), layout="constrained")
    for row, (name, group) in zip(axes, groups, strict=True):
        for cell, i in zip(row, rng.choice(group, 4, replace=False), strict=True):
            cell.imshow(Image.open(io.BytesIO(sample.images[i])))
            cell.set_title(
                f"{name}, ITM {itm[i]:.2f}\nfound: {_short(sample.captions[i])}\ngenerated: {_short(said[i])}",
                fontsize=8,
            )
            cell.axis("off")
    figure.savefig(PICTURES / "examples.png", dpi=80)
    plt.close(figure)


def _short(text: str) -> str:
    return (text if len(text) <= 30 else text[:29] + "…").replace("$", r"\$")


# --- data ---------------------------------------------------------------------------------------------------------------------


def _members(pattern: str) -> Iterator[tuple[dict[str, Any], bytes]]:
    """(its .json, its image) of every pair."""
    for shard in sorted(ROOT.glob(pattern)):
        with tarfile.open(shard) as tar:
            about: dict[str, dict[str, Any]] = {}
            images: dict[str, bytes] = {}
            for member in tar:
                key, _, extension = member.name.partition(".")
                content = tar.extractfile(member)
                if content is not None and extension == "json":
                    about[key] = json.loads(content.read())
                elif content is not None and extension in ("jpg", "png"):
                    images[key] = content.read()
            yield from ((about[key], images[key]) for key in sorted(about))


def _noisy() -> Iterator[TrainingPair]:
    apart = {
        a["uid"] for pattern in ("corpus/sample/*.tar", "corpus/full/bootstrap-*.tar") for a, _ in _members(pattern)
    }
    for about, image in _members("corpus/full/noisy-*.tar"):
        if about["uid"] not in apart:
            yield TrainingPair(about["uid"], about["caption"], image)


def _clean(*, held_out: bool) -> Iterator[TrainingPair]:
    for about, image in _members("corpus/full/clean-*.tar"):
        fifth = hashlib.sha256(f"stage1/{about['family']}".encode()).digest()[0] % 5 == 0
        if fifth == held_out:
            yield TrainingPair(about["family"], about["caption"], image)


def _held_out(which: str) -> HeldOut:
    """With features from the encoder that all variants share, computed once."""
    if which == "sample":
        pairs = [TrainingPair(a["family"], a["caption"], i) for a, i in _members("corpus/sample/*.tar")]
    else:
        pairs = list(_clean(held_out=True))
    file = WORK / "cache" / f"held-out-{which}.npy"
    if not file.exists():
        from models.pretrained import load_encoder

        captioner = Captioner(TINY)
        load_encoder(captioner, None)
        file.parent.mkdir(parents=True, exist_ok=True)
        encoder = PaddedEncoder(captioner, torch.device("cpu"))
        np.save(file, encoder.features([decode(p.image, TINY.side) for p in pairs]).astype(np.float16))
    captions = [p.caption.strip() for p in pairs]
    features = np.load(file, allow_pickle=False).astype(np.float32)
    return HeldOut([p.image for p in pairs], captions, [p.id for p in pairs], features, _text_encoder().embed(captions))


def _text_encoder() -> TextEncoder:
    global _ENCODER
    if _ENCODER is None:
        _ENCODER = TextEncoder(packaged_text_encoder())
    return _ENCODER


_ENCODER: TextEncoder | None = None

# --- the page -----------------------------------------------------------------------------------------------------------------

COLUMNS = (
    ("loss", "loss, nats a piece", "{:.3f}"),
    ("perplexity", "perplexity", "{:.1f}"), ("nearer", "nearer than another", "{:.1%}"),
    ("similarity", "similarity", "{:.3f}"), ("bleu4", "BLEU-4", "{:.3f}"), ("found_first", "found first of 100", "{:.1%}"),
    ("found_in_ten", "in the first 10", "{:.1%}"), ("median_rank", "median rank", "{:.0f}"),
)  # fmt: skip


def _render() -> None:
    units = _done()
    if not units:
        return
    PICTURES.mkdir(exist_ok=True)
    lines = [f"Units measured: {len(units)}; {min(u['date'] for u in units)} to {max(u['date'] for u in units)}.", ""]
    lines += ["### Held out, after the noisy phase", "", _header(), "|---|---|" + "---|" * len(COLUMNS)]
    for name, (what, *_rest) in VARIANTS.items():
        lines += _row(what, [u["noisy"] for u in units if u["unit"].startswith(f"{name}/") and "noisy" in u])
    lines += [
        "",
        "### … and after the clean phase (one epoch, decoder only)",
        "",
        _header(),
        "|---|---|" + "---|" * len(COLUMNS),
    ]
    for name, (what, *_rest) in VARIANTS.items():
        lines += _row(what, [u["clean"] for u in units if u["unit"].startswith(f"{name}/") and "clean" in u])
    lines += [
        "", "### Clean captions held out: loss before and after the clean phase", "",
        "| codebook | seeds | before | after |", "|---|---|---|---|",
    ]  # fmt: skip
    for name, (what, *_rest) in VARIANTS.items():
        some = [u for u in units if u["unit"].startswith(f"{name}/")]
        if some:
            before, after = (_spread([u[p]["clean_loss"] for u in some], "{:.3f}") for p in ("noisy", "clean"))
            lines.append(f"| {what} | {len(some)} | {before} | {after} |")
    lines += [
        "", "### Codes used by the held-out images, after the noisy phase", "",
        "| codebook | seeds | used of 1,000 | perplexity |", "|---|---|---|---|",
    ]  # fmt: skip
    for name, (what, *_rest) in VARIANTS.items():
        some = [u for u in units if u["unit"].startswith(f"{name}/")]
        if some and name != "none":
            used, even = (_spread([u["noisy"][k] for u in some], "{:.0f}") for k in ("codes_used", "code_perplexity"))
            lines.append(f"| {what} | {len(some)} | {used} | {even} |")
    _draw_usage(units)
    lines += ["", "![codes in use and their perplexity over training](stage1/codes.png)", ""]
    if clustered := [u["clusters"] for u in units if "clusters" in u]:
        lines += [
            f"### Clusters: similarity of two captions, {CLUSTERS} clusters of the sample, pairs of one family left out", "",
            "| clustered | seeds | inside | across |", "|---|---|---|---|",
        ]  # fmt: skip
        for name in clustered[0]:
            inside, across = (_spread([c[name][k] for c in clustered], "{:.3f}") for k in (0, 1))
            lines.append(f"| {name} | {len(clustered)} | {inside} | {across} |")
    for unit in units[::-1]:
        if unit["unit"].startswith("bundle"):
            lines += ["", *_bundle_lines(unit)]
            break
    page = _replaced(PAGE.read_text("utf-8"), "measured", lines)
    PAGE.write_text(_replaced(page, "settings", _settings()), "utf-8")


def _replaced(page: str, name: str, lines: Sequence[str]) -> str:
    """`page` with `lines` between the markers of that name."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = page.partition(begin)
    return before + begin + "\n\n" + "\n".join(lines) + "\n\n" + end + rest.partition(end)[2]


def _settings() -> list[str]:
    """Every name that --set takes, with its value in each architecture."""
    sides = [ARCHITECTURES[name].as_dict() | asdict(RECIPES[name]) for name in ARCHITECTURES]
    lines = [f"| name | {' | '.join(ARCHITECTURES)} |", "|---|" + "---|" * len(sides)]
    return lines + [f"| `{name}` | {' | '.join(str(side[name]) for side in sides)} |" for name in sides[0]]


def _bundle_lines(unit: dict[str, Any]) -> list[str]:
    rows = [
        f"| {name} | {unit['itm_median'][name]:.3f} | {unit['itm_below_a_tenth'][name]:.1%} |"
        for name in ("original", "generated", "refined")
    ]
    return [
        f"### The sample bundle {unit['bundle']}, one seed, on the held-out sample", "",
        f"Generated caption nearer to its own than to a random one: {unit['nearer']}. AUC against shuffled captions: ITM head "
        f"{unit['itm_auc']:.3f}, agreement of T_o and T_g in text space {unit['agreement_auc']:.3f}. "
        f"Gate, the median of the bootstrap shard: {unit['gate']:.3f}.", "",
        "| captions | median ITM | below 0.1 |", "|---|---|---|", *rows, "",
        "![ITM of original and refined captions](stage1/itm.png)", "",
        "![good, middling and bad captions](stage1/examples.png)",
    ]  # fmt: skip


def _header() -> str:
    return "| codebook | seeds | " + " | ".join(title for _, title, _ in COLUMNS) + " |"


def _row(what: str, results: list[dict[str, float]]) -> list[str]:
    if not results:
        return []
    cells = []
    for key, _, form in COLUMNS:
        cells.append(_spread([np.exp(r["loss"]) if key == "perplexity" else r[key] for r in results], form))
    return [f"| {what} | {len(results)} | " + " | ".join(cells) + " |"]


def _spread(values: Sequence[float], form: str) -> str:
    """Mean, and the standard deviation over the seeds."""
    if len(values) < 2:
        return form.format(float(np.mean(values)))
    return f"{form.format(float(np.mean(values)))} ± {form.format(float(np.std(values, ddof=1)))}"


def _draw_usage(units: list[dict[str, Any]]) -> None:
    plt = _pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for name, (what, *_rest) in VARIANTS.items():
        curves = [u["curve"] for u in units if u["unit"].startswith(f"{name}/")]
        if not curves or name == "none":
            continue
        for column, axes in zip((2, 3), panels, strict=True):
            noisy = [[(e[1], e[column]) for e in curve if e[0] == "noisy"] for curve in curves]
            epochs = [e for e, _ in noisy[0]]
            values = np.array([[v for _, v in curve] for curve in noisy])
            axes.plot(epochs, values.mean(0), label=what)
            axes.fill_between(epochs, values.min(0), values.max(0), alpha=0.2)
    for axes, title in zip(panels, ("codes in use, of 1,000", "perplexity of their use"), strict=True):
        axes.set_xlabel("epoch of the noisy phase")
        axes.set_ylabel(title)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=7)
    figure.savefig(PICTURES / "codes.png", dpi=110)
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    PICTURES.mkdir(exist_ok=True)
    return plt


if __name__ == "__main__":
    raise SystemExit(main())
