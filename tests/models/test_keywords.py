"""Keywords and keyphrases of a corpus."""

from pathlib import Path

import pytest

from models.errors import CorpusError
from models.keywords import listed, stop_words, top_keywords

CAPTIONS = ["A red fire truck", "the fire truck in the street", "Fire truck!", "street, with a dog", "dog dog 123 _"]
CAPTIONS += ["one two three of ten things: house tree sun moon star cloud"]


def test_the_most_frequent_words_come_first_and_ties_are_alphabetical() -> None:
    assert top_keywords(CAPTIONS, 4) == ["dog", "fire", "fire truck", "truck"]


def test_stop_words_numbers_and_single_letters_are_no_keywords() -> None:
    words = top_keywords(CAPTIONS, 6)

    assert not {"the", "a", "in", "with", "123"} & set(words)
    assert {"the", "clipart"} <= stop_words()


def test_words_that_only_happen_to_meet_are_no_phrase() -> None:
    often = ["cat dog"] * 3 + ["cat"] * 300 + ["dog"] * 300

    assert top_keywords(often, 2) == ["cat", "dog"]
    with pytest.raises(CorpusError):
        top_keywords(often, 3)


def test_too_small_a_corpus_is_refused_with_both_numbers() -> None:
    with pytest.raises(CorpusError, match=r"\d+ keywords.*1000 are needed"):
        top_keywords(CAPTIONS, 1000)


def test_a_word_list_gives_its_first_words_and_is_refused_when_too_short(tmp_path: Path) -> None:
    tags = tmp_path / "tags.txt"
    tags.write_text("tree\n\nman\ntree\ntraffic light\n", "utf-8")

    assert listed(tags, 2) == ["tree", "man"]
    with pytest.raises(CorpusError, match="3 words for 9 codes"):
        listed(tags, 9)
    with pytest.raises(CorpusError, match="one word a line"):
        listed(tmp_path / "none.txt", 1)
