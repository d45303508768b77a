"""What is announced, to whom, and what a reader of `model-bundles` makes of it."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from stream.bundle_list import list_bundles
from stream.bundles import Announced, Announcement, announce, announced, told
from stream.kafka import Connection, end_offsets, read_partition
from stream.records import Codec
from stream.topics import BUNDLES
from tests.end_to_end.worker_process import until


def uris_of(kafka: Connection, stream: str) -> list[str]:
    """Where the bundles are that a stream was told of, without those of other tests, which were told to any."""
    return [one.uri for one in told(announced(kafka), stream).values() if stream in one.uri]


def keys_of(kafka: Connection, name: str) -> list[bytes]:
    """The keys of the records about bundles of this name: compaction keeps the last record of each."""
    end = end_offsets(kafka, BUNDLES, [0])[0]
    records = [message for batch in read_partition(kafka, BUNDLES, 0, 0, end) for message in batch]
    return [key for message in records if name.encode() in (key := message.key() or b"")]


def test_an_announcement_to_one_stream_takes_none_away_that_another_stream_was_told(
    kafka: Connection, name: str
) -> None:
    for stream in (f"{name}-a", f"{name}-b", ""):
        announce(kafka, f"/{name}-a/{name}-b", f"{name}-v1", "space", stream)

    assert len(set(keys_of(kafka, name))) == 3
    assert uris_of(kafka, f"{name}-a") == uris_of(kafka, f"{name}-b") == [f"/{name}-a/{name}-b"]


def test_a_stream_has_its_bundles_in_the_order_in_which_it_or_any_stream_was_told_of_them(
    kafka: Connection, name: str
) -> None:
    for bundle, stream in (("one", name), ("two", ""), ("three", "other"), ("one", "other"), ("two", "other")):
        announce(kafka, f"/{name}/{bundle}", f"{name}-{bundle}", "space", stream)
    assert uris_of(kafka, name) == [f"/{name}/one", f"/{name}/two"]

    announce(kafka, f"/{name}/one-again", f"{name}-one", "space")
    assert uris_of(kafka, name) == [f"/{name}/two", f"/{name}/one-again"]


def test_records_whose_key_is_the_version_alone_are_read_whatever_stream_they_are_for(
    kafka: Connection, name: str
) -> None:
    announce(kafka, f"/{name}/new", f"{name}-new", "space", name)
    old = Announcement(f"{name}-old", f"/{name}/old", "space", name, 0)
    producer = kafka.producer(acks="all")
    producer.produce(BUNDLES, Codec("BundleAnnouncement").encode(asdict(old)), old.version.encode(), 0)
    producer.flush()

    assert uris_of(kafka, name) == [f"/{name}/new", f"/{name}/old"]


def test_without_a_stream_a_bundle_is_listed_for_each_one_that_was_told_of_it(kafka: Connection, name: str) -> None:
    for stream in (f"{name}-a", f"{name}-b"):
        announce(kafka, "/bundle", f"{name}-v1", "space", stream)

    listed = [one.announcement for one in list_bundles(kafka, None).bundles if one.version == f"{name}-v1"]

    assert [one.stream for one in listed if one is not None] == [f"{name}-a", f"{name}-b"]


@pytest.fixture
def own_topic(kafka: Connection, name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A topic of announcements for one test alone, which does to it what others could not stand."""
    monkeypatch.setattr("stream.bundles.BUNDLES", name)
    return name


def test_a_topic_that_was_made_anew_is_read_from_its_beginning_and_what_it_said_before_is_forgotten(
    kafka: Connection, own_topic: str
) -> None:
    for bundle in ("one", "two", "three"):
        announce(kafka, f"/{bundle}", bundle, "space")
    following = Announced(kafka)
    assert [one.version for one in following.look()] == ["one", "two", "three"]

    kafka.admin.delete_topics([own_topic])[own_topic].result()
    until(lambda: own_topic not in kafka.admin.list_topics(timeout=10).topics, "it is gone")
    for bundle in ("four", "one", "five"):  # as many as before
        announce(kafka, f"/{bundle}", bundle, "space")

    assert [one.version for one in following.look()] == ["four", "one", "five"]
    announce(kafka, "/six", "six", "space")
    assert [one.version for one in following.look()] == ["four", "one", "five", "six"]


def test_a_record_that_is_no_announcement_is_told_of_once_and_passed_over(
    kafka: Connection, own_topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    announce(kafka, "/one", "one", "space")
    producer = kafka.producer(acks="all")
    producer.produce(own_topic, b"by hand", b"two", 0)
    producer.flush()
    announce(kafka, "/three", "three", "space")
    following = Announced(kafka)

    for _ in range(2):
        assert [one.version for one in following.look()] == ["one", "three"]

    told = [record.getMessage() for record in caplog.records if "no announcement" in record.getMessage()]
    assert len(told) == 1 and "offset 1 " in told[0]
