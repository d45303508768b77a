"""What is written and read by hand is what fastavro writes and reads, for every record."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.avro_by_hand import KeptColumns, read_raw_pair, write_kept_pairs, write_pair_codes, write_tail
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
shared = {"epoch": longs, "bundle": texts, "rate": texts, "source_topic": texts, "source_partition": ints}
own = {
    "id": texts, "image": blobs, "caption": texts, "generated_caption": texts, "refined_caption": texts, "cluster": ints,
    "position": longs, "index_vector": st.binary(min_size=6, max_size=6), "priority": st.binary(min_size=8, max_size=8),
    "itm_original": floats, "itm_refined": floats, "source_offset": longs, "source_timestamp_ms": longs,
    "image_uri": texts | st.none(), "fields": fields,
}  # fmt: skip
kept_pairs = st.tuples(st.fixed_dictionaries(shared), st.lists(st.fixed_dictionaries(own), min_size=1, max_size=3))

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
def test_kept_pairs_are_written_byte_by_byte_as_fastavro_writes_them(
    kept: tuple[dict[str, Any], list[dict[str, Any]]],
) -> None:
    same, pairs = kept

    def column(name: str) -> list[Any]:
        return [pair[name] for pair in pairs]

    columns = KeptColumns(
        [name.encode() for name in column("id")], column("image"), column("caption"), column("generated_caption"),
        column("refined_caption"), column("cluster"), column("position"),
        np.frombuffer(b"".join(column("index_vector")), "<u2").reshape(-1, 3),
        np.frombuffer(b"".join(column("priority")), "<u8"),
        np.array([column("itm_original"), column("itm_refined")], np.float32).T, column("source_offset"),
        column("source_timestamp_ms"), [write_tail(pair["image_uri"], pair["fields"]) for pair in pairs],
    )  # fmt: skip

    written = write_kept_pairs(KEPT.header, columns, *(same[name] for name in shared))

    assert written == [KEPT.encode({**same, **pair}) for pair in pairs]


@given(pair_codes)
def test_pair_codes_are_written_byte_by_byte_as_fastavro_writes_them(record: dict[str, Any]) -> None:
    names = [pair_id.encode() for pair_id in record["ids"]]

    assert write_pair_codes(CODES.header, {**record, "ids": names}) == CODES.encode(record)


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
