"""`python -m corpus.evaluate`: a bundle on held-out pairs, as figures that stand beside it.

Shards whose families training has seen give figures that mean nothing: pass corpus/sample, and train with it excluded.
"""

import argparse
import json
import math
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from models.blip_matching import BlipScorer
from models.bundle import read_files
from models.captioner import Captioner
from models.clustering import FORMS, fit
from models.device import choose_device
from models.errors import ModelError
from models.evaluation import auc, rate_by_family, wins
from models.images import decode
from models.loaded import CaptionerParts, LoadedModel
from models.matching import text_agreement
from models.model import Picture, Vectors
from models.refine import refine, survives
from models.text_embeddings import TextEncoder, packaged_text_encoder
from models.vocabulary import PAD, START, STOP, UNK, Vocabulary

PARTITIONS = 2  # of the demo
BLIP_IMAGES_AT_ONCE = 64
CAPTION_TOKENS = 30  # the authors' loader drops what stands behind


def evaluate(bundle: Path, shards: Sequence[Path], seed: int, blip: Path | None = None) -> list[str]:
    """The figures as lines of Markdown."""
    manifest, contents = read_files(bundle)
    parts = CaptionerParts.of(manifest, contents)
    model = LoadedModel.of(manifest, contents, "cpu")
    images, captions, families, titles = _read(shards)
    started = time.perf_counter()
    pictures = [model.decode(i) for i in images]
    decoding = time.perf_counter() - started
    started = time.perf_counter()
    vectors = model.encode(pictures)
    encoding = time.perf_counter() - started
    started = time.perf_counter()
    generated = model.caption(vectors, pictures)
    captioning = time.perf_counter() - started
    started = time.perf_counter()
    scores = model.match(vectors, captions, pictures)
    matching = time.perf_counter() - started

    encoder = TextEncoder(packaged_text_encoder())
    refined = [refine(o, g) for o, g in zip(captions, generated, strict=True)]
    own, said = encoder.embed(captions), encoder.embed(generated)
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(captions))
    constant = encoder.embed([Counter(generated).most_common(1)[0][0]] * len(captions))
    negatives = model.match(vectors, [captions[i] for i in shuffled], pictures)
    novel = [i for i, count in enumerate(Counter(families)[f] for f in families) if count == 1]
    usage = np.bincount(vectors.ravel(), minlength=model.codebook_size)
    seen = torch.cat(list(model.seen(vectors, pictures)))
    nats, lengths, unknown = _surprise(parts.captioner, parts.vocabulary, seen, captions)
    perplexity = math.exp(float(nats.sum()) / int(lengths.sum()))
    ratio_auc = _likelihood_ratio_auc(parts, seen, captions, [captions[i] for i in shuffled])
    occupancy = np.bincount(model.assign(vectors), minlength=model.clusters)
    halves = rng.permutation(len(captions)) % PARTITIONS
    cells = [np.bincount(model.assign(vectors[halves == h]), minlength=model.clusters) for h in range(PARTITIONS)]
    lines = [
        f"# Bundle {model.version} on {len(captions):,} held-out pairs of {len(set(families)):,} title families",
        "",
        "Made by `python -m corpus.evaluate` (see the Makefile); captions judged by all-MiniLM-L6-v2, mean pooled.",
        "Intervals: 95 %, resampling whole families. Captions of the same family do not compete.",
        "",
        "| nearer to the own caption than to a random other one | rate |",
        "|---|---|",
        f"| generated caption | {rate_by_family(wins(said, own, families), families)} |",
        f"| … of pairs whose family has no other pair ({len(novel)}) | "
        f"{rate_by_family(wins(said[novel], own[novel], [families[i] for i in novel]), [families[i] for i in novel])} |",
        f"| the most frequent generated caption, for every image | {rate_by_family(wins(constant, own, families), families)} |",
        f"| generated captions of shuffled images | {rate_by_family(wins(said[shuffled], own, families), families)} |",
        "",
        "| figure | value |",
        "|---|---|",
        f"| ITM: AUC against shuffled captions | {auc(scores, negatives):.3f} |",
        f"| … of the captioner's likelihood ratio, which costs two passes of the decoder | {ratio_auc:.3f} |",
        f"| … of a BLIP ITM checkpoint | {_blip_auc(blip, images, captions, shuffled)} |",
        f"| … of the agreement of T_o and T_g in text space (SIEVE) | "
        f"{auc(text_agreement(own, said), text_agreement(own[shuffled], said)):.3f} |",
        f"| ITM: median of the refined captions | {np.median(model.match(vectors, refined, pictures)):.3f} |",
        f"| ITM: median of the captions as found, of shuffled ones | {np.median(scores):.3f}, {np.median(negatives):.3f} |",
        f"| perplexity of the held-out captions, per word piece | {perplexity:.1f} |",
        f"| unknown pieces in the held-out captions | {unknown:.2%} |",
        f"| distinct generated captions | {len(set(generated)):,} |",
        f"| refined captions whose T_g survives a cut at {CAPTION_TOKENS} words; with `--caption-tokens {CAPTION_TOKENS}` | "
        f"{_surviving(captions, generated, None):.2%}; {_surviving(captions, generated, CAPTION_TOKENS):.2%} |",
        f"| codes used by the held-out images | {(usage > 0).sum():,} of {model.codebook_size:,} |",
        f"| clusters: pairs each (least, median, most) | {occupancy.min()}, {np.median(occupancy):.0f}, {occupancy.max()} |",
        f"| cells of {PARTITIONS} partitions: median pairs | {np.median(np.concatenate(cells)):.1f} |",
        f"| decode, encode, caption, match: images/s ({torch.get_num_threads()} threads; decode one) | "
        f"{len(captions) / decoding:.0f}, {len(captions) / encoding:.0f}, {len(captions) / captioning:.0f}, "
        f"{len(captions) / matching:.0f} |",
        "",
        "## Which form of the index vector keeps the meaning",
        "",
        "K-Means of these pairs in each form; mean similarity of two captions (all-MiniLM) inside a cluster, and across.",
        "",
        "| form | inside | across |",
        "|---|---|---|",
        *_forms(vectors, parts, own, model.clusters, families),
        "",
        "## Captions of pairs drawn at random",
        "",
        "| title | caption as found | generated | ITM |",
        "|---|---|---|---|",
    ]
    drawn = rng.permutation(len(captions))[:24]
    return lines + [
        f"| {_cell(titles[i])} | {_cell(captions[i])} | {_cell(generated[i])} | {scores[i]:.2f} |" for i in drawn
    ]


def _blip_auc(folder: Path | None, images: Sequence[bytes], captions: Sequence[str], shuffled: np.ndarray) -> str:
    if folder is None:
        return "not measured: no checkpoint was given"
    scorer = BlipScorer(folder, choose_device())
    scores: list[list[np.ndarray]] = [[], []]
    for start in range(0, len(images), BLIP_IMAGES_AT_ONCE):
        rows = range(start, min(start + BLIP_IMAGES_AT_ONCE, len(images)))
        pictures = [Picture(pixels, pixels) for pixels in (decode(images[i], scorer.side) for i in rows)]
        nothing = np.empty((len(rows), 0), np.uint16)  # it asks for no index vectors
        for into, texts in zip(scores, (captions, [captions[i] for i in shuffled]), strict=True):
            into.append(scorer.scores(nothing, [texts[i] for i in rows], pictures))
    return f"{auc(*(np.concatenate(part) for part in scores)):.3f}"


def _surviving(captions: Sequence[str], generated: Sequence[str], words_max: int | None) -> float:
    """Share of the refined captions whose generated part is read by a trainer that cuts at CAPTION_TOKENS words."""
    refined = [refine(o, g, words_max=words_max) for o, g in zip(captions, generated, strict=True)]
    return sum(survives(t, g, CAPTION_TOKENS) for t, g in zip(refined, generated, strict=True)) / len(refined)


def _forms(
    vectors: Vectors, parts: CaptionerParts, own: np.ndarray, clusters: int, families: Sequence[str]
) -> list[str]:
    """One row a form; pairs of one family are left out, since any form keeps identical pictures together."""
    codes = parts.captioner.quantiser.codebook.codes.numpy()
    similarity = own @ own.T
    names = np.array(families)
    apart = names[:, None] != names[None]
    rows = []
    for form in FORMS:
        assigned = fit(vectors, codes, clusters, form).assign(vectors)
        together = (assigned[:, None] == assigned[None]) & apart
        rows.append(f"| {form} | {similarity[together].mean():.3f} | {similarity[~together & apart].mean():.3f} |")
    return rows


@torch.inference_mode()
def _surprise(
    captioner: Captioner, vocabulary: Vocabulary, seen: torch.Tensor, captions: Sequence[str], *, shown: bool = True
) -> tuple[np.ndarray, np.ndarray, float]:
    """(nats of each caption, its pieces with the stop, share of unknown pieces); without the image where not `shown`.

    seen  (n, L, D) what the decoder is shown of each image.
    """
    pieces = vocabulary.encode(captions, captioner.config.caption_pieces_max)
    nats: list[float] = []
    for start in range(0, len(pieces), 64):
        rows = pieces[start : start + 64]
        longest = max(map(len, rows)) + 1
        inputs = torch.tensor([[START, *r] + [PAD] * (longest - len(r) - 1) for r in rows])
        targets = torch.tensor([[*r, STOP] + [PAD] * (longest - len(r) - 1) for r in rows])
        logits = captioner.decoder.logits(inputs, captioner.decoder.see(seen[start : start + 64] * float(shown)))
        lost = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PAD, reduction="none")
        nats += lost.view(targets.shape).sum(1).tolist()
    lengths = np.array([len(r) + 1 for r in pieces])
    return np.array(nats, np.float32), lengths, sum(r.count(UNK) for r in pieces) / max(1, int((lengths - 1).sum()))


def _likelihood_ratio_auc(
    parts: CaptionerParts, seen: torch.Tensor, captions: Sequence[str], others: Sequence[str]
) -> float:
    """What the captioner alone tells: log p(T | image) - log p(T) of true against shuffled captions."""
    ratios = []
    for texts in (captions, others):
        with_image, without = (
            _surprise(parts.captioner, parts.vocabulary, seen, texts, shown=shown)[0] for shown in (True, False)
        )
        ratios.append(without - with_image)
    return auc(*ratios)


def _read(shards: Sequence[Path]) -> tuple[list[bytes], list[str], list[str], list[str]]:
    """(images, captions, families, titles)."""
    images, captions, families, titles = [], [], [], []
    for shard in sorted(shards):
        with tarfile.open(shard) as tar:
            members = {m.name: m for m in tar}
            for name in sorted(n for n in members if n.endswith(".json")):
                about = json.load(tar.extractfile(members[name]))  # type: ignore[arg-type]
                key = name.removesuffix(".json")
                image = next(members[f"{key}.{e}"] for e in ("jpg", "png") if f"{key}.{e}" in members)
                images.append(tar.extractfile(image).read())  # type: ignore[union-attr]
                captions.append(about["caption"])
                families.append(about["family"])
                titles.append(about["title"])
    return images, captions, families, titles


def _cell(text: str) -> str:
    return text.replace("|", "\\|")[:80]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m corpus.evaluate", description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True, help="the bundle folder")
    parser.add_argument(
        "--shards", type=Path, nargs="+", required=True, help="held-out WebDataset shards of corpus.build"
    )
    parser.add_argument("--out", type=Path, help="file for the figures; they are printed in any case")
    parser.add_argument("--blip", type=Path, help="folder of a BLIP ITM checkpoint, to compare with")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffles and the resampling")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        lines = evaluate(options.bundle, options.shards, options.seed, options.blip)
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
