"""What is read at once is what is read one by one, and what is left out says nothing."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from stream.avro_by_hand import read_raw_pair, write_tail
from stream.plain_pairs import read_plain_pairs
from stream.records import HEADER_BYTES, Codec

RAW = Codec("RawPair")
texts = st.text(max_size=200)
pairs = st.fixed_dictionaries(
    {
        "id": texts, "caption": texts, "image": st.binary(max_size=2500) | st.none(), "image_uri": texts | st.none(),
        "fields": st.dictionaries(texts, texts, max_size=3),
    }
)  # fmt: skip
PAIR: dict[str, Any] = {"id": "a", "caption": "a cat", "image": b"picture", "image_uri": None, "fields": {"k": "v"}}


def test_pairs_of_every_shape_are_read_at_once() -> None:
    shapes: list[dict[str, Any]] = [
        {}, {"fields": {}}, {"id": "i" * 64, "caption": "c" * 64, "image": b"x" * 64}, {"caption": "ein Kätzchen"},
        {"fields": {f"name {n}": "v" * 100 for n in range(16)}}, {"fields": {"ä": "ö"}}, {"image": bytes(1500)},
    ]  # fmt: skip
    records = [RAW.encode({**PAIR, **shape}) for shape in shapes]

    assert read_plain_pairs(records, RAW.header).rows == list(range(len(shapes)))


@given(st.lists(pairs, max_size=8), st.data())
def test_what_is_read_at_once_is_what_is_read_alone(mixed: list[dict[str, Any]], data: st.DataObject) -> None:
    # given: whole records, damaged ones and takedowns
    records = [RAW.encode(pair) for pair in [*mixed, PAIR]]
    for at in range(len(records) - 1):
        if data.draw(st.booleans()):
            place = data.draw(st.integers(0, len(records[at]) - 1))
            more = data.draw(st.sampled_from([b"", b"\0", b"\x7f", b"\x80", b"\xff", b"\1"]))
            records[at] = records[at][:place] + more + records[at][place + data.draw(st.integers(0, 3)) :]
    records.append(b"")

    # when
    found = read_plain_pairs(records, RAW.header)

    # then
    for row, name, caption, image, tail in zip(*found, strict=True):
        alone = read_raw_pair(records[row], HEADER_BYTES)
        assert (name.decode(), caption, image) == alone[:3]
        assert name and image and caption.strip()
        assert tail == write_tail(*alone[3:]) or len(alone[4]) < tail[1] // 2  # a name that comes twice


@given(st.binary(max_size=60), st.binary(max_size=60))
def test_bytes_of_any_kind_are_no_trouble(first: bytes, second: bytes) -> None:
    records = [RAW.header + first, RAW.encode(PAIR), RAW.header + second]

    for row, name, caption, image, _ in zip(*read_plain_pairs(records, RAW.header), strict=True):
        assert (name.decode(), caption, image) == read_raw_pair(records[row], HEADER_BYTES)[:3]


def test_a_blank_caption_leaves_its_own_record_to_be_read_alone() -> None:
    records = [
        RAW.encode({**PAIR, "id": caption, "caption": caption}) for caption in ("a cat", "\u2003 \n", "\tein Kater")
    ]

    assert read_plain_pairs(records, RAW.header)[:2] == ([0, 2], [b"a cat", b"\tein Kater"])


def test_a_text_that_is_none_leaves_everything_to_be_read_alone() -> None:
    whole, damaged = RAW.encode(PAIR), RAW.encode(PAIR).replace(b"cat", b"c\xe4t")

    assert read_plain_pairs([whole, whole], RAW.header).rows == [0, 1]
    assert read_plain_pairs([whole, damaged], RAW.header).rows == []


def test_two_halves_of_a_letter_in_neighbouring_ids_are_none() -> None:
    whole = RAW.encode({**PAIR, "id": "abcd"})
    halves = [whole.replace(b"abcd", b"abc\xc3"), whole.replace(b"abcd", b"\xa4bcd")]

    assert read_plain_pairs(halves, RAW.header).rows == []
