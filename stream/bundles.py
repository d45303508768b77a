"""Announcing model bundles to the workers, and finding the newest one: the topic `model-bundles`.

Must not know what is in a bundle beyond its manifest's version and space.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from confluent_kafka import KafkaError, KafkaException

from stream.acl import Right
from stream.errors import TldrError, Unavailable
from stream.kafka import (
    Connection,
    create_missing,
    end_offsets,
    partition_counts,
    read_partition,
    refused,
    start_offsets,
)
from stream.records import Codec
from stream.rights import check_rights
from stream.topics import BUNDLES

DELIVERY_TIMEOUT_S = 30.0
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
    check_rights(connection, "bundle announce")
    create_missing(connection, {BUNDLES: {"cleanup.policy": "compact"}}, 1)
    announcement = Announcement(version, uri, space, stream, int(time.time() * 1000))
    failures: list[KafkaError] = []
    producer = connection.producer(acks="all")
    try:
        producer.produce(
            BUNDLES, Codec("BundleAnnouncement").encode(asdict(announcement)), version.encode(), 0,
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


def announce_folder(connection: Connection, folder: Path, stream: str = "") -> Announcement:
    """Announces the bundle in `folder`, which must be whole and have clusters of codes. Raises BundleError otherwise."""
    from models.bundle import read_manifest
    from models.errors import BundleError

    manifest = read_manifest(folder)
    if problem := manifest.unfit_for_streams:
        raise BundleError(problem)
    return announce(connection, str(folder.resolve()), manifest.version[:VERSION_CHARACTERS], manifest.space, stream)


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
            yield f"gate {self.gate:.4f}; {', '.join(f'{k}={v}' for k, v in self.baselines.items())}"
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

    from models.bundle import read_files

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
        data.get("gate"), {k: v for k, v in baselines.items() if k not in ("code_usage", "cluster_occupancy")},
        dict(data.get("fingerprint", {})), list(data.get("examples", [])),
    )  # fmt: skip


def announced(connection: Connection) -> list[Announcement]:
    """Every announced bundle, oldest first; the last announcement of a version counts."""
    check_rights(connection, "an announced bundle")
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
