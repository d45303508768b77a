"""Batches are a function of seed and step, and keep to what a recipe allows."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.batches import Draws, Examples, at_most
from models.errors import CorpusError
from models.pair_store import PairStore, TrainingPair
from models.vocabulary import MASK, PAD, of_pieces
from tests.models.conftest import CAPTIONS, jpeg

DRAWS = Draws(
    seed=3, batch=4, accumulation=2, caption_repeats_max=2, words_dropped=0.5, images_hidden=0.5, augment=True
)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    pairs = [TrainingPair(str(i), CAPTIONS[i % 6], jpeg(i % 8)) for i in range(18)]
    pairs += [TrainingPair("bad", "a cat", b"no image"), TrainingPair("mute", " ", jpeg(0))]
    words = of_pieces(sorted({w for c in CAPTIONS for w in c.split()}))
    store = PairStore.write(tmp_path_factory.mktemp("store") / "noisy", pairs, 32)
    return Examples(store, words, 8, 32, None, None)


def test_a_store_gives_back_what_it_was_given_and_leaves_out_what_says_or_shows_nothing(examples: Examples) -> None:
    store = examples.store

    assert len(store) == 18
    assert list(store.captions()) == [CAPTIONS[i % 6] for i in range(18)] and store.image(9) == jpeg(1)


def test_a_caption_comes_up_in_an_epoch_as_often_as_it_may(examples: Examples) -> None:
    epoch = examples.epoch(DRAWS, 0, 0)

    rows = np.concatenate(epoch)
    assert len(rows) == len(set(rows.tolist())) == 12  # six captions twice
    assert set(Counter(examples.store.captions(rows)).values()) == {2}
    assert all(len(batch) == 4 for batch in epoch)


def test_a_step_draws_the_same_again_and_something_else_in_another_epoch(examples: Examples) -> None:
    first, other = examples.epoch(DRAWS, 0, 0), examples.epoch(DRAWS, 0, 1)
    one, same = (examples.parts(first[0], DRAWS, 0, 0) for _ in range(2))

    assert np.array_equal(np.concatenate(first), np.concatenate(examples.epoch(DRAWS, 0, 0)))
    assert not np.array_equal(np.concatenate(first), np.concatenate(other))
    assert all(
        torch.equal(a.images, b.images) and torch.equal(a.inputs, b.inputs) for a, b in zip(one, same, strict=True)
    )


def test_the_parts_of_a_batch_weigh_together_as_much_as_the_batch(examples: Examples) -> None:
    parts = examples.parts(examples.epoch(DRAWS, 0, 0)[0], DRAWS, 0, 0)

    assert len(parts) == 2 and sum(p.language_share for p in parts) == pytest.approx(1)
    assert [p.share for p in parts] == [0.5, 0.5] and parts[0].images.shape == (2, 3, 32, 32)
    assert any(bool((p.inputs == MASK).any()) for p in parts) and not any(
        bool((p.targets == MASK).any()) for p in parts
    )
    assert all(int((p.targets[:, 0] != PAD).sum()) == 2 for p in parts)


def test_fewer_pairs_than_parts_are_refused(examples: Examples) -> None:
    many = Draws(**{**DRAWS.__dict__, "accumulation": 100})

    with pytest.raises(CorpusError, match="too few for 100 parts"):
        examples.epoch(many, 0, 0)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(1, 5))
def test_at_most_keeps_the_first_of_each_key_in_their_order(keys: list[int], times: int) -> None:
    order = np.random.default_rng(0).permutation(len(keys))
    seen: Counter[int] = Counter()
    expected = []
    for row in order.tolist():
        seen[keys[row]] += 1
        if seen[keys[row]] <= times:
            expected.append(row)

    assert at_most(np.array(keys), times, order).tolist() == expected
