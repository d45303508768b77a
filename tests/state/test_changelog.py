"""The changelog's bytes: what was written is read again, and what nobody wrote is refused in one line."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from state import changelog
from state.changelog import CellCounts, EntryHead, Position, Switch, Totals
from state.errors import BadSetting, SettingsDiffer, UnknownRecord
from state.quota import Ratio
from state.settings import StreamSettings, refuse_difference
from tests.state.test_quota import ratios

u64, u32 = st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1)
SETTINGS = StreamSettings(4, "topic-id", 7, Ratio(1, 4), 100, 10_000, 0.25, "paper", "space", 196)


@given(u64, u32, u32, u64, ratios, st.text(max_size=50), st.lists(st.integers(0, 65535), max_size=8))
@example(0, 0, 0, 0, Ratio(1, 1), "\N{SNOWMAN}" * 40_000, [])
def test_an_entry_is_read_as_written(
    offset: int, epoch: int, cluster: int, priority: int, rate: Ratio, pair_id: str, codes: list[int]
) -> None:
    vector = np.array(codes, "<u2")
    value = changelog.encode_entry(offset, epoch, cluster, priority, rate, pair_id.encode(), vector.tobytes())

    entry = changelog.decode_entry(value)

    assert entry[:-1] == (pair_id, epoch, cluster, priority, rate, offset)
    assert entry.vector.tolist() == codes
    assert changelog.entry_head(value) == EntryHead(offset, epoch, cluster, priority, rate)
    assert int.from_bytes(changelog.entry_offset_bytes(value), "big") == offset


@given(st.lists(st.tuples(u64, st.integers(1, 2**33)), max_size=20), st.integers(0, 2**62))
@example([(i, 1) for i in range(changelog.KNOWN_IDS_MAX + 1)], 5)
def test_known_ids_are_read_as_written_however_far_apart(counted: list[tuple[int, int]], start: int) -> None:
    hashes = np.array([known for known, _ in counted], np.uint64)
    offsets = np.array([start, *(gap for _, gap in counted)], np.uint64).cumsum(dtype=np.uint64)[1:]

    records = changelog.encode_known(hashes, offsets)

    columns = [changelog.known_columns(key, value) for key, value in records if value is not None]
    assert b"".join(column for column, _ in columns) == hashes.astype(">u8").tobytes()
    assert b"".join(column for _, column in columns) == offsets.astype(">u8").tobytes()
    assert all(len(value or b"") < 500_000 for _, value in records)  # Kafka's default limit is 1 MB
    assert sorted(key for key, _ in records) == [key for key, _ in records]


@given(st.lists(st.tuples(*[st.integers(0, 2**62)] * 4), max_size=changelog.CELLS_A_RECORD), st.integers(0, 100))
def test_cells_are_read_as_written(cells: list[tuple[int, int, int, int]], record: int) -> None:
    first = record * changelog.CELLS_A_RECORD
    key = changelog.cells_key(3, first + 63)

    value = changelog.encode_cells(np.array(cells, np.int64).reshape(-1, 4))

    read = {(epoch, cluster): counts for epoch, cluster, counts in changelog.cells_of(key, value)}
    assert read == {(3, first + at): CellCounts(*cell) for at, cell in enumerate(cells) if cell[0]}
    assert changelog.decode_cells(value).tolist() == [
        list(cell) for cell in cells[: len(changelog.decode_cells(value))]
    ]


def test_positions_switches_takedowns_and_settings_are_read_as_written() -> None:
    position = Position(2**40, 3, 1_700_000_000_000, "worker-ü", Totals(*range(12)))
    switch = Switch(3, "bundle", "space", 2**40)

    assert changelog.decode_position(changelog.encode_position(position)) == position
    assert changelog.decode_switch(changelog.encode_switch(switch)) == switch
    assert changelog.decode_forgotten(changelog.encode_forgotten(2**40)) == 2**40
    assert StreamSettings.from_json(SETTINGS.to_json()) == SETTINGS


def test_keys_sort_by_their_numbers() -> None:
    numbers = [0, 1, 255, 256, 2**31, 2**32 - 1]
    for key in (changelog.switch_key, changelog.known_key, changelog.entry_key, changelog.forgotten_key):
        assert [changelog.number_of(made) for made in sorted(map(key, numbers))] == numbers


@pytest.mark.parametrize("value", [b"", b"\x02" + b"x" * 60, b"\x01", b"\x01" + b"\xff" * 40, b"{}", b"[]", b"{"])
def test_a_strange_value_is_refused_in_one_line(value: bytes) -> None:
    readers = (
        changelog.decode_entry,
        changelog.decode_cells,
        changelog.decode_position,
        changelog.decode_switch,
        changelog.decode_forgotten,
        StreamSettings.from_json,
        lambda value: changelog.known_columns(b"K" + bytes(8), value),
    )
    for read in readers:
        with pytest.raises(UnknownRecord) as refused:
            read(value)
        assert "\n" not in str(refused.value)


def test_other_settings_than_the_streams_are_refused_with_both_values() -> None:
    import dataclasses

    other = dataclasses.replace(SETTINGS, seed=8, cell_cap=None)

    refuse_difference(SETTINGS, SETTINGS)
    with pytest.raises(SettingsDiffer, match=r"seed is 7 in the stream and 8 here; cell_cap is 100 .* and None here"):
        refuse_difference(SETTINGS, other)


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"seed": 2**64}, {"cell_cap": 0}, {"dedupe_window": 0}, {"tokens": 0}])
def test_settings_that_cannot_be_are_refused(wrong: dict[str, int]) -> None:
    import dataclasses

    with pytest.raises(BadSetting):
        dataclasses.replace(SETTINGS, **wrong)  # type: ignore[arg-type]
