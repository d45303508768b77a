"""A broker that compacts at once what a test wants compacted; by default it looks every 15 s, at segments of a week."""

from __future__ import annotations

from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

from stream.kafka import Connection, topic_setting
from tests.end_to_end.worker_process import until

# Settings of a topic whose records may be compacted as soon as they are written; its last segment is left alone.
EAGER = {"min.compaction.lag.ms": "0", "segment.ms": "50", "min.cleanable.dirty.ratio": "0.01"}


def clean_every(kafka: Connection, interval_ms: int) -> None:
    """The cleaner's rest between two rounds, for all topics of the broker."""
    _alter(kafka, ResourceType.BROKER, "1", {"log.cleaner.backoff.ms": str(interval_ms)})


def set_topic(kafka: Connection, topic: str, **settings: str) -> None:
    """Changes settings of a topic; underscores stand for dots."""
    wanted = {key.replace("_", "."): value for key, value in settings.items()}
    _alter(kafka, ResourceType.TOPIC, topic, wanted)
    for key, value in wanted.items():
        until(lambda key=key, value=value: topic_setting(kafka, topic, key) == value, f"{key} is {value}")  # type: ignore[misc]


def _alter(kafka: Connection, kind: ResourceType, name: str, settings: dict[str, str]) -> None:
    entries = [ConfigEntry(key, value, incremental_operation=AlterConfigOpType.SET) for key, value in settings.items()]
    for done in kafka.admin.incremental_alter_configs(
        [ConfigResource(kind, name, incremental_configs=entries)]
    ).values():
        done.result()
