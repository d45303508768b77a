"""Pairs come out of every kind of source untouched, in one order, and with ids that say what they are."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from stream.errors import TldrError
from stream.pair_sources import BadEntry, SourcePair, open_source, shards_of
from tests.stream.source_files import crawl_members, write_parquet, write_tar

URL = "https://images.example.org/"


def pairs_of(source: Path | str, fields: dict[str, str] | None = None) -> list[SourcePair]:
    return [entry for entry in open_source(source, fields) if isinstance(entry, SourcePair)]


def bad_of(source: Path | str) -> list[BadEntry]:
    return [entry for entry in open_source(source) if isinstance(entry, BadEntry)]


def test_an_img2dataset_shard_gives_image_caption_url_and_fields(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", crawl_members([(URL + "cat.jpg", b"\xff\xd8cat", "a cat 🐈")]))

    [pair] = pairs_of(tmp_path)

    assert (pair.id, pair.caption, pair.image) == (URL + "cat.jpg", "a cat 🐈", b"\xff\xd8cat")
    assert pair.image_uri is None
    assert pair.fields == {"url": URL + "cat.jpg", "key": "000000000", "status": "success", "width": "64"}
    assert pair.place == "00000.tar/000000000"


def test_two_crawls_with_equal_keys_and_different_images_lose_nothing(tmp_path: Path) -> None:
    for crawl in ("a", "b"):
        named = crawl_members([(f"{URL}{crawl}{i}.jpg", f"{crawl}{i}".encode(), "same words") for i in range(5)])
        unnamed = crawl_members([(None, f"unnamed {crawl}{i}".encode(), "same words") for i in range(5)])
        write_tar(tmp_path / crawl / "00000.tar", named)
        write_tar(tmp_path / crawl / "00001.tar", unnamed)

    pairs = pairs_of(tmp_path)

    assert len(pairs) == 20
    assert len({pair.id for pair in pairs}) == 20
    assert len({pair.place for pair in pairs}) == 20


def test_the_same_pair_has_the_same_id_wherever_it_lies(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("x/0.png", b"image"), ("x/0.txt", b"words")])
    write_tar(tmp_path / "b.tar", [("y/7.png", b"image"), ("y/7.txt", b"words")])
    (tmp_path / "c.png").write_bytes(b"image")
    (tmp_path / "c.txt").write_text("words\n")

    ids = {pair.id for pair in pairs_of(tmp_path)}

    assert len(ids) == 1


def test_one_image_under_two_captions_is_two_pairs(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("0.png", b"i"), ("0.txt", b"one"), ("1.png", b"i"), ("1.txt", b"two")])

    assert len({pair.id for pair in pairs_of(tmp_path)}) == 2


def test_a_uid_of_the_source_is_the_id_and_its_key_never(tmp_path: Path) -> None:
    meta = {"uid": "datacomp-17", "key": "0", "url": URL, "__key__": "0", "id": 3}
    write_tar(tmp_path / "a.tar", [("0.png", b"i"), ("0.txt", b"c"), ("0.json", json.dumps(meta).encode())])

    assert pairs_of(tmp_path / "a.tar")[0].id == "datacomp-17"


def test_img2datasets_sidecar_stands_in_for_a_missing_json_and_is_no_source_of_its_own(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", [("000.jpg", b"i"), ("000.txt", b"c")])
    rows = [
        {"key": "000", "url": URL + "a", "status": "success"},
        {"key": "001", "url": URL + "b", "status": "failed_to_download"},
    ]
    write_parquet(tmp_path / "00000.parquet", rows)
    (tmp_path / "00000_stats.json").write_text("{}")

    entries = list(open_source(tmp_path))

    assert [entry.id for entry in entries if isinstance(entry, SourcePair)] == [URL + "a"]
    assert len(entries) == 1


def test_img2datasets_files_and_parquet_formats_are_read_too(tmp_path: Path) -> None:
    folder = tmp_path / "files" / "00000"
    folder.mkdir(parents=True)
    for name, data in crawl_members([(URL + "a", b"A", "one"), (URL + "b", b"B", "two")]):
        (folder / name).write_bytes(data)
    write_parquet(tmp_path / "files" / "00000.parquet", [{"key": "000000000", "url": URL + "a"}])
    rows: list[dict[str, Any]] = [
        {"key": "0", "url": URL + "a", "caption": "one", "status": "success", "jpg": b"A"},
        {"key": "1", "url": URL + "x", "caption": "gone", "status": "failed_to_download", "jpg": None},
        {"key": "2", "url": URL + "b", "caption": "two", "status": "success", "jpg": b"B"},
    ]
    write_parquet(tmp_path / "parquet" / "00000.parquet", rows)

    from_files, from_parquet = pairs_of(tmp_path / "files"), pairs_of(tmp_path / "parquet")

    assert [(p.id, p.caption, p.image) for p in from_files] == [(URL + "a", "one", b"A"), (URL + "b", "two", b"B")]
    assert [(p.id, p.caption, p.image) for p in from_parquet] == [(URL + "a", "one", b"A"), (URL + "b", "two", b"B")]
    assert [bad.reason for bad in bad_of(tmp_path / "parquet")] == ["no-image"]


def test_parquet_with_hugging_face_images_or_with_uris(tmp_path: Path) -> None:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows: list[dict[str, Any]] = [
        {"image": {"bytes": b"A", "path": "a.png"}, "text": "one"},
        {"image": {"bytes": b"B", "path": None}, "text": "two"},
    ]
    write_parquet(tmp_path / "hf.parquet", rows, pa.schema([("image", image), ("text", pa.string())]))
    write_parquet(tmp_path / "uri.parquet", [{"image_uri": URL + "a.png", "caption": "one", "score": 0.5}])

    assert [(p.image, p.image_uri, p.caption) for p in pairs_of(tmp_path / "hf.parquet")] == [
        (b"A", None, "one"),
        (b"B", None, "two"),
    ]
    [pair] = pairs_of(tmp_path / "uri.parquet")
    assert (pair.id, pair.image, pair.image_uri, pair.fields) == (URL + "a.png", None, URL + "a.png", {"score": "0.5"})


def test_other_names_are_mapped_and_a_wrong_target_is_one_clear_line(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"photo": b"A", "alt_text": "one", "asset": 17}])

    [pair] = pairs_of(tmp_path, {"image": "photo", "caption": "alt_text", "id": "asset"})

    assert (pair.id, pair.caption, pair.image) == ("17", "one", b"A")
    with pytest.raises(TldrError, match="picture"):
        shards_of(tmp_path, {"picture": "photo"})


def test_what_is_no_pair_is_named_with_its_place_and_the_others_go_through(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar",
        [
            ("0.png", b"i0"), ("0.txt", b"good"),
            ("1.txt", b"a caption alone"),
            ("2.png", b"i2"),
            ("3.png", b"i3"), ("3.json", b"{broken"),
            ("4.png", b"i4"), ("4.jpg", b"i5"), ("4.txt", b"two images"),
            ("5.png", b"i5"), ("5.txt", b"\xff\xfe not utf-8"),
            ("6.png", b"i6"), ("6.txt", b""),
            ("7.png", b"i7"), ("7.json", b'{"caption": 7}'),
        ],
    )  # fmt: skip

    assert [(bad.place, bad.reason) for bad in bad_of(tmp_path)] == [
        ("a.tar/1", "no-image"),
        ("a.tar/2", "no-caption"),
        ("a.tar/3", "bad-json"),
        ("a.tar/4", "several-images"),
        ("a.tar/5", "not-utf8"),
        ("a.tar/7", "caption-not-text"),
    ]
    # An empty caption is a worker's dead letter, not a fault of the source.
    assert [pair.caption for pair in pairs_of(tmp_path)] == ["good", ""]


@pytest.mark.parametrize("cut", [700, 1400, 2000, 2048, 3072])
def test_a_truncated_shard_gives_what_it_has_and_the_next_shard_is_read(tmp_path: Path, cut: int) -> None:
    whole = write_tar(
        tmp_path / "whole.tar", [("0.png", b"i" * 600), ("0.txt", b"c"), ("1.png", b"j" * 600), ("1.txt", b"d")]
    )
    (tmp_path / "a.tar").write_bytes(whole.read_bytes()[:cut])
    whole.rename(tmp_path / "b.tar")

    shards = shards_of(tmp_path)
    read = {shard.name: list(shard.read()) for shard in shards}

    assert [entry.reason for entry in read["a.tar"] if isinstance(entry, BadEntry)][-1] == "unreadable-shard"
    assert not shards[0].complete
    assert len(read["b.tar"]) == 2
    assert shards[1].complete
    assert all(len(e.image or b"") == 600 for e in read["a.tar"] if isinstance(e, SourcePair))


def test_a_file_that_is_no_archive_is_a_bad_entry_and_not_a_crash(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"<html>not found</html>" * 100)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")

    assert [(bad.place, bad.reason) for bad in bad_of(tmp_path)] == [
        ("a.tar", "unreadable-shard"),
        ("b.parquet", "unreadable-shard"),
    ]


def test_braces_and_wildcards_name_shards_and_places_do_not_depend_on_how_many_match(tmp_path: Path) -> None:
    for i in range(4):
        write_tar(tmp_path / "crawl" / f"{i:05d}.tar", [("0.png", b"%d" % i), ("0.txt", b"c")])

    by_brace = pairs_of(f"{tmp_path}/crawl/{{00001..00002}}.tar")
    by_wildcard = pairs_of(f"{tmp_path}/crawl/0000[0-2].tar")

    assert [pair.image for pair in by_brace] == [b"1", b"2"]
    assert [pair.place for pair in by_brace] == ["00001.tar/0", "00002.tar/0"]
    assert [pair.place for pair in by_wildcard] == ["00000.tar/0", "00001.tar/0", "00002.tar/0"]
    with pytest.raises(TldrError, match="does not exist"):
        shards_of(f"{tmp_path}/crawl/{{00003..00004}}.tar")


def test_a_folder_without_pairs_and_a_missing_path_are_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("nothing")

    with pytest.raises(TldrError, match="holds no"):
        list(open_source(tmp_path))
    with pytest.raises(TldrError, match="does not exist"):
        list(open_source(tmp_path / "absent.tar"))


def test_the_order_is_the_same_every_time(tmp_path: Path) -> None:
    for name in ("b.png", "a.webp", "c.JPG"):
        (tmp_path / name).write_bytes(name.encode())
        (tmp_path / f"{name[0]}.txt").write_text(name)
    write_tar(tmp_path / "z.tar", crawl_members([(None, b"1", "x"), (None, b"2", "y")]))

    assert [pair.place for pair in pairs_of(tmp_path)] == [
        "a.webp",
        "b.png",
        "c.JPG",
        "z.tar/000000000",
        "z.tar/000000001",
    ]


def test_memory_does_not_grow_with_the_shard(tmp_path: Path) -> None:
    image = bytes(100_000)
    write_tar(tmp_path / "a.tar", crawl_members([(f"{URL}{i}", image, "c") for i in range(300)]))

    tracemalloc.start()
    count = sum(1 for _ in open_source(tmp_path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert count == 300
    assert peak < 5_000_000  # the shard has 30 MB
