"""Which bundle a stream runs with, where its partitions differ: epochs do not tell, each counts its own switches."""

from __future__ import annotations

from pathlib import Path

import pytest

from state.changelog import Switch
from state.quota import Ratio
from state.settings import StreamSettings
from stream.bundles import announce
from stream.errors import TldrError
from stream.kafka import Connection
from stream.live_bundle import live_bundle, running_bundle
from stream.stream_view import PartitionView, StreamView
from stream.topics import StreamTopics


def view_of(stream: str, *partitions: list[str]) -> StreamView:
    """A partition has come to its last bundle over those before it."""
    settings = StreamSettings(len(partitions), "id", 1, Ratio(1, 2), None, None, None, "paper", "space", 8)
    parts = {p: PartitionView(p) for p in range(len(partitions))}
    for p, bundles in enumerate(partitions):
        for epoch, bundle in enumerate(bundles):
            parts[p].switches[epoch] = Switch(epoch, f"{stream}-{bundle}", "space", 10 * epoch)
    return StreamView(StreamTopics(stream), settings, parts)


def test_of_the_bundles_that_partitions_run_with_it_is_the_one_that_was_announced_last(
    kafka: Connection, name: str
) -> None:
    for bundle in ("first", "second", "third", "fourth"):
        announce(kafka, f"/{bundle}", f"{name}-{bundle}", "space", name)
    announce(kafka, "/second", f"{name}-second", "space", f"{name}-another")

    straight, behind = ["first", "third"], ["first", "second", "first"]  # … and nobody has come to the fourth yet
    assert running_bundle(kafka, view_of(name, behind, straight)) == f"{name}-third"
    assert running_bundle(kafka, view_of(name, straight, behind)) == f"{name}-third"
    assert running_bundle(kafka, view_of(name, straight, ["first", "second", "third"])) == f"{name}-third"
    assert running_bundle(kafka, view_of(name, behind, ["never announced"])) == f"{name}-first"


def test_where_announcements_do_not_tell_it_is_that_of_most_partitions_then_of_the_lowest(
    kafka: Connection, name: str
) -> None:
    assert running_bundle(kafka, view_of(name, ["a", "b"], ["c"], ["c"], [])) == f"{name}-c"
    assert running_bundle(kafka, view_of(name, ["a", "b"], ["a", "c", "d"])) == f"{name}-b"


def test_a_bundle_that_is_named_has_to_be_one_that_some_partition_runs_with(
    kafka: Connection, name: str, tmp_path: Path
) -> None:
    with pytest.raises(TldrError, match="no bundle yet"):
        running_bundle(kafka, view_of(name, [], []))
    with pytest.raises(TldrError, match=f"give the folder of bundle {f'{name}-b'[:12]} or {f'{name}-c'[:12]}$"):
        live_bundle(kafka, view_of(name, ["a", "b"], ["a", "c"]), str(tmp_path / "none"))
