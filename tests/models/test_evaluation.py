"""The held-out figures: what they are worth is decided by simple cases."""

import numpy as np
import pytest

from models.evaluation import auc, rate_by_family, wins

RNG = np.random.default_rng(0)


def unit(rows: int, width: int = 16) -> np.ndarray:
    x = RNG.normal(size=(rows, width)).astype(np.float32)
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), np.float32)


def test_perfect_captions_always_win_and_a_constant_one_wins_half_of_the_time() -> None:
    own, families = unit(200), [str(i) for i in range(200)]

    assert wins(own, own, families).mean() == pytest.approx(1)
    assert wins(np.repeat(unit(1), 200, 0), own, families).mean() == pytest.approx(0.5)


def test_captions_of_the_same_family_do_not_compete() -> None:
    own = unit(4)[[0, 0, 0, 1]]

    assert wins(own, own, ["a", "a", "a", "b"]).tolist() == [1, 1, 1, 1]


def test_equal_captions_of_two_families_tie() -> None:
    own = np.repeat(unit(1), 2, 0)

    assert wins(own, own, ["a", "b"]).tolist() == [0.5, 0.5]


def test_the_interval_widens_when_few_families_make_up_the_pairs() -> None:
    values = RNG.random(400)
    clustered = np.repeat(RNG.random(8), 50)

    apart = rate_by_family(values, [str(i) for i in range(400)])
    together = rate_by_family(clustered, [str(i // 50) for i in range(400)])

    assert apart.low < apart.value < apart.high and apart.high - apart.low < 0.08
    assert together.high - together.low > 0.2


def test_auc_agrees_with_counting() -> None:
    positive, negative = np.array([0.9, 0.5, 0.5, 0.2], np.float32), np.array([0.5, 0.1, 0.3], np.float32)

    counted = np.mean([(p > n) + 0.5 * (p == n) for p in positive for n in negative])

    assert auc(positive, negative) == pytest.approx(counted)
