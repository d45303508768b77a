"""What is announced, to whom, and what a reader of `model-bundles` makes of it."""

from __future__ import annotations

from dataclasses import asdict

from stream.bundle_list import list_bundles
from stream.bundles import Announcement, announce, announced, told
from stream.kafka import Connection, end_offsets, read_partition
from stream.records import Codec
from stream.topics import BUNDLES


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
