"""The quota: of each q counted pairs of a cell exactly p are kept, and nobody can tell beforehand which."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from state.errors import BadSetting
from state.quota import BLOCK_MAX, Ratio, kept_positions
from state.settings import AUTHORS, PAPER, RULES, rule_named

ratios = st.builds(lambda q, share: Ratio.of(max(1, round(q * share)), q), st.integers(1, BLOCK_MAX), st.floats(0, 1))


def kept_up_to(n: int, ratio: Ratio, cluster: int = 0, seed: int = 0) -> int:
    """Kept among the first n counted pairs of a cell."""
    return sum(kept_positions(seed, 0, 0, cluster, i // ratio.q, ratio) >> i % ratio.q & 1 for i in range(n))


@given(ratios, st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**40))
def test_every_block_keeps_exactly_p_of_q(ratio: Ratio, seed: int, cluster: int, block: int) -> None:
    mask = kept_positions(seed, 1, 2, cluster, block, ratio)

    assert mask.bit_count() == ratio.p
    assert mask < 1 << ratio.q


@given(st.integers(1, BLOCK_MAX), st.integers(0, 99), st.integers(0, 400))
def test_for_1_in_q_the_kept_count_is_within_one_of_the_share_at_every_moment(q: int, cluster: int, n: int) -> None:
    assert abs(kept_up_to(n, Ratio(1, q), cluster) - n / q) < 1


@pytest.mark.parametrize("ratio", [Ratio(1, 4), Ratio(1, 2), Ratio(3, 7), Ratio(9, 10)])
def test_every_position_is_kept_with_the_same_probability(ratio: Ratio) -> None:
    blocks = 4000

    kept = Counter(
        position
        for block in range(blocks)
        for position in range(ratio.q)
        if kept_positions(3, 0, 0, 5, block, ratio) >> position & 1
    )

    expected = blocks * ratio.p / ratio.q
    spread = sum((kept[position] - expected) ** 2 / expected for position in range(ratio.q))
    assert spread < 40  # chi-square with at most 9 degrees of freedom: 1 in 100,000 at 40


def test_cells_epochs_partitions_and_seeds_keep_different_positions() -> None:
    ratio = Ratio(1, 100)
    of = [
        [kept_positions(seed, epoch, partition, cluster, block, ratio) for block in range(8)]
        for seed, epoch, partition, cluster in ((0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1))
    ]

    assert len({tuple(masks) for masks in of}) == len(of)


@pytest.mark.parametrize(
    ("text", "ratio"),
    [
        ("25", (1, 4)),
        ("25%", (1, 4)),
        ("1/4", (1, 4)),
        ("50", (1, 2)),
        ("100", (1, 1)),
        ("12.5 %", (1, 8)),
        ("2/8", (1, 4)),
    ],
)
def test_a_ratio_reads_as_percentage_or_fraction(text: str, ratio: tuple[int, int]) -> None:
    assert Ratio.parse(text) == ratio
    assert Ratio.parse(str(Ratio.parse(text))) == ratio


@pytest.mark.parametrize(
    "text", ["0", "101", "0/4", "5/4", "1/0", "a quarter", "", "-25", "0.25", "33.3", "1/101", "nan"]
)
def test_a_ratio_that_cannot_be_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(BadSetting) as refused:
        Ratio.parse(text)

    assert "\n" not in str(refused.value)


def test_the_rules_paper_and_authors_go_by_name() -> None:
    assert rule_named("paper") == PAPER == ("paper", Ratio.parse("25"), 3000, False)
    assert rule_named("authors") == AUTHORS == ("authors", Ratio.parse("50"), 1000, True)
    assert list(RULES) == ["paper", "authors"]
    with pytest.raises(BadSetting, match="authors, paper"):
        rule_named("pape")
