"""How well `recluster --dry-run` foretells pairs to come, by the size of its window, against a long stream: is its ± honest?

    python benchmarks/foretold.py --seeds 20        (5 minutes)

The corpora have too few pairs to look at 20,000 that come (docs/drift.md compares with as many as the window has), so pairs are
made up: each mixes two of twelve topics, which are distributions of codes without sharp borders. Prints a table by window.
"""

# ruff: noqa: E501  (a row of a table is a line)

from __future__ import annotations

import argparse
from collections import defaultdict

from models.threads import set_thread_environment

set_thread_environment()

import numpy as np  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from models.clustering import FORMS, fit, foretell, refit  # noqa: E402
from stream.recluster import MARGIN_WANTED, coming  # noqa: E402

CODES, TOKENS, TOPICS = 200, 24, 12
PAST, TO_COME = 4000, 20_000
WINDOWS = (500, 1000, 2000, 4000)
CODEBOOK = np.random.default_rng(5).normal(size=(CODES, 16)).astype(np.float32)
TOPIC_CODES = np.random.default_rng(77).dirichlet(np.full(CODES, 0.08), size=TOPICS).cumsum(1)
OLD = np.repeat([1 / 8, 0], [8, 4])
MIXES = {"unchanged": OLD, "drifted": np.repeat([1 / 16, 1 / 8], [8, 4]), "other": np.repeat([0, 1 / 4], [8, 4])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    seeds = parser.parse_args().seeds
    found: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for seed in range(seeds):
        for form in FORMS:
            for clusters in (16, 64):
                for case, pairs, off, margin in cases(form, clusters, seed):
                    found[case, pairs].append((off, margin))
    print(
        "| | pairs in window | cases | off by, root mean square (and the largest) | ± said, most | within the ± said | off by more than 2 points | … of those, ± said is below 2 points |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for (case, pairs), its in sorted(found.items(), key=lambda item: (item[0][1], list(MIXES).index(item[0][0]))):
        off, margin = np.abs(np.array(its)).T
        wide = off > 0.02
        print(
            f"| {case} | {pairs:,} | {len(its)} | {100 * np.sqrt((off**2).mean()):.1f} ({100 * off.max():.1f}) | ± {100 * margin.max():.1f} | "
            f"{(off <= margin).mean():.1%} | {wide.sum()} | {(wide & (margin <= MARGIN_WANTED)).sum()} |"
        )


def cases(form: str, clusters: int, seed: int) -> list[tuple[str, int, float, float]]:
    """(case, pairs in the window, what was said less what came, ± said) for bundles of that form and seed."""
    dice = np.random.default_rng([seed, clusters, FORMS.index(form)])
    live = fit(made_up(PAST, dice, OLD), CODEBOOK, clusters, form, seed)
    found = []
    for case, mix in MIXES.items():
        to_come = made_up(TO_COME, dice, mix)
        were = live.assign(to_come)
        for pairs in WINDOWS:
            apart, fitted = np.split(made_up(pairs, dice, mix), [pairs // 5])
            new = refit(live, fitted, apart, seed)
            said = coming(foretell(live, new, fitted, apart, seed))
            came = float((were != new.clustering.assign(to_come)).mean())
            found.append((case, pairs, said.moved - came, said.margin))
    return found


def made_up(rows: int, dice: np.random.Generator, mix: NDArray[np.float64]) -> NDArray[np.uint16]:
    """(rows, L) index vectors; mix  (TOPICS,) how often each topic comes."""
    one, other = dice.choice(TOPICS, (2, rows), p=mix)
    topics = np.where(dice.random((rows, TOKENS)) < dice.random(rows)[:, None], one[:, None], other[:, None])
    chance = dice.random((rows, TOKENS))
    vectors = np.empty((rows, TOKENS), np.uint16)
    for topic in range(TOPICS):
        its = topics == topic
        vectors[its] = np.minimum(np.searchsorted(TOPIC_CODES[topic], chance[its]), CODES - 1)
    return vectors


if __name__ == "__main__":
    main()
