"""Announcing model bundles to the workers, and finding the newest one: the topic `model-bundles`.

Must not know what is in a bundle beyond its manifest's version and space.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from confluent_kafka import KafkaException

from stream.errors import TldrError, Unavailable
from stream.kafka import Connection, create_missing, end_offsets, partition_counts, read_partition, start_offsets
from stream.records import Codec
from stream.topics import BUNDLES

DELIVERY_TIMEOUT_S = 30.0
# A model names its bundle by so much of the content's SHA-256 (models/model.py).
VERSION_CHARACTERS = 16


@dataclass(frozen=True)
class Announcement:
    """A bundle that workers may use (schemas/BundleAnnouncement.avsc)."""

    version: str
    uri: str
    space: str
    stream: str
    created_ms: int

    def lines(self) -> Iterable[str]:
        yield f"announced bundle {self.version[:12]} at {self.uri} to {self.stream or 'any stream'}"


def announce(connection: Connection, uri: str, version: str, space: str, stream: str = "") -> Announcement:
    """Announces the bundle at `uri` to the workers of `stream` ("" = of any). Creates the topic if it is missing."""
    create_missing(connection, {BUNDLES: {"cleanup.policy": "compact"}}, 1)
    announcement = Announcement(version, uri, space, stream, int(time.time() * 1000))
    producer = connection.producer(acks="all")
    try:
        producer.produce(BUNDLES, Codec("BundleAnnouncement").encode(asdict(announcement)), version.encode(), 0)
        if producer.flush(DELIVERY_TIMEOUT_S):
            raise Unavailable(
                f"the bundle {version[:12]} was not announced within {DELIVERY_TIMEOUT_S:.0f} s: try again"
            )
    except KafkaException as error:
        raise Unavailable(f"the bundle {version[:12]} was not announced: {error.args[0].str()}") from error
    return announcement


def announce_folder(connection: Connection, folder: Path, stream: str = "") -> Announcement:
    """Announces the bundle in `folder`, which must be whole. Raises BundleError otherwise."""
    from models.bundle import read_manifest

    manifest = read_manifest(folder)
    return announce(connection, str(folder.resolve()), manifest.version[:VERSION_CHARACTERS], manifest.space, stream)


def announced(connection: Connection) -> list[Announcement]:
    """Every announced bundle, oldest first; the last announcement of a version counts."""
    if BUNDLES not in partition_counts(connection, [BUNDLES]):
        return []
    codec = Codec("BundleAnnouncement")
    found: dict[str, Announcement] = {}
    first, end = start_offsets(connection, BUNDLES, [0])[0], end_offsets(connection, BUNDLES, [0])[0]
    for messages in read_partition(connection, BUNDLES, 0, first, end):
        for message in messages:
            if message.value() is not None:
                announcement = Announcement(**codec.decode(message.value()))
                found.pop(announcement.version, None)
                found[announcement.version] = announcement
    return list(found.values())


def find_bundle(connection: Connection, given: str | None, stream: str) -> Path:
    """The folder of the bundle to use: `given`, or the newest that was announced for `stream` or for any.

    Raises TldrError where there is none, or where its folder is not on this machine.
    """
    if given is not None:
        folder = Path(given)
        if not folder.is_dir():
            raise TldrError(f"there is no bundle at {given}: make one with `tldr-stream bootstrap`")
        return folder
    fitting = [a for a in announced(connection) if a.stream in ("", stream)]
    if not fitting:
        raise TldrError(
            "no bundle was announced: make one with `tldr-stream bootstrap SOURCE --announce`, or give --bundle FOLDER"
        )
    folder = Path(fitting[-1].uri)
    if not folder.is_dir():
        raise TldrError(
            f"the announced bundle {fitting[-1].version[:12]} lies at {fitting[-1].uri}, which is not on this machine: "
            "copy it here and give --bundle FOLDER"
        )
    return folder
