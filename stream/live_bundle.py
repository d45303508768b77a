"""The bundle that a stream runs with now: which one its changelog names, where it lies, and what drift is measured against."""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stream.bundles import announced, known_to, told
from stream.errors import TldrError
from stream.kafka import Connection, MissingRight
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


def running_bundle(connection: Connection, view: StreamView) -> str:
    """The version of the bundle that the stream is said to run with.

    Partitions switch one by one, and one whose worker cannot load a bundle stays behind. Of the bundles that partitions run
    with now it is the one that was announced last; where announcements do not tell (none of these was announced, or they
    may not be read), the one of most partitions, and of as many the lowest partition's.
    Raises TldrError where no partition runs with any yet.
    """
    present = _present(view)
    if len(present) > 1:
        with contextlib.suppress(MissingRight):
            versions = told(announced(connection), view.topics.name)
            if known := [version for version in versions if version in present]:
                return known[-1]
    return present.most_common(1)[0][0]


def _present(view: StreamView) -> Counter[str]:
    """The bundles that partitions run with now, the lowest partition's first. Raises TldrError where there is none yet."""
    present = Counter(switch.bundle for _, switch in sorted(view.running.items()))
    if not present:
        raise TldrError(
            f"the stream {view.topics.name} runs with no bundle yet: start a worker, or wait for its first commit"
        )
    return present


def live_bundle(connection: Connection, view: StreamView, given: str | None = None) -> LiveBundle:
    """The stream's bundle (`running_bundle`), where it was announced to be, a folder or an fsspec URL; or the one in the folder
    `given`, with which some partition runs.

    Raises TldrError where it cannot be found or `given` is another one, BundleError for a damaged or unreachable one.
    """
    from models.bundle import read_manifest
    from stream.bundle_fetch import fetch

    if given is not None:
        present = _present(view)
        names = " and ".join(version[:12] for version in present)
        if not Path(given).is_dir():
            raise TldrError(
                f"there is no bundle at {given}: give the folder of bundle {names.replace(' and ', ' or ')}"
            )
        version = read_manifest(given).version
        if not version.startswith(tuple(present)):
            raise TldrError(
                f"the stream runs with bundle {names}, and {given} is {version[:12]}: give --bundle FOLDER of "
                f"{'that one' if len(present) == 1 else 'one of those'}"
            )
        return open_bundle(Path(given))
    running = running_bundle(connection, view)
    known = known_to(announced(connection), view.topics.name)
    uris = [one.uri for one in known.values() if one.version.startswith(running)]
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
