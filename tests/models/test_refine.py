"""T = T_o + T_g."""

import pytest

from models.refine import refine


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
