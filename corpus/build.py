"""`python -m corpus.build`: full corpora (noisy, clean), bootstrap shard and committed sample, the same bytes every time.

Sample and bootstrap shard are drawn from whole title families, apart from each other: training excludes both. Figures are
measured on the sample; clusters, gate and baselines come from the bootstrap shard, as in a stream from pairs that are new.
"""

import argparse
import hashlib
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from corpus.debian import PACKAGES, CorpusBuildError, fetch, unpack
from corpus.families import families, family_key
from corpus.render import render, thumbnail
from corpus.shards import Pair, write_shards
from corpus.sources import Item, openclipart, tuxpaint

PAIRS_PER_SHARD = 1000
SAMPLE_PAIRS = 1250
SAMPLE_BYTES_MAX = 12_000_000 * 97 // 100  # below 12 MB with tar's padding
BOOTSTRAP_PAIRS = 600  # of 7,000: the median ITM of so many is known to ±.03, and training can spare them
FAMILY_MAX = 40  # larger families (card games, flags of one series) stay in training: one of them would fill the sample


def build(out: Path, sample: Path, debs: Path, work: Path, processes: int) -> dict[str, int]:
    """Fetch, render, group, split and write; returns how many pairs each corpus has."""
    roots = [unpack(fetch(package, debs), work) for package in PACKAGES]
    items = [*openclipart(roots[0]), *tuxpaint(roots[1])]
    print(f"{len(items)} images with a caption; drawing them", flush=True)
    drawn = _draw(items, processes)
    kept = [(item, *image) for item, image in zip(items, drawn, strict=True) if image is not None]
    print(f"{len(kept)} drawn, {len(items) - len(kept)} refused or blank; grouping into families", flush=True)
    names = families(
        [family_key(item.title, item.path) for item, _, _ in kept],
        np.stack([thumbnail(image) for _, image, _ in kept]),
    )
    pairs = [_pair(item, image, ext, name) for (item, image, ext), name in zip(kept, names, strict=True)]
    noisy = [p for p in pairs if p.fields["source"] == "openclipart"]
    clean = [p for p in pairs if p.fields["source"] == "tuxpaint"]
    clean_families = {str(p.fields["family"]) for p in clean}
    held_out = _whole_families("sample", noisy, clean_families, SAMPLE_PAIRS, SAMPLE_BYTES_MAX)
    taken = clean_families | {str(p.fields["family"]) for p in held_out}
    new = _whole_families("bootstrap", noisy, taken, BOOTSTRAP_PAIRS, SAMPLE_BYTES_MAX)
    write_shards(noisy, out, "noisy", PAIRS_PER_SHARD)
    write_shards(clean, out, "clean", PAIRS_PER_SHARD)
    write_shards(new, out, "bootstrap", PAIRS_PER_SHARD)
    write_shards(held_out, sample, "sample", PAIRS_PER_SHARD // 2)
    return {"noisy": len(noisy), "clean": len(clean), "bootstrap": len(new), "sample": len(held_out)}


def _draw(items: Sequence[Item], processes: int) -> list[tuple[bytes, str] | None]:
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(render, [item.file for item in items], chunksize=16))


def _pair(item: Item, image: bytes, extension: str, family: str) -> Pair:
    fields = {
        "source": item.source,
        "url": f"debian:{item.source}/{item.path}",
        "licence": item.licence,
        "title": item.title,
        "keywords": list(item.keywords),
        "description": item.description,
        "family": family,
    }
    return Pair(item.uid, image, extension, item.caption, fields)


def _whole_families(
    name: str, noisy: Sequence[Pair], not_these: set[str], pairs_max: int, bytes_max: int
) -> list[Pair]:
    """Whole families in the order of a hash of their name, until there are enough pairs or bytes."""
    sizes = Counter(str(p.fields["family"]) for p in noisy)
    room, chosen = bytes_max, list[Pair]()
    for family in sorted(sizes, key=lambda one: hashlib.sha256(f"{name}/{one}".encode()).digest()):
        members = [p for p in noisy if p.fields["family"] == family]
        size = sum(_tar_bytes(p) for p in members)
        if family in not_these or len(members) > FAMILY_MAX or size > room:
            continue
        chosen += members
        room -= size
        if len(chosen) >= pairs_max:
            break
    return chosen


def _tar_bytes(pair: Pair) -> int:
    """A member takes a header and is padded to 512 bytes; about 1 KiB of JSON and text is allowed for."""
    return 512 * (3 + 3) + len(pair.image) + 512


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of `make corpus`."""
    parser = argparse.ArgumentParser(prog="python -m corpus.build", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("corpus/full"), help="folder of all but the sample")
    parser.add_argument(
        "--sample", type=Path, default=Path("corpus/sample"), help="folder of the held-out sample-*.tar"
    )
    parser.add_argument("--debs", type=Path, help="folder with the .deb files (default: fetched into OUT/debs)")
    parser.add_argument("--processes", type=int, default=2, help="how many draw at the same time")
    options = parser.parse_args(arguments)
    try:
        counts = build(
            options.out,
            options.sample,
            options.debs or options.out / "debs",
            options.out / "unpacked",
            options.processes,
        )
    except CorpusBuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(", ".join(f"{name} {count:,} pairs" for name, count in counts.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
