"""The bundle that a stream runs with now: which one its changelog names, where it lies, and what drift is measured against."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stream.bundles import announced
from stream.errors import TldrError
from stream.kafka import Connection
from stream.stream_view import StreamView

if TYPE_CHECKING:
    from models.bundle import Manifest
    from models.clustering import Clustering
    from models.drift import Baseline


@dataclass(frozen=True)
class LiveBundle:
    """A bundle whose files were checked, and its clustering; no network of it is loaded to a device.

    uri  a folder of this machine, or the URL that it was fetched from
    """

    uri: str
    manifest: Manifest
    contents: Mapping[str, bytes]
    clustering: Clustering
    baseline: Baseline

    @property
    def version(self) -> str:
        """As a stream names it."""
        from stream.bundles import VERSION_CHARACTERS

        return self.manifest.version[:VERSION_CHARACTERS]


def running_bundle(view: StreamView) -> str:
    """The version in the newest switch record. Raises TldrError where the stream has none yet."""
    switches = [switch for part in view.partitions.values() for switch in part.switches.values()]
    if not switches:
        raise TldrError(
            f"the stream {view.topics.name} runs with no bundle yet: start a worker, or wait for its first commit"
        )
    return max(switches, key=lambda switch: switch.epoch).bundle


def live_bundle(connection: Connection, view: StreamView, given: str | None = None) -> LiveBundle:
    """The stream's bundle: in the folder `given`, or where it was announced to be, a folder or an fsspec URL.

    Raises TldrError where it cannot be found or `given` is another one, BundleError for a damaged or unreachable one.
    """
    from models.bundle import read_manifest
    from stream.bundle_fetch import fetch

    running = running_bundle(view)
    if given is not None:
        if not Path(given).is_dir():
            raise TldrError(f"there is no bundle at {given}: give the folder of bundle {running[:12]}")
        version = read_manifest(given).version
        if not version.startswith(running):
            raise TldrError(
                f"the stream runs with bundle {running[:12]}, and {given} is {version[:12]}: give --bundle FOLDER of that one"
            )
        return open_bundle(Path(given))
    uris = [one.uri for one in announced(connection) if one.version.startswith(running)]
    if not uris:
        raise TldrError(f"the stream runs with bundle {running[:12]}, which was never announced: give --bundle FOLDER")
    if "://" in uris[-1]:
        with tempfile.TemporaryDirectory(prefix="tldr-bundle-") as cache:
            return open_bundle(fetch(uris[-1], running, Path(cache)), uris[-1])
    folder = Path(uris[-1])
    if not folder.is_dir() or not read_manifest(folder).version.startswith(running):
        raise TldrError(
            f"the stream's bundle {running[:12]} was announced at {uris[-1]}, where it is not on this machine: copy it here "
            "and give --bundle FOLDER"
        )
    return open_bundle(folder)


def open_bundle(folder: Path, uri: str | None = None) -> LiveBundle:
    """The bundle in `folder` (which was fetched from `uri`), each hash checked. Raises BundleError."""
    from safetensors.numpy import load

    from models.bundle import read_files
    from models.drift import Baseline
    from models.errors import BundleError
    from models.loaded import CaptionerParts, clustering_of

    manifest, contents = read_files(folder)
    if not manifest.complete:
        raise BundleError(f"{folder} has no clusters: run `tldr-stream bootstrap` on it to make it a whole bundle")
    if problem := manifest.unfit_for_streams:
        raise BundleError(problem)
    codebook = CaptionerParts.of(manifest, contents).captioner.quantiser.codebook.codes.numpy()
    clustering = clustering_of(manifest.data["clustering"], load(contents["clusters.safetensors"]), codebook)
    return LiveBundle(uri or str(folder), manifest, contents, clustering, Baseline.of(manifest.data))
