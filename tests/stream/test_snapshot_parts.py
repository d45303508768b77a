"""Promises of `snapshot --part`: N processes leave the very bytes that one would, whatever their order, crashes and cuts."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from state.quota import Ratio
from stream.cut import parse_cut
from stream.errors import TldrError
from stream.kafka import Connection
from stream.snapshot import snapshot
from stream.snapshot_parts import Part, put_together
from stream.snapshot_state import read_state
from stream.stream_view import read_view
from tests.stream.stream_writer import StreamWriter, raw
from tests.stream.test_snapshot import apart, bytes_of, file_size_limit, ids_of


@pytest.fixture
def writer(kafka: Connection, name: str, tmp_path: Path) -> Iterator[StreamWriter]:
    """Five partitions with full cells, evictions and takedowns."""
    with StreamWriter(kafka, name, tmp_path / "state", partitions=5, cap=15) as stream:
        stream.feed(f"http://x/{i}.png" for i in range(400))
        stream.feed([("http://x/3.png", None), ("http://x/5.png", None)])
        yield stream.run()


@pytest.mark.parametrize(("of", "kind"), [(2, "webdataset"), (5, "parquet")])
def test_parts_in_any_order_leave_the_bytes_of_one_process(
    writer: StreamWriter, tmp_path: Path, of: int, kind: str
) -> None:
    whole = snapshot(writer.source, tmp_path / "whole", format=kind, ratio=Ratio(1, 4), shard_pairs=10)
    for number in reversed(range(of)):
        taken = snapshot(
            writer.source, tmp_path / "parts", format=kind, ratio=Ratio(1, 4), shard_pairs=10,
            part=Part(number, of), scratch=tmp_path / "scratch",
        )  # fmt: skip
        assert taken.parts_missing == number

    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")
    assert (taken.files, taken.manifest_sha256) == (whole.files, whole.manifest_sha256)
    assert os.listdir(tmp_path / "scratch") == []


def test_parts_at_the_same_time_leave_one_manifest(writer: StreamWriter, tmp_path: Path) -> None:
    snapshot(writer.source, tmp_path / "whole", shard_pairs=10)

    with ThreadPoolExecutor(5) as pool:
        for _ in pool.map(
            lambda n: snapshot(writer.source, tmp_path / "parts", shard_pairs=10, part=Part(n, 5)), range(5)
        ):
            pass

    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")


def test_every_part_cuts_its_partitions_when_it_begins_and_the_whole_is_a_cut(
    writer: StreamWriter, tmp_path: Path
) -> None:
    snapshot(writer.source, tmp_path / "parts", part=Part(0, 2))
    writer.feed(f"later {i}" for i in range(100)).run()
    snapshot(writer.source, tmp_path / "parts", part=Part(1, 2))

    cut = parse_cut(str(tmp_path / "parts" / "manifest.json"))
    snapshot(writer.source, tmp_path / "whole", cut=cut)

    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")
    state = read_state(tmp_path / "parts")
    state.refuse_another_stream(read_view(writer.source))
    pairs = {pair.id: pair.offset for p in range(5) for pair in state.pairs(p)}
    assert pairs == ids_of(tmp_path / "parts")


def test_all_parts_can_be_given_one_cut(writer: StreamWriter, tmp_path: Path) -> None:
    snapshot(writer.source, tmp_path / "first", manifest_only=True)
    cut = parse_cut(str(tmp_path / "first" / "manifest.json"))
    writer.feed(f"later {i}" for i in range(60)).run()

    for number in range(3):
        snapshot(writer.source, tmp_path / "parts", cut=cut, part=Part(number, 3))

    snapshot(writer.source, tmp_path / "whole", cut=cut)
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")


def test_a_part_that_died_goes_on_where_it_stopped_and_touches_no_other(
    kafka: Connection, name: str, tmp_path: Path
) -> None:
    with StreamWriter(kafka, name, tmp_path / "state", partitions=4, ratio="1/1") as writer:
        large = {0: 100, 1: 100, 2: 300_000, 3: 100}
        writer.feed(raw(f"pair {i}", image=bytes(large[writer.partition_of(f"pair {i}")])) for i in range(40)).run()
        snapshot(writer.source, tmp_path / "parts", part=Part(1, 2))
        before = {path.name: path.read_bytes() for path in (tmp_path / "parts").iterdir()}
        with file_size_limit(250_000), pytest.raises(TldrError, match="no room left"):
            snapshot(writer.source, tmp_path / "parts", part=Part(0, 2))
        assert all((tmp_path / "parts" / name).read_bytes() == data for name, data in before.items())
        writer.feed(f"later {i}" for i in range(40)).run()
        taken = snapshot(writer.source, tmp_path / "parts", part=Part(0, 2))

        assert (taken.reused_files, taken.pairs) == (1, 40)
        assert snapshot(writer.source, tmp_path / "parts", part=Part(1, 2)).files == taken.files


def test_a_part_that_died_before_the_manifest_was_written_writes_it(writer: StreamWriter, tmp_path: Path) -> None:
    snapshot(writer.source, tmp_path / "whole")
    snapshot(writer.source, tmp_path / "first", part=Part(0, 2))
    snapshot(writer.source, tmp_path / "parts", part=Part(1, 2))
    # As if part 0 had finished meanwhile and part 1 had died after its report.
    shutil.copytree(tmp_path / "first", tmp_path / "parts", dirs_exist_ok=True)
    taken = snapshot(writer.source, tmp_path / "parts", part=Part(1, 2))

    assert taken.parts_missing == 0
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")


def test_a_part_whose_partitions_have_nothing_is_a_part_all_the_same(
    kafka: Connection, name: str, tmp_path: Path
) -> None:
    with StreamWriter(kafka, name, tmp_path / "state", partitions=3) as writer:
        ids = (f"pair {i}" for i in itertools.count())
        writer.feed(itertools.islice((i for i in ids if writer.partition_of(i) == 1), 30)).run()
        snapshot(writer.source, tmp_path / "whole")
        for number in range(3):
            snapshot(writer.source, tmp_path / "parts", part=Part(number, 3))

    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")


def test_what_is_no_part_of_the_same_snapshot_is_refused(writer: StreamWriter, tmp_path: Path) -> None:
    snapshot(writer.source, tmp_path / "parts", part=Part(0, 2))

    with pytest.raises(TldrError, match="not empty"):
        snapshot(writer.source, tmp_path / "parts", part=Part(1, 3))
    with pytest.raises(TldrError, match="not empty"):
        snapshot(writer.source, tmp_path / "parts")
    with pytest.raises(TldrError, match="a finished snapshot with ratio"):
        snapshot(writer.source, tmp_path / "parts", part=Part(0, 2), ratio=Ratio(1, 4))
    with pytest.raises(TldrError, match="5 parts at most"):
        snapshot(writer.source, tmp_path / "six", part=Part(0, 6))
    with pytest.raises(TldrError, match="different settings"):
        snapshot(writer.source, tmp_path / "parts", part=Part(1, 2), ratio=Ratio(1, 4))


@pytest.mark.parametrize("text", ["1", "2/2", "-1/2", "a/b", "1/0", ""])
def test_a_part_is_its_number_and_how_many_there_are(text: str) -> None:
    assert Part.parse("0/16") == Part(0, 16)
    with pytest.raises(TldrError, match="0/16"):
        Part.parse(text)


@pytest.mark.parametrize("of", [1, 2, 3, 7])
def test_every_partition_belongs_to_exactly_one_part(of: int) -> None:
    shared = [list(Part(number, of).partitions(7)) for number in range(of)]

    assert sorted(itertools.chain(*shared)) == list(range(7))
    assert max(map(len, shared)) - min(map(len, shared)) <= 1


def test_parts_whose_partitions_switched_in_different_ways_leave_the_bytes_of_one_process(
    kafka: Connection, name: str, tmp_path: Path
) -> None:
    with apart(kafka, name, tmp_path / "state", partitions=3) as writer:
        _, between, newest = writer.models
        snapshot(writer.source, tmp_path / "whole")
        for number in range(3):
            snapshot(writer.source, tmp_path / "parts", part=Part(number, 3))
        view = read_view(writer.source)

    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")
    state = read_state(tmp_path / "parts")
    state.refuse_another_stream(view)
    found = {(e["epoch"], e["bundle"]): sorted(e["begins"]) for e in state.manifest["epochs"] if e["epoch"]}
    assert found == {(1, newest): ["0"], (1, between): ["1", "2"], (2, newest): ["1", "2"]}


def test_parts_of_a_manifest_put_together_are_the_manifest(writer: StreamWriter, tmp_path: Path) -> None:
    snapshot(writer.source, tmp_path / "whole")
    manifest = json.loads((tmp_path / "whole" / "manifest.json").read_text())

    assert put_together([manifest]) == manifest
