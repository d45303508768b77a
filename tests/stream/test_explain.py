"""Promises of `explain`: it tells the fate of every pair, and agrees with who is in the set."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stream.cli import app
from stream.errors import TldrError
from stream.explain import explain, explain_many
from stream.kafka import Connection
from tests.stream.stream_writer import StreamWriter, raw


def test_it_agrees_with_membership_for_every_pair_of_a_stream(kafka: Connection, name: str, tmp_path: Path) -> None:
    with StreamWriter(kafka, name, tmp_path, cap=20, window=60, gate=0.1) as writer:
        writer.feed(f"pair {i}" for i in range(250))
        writer.feed([("pair 3", None), ("nobody", None), ("broken", b"not avro")])
        writer.feed(raw(f"bad {i}", image=b"BAD") for i in range(5))
        writer.feed(f"pair {i}" for i in range(250)).run()
        found, members = explain_many(writer.source, None), writer.members()

    assert {pair_id for pair_id, about in found.items() if about.in_the_set} == set(members)
    assert len(found) == 250 + 2 + 5
    assert not [about.verdict for about in found.values() if "verify" in about.verdict or "nothing" in about.verdict]
    assert all(about.verdict.startswith("kept (offset") == about.in_the_set for about in found.values())
    said = {re.sub(r" \(.*|:.*", "", about.verdict) for about in found.values()}
    assert said >= {"kept", "evicted", "forgotten", "not kept", "dead letter"}


def test_it_tells_cluster_position_itm_offsets_bundle_and_what_came_later(
    kafka: Connection, name: str, tmp_path: Path
) -> None:
    with StreamWriter(kafka, name, tmp_path, partitions=1, ratio="1/1", cap=1) as writer:
        writer.feed([f"pair {i}" for i in range(20)] + ["pair 0"]).run()
        survivor = next(iter(writer.members()))
        evicted = next(f"pair {i}" for i in range(20) if f"pair {i}" not in writer.members())
        there, gone = explain(writer.source, survivor), explain(writer.source, evicted)
        first = explain(writer.source, "pair 0")
        with pytest.raises(TldrError, match="nothing is recorded of 'a stranger'"):
            explain(writer.source, "a stranger")
        shown = CliRunner().invoke(
            app, ["explain", survivor, "--topic", name, "--bootstrap-servers", kafka.bootstrap_servers]
        )

    (kept,) = [event for event in there.events if event.fate == "kept"]
    assert (kept.offset, kept.bundle) == (writer_offset(survivor), writer.model.version)
    assert kept.cluster in (0, 1, 2)
    assert kept.position >= 0
    assert kept.itm is not None
    assert there.refined_caption is not None
    assert gone.verdict.startswith(("evicted: pair", "not kept: its cell was full"))
    assert first.events[-1].what == "not counted: a duplicate of offset 0"
    assert shown.exit_code == 0, shown.output
    assert "in the reduced set: kept" in shown.output


def writer_offset(pair_id: str) -> int:
    return int(pair_id.split()[1])


def test_a_dead_letter_is_told_with_its_reason(kafka: Connection, name: str, tmp_path: Path) -> None:
    with StreamWriter(kafka, name, tmp_path, partitions=1) as writer:
        writer.feed([raw("bad", image=b"BAD"), ("broken", b"not avro")]).run()
        bad, broken = explain(writer.source, "bad"), explain(writer.source, "broken")

    assert bad.verdict == "dead letter: not-an-image (offset 0)"
    assert broken.verdict == "dead letter: not-avro (offset 1)"
    assert not bad.in_the_set
