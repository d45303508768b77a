"""T = T_o + T_g."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.refine import refine, survives


def test_the_original_stays_whole_and_first() -> None:
    assert refine("My dog!  ", "a brown dog") == "My dog!   a brown dog"
    assert refine("My dog", "a brown dog", joiner="; ") == "My dog; a brown dog"


@pytest.mark.parametrize("generated", ["", "  ", "brown dog", "Brown  dog.", "the brown dog runs"])
def test_what_the_original_says_already_is_not_said_again(generated: str) -> None:
    assert refine("The brown dog runs", generated) == "The brown dog runs"


def test_part_of_a_word_is_not_a_repetition() -> None:
    assert refine("scatter", "cat") == "scatter cat"


def test_without_an_original_the_generated_caption_stands_alone() -> None:
    assert refine("", "a dog") == "a dog"


@given(
    original=st.text(max_size=200),
    generated=st.lists(st.text("abcdefg", min_size=1, max_size=5), min_size=1, max_size=8).map(" ".join),
    joiner=st.sampled_from([" ", "; ", " | "]),
)
def test_a_trainer_s_cut_leaves_the_generated_caption_whole(original: str, generated: str, joiner: str) -> None:
    refined = refine(original, generated, joiner, words_max=10)

    assert survives(refined, generated, 10)


def test_without_a_limit_a_long_original_pushes_the_generated_caption_behind_the_cut() -> None:
    original = " ".join(f"word{i}" for i in range(40))

    assert not survives(refine(original, "a dog"), "a dog", 30)
    assert refine(original, "a dog", words_max=30) == " ".join(f"word{i}" for i in range(28)) + " a dog"


def test_a_short_original_stays_whole_under_a_limit() -> None:
    assert refine("Two  spaces,\tkept", "a dog", "; ", words_max=30) == "Two  spaces,\tkept; a dog"


def test_unicode_and_what_looks_like_code_stay_as_they_are() -> None:
    original = "Straße 漢字 👩‍👩‍👧 e\u0301 %s {0} \\1 $HOME <b>"

    assert refine(original, "a {0} dog \\g<1>") == original + " a {0} dog \\g<1>"
