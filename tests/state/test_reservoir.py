"""The reservoir of a cell: the k of smallest priority ÷ rate whatever the order, and nested shares for snapshots."""

from __future__ import annotations

import random
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from state.priority import hash_id, id_key
from state.quota import Ratio
from state.reservoir import OFFSET_MASK, Verdict, heap_of, mark_of, offer, rank_of, take_share
from tests.state.test_quota import ratios

priorities = st.integers(0, 2**64 - 1)


def fill(marks: list[int], cap: int) -> tuple[set[int], list[Verdict]]:
    heap: list[int] = []
    verdicts = [offer(heap, mark, cap) for mark in marks]
    return {-mark for mark in heap}, verdicts


@given(st.lists(priorities, unique=True, max_size=40), st.integers(1, 10), st.randoms(use_true_random=False))
def test_a_full_cell_holds_the_smallest_whatever_the_order(ranks: list[int], cap: int, dice: random.Random) -> None:
    marks = [mark_of(rank, offset) for offset, rank in enumerate(ranks)]
    shuffled = dice.sample(marks, len(marks))

    inside, _ = fill(shuffled, cap)

    assert inside == set(sorted(marks)[:cap])


@given(st.lists(priorities, max_size=40), st.integers(1, 10))
def test_verdicts_account_for_everything_in_the_cell(ranks: list[int], cap: int) -> None:
    inside, verdicts = fill([mark_of(rank, offset) for offset, rank in enumerate(ranks)], cap)

    admitted = {offset for offset, verdict in enumerate(verdicts) if verdict.admitted}
    evicted = {offset for verdict in verdicts for offset in verdict.evicted}
    assert admitted - evicted == {mark & OFFSET_MASK for mark in inside}
    assert len(inside) == min(cap, len(ranks))


@given(st.lists(priorities, unique=True, min_size=1, max_size=30), st.integers(1, 10), st.integers(0, 29))
def test_a_heap_that_was_stored_goes_on_like_one_that_was_not(ranks: list[int], cap: int, at: int) -> None:
    marks = [mark_of(rank, offset) for offset, rank in enumerate(ranks)]
    heap: list[int] = []
    for mark in marks[:at]:
        offer(heap, mark, cap)

    reopened = heap_of(sorted(-mark for mark in heap))

    assert [offer(reopened, mark, cap) for mark in marks[at:]] == [offer(heap, mark, cap) for mark in marks[at:]]


def test_an_entry_sampled_at_half_the_rate_stands_for_two() -> None:
    assert rank_of(1000, Ratio(1, 2)) == 2 * rank_of(1000, Ratio(1, 1))
    assert mark_of(rank_of(1000, Ratio(1, 4)), 0) > mark_of(rank_of(1999, Ratio(1, 2)), 9)


def test_the_cap_samples_uniformly_in_every_order() -> None:
    # 400 streams of 20 pairs with other ids each, 5 kept: every place in the stream is as likely
    kept: Counter[int] = Counter()
    key = id_key(1)
    for stream in range(400):
        inside, _ = fill([mark_of(hash_id(key, f"{stream}/{place}")[1], place) for place in range(20)], 5)
        kept.update(mark & OFFSET_MASK for mark in inside)

    spread = sum((kept[place] - 100) ** 2 / 100 for place in range(20))
    assert spread < 60  # chi-square with 19 degrees of freedom: 1 in 200,000 at 60


@given(st.lists(priorities, unique=True, max_size=60), ratios, ratios, ratios, st.integers(0, 99))
def test_a_snapshot_at_a_smaller_ratio_is_inside_the_one_at_a_larger(
    ranks: list[int], one: Ratio, other: Ratio, sampled: Ratio, cluster: int
) -> None:
    smaller, larger = sorted((one, other), key=lambda ratio: ratio.share)
    assume(larger.share <= sampled.share)

    few = take_share(ranks, smaller, sampled, 7, 0, 0, cluster)
    many = take_share(ranks, larger, sampled, 7, 0, 0, cluster)

    assert many[: len(few)] == few
    exact = len(ranks) * larger.share / sampled.share
    assert Fraction(len(many)) - exact < 1
    assert exact - len(many) < 1
    assert sorted(ranks)[: len(many)] == [ranks[i] for i in many]


def test_a_snapshot_at_the_streams_own_ratio_takes_everything() -> None:
    assert sorted(take_share(range(17), Ratio(1, 4), Ratio(1, 4), 1, 0, 0, 0)) == list(range(17))


@pytest.mark.parametrize("entries", [1, 3, 10])
def test_the_share_of_small_cells_is_right_on_average(entries: int) -> None:
    cells = 4000

    taken = sum(len(take_share(range(entries), Ratio(1, 10), Ratio(1, 4), 5, 0, 0, cell)) for cell in range(cells))

    # each cell is off by less than one, independently: six standard deviations of their sum
    assert abs(taken - cells * entries * 0.4) < 6 * 0.5 * cells**0.5


def test_every_entry_of_a_cell_is_as_likely_in_a_snapshot() -> None:
    key = id_key(9)
    taken: Counter[int] = Counter()
    for cell in range(1000):
        ranks = [hash_id(key, f"{cell}/{place}")[1] for place in range(8)]
        taken.update(take_share(ranks, Ratio(1, 8), Ratio(1, 4), 9, 0, 0, cell))

    spread = sum((taken[place] - 500) ** 2 / 500 for place in range(8))
    assert spread < 45  # chi-square with 7 degrees of freedom


@given(st.text(), st.text(), st.integers(0, 2**64 - 1))
def test_an_id_has_one_hash_and_one_priority_a_seed(one: str, other: str, seed: int) -> None:
    key = id_key(seed)
    assert hash_id(key, one) == hash_id(id_key(seed), one)
    assert (hash_id(key, one) == hash_id(key, other)) == (one == other)
    assert hash_id(key, one) != hash_id(id_key(seed ^ 1), one)
