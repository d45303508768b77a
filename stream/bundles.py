"""Announcing model bundles to the workers, and finding the newest one: the topic `model-bundles`.

Must not know what is in a bundle beyond its manifest's version and space.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from confluent_kafka import KafkaError, KafkaException, Message

from models.bundle import Manifest, read_files
from models.errors import BundleError
from state.errors import StateError
from stream.acl import Right
from stream.errors import TldrError, Unavailable
from stream.kafka import (
    Connection,
    MissingRight,
    create_missing,
    end_offsets,
    read_partition,
    refused,
    start_offsets,
    topic_ids,
)
from stream.records import Codec, UndecodableRecord
from stream.rights import check_rights
from stream.topics import BUNDLES

log = logging.getLogger(__name__)

DELIVERY_TIMEOUT_S = 30.0
NULL = "null:"  # the URI of a null model begins so
FREQUENT = 15  # codes that `bundle inspect` shows
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
    # A compacted topic keeps the last record of a key: what one stream is told must not take away what another one was.
    key = f"{version}/{stream}" if stream else version
    check_rights(connection, "bundle announce")
    create_missing(connection, {BUNDLES: {"cleanup.policy": "compact"}}, 1)
    announcement = Announcement(version, uri, space, stream, int(time.time() * 1000))
    failures: list[KafkaError] = []
    producer = connection.producer(acks="all")
    try:
        producer.produce(
            BUNDLES, Codec("BundleAnnouncement").encode(asdict(announcement)), key.encode(), 0,
            on_delivery=lambda error, message: failures.append(error) if error is not None else None,
        )  # fmt: skip
        if producer.flush(DELIVERY_TIMEOUT_S):
            raise Unavailable(
                f"the bundle {version[:12]} was not announced within {DELIVERY_TIMEOUT_S:.0f} s: try again"
            )
    except KafkaException as error:
        failures.append(error.args[0])
    if failures:
        what = f"the bundle {version[:12]} was not announced"
        raise refused(connection, failures[0], what, Right("Write", "topic", BUNDLES))
    return announcement


def announce_folder(connection: Connection, folder: Path | str, stream: str = "") -> Announcement:
    """Announces the bundle in `folder` (or at an fsspec URL), which must be whole and have clusters of codes.

    `null:SEED` and `null:SEED/CLUSTERS` are other clusters of the null model. Raises BundleError, and TldrError where the
    stream runs with another encoder, codebook or gate.
    """
    uri = str(folder)
    if uri.startswith(NULL):
        from models.null import NullModel

        model = NullModel.at(uri)
        _refuse_another_space(connection, stream, model.version, model.space)
        return announce(connection, uri, model.version, model.space, stream)
    if "://" in uri:
        from stream.bundle_fetch import manifest_at

        manifest = Manifest(manifest_at(uri))
    else:
        manifest, _ = read_files(folder, ())
        uri = str(Path(folder).resolve())
    if problem := manifest.unfit_for_streams:
        raise BundleError(problem)
    if not manifest.complete:
        raise BundleError(f"{uri} has no clusters: run `tldr-stream bootstrap` on it to make it a whole bundle")
    _refuse_another_space(connection, stream, manifest.version, manifest.space)
    return announce(connection, uri, manifest.version[:VERSION_CHARACTERS], manifest.space, stream)


def _refuse_another_space(connection: Connection, stream: str, version: str, space: str) -> None:
    from stream.stream_view import stored_settings
    from stream.topics import StreamTopics

    settings = stored_settings(connection, StreamTopics(stream)) if stream else None
    if settings is not None and settings.space != space:
        raise TldrError(
            f"bundle {version[:12]} has another encoder, codebook or gate than the stream {stream}, which cannot switch to "
            "it: start another --stream on the same raw topic with it, which is then reduced from its beginning"
        )


def streams_of_other_spaces(connection: Connection, announcement: Announcement) -> list[str]:
    """The streams of this cluster that it speaks to and that cannot switch to the bundle, as far as this client may look."""
    from stream.stream_view import stored_settings
    from stream.topics import StreamTopics

    if announcement.stream:
        return []  # it was looked at before
    ending, found = StreamTopics("").changelog, []
    try:
        topics = connection.admin.list_topics(timeout=DELIVERY_TIMEOUT_S).topics
        for stream in sorted(topic.removesuffix(ending) for topic in topics if topic.endswith(ending)):
            with contextlib.suppress(MissingRight, StateError):  # another version of this software may have written it
                settings = stored_settings(connection, StreamTopics(stream))
                if settings is not None and settings.space != announcement.space:
                    found.append(stream)
    except (KafkaException, TldrError) as error:  # it is announced all the same
        log.warning("which streams can switch to it was not to be seen: %s", error)
    return found


@dataclass(frozen=True)
class BundleView:
    """What a bundle says about itself, and how large its networks are."""

    folder: Path
    version: str
    space: str
    architecture: str
    parameters: dict[str, int]
    config: dict[str, object]
    codes_used: int
    code_perplexity: float
    frequent_codes: list[tuple[int, float, str]]  # number, share of all tokens, the keyword that it started from
    clustering: dict[str, object]
    cluster_sizes: tuple[int, float, int, int]  # least, median, most, empty
    gate: float | None
    itm: str
    baselines: dict[str, object]
    fingerprint: dict[str, str]
    examples: list[dict[str, object]]

    def lines(self) -> Iterable[str]:
        yield f"bundle {self.version[:16]} in {self.folder}, architecture {self.architecture}, space {self.space[:16]}"
        yield f"parameters: {', '.join(f'{name} {count:,}' for name, count in self.parameters.items())}"
        yield f"settings: {', '.join(f'{k}={v}' for k, v in self.config.items())}"
        yield f"made on: {', '.join(f'{k}={v}' for k, v in self.fingerprint.items())}"
        if self.clustering:
            least, median, most, empty = self.cluster_sizes
            yield f"clusters: {', '.join(f'{k}={v}' for k, v in self.clustering.items())}"
            yield f"  pairs each: {least} to {most}, median {median:.0f}, {empty} empty"
        else:
            yield "clusters: none yet; run `tldr-stream bootstrap`"
        if self.gate is not None:
            yield f"gate {self.gate:.4f}, of the scorer: {self.itm}"
            yield f"baselines: {', '.join(f'{k}={v}' for k, v in self.baselines.items())}"
        if self.frequent_codes:
            yield f"codes: {self.codes_used} used, perplexity {self.code_perplexity:.0f}; most frequent, with the keyword"
            yield "  that each started from (a code that was revived has drifted from it):"
            yield from (f"  {number:>5} {share:6.2%}  {keyword}" for number, share, keyword in self.frequent_codes)
        for example in self.examples:
            yield f"example: {example['caption']!r} → {example['generated']!r} (ITM {example['itm']})"


def inspect(folder: Path) -> BundleView:
    """The bundle in `folder`, each file's hash checked. Raises BundleError where something is wrong with it."""
    import json
    import struct

    import numpy as np

    manifest, contents = read_files(folder)
    parameters = {}
    for name, content in contents.items():
        if name.endswith(".safetensors"):
            header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
            shapes = [int(np.prod(about["shape"])) for key, about in header.items() if key != "__metadata__"]
            parameters[name.removesuffix(".safetensors")] = sum(shapes)
    data, baselines = manifest.data, manifest.data.get("baselines", {})
    usage = np.array(baselines.get("code_usage", []), np.int64)
    share = usage / max(1, usage.sum())
    used = share[share > 0]
    keywords = list(data.get("keywords", []))
    frequent = [
        (int(c), float(share[c]), keywords[c] if c < len(keywords) else "") for c in np.argsort(-usage)[:FREQUENT]
    ]
    sizes = np.array(baselines.get("cluster_occupancy", [0]), np.int64)
    spread = (int(sizes.min()), float(np.median(sizes)), int(sizes.max()), int((sizes == 0).sum()))
    return BundleView(
        folder, manifest.version, manifest.space, str(data.get("architecture", "?")), parameters, dict(data["config"]),
        len(used), float(np.exp(-(used * np.log(used)).sum())), [f for f in frequent if f[1]],
        dict(data.get("clustering", {})), spread,
        data.get("gate"), _scorer(manifest),
        {k: v for k, v in baselines.items() if k not in ("code_usage", "cluster_occupancy")},
        dict(data.get("fingerprint", {})), list(data.get("examples", [])),
    )  # fmt: skip


class Announced:
    """All announcements, oldest first, kept up to date by `look`; the last one of a version to a stream counts."""

    def __init__(self, connection: Connection) -> None:
        self.all: list[Announcement] = []
        self._connection = connection
        self._topic: str | None = None  # Kafka's own id of it
        self._next = 0
        self._codec = Codec("BundleAnnouncement")

    def look(self) -> list[Announcement]:
        """Reads what was announced since the last call. Raises Unavailable."""
        connection = self._connection
        topic = topic_ids(connection, [BUNDLES]).get(BUNDLES)
        if topic is None:
            return self.all
        if topic != self._topic:
            if self._topic is not None:
                log.warning("%s was made anew: what was announced before counts no more", BUNDLES)
            self._next, self.all = start_offsets(connection, BUNDLES, [0])[0], []
            self._topic = topic
        end = end_offsets(connection, BUNDLES, [0])[0]
        found = {(one.version, one.stream): one for one in self.all}
        for messages in read_partition(connection, BUNDLES, 0, self._next, end, timeout_s=DELIVERY_TIMEOUT_S):
            for message in messages:
                if message.value() is not None and (announcement := self._announcement(message)) is not None:
                    # Not by the record's key: older versions of this software left the stream out of it.
                    found.pop((announcement.version, announcement.stream), None)
                    found[announcement.version, announcement.stream] = announcement
        self._next, self.all = max(self._next, end), list(found.values())
        return self.all

    def _announcement(self, message: Message) -> Announcement | None:
        """What a record says; None: it is no announcement, which is told, and keeps nobody from the next one."""
        try:
            return Announcement(**self._codec.decode(message.value() or b""))
        except (UndecodableRecord, TypeError) as error:
            log.warning("%s: offset %d is no announcement (%s): passing over it", BUNDLES, message.offset(), error)
            return None


def told(announcements: Iterable[Announcement], stream: str) -> dict[str, Announcement]:
    """What `stream` was told, or any: version → its last announcement, in the order of these."""
    return _latest(one for one in announcements if one.stream in ("", stream))


def _latest(announcements: Iterable[Announcement]) -> dict[str, Announcement]:
    found: dict[str, Announcement] = {}
    for one in announcements:
        found.pop(one.version, None)
        found[one.version] = one
    return found


def known_to(announcements: Iterable[Announcement], stream: str) -> dict[str, Announcement]:
    """What `stream` was told, and of the bundles that it was not told of the last announcement to another one.

    Their order says nothing. A version tells the content, so whoever runs with a bundle may have it from anywhere.
    """
    return _latest(announcements) | told(announcements, stream)


def _scorer(manifest: Manifest) -> str:
    if manifest.blip is None:
        return "the bundle's own head"
    folder, files = manifest.blip
    return f"the BLIP in {folder} ({', '.join(f'{name} {digest[:16]}' for name, digest in files.items())})"


def announced(connection: Connection) -> list[Announcement]:
    """Every announcement, oldest first; the last one of a version to a stream counts."""
    check_rights(connection, "an announced bundle")
    return Announced(connection).look()


def fitting_for(connection: Connection, stream: str, space: str | None = None) -> list[Announcement]:
    """The bundles that were announced for `stream` or for any, oldest first; of one space, if it has one already.

    Raises TldrError where there is none.
    """
    fitting = [a for a in told(announced(connection), stream).values() if not a.uri.startswith(NULL)]
    if not fitting:
        raise TldrError(
            "no bundle was announced: make one with `tldr-stream bootstrap SOURCE --announce`, or give --bundle FOLDER"
        )
    if space is None:
        return fitting
    same = [a for a in fitting if a.space == space]
    if not same:
        raise TldrError(
            f"no announced bundle has the encoder, codebook and gate of the stream {stream}: announce one that has, or start "
            "another --stream on the same raw topic"
        )
    return same


def find_bundle(connection: Connection, given: str | None, stream: str) -> Path:
    """The folder of the bundle to use: `given`, or the newest that was announced for `stream` or for any.

    Raises TldrError where there is none, or where its folder is not on this machine.
    """
    if given is not None:
        folder = Path(given)
        if not folder.is_dir():
            raise TldrError(f"there is no bundle at {given}: make one with `tldr-stream bootstrap`")
        return folder
    fitting = fitting_for(connection, stream)
    folder = Path(fitting[-1].uri)
    if not folder.is_dir():
        raise TldrError(
            f"the announced bundle {fitting[-1].version[:12]} lies at {fitting[-1].uri}, which is not on this machine: "
            "copy it here and give --bundle FOLDER"
        )
    return folder
