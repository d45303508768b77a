"""Pairs reach the raw topic once, in their partitions, however often `ingest` is stopped, killed and started again."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from confluent_kafka import Message

from stream.errors import TldrError, Unavailable
from stream.ingest import IngestOptions, IngestResult, ingest
from stream.ingest_journal import Journal
from stream.kafka import Connection, create_missing, end_offsets, partition_counts, read_partition, topic_setting
from stream.murmur2 import partitions_of
from stream.records import Codec
from stream.results import to_plain
from tests.stream.source_files import crawl_members, write_tar

URL = "https://images.example.org/"


def crawl(file: Path, count: int, prefix: str = "", image_bytes: int = 200) -> Path:
    pairs = [(f"{URL}{prefix}{i}.jpg", os.urandom(image_bytes), f"caption {i}") for i in range(count)]
    return write_tar(file, crawl_members([(u, i, c) for u, i, c in pairs]))


def run(kafka: Connection, source: Path, topic: str, **options: object) -> IngestResult:
    journal = source.parent / "journals"
    return ingest(IngestOptions(kafka, str(source), topic, **{"journal": journal, **options}))  # type: ignore[arg-type]


def records(kafka: Connection, topic: str) -> list[Message]:
    ends = end_offsets(kafka, topic, range(partition_counts(kafka, [topic])[topic]))
    return [m for p, end in ends.items() for batch in read_partition(kafka, topic, p, 0, end) for m in batch]


def ids(kafka: Connection, topic: str) -> Counter[str]:
    return Counter(message.key().decode() for message in records(kafka, topic))


def test_every_pair_arrives_untouched_in_its_murmur2_partition(kafka: Connection, name: str, tmp_path: Path) -> None:
    source = write_tar(
        tmp_path / "a.tar", crawl_members([(f"{URL}{i}", bytes([255, i]), f"🐈 {i}") for i in range(40)])
    )

    result = run(kafka, source, name, partitions=3)

    assert (result.sent, result.partitions, result.topic_created, result.bad) == (40, 3, True, 0)
    messages = records(kafka, name)
    read = {m.key().decode(): Codec("RawPair").decode(m.value()) for m in messages}
    assert {i: (r["image"], r["caption"]) for i, r in read.items()} == {
        f"{URL}{i}": (bytes([255, i]), f"🐈 {i}") for i in range(40)
    }
    assert all(pair_id == record["id"] for pair_id, record in read.items())
    assert [m.partition() for m in messages] == partitions_of([m.key() for m in messages], 3).tolist()
    assert len({m.partition() for m in messages}) == 3
    assert int(topic_setting(kafka, name, "max.message.bytes") or 0) > 4_000_000


def test_a_second_run_adds_nothing_and_again_adds_all(kafka: Connection, name: str, tmp_path: Path) -> None:
    source = crawl(tmp_path / "a.tar", 50)
    run(kafka, source, name)

    second = run(kafka, source, name)
    forced = run(kafka, source, name, again=True)

    assert (second.sent, second.already_there) == (0, 50)
    assert (forced.sent, forced.already_there) == (50, 0)
    assert set(ids(kafka, name).values()) == {2}


def test_a_grown_folder_adds_only_what_is_new(kafka: Connection, name: str, tmp_path: Path) -> None:
    source = tmp_path / "crawl"
    crawl(source / "00000.tar", 20)
    for file in ("a", "c"):
        (source / f"{file}.png").write_bytes(file.encode())
        (source / f"{file}.txt").write_text(file)
    run(kafka, source, name)

    crawl(source / "00001.tar", 5, "new")
    (source / "b.png").write_bytes(b"b")
    (source / "b.txt").write_text("b")
    second = run(kafka, source, name)

    assert (second.sent, second.already_there) == (6, 22)
    assert set(ids(kafka, name).values()) == {1}


def test_a_rewritten_shard_of_the_same_name_is_sent(kafka: Connection, name: str, tmp_path: Path) -> None:
    run(kafka, crawl(tmp_path / "00000.tar", 10, "monday"), name)

    second = run(kafka, crawl(tmp_path / "00000.tar", 10, "tuesday"), name)

    assert (second.sent, second.already_there) == (10, 0)


def test_duplicates_within_a_source_are_the_workers_business(kafka: Connection, name: str, tmp_path: Path) -> None:
    source = write_tar(tmp_path / "a.tar", crawl_members([(URL + "x", b"image", "c")] * 3))

    result = run(kafka, source, name)

    assert result.sent == 3
    assert ids(kafka, name) == {URL + "x": 3}


def make_topic(kafka: Connection, topic: str, settings: dict[str, str]) -> None:
    create_missing(kafka, {topic: settings}, 2)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with contextlib.suppress(Unavailable):  # its leaders come a moment later
            end_offsets(kafka, topic, range(2))
            return


def start(kafka: Connection, source: Path, topic: str) -> subprocess.Popen[bytes]:
    arguments = ["ingest", str(source), "--topic", topic, "--bootstrap-servers", kafka.bootstrap_servers]
    arguments += ["--journal", str(source.parent / "journals"), "--partitions", "2"]
    return subprocess.Popen([sys.executable, "-m", "stream", *arguments], stdout=subprocess.DEVNULL)


def sent_so_far(kafka: Connection, topic: str) -> int:
    return sum(end_offsets(kafka, topic, range(2)).values()) if partition_counts(kafka, [topic]) else 0


def test_kill_minus_9_at_any_moment_and_run_again_sends_every_pair_once(
    kafka: Connection, name: str, tmp_path: Path
) -> None:
    total = 6_000
    source = crawl(tmp_path / "a.tar", total, image_bytes=2_000)
    make_topic(kafka, name, {})
    killed_at = []

    for moment in (1, 2_500):
        job = start(kafka, source, name)
        while job.poll() is None and sent_so_far(kafka, name) < moment:
            time.sleep(0.005)
        job.kill()
        job.wait()
        killed_at.append(sent_so_far(kafka, name))
    finished = start(kafka, source, name)

    assert finished.wait(60) == 0
    assert 0 < killed_at[0] < total, "the test must interrupt a run"
    counts = ids(kafka, name)
    lost, sent_twice = total - len(counts), sum(1 for n in counts.values() if n > 1)
    assert (lost, sent_twice) == (0, 0)


def test_what_a_killed_run_sent_without_writing_it_down_is_found_in_the_topic(
    kafka: Connection, name: str, tmp_path: Path
) -> None:
    source = crawl(tmp_path / "a.tar", 100)
    make_topic(kafka, name, {})
    first = run(kafka, source, name)
    [file] = (tmp_path / "journals").glob("*.journal")
    with Journal(file) as journal:  # as if killed before the first write: the offsets are those of the start
        journal.forget()
        journal.begin({0: 0, 1: 0}, {})

    second = run(kafka, source, name)

    assert (first.sent, second.sent, second.already_there) == (100, 0, 100)
    assert set(ids(kafka, name).values()) == {1}


def test_two_runs_of_one_source_at_once_are_refused(kafka: Connection, name: str, tmp_path: Path) -> None:
    source = crawl(tmp_path / "a.tar", 5)
    run(kafka, source, name)
    [file] = (tmp_path / "journals").glob("*.journal")

    with Journal(file), pytest.raises(TldrError, match="another ingest"):
        run(kafka, source, name)


def test_bad_entries_are_counted_and_listed_and_the_rest_arrives(kafka: Connection, name: str, tmp_path: Path) -> None:
    members = crawl_members([(f"{URL}{i}", b"image%d" % i, "c") for i in range(20)])
    members += [("lonely.png", b"i"), ("half.png", b"i"), ("half.json", b'{"caption": "half a cat \\ud83d"}')]
    source = write_tar(tmp_path / "a.tar", members)
    (tmp_path / "list.tsv").touch()

    first = run(kafka, source, name, bad_entries=tmp_path / "list.tsv")
    second = run(kafka, source, name, bad_entries=tmp_path / "list.tsv")

    assert (first.sent, first.bad) == (20, 2)
    assert first.bad_by_reason == {"no-caption": 1, "not-unicode": 1}
    assert [entry.place for entry in first.first_bad] == ["a.tar/half", "a.tar/lonely"]
    assert (tmp_path / "list.tsv").read_text().startswith("a.tar/half\tnot-unicode\t")
    assert (second.sent, second.bad) == (0, 2)


def test_a_record_that_the_topic_does_not_take_is_a_bad_entry(kafka: Connection, name: str, tmp_path: Path) -> None:
    make_topic(kafka, name, {"max.message.bytes": "50000"})
    images = [os.urandom(size) for size in (100, 60_000, 49_000, 20_000, 20_000, 20_000, 20_000)]
    source = write_tar(tmp_path / "a.tar", crawl_members([(f"{URL}{i}", x, "c") for i, x in enumerate(images)]))

    result = run(kafka, source, name)

    assert (result.sent, result.bad_by_reason) == (6, {"record-too-large": 1})
    assert result.first_bad[0].place == "a.tar/000000001"


def test_an_image_under_many_ids_is_reported(kafka: Connection, name: str, tmp_path: Path) -> None:
    pairs = [(f"{URL}{i}", b"image not available" if i % 2 else b"%d" % i, "c") for i in range(14)]
    source = write_tar(tmp_path / "a.tar", crawl_members([(u, i, c) for u, i, c in pairs]))

    result = run(kafka, source, name)

    assert [(image.ids, image.place) for image in result.repeated_images] == [(7, "a.tar/000000001")]
    assert any("placeholder" in line for line in result.lines())
    assert json.loads(json.dumps(to_plain(result)))["repeated_images"] == [{"ids": 7, "place": "a.tar/000000001"}]


def test_a_full_producer_queue_waits_and_loses_nothing(kafka: Connection, name: str, tmp_path: Path) -> None:
    slow = Connection(kafka.bootstrap_servers, {"queue.buffering.max.messages": "10"})
    source = crawl(tmp_path / "a.tar", 300)

    result = run(slow, source, name)

    assert result.sent == 300
    assert len(ids(kafka, name)) == 300


def test_another_partition_count_than_the_topic_has_is_one_clear_line(
    kafka: Connection, name: str, tmp_path: Path
) -> None:
    make_topic(kafka, name, {})

    with pytest.raises(TldrError, match="has 2 partitions, not 3"):
        run(kafka, crawl(tmp_path / "a.tar", 1), name, partitions=3)
