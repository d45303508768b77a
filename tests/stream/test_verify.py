"""Promises of `verify`: a stream that is right has no difference, and every planted one is found by id and offset."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from confluent_kafka import TopicPartition
from numpy.typing import NDArray
from typer.testing import CliRunner

from models.model import PairModel
from models.null import NullModel
from stream.cli import app
from stream.errors import Differs, NotVerified
from stream.kafka import Connection, end_offsets
from stream.verify import KINDS, Verified, verify
from tests.stream.stream_writer import StreamWriter, raw


def filled(writer: StreamWriter, count: int = 240) -> StreamWriter:
    """Pairs, a takedown, repeated ids, dead letters, an id that comes back after its takedown."""
    writer.feed(f"pair {i}" for i in range(count))
    writer.feed([("pair 3", None), ("nobody", None), ("broken", b"not avro")])
    writer.feed(raw(f"bad {i}", image=b"BAD") for i in range(5))
    return writer.feed(f"pair {i}" for i in range(0, count, 5)).feed(["pair 3"])


def check(writer: StreamWriter, model: PairModel | None = None) -> Verified:
    return verify(writer.source, writer.name, lambda version: model or writer.model)


def nothing_but(found: Verified, *kinds: str) -> list[Any]:
    assert {kind: found.counts[kind] for kind in KINDS if kind not in kinds and found.counts[kind]} == {}
    return [d for d in found.differences if d.kind in kinds]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ratio": "3/7", "cap": 12, "gate": 0.2},
        {"cap": 8, "window": 20, "ratio": "1/1", "batch": 17},
    ],
    ids=["plain", "capped and gated", "with a window"],
)
def test_an_undisturbed_stream_has_no_difference(
    kafka: Connection, name: str, tmp_path: Path, settings: dict[str, Any]
) -> None:
    with filled(StreamWriter(kafka, name, tmp_path, **settings)) as writer:
        writer.run()
        found, members = check(writer), writer.members()

    assert nothing_but(found) == []
    assert found.not_verified == []
    assert (found.rows + found.dead_letters, found.dead_letters) == (240 + 48 + 9, 6)
    assert found.clusters_checked > 200
    assert found.pairs == len(members)
    assert found.complete
    assert "0 missing, 0 extra, 0 cluster differs, 0 unaccounted" in found.lines()
    found.raise_for_status()


def test_what_was_planted_is_found_by_id_and_offset(kafka: Connection, name: str, tmp_path: Path) -> None:
    with filled(StreamWriter(kafka, name, tmp_path)) as writer:
        writer.run()
        victim, offset = next(iter(sorted(writer.members().items())))
        writer.plant(writer.topics.kept, victim, None, cause="1")
        writer.plant(
            writer.topics.kept, "intruder", b"value", cause="2", epoch="0", cluster="1", priority="5", rate="1/2"
        )
        found = check(writer)

    extra, missing = sorted(nothing_but(found, "missing", "extra"), key=lambda d: d.kind)
    assert (extra.kind, extra.id, extra.offset) == ("extra", "intruder", 2)
    assert (missing.kind, missing.id, missing.offset) == ("missing", victim, offset)
    assert any("intruder" in line for line in found.lines())
    with pytest.raises(Differs, match="1 missing, 1 extra") as stopped:
        found.raise_for_status()
    assert stopped.value.exit_status == 5


def test_a_worker_that_skips_a_record_is_caught(kafka: Connection, name: str, tmp_path: Path) -> None:
    with filled(StreamWriter(kafka, name, tmp_path)) as writer:
        writer.run(skip=lambda message: message.key() == b"pair 17" and message.offset() < 100)
        found = check(writer)
        ends = end_offsets(kafka, name, [writer.partition_of("pair 17")])

    (skipped,) = nothing_but(found, "unaccounted")
    assert (skipped.id, skipped.partition) == ("pair 17", writer.partition_of("pair 17"))
    assert 0 <= skipped.offset < ends[skipped.partition]


def test_an_offset_that_is_no_record_is_not_unaccounted(kafka: Connection, name: str, tmp_path: Path) -> None:
    with StreamWriter(kafka, name, tmp_path, partitions=1) as writer:
        writer.feed(["first"])
        from confluent_kafka import Producer

        producer = Producer(kafka.config(transactional_id=f"{name}-ingest"))
        producer.init_transactions()
        for _ in range(2):  # leaves a marker behind each
            producer.begin_transaction()
            producer.produce(name, b"broken", b"key", 0)
            producer.commit_transaction()
            settled_end(kafka, name)
        writer.feed(["last"]).run()
        found = check(writer)

    assert nothing_but(found) == []
    assert (found.rows, found.dead_letters, found.cut[0]) == (2, 2, 6)


def test_another_cluster_than_the_bundles_is_found(kafka: Connection, name: str, tmp_path: Path) -> None:
    class Other(NullModel):
        def assign(self, vectors: NDArray[np.uint16]) -> NDArray[np.int32]:
            clusters = super().assign(vectors)
            clusters[0] += 1
            return clusters

    with StreamWriter(kafka, name, tmp_path, partitions=1) as writer:
        writer.feed(["only one"]).run()
        found = check(writer, Other(tokens=8, codebook_size=50, clusters=3))
        unknown = verify(writer.source, name, lambda version: None)

    (difference,) = nothing_but(found, "cluster_differs")
    assert (difference.id, difference.offset) == ("only one", 0)
    assert "1 clusters" in unknown.not_verified[0]


@pytest.mark.parametrize("cap", [None, 10])
def test_where_codes_have_expired_the_rest_is_verified(
    kafka: Connection, name: str, tmp_path: Path, cap: int | None
) -> None:
    with StreamWriter(kafka, name, tmp_path, partitions=1, cap=cap, ratio="2/3") as writer:
        writer.feed(f"pair {i}" for i in range(200))
        writer.feed(f"pair {i}" for i in range(0, 200, 3)).run()
        expire(writer, 3)
        sound = check(writer)
        victim = max(writer.members().items(), key=lambda member: member[1])
        writer.plant(writer.topics.kept, victim[0], None, cause="1")
        planted = check(writer)

    assert nothing_but(sound) == []
    assert sound.verified_from == {0: 80}  # a transaction takes two records: its rows and its marker
    assert "before input offset 80 have expired" in sound.not_verified[0]
    assert not sound.complete
    assert not any("0 missing" in line for line in sound.lines())
    with pytest.raises(NotVerified) as stopped:
        sound.raise_for_status()
    assert stopped.value.exit_status == 4
    (missing,) = nothing_but(planted, "missing")
    assert (missing.id, missing.offset) == victim


def test_where_all_codes_have_expired_it_does_not_say_0_missing(kafka: Connection, name: str, tmp_path: Path) -> None:
    with StreamWriter(kafka, name, tmp_path, partitions=1) as writer:
        writer.feed(f"pair {i}" for i in range(20)).run()
        expire(writer, settled_end(kafka, writer.topics.codes))
        found = check(writer)

    assert not any("0 missing" in line for line in found.lines())
    with pytest.raises(NotVerified):
        found.raise_for_status()


def test_the_command_leaves_with_4_and_one_line_where_it_could_not_check_all(
    kafka: Connection, name: str, tmp_path: Path
) -> None:
    with StreamWriter(kafka, name, tmp_path, partitions=1) as writer:
        writer.feed(["a pair of a bundle that nobody announced"]).run()
    done = CliRunner().invoke(app, ["verify", "--topic", name, "--bootstrap-servers", kafka.bootstrap_servers])

    assert done.exit_code == 4
    assert done.stderr.splitlines()[-1].startswith(f"error: the stream {name} was verified in part: 1 clusters")


def settled_end(kafka: Connection, topic: str) -> int:
    """The end of the topic, once every transaction's marker is there: it is written behind the caller's back."""
    while end_offsets(kafka, topic, [0]) != end_offsets(kafka, topic, [0], committed=False):
        time.sleep(0.01)
    return end_offsets(kafka, topic, [0])[0]


def expire(writer: StreamWriter, offset: int) -> None:
    """What retention does, at once."""
    done = writer.kafka.admin.delete_records([TopicPartition(writer.topics.codes, 0, offset)])
    for future in done.values():
        future.result()
