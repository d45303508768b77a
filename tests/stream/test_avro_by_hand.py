"""What is written and read by hand is what fastavro writes and reads, for every record."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.avro_by_hand import read_raw_pair, write_kept_pair, write_pair_codes, write_tail
from stream.raw_format import raw_reader
from stream.records import HEADER_BYTES, Codec, UndecodableRecord

RAW, KEPT, CODES = Codec("RawPair"), Codec("KeptPair"), Codec("PairCodes")
texts = st.text(max_size=200)
blobs = st.binary(max_size=300)
longs = st.integers(-(2**63), 2**63 - 1)
ints = st.integers(-(2**31), 2**31 - 1)
floats = st.floats(width=32, allow_nan=False)
fields = st.dictionaries(texts, texts, max_size=3)
raw_pairs = st.fixed_dictionaries(
    {"id": texts, "caption": texts, "image": blobs | st.none(), "image_uri": texts | st.none(), "fields": fields}
)
kept_pairs = st.fixed_dictionaries(
    {
        "id": texts, "image": blobs, "caption": texts, "generated_caption": texts, "refined_caption": texts, "epoch": longs,
        "cluster": ints, "position": longs, "index_vector": blobs, "bundle": texts, "priority": blobs, "rate": texts,
        "itm_original": floats, "itm_refined": floats, "source_topic": texts, "source_partition": ints,
        "source_offset": longs, "source_timestamp_ms": longs, "image_uri": texts | st.none(), "fields": fields,
    }
)  # fmt: skip

pair_codes = st.fixed_dictionaries(
    {
        "partition": ints, "epoch": longs, "bundle": texts, "tokens": ints,
        "ids": st.lists(texts | st.just("x" * 20_000), max_size=5),
        **dict.fromkeys(
            ("offsets", "fates", "clusters", "positions", "priorities", "itms", "vectors", "duplicate_of"), blobs
        ),
        "removed": st.lists(st.fixed_dictionaries({"id": texts, "row": ints}), max_size=3),
    }
)  # fmt: skip


def in_order(codec: Codec, pair: dict[str, Any]) -> tuple[Any, ...]:
    """The values as the schema has them."""
    return tuple(pair[field["name"]] for field in codec.schema["fields"])


@given(raw_pairs)
def test_a_raw_pair_is_read_as_fastavro_reads_it(pair: dict[str, Any]) -> None:
    assert read_raw_pair(RAW.encode(pair), HEADER_BYTES) == in_order(RAW, pair)


def test_a_large_image_is_read_as_a_view_of_its_record() -> None:
    pair: dict[str, Any] = {"id": "a", "caption": "a cat", "image": bytes(9000), "image_uri": None, "fields": {}}

    _, _, image, *_ = read_raw_pair(RAW.encode(pair), HEADER_BYTES)

    assert isinstance(image, memoryview) and image == pair["image"]


@given(kept_pairs)
def test_a_kept_pair_is_written_byte_by_byte_as_fastavro_writes_it(pair: dict[str, Any]) -> None:
    values = in_order(KEPT, pair)

    written = write_kept_pair(*(values[0].encode(), *values[1:-2], write_tail(*values[-2:])))

    assert KEPT.header + written == KEPT.encode(pair)


@given(pair_codes)
def test_pair_codes_are_written_byte_by_byte_as_fastavro_writes_them(record: dict[str, Any]) -> None:
    assert CODES.header + write_pair_codes(record) == CODES.encode(record)


@given(raw_pairs, st.data())
def test_a_record_that_is_cut_off_anywhere_is_a_dead_letter(pair: dict[str, Any], data: st.DataObject) -> None:
    whole = RAW.encode({**pair, "caption": "a cat", "image": b"picture"})
    cut = data.draw(st.integers(0, len(whole) - 1))

    with pytest.raises(UndecodableRecord):
        raw_reader().read(b"key", whole[:cut])


def test_a_map_in_several_blocks_with_their_sizes_is_read_by_fastavro() -> None:
    # as Java may write it: a negative count, then the size in bytes
    head = RAW.encode({"id": "a", "caption": "a cat", "image": b"x", "image_uri": None, "fields": {}})[:-1]
    block = bytes([2, ord("k"), 2, ord("v")])

    raw = raw_reader().read(b"a", head + bytes([1, 2 * len(block)]) + block + b"\0")

    assert raw.fields == {"k": "v"}
