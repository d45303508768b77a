"""Promises of `topics`: all that a stream needs is made once, as a worker would make it, and nothing that exists is touched."""

from __future__ import annotations

import dataclasses

import pytest

from stream.errors import TldrError
from stream.kafka import Connection, create_missing, partition_counts, topic_setting
from stream.topic_set import TopicOptions, make_topics
from stream.topics import BUNDLES, KEPT_OVERHEAD_BYTES, StreamTopics


def test_a_stream_gets_its_topics_once_and_as_a_worker_makes_them(kafka: Connection, name: str) -> None:
    options = TopicOptions(name, f"{name}-s", 3, replication_factor=1, min_insync_replicas=1, record_bytes=2_000_000)

    first, second = make_topics(kafka, options), make_topics(kafka, options)

    wanted = StreamTopics(f"{name}-s").settings(4_000_000 + KEPT_OVERHEAD_BYTES)
    assert set(first.created) >= {name, *wanted}
    assert partition_counts(kafka, [name, *wanted]) == dict.fromkeys([name, *wanted], 3)
    assert partition_counts(kafka, [BUNDLES]) == {BUNDLES: 1}
    for topic, settings in wanted.items():
        for setting, value in settings.items():
            assert topic_setting(kafka, topic, setting) == value
    assert topic_setting(kafka, name, "max.message.bytes") == "2000000"
    assert second.created == []
    assert [line for line in second.differing if BUNDLES not in line] == []


def test_what_exists_is_told_and_left(kafka: Connection, name: str) -> None:
    create_missing(kafka, {name: {"max.message.bytes": "1000000"}}, 2)

    made = make_topics(kafka, TopicOptions(name, name, 2))

    assert name in made.existing
    assert f"{name} has max.message.bytes=1000000, not 8388608" in made.differing
    assert topic_setting(kafka, name, "max.message.bytes") == "1000000"
    with pytest.raises(TldrError, match="has 2 partitions"):
        make_topics(kafka, TopicOptions(name, name, 4))


def test_replicas_that_cannot_be_are_refused_before_anything_is_made(kafka: Connection, name: str) -> None:
    options = TopicOptions(name, name, 2, replication_factor=1, min_insync_replicas=2)

    with pytest.raises(TldrError, match="no record could be written"):
        make_topics(kafka, options)
    with pytest.raises(TldrError, match="create topic"):  # one broker has no three replicas
        make_topics(kafka, dataclasses.replace(options, replication_factor=3))
    assert name not in partition_counts(kafka, [name])
