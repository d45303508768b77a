"""Promises of `snapshot`: one consistent cut, the same bytes every time, loadable by those who train."""

from __future__ import annotations

import io
import json
import os
import resource
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from models.null import NullModel
from state.quota import Ratio
from stream.cut import parse_cut, written
from stream.errors import TldrError
from stream.kafka import Connection
from stream.snapshot import snapshot
from stream.snapshot_state import read_state
from stream.stream_view import read_kept, read_view, whole
from tests.stream.compaction import EAGER, clean_every
from tests.stream.stream_writer import StreamWriter, raw


@pytest.fixture
def writer(kafka: Connection, name: str, tmp_path: Path) -> Iterator[StreamWriter]:
    """Two partitions with full cells, evictions, takedowns and repeated ids."""
    with StreamWriter(kafka, name, tmp_path / "state", cap=30) as stream:
        stream.feed(raw(f"http://x/{i}.png", f"caption {i}", url=f"http://x/{i}.png") for i in range(400))
        stream.feed([("http://x/3.png", None), ("http://x/5.png", None)])
        stream.feed(f"http://x/{i}.png" for i in range(0, 400, 7))
        yield stream.run()


def ids_of(folder: Path) -> dict[str, int]:
    """id → input offset of every pair in a WebDataset snapshot."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    about = json.loads((tar.extractfile(member) or io.BytesIO()).read())
                    found[about["id"]] = about["source_offset"]
    return found


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_snapshot_is_the_reduced_set(writer: StreamWriter, tmp_path: Path) -> None:
    taken = snapshot(writer.source, tmp_path / "out", shard_pairs=30)

    assert ids_of(tmp_path / "out") == writer.members()
    assert taken.pairs == len(writer.members()) == taken.in_set
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["counts"]["evicted"] > 0
    assert manifest["counts"]["in_set"] == manifest["epochs"][0]["pairs"] == taken.pairs
    assert sum(row[3] for row in manifest["cells"]["rows"]) == read_view(writer.source).totals.counted
    assert sorted(os.listdir(tmp_path / "out")) == [
        "manifest.json", *(file.name for file in taken.files), "state-00000.avro", "state-00001.avro",
    ]  # fmt: skip


def test_a_shard_has_pairs_of_one_partition_in_shuffled_membership(writer: StreamWriter, tmp_path: Path) -> None:
    taken = snapshot(writer.source, tmp_path / "out", format="parquet", shard_pairs=30)

    seen: dict[int, list[tuple[int, int]]] = {0: [], 1: []}
    for file in taken.files:
        table = pq.read_table(tmp_path / "out" / file.name)
        offsets = table["source_offset"].to_pylist()
        assert set(table["source_partition"].to_pylist()) == {file.partition}
        assert offsets == sorted(offsets)
        assert 20 <= file.pairs <= 30
        seen[file.partition].append((offsets[0], offsets[-1]))
    # Shards drawn by a hash overlap in the stream; shards cut from it in a row would not.
    assert all(max(a for a, _ in spans) < min(b for _, b in spans) for spans in seen.values())


def test_the_same_cut_gives_the_same_bytes_however_late_it_is_taken(writer: StreamWriter, tmp_path: Path) -> None:
    for kind in ("webdataset", "parquet"):
        snapshot(writer.source, tmp_path / f"first-{kind}", format=kind, ratio=Ratio(1, 4), shard_pairs=20)
    writer.feed(f"later {i}" for i in range(150)).feed([("http://x/11.png", None)]).run()

    for kind in ("webdataset", "parquet"):
        cut = parse_cut(str(tmp_path / f"first-{kind}" / "manifest.json"))
        snapshot(writer.source, tmp_path / f"again-{kind}", format=kind, ratio=Ratio(1, 4), cut=cut, shard_pairs=20)
        assert bytes_of(tmp_path / f"first-{kind}") == bytes_of(tmp_path / f"again-{kind}")


def test_a_snapshot_at_10_percent_is_inside_the_one_at_25(writer: StreamWriter, tmp_path: Path) -> None:
    sets = []
    for share in (Ratio(1, 10), Ratio(1, 4), Ratio(1, 2)):
        snapshot(writer.source, tmp_path / f"{share.q}", ratio=share)
        sets.append(set(ids_of(tmp_path / f"{share.q}")))

    assert sets[0] < sets[1] < sets[2] == set(writer.members())
    assert len(sets[1]) == pytest.approx(len(sets[2]) / 2, abs=6)
    with pytest.raises(TldrError, match="keeps 1/2"):
        snapshot(writer.source, tmp_path / "more", ratio=Ratio(3, 4))


def test_a_cut_below_the_newest_is_the_set_of_then(kafka: Connection, name: str, tmp_path: Path) -> None:
    with StreamWriter(kafka, name, tmp_path / "state", cap=8) as writer:
        then = []
        for start in range(0, 240, 80):
            writer.feed(f"pair {i}" for i in range(start, start + 80)).feed([(f"pair {start}", None)]).run()
            then.append((read_view(writer.source).cut, writer.members()))
        for cut, members in then:
            out = tmp_path / written(cut).replace(":", "-")
            snapshot(writer.source, out, cut=cut)
            assert ids_of(out) == members
        newest = then[-1][0]
        with pytest.raises(TldrError, match="beyond what is committed"):
            snapshot(writer.source, tmp_path / "beyond", cut={**newest, 0: newest[0] + 1})
        with pytest.raises(TldrError, match="give every partition's offset"):
            snapshot(writer.source, tmp_path / "partial", cut={0: 1})


def test_a_cut_that_compaction_has_eaten_is_refused_with_the_newest_possible_one(
    kafka: Connection, name: str, tmp_path: Path
) -> None:
    clean_every(kafka, 200)
    with StreamWriter(kafka, name, tmp_path / "state", partitions=1, cap=5, kept_settings=EAGER) as writer:
        writer.feed(f"pair {i}" for i in range(60)).run()
        early = read_view(writer.source).cut
        writer.feed(f"more {i}" for i in range(200)).run()
        snapshot(writer.source, tmp_path / "before")
        newest = read_view(writer.source).cut
        wait_for_compaction(writer)

        snapshot(writer.source, tmp_path / "after", cut=newest)
        assert bytes_of(tmp_path / "before") == bytes_of(tmp_path / "after")
        with pytest.raises(TldrError, match=f"eaten the cut at offset {early[0]}.*--cut {written(newest)}$"):
            snapshot(writer.source, tmp_path / "early", cut=early)


def wait_for_compaction(writer: StreamWriter, timeout_s: float = 60) -> None:
    """Until the kept topic holds no evicted pair any more; the cleaner leaves the last segment alone, so new ones are begun."""
    topic, deadline = writer.topics.kept, time.monotonic() + timeout_s
    members = writer.members()

    def evicted_left() -> bool:
        records = (r for batch in read_kept(writer.source, whole(writer.kafka, topic, [0])) for r in batch)
        return any(r.value is not None and r.id not in members and r.id != "filler" for r in records)

    while evicted_left():
        assert time.monotonic() < deadline, "the cleaner did not run"
        for _ in range(2):
            writer.plant(topic, "filler", b"", cause=str(10**9))
            time.sleep(0.1)


def test_a_full_disk_leaves_finished_shards_and_the_next_run_goes_on(
    kafka: Connection, name: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with StreamWriter(kafka, name, tmp_path / "state", ratio="1/1") as writer:
        for i in range(20):
            pair_id = f"pair {i}"
            writer.feed([raw(pair_id, image=bytes(300_000 if writer.partition_of(pair_id) else 100))])
        writer.run()
        with file_size_limit(250_000), pytest.raises(TldrError, match="no room left for the snapshot"):
            snapshot(writer.source, out)
        left = sorted(path.name for path in out.iterdir() if path.name.startswith("part-"))
        writer.feed(["a later pair"]).run()
        with pytest.raises(TldrError, match="unfinished snapshot with format webdataset"):
            snapshot(writer.source, out, format="parquet")
        taken = snapshot(writer.source, out)

    assert left == ["part-00000-00000.tar"]
    assert (taken.reused_files, len(taken.files), taken.pairs) == (1, 2, 20)
    assert snapshot(writer.source, out).files == taken.files
    with pytest.raises(TldrError, match="a finished snapshot with shard_pairs"):
        snapshot(writer.source, out, shard_pairs=3)


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """No file of this process may grow beyond `limit` bytes; what happens then is what a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_many_shards_are_written_in_several_passes(writer: StreamWriter, tmp_path: Path) -> None:
    taken = snapshot(writer.source, tmp_path / "out", shard_pairs=1)

    assert len(taken.files) == taken.pairs > 2 * 64
    assert ids_of(tmp_path / "out") == writer.members()


def test_only_the_manifest_says_which_pairs_a_snapshot_would_have(writer: StreamWriter, tmp_path: Path) -> None:
    taken = snapshot(writer.source, tmp_path / "out", manifest_only=True)

    assert sorted(os.listdir(tmp_path / "out")) == ["manifest.json", "state-00000.avro", "state-00001.avro"]
    pairs = {pair.id: pair.offset for p in (0, 1) for pair in read_state(tmp_path / "out").pairs(p)}
    assert pairs == writer.members()
    assert (taken.pairs, taken.files) == (len(writer.members()), [])


def test_a_folder_with_something_else_in_it_is_refused(writer: StreamWriter, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")

    with pytest.raises(TldrError, match="not empty"):
        snapshot(writer.source, tmp_path / "out")


def image(kind: str, shade: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (16, 16), (shade, 0, 0)).save(out, kind)
    return out.getvalue()


def test_what_is_taken_loads_with_webdataset_and_with_datasets(
    kafka: Connection, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets
    import webdataset

    kinds = {"JPEG": "jpg", "PNG": "png", "GIF": "gif", "WEBP": "webp"}
    with StreamWriter(kafka, name, tmp_path / "state", ratio="1/1") as writer:
        writer.feed(raw(f"http://x/{kind}", f"a {kind} 🎈", image(kind, 9), url="u") for kind in kinds).run()
        wds = snapshot(writer.source, tmp_path / "wds")
        parquet = snapshot(writer.source, tmp_path / "parquet", format="parquet")
    tars = [str(tmp_path / "wds" / file.name) for file in wds.files]
    tables = [str(tmp_path / "parquet" / file.name) for file in parquet.files]

    by_id = {}
    for sample in webdataset.WebDataset(tars, shardshuffle=False, empty_check=False):
        about = json.loads(sample["json"])
        by_id[about["id"]] = sample
    for kind, extension in kinds.items():
        sample = by_id[f"http://x/{kind}"]
        assert sample[extension] == image(kind, 9)
        assert sample["txt"].decode().startswith(f"a {kind} 🎈 codes")
        assert json.loads(sample["json"])["original_caption"] == f"a {kind} 🎈"
    loaded = datasets.load_dataset("parquet", data_files=tables, split="train", cache_dir=str(tmp_path / "cache"))
    assert {row["id"]: row["image"].size for row in loaded} == {f"http://x/{kind}": (16, 16) for kind in kinds}
    assert set(pq.read_table(tables[0])["url"].to_pylist()) == {"u"}

    # Its WebDataset loader wants one kind of image in all samples.
    with StreamWriter(kafka, f"{name}-png", tmp_path / "png-state", partitions=1, ratio="1/1") as writer:
        writer.feed(raw(f"http://x/{i}", f"caption {i}", image("PNG", i)) for i in range(3)).run()
        wds = snapshot(writer.source, tmp_path / "png")
    tars = [str(tmp_path / "png" / file.name) for file in wds.files]
    streamed = datasets.load_dataset("webdataset", data_files=tars, split="train", streaming=True)
    assert {row["json"]["id"]: row["png"].size for row in streamed} == {f"http://x/{i}": (16, 16) for i in range(3)}


def apart(kafka: Connection, name: str, folder: Path, partitions: int = 2) -> StreamWriter:
    """Epoch 1 of partition 0 has the bundle that epoch 2 has elsewhere."""
    between, newest = (NullModel(tokens=8, codebook_size=50, clusters=3, seed=seed) for seed in (1, 2))
    writer = StreamWriter(kafka, name, folder, partitions=partitions, cap=30)
    return writer.switch_apart(between, newest, [f"pair {i}" for i in range(150 * partitions)])


def test_each_pair_is_of_the_bundle_that_the_manifest_says_though_partitions_came_to_it_in_different_epochs(
    kafka: Connection, name: str, tmp_path: Path
) -> None:
    with apart(kafka, name, tmp_path / "state") as writer:
        first, between, newest = writer.models
        snapshot(writer.source, tmp_path / "out", format="parquet", ratio=Ratio(1, 4))
        view = read_view(writer.source)

    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    told = {
        (int(p), epoch["epoch"]): epoch["bundle"] for epoch in manifest["epochs"] for p in epoch["begins"]
    }  # fmt: skip
    assert told == {(0, 0): first, (0, 1): newest, (1, 0): first, (1, 1): between, (1, 2): newest}
    pairs = [row for path in sorted((tmp_path / "out").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert {told[row["source_partition"], row["epoch"]] == row["bundle"] for row in pairs} == {True}
    for epoch in manifest["epochs"]:
        its = {(int(p), epoch["epoch"]) for p in epoch["begins"]}
        assert epoch["taken"] == sum((row["source_partition"], row["epoch"]) in its for row in pairs) > 0
        assert epoch["pairs"] == sum(row[6] for row in manifest["cells"]["rows"] if (row[0], row[1]) in its)
    read_state(tmp_path / "out").refuse_another_stream(view)
