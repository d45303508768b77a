"""Promises of `verify`: a stream that is right has no difference, and every planted one is found by id and offset."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from confluent_kafka import TopicPartition
from numpy.typing import NDArray
from typer.testing import CliRunner, Result

from models.model import PairModel
from models.null import NullModel
from state.changelog import encode_forgotten, encode_known, forgotten_key
from stream.cli import app
from stream.errors import Differs, NotVerified, TldrError
from stream.kafka import Connection, end_offsets
from stream.snapshot import snapshot
from stream.snapshot_state import read_state
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


def check_from(writer: StreamWriter, folder: Path) -> Verified:
    return verify(writer.source, writer.name, lambda version: writer.model, taken=read_state(folder))


def assert_refused(done: Result, message: str) -> None:
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert message in line


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


@pytest.mark.parametrize(
    "settings",
    [{}, {"cap": 9, "ratio": "2/3"}, {"cap": 6, "window": 30, "ratio": "1/1"}],
    ids=["plain", "capped", "with a window"],
)
def test_a_stream_older_than_its_codes_is_proven_from_a_snapshot_on(
    kafka: Connection, name: str, tmp_path: Path, settings: dict[str, Any]
) -> None:
    with StreamWriter(kafka, name, tmp_path, partitions=1, **settings) as writer:
        writer.feed(f"pair {i}" for i in range(150)).feed([("pair 5", None), ("broken", b"no Avro")]).run()
        snapshot(writer.source, tmp_path / "snapshot", manifest_only=True)
        victim = min(writer.members().items(), key=lambda member: member[1])
        expire(writer, settled_end(kafka, writer.topics.codes))
        # Pairs of before are removed, evicted, repeated; an id comes back after its takedown.
        writer.feed([("broken", b"no Avro"), (min(writer.members()), None), "pair 5"])
        writer.feed(f"pair {i}" for i in range(0, 300, 2)).run()
        alone, since = check(writer), check_from(writer, tmp_path / "snapshot")
        at = writer.members().get(victim[0])
        lost = at is not None and [(victim[0], at)]
        later = max(writer.members().items(), key=lambda member: member[1])
        for pair_id in filter(writer.members().get, (victim[0], later[0])):
            writer.plant(writer.topics.kept, pair_id, None, cause="1")
        planted = check_from(writer, tmp_path / "snapshot")

    with pytest.raises(NotVerified):
        alone.raise_for_status()
    assert nothing_but(since) == []
    assert since.not_verified == []
    assert since.verified_from == {0: 152}
    assert any("from the state of the snapshot" in line for line in since.lines())
    found = [(d.id, d.offset) for d in nothing_but(planted, "missing")]
    assert sorted(found) == sorted([*(lost or ()), later])
    with pytest.raises(Differs):
        planted.raise_for_status()


def other(seed: int, clusters: int) -> NullModel:
    return NullModel(tokens=8, codebook_size=50, clusters=clusters, seed=seed)


def test_a_capped_stream_with_two_switches_is_verified_and_what_is_planted_after_one_is_found(
    kafka: Connection, name: str, tmp_path: Path
) -> None:
    with StreamWriter(kafka, name, tmp_path, partitions=1, cap=9, ratio="2/3") as writer:
        writer.feed(f"pair {i}" for i in range(150)).run().switch(other(1, 2))
        writer.feed(f"pair {i}" for i in range(150, 250)).feed([("pair 155", None)]).run().switch(other(2, 3))
        writer.feed(f"pair {i}" for i in range(250, 350)).run()
        sound = verify(writer.source, name, writer.models.get)
        without = verify(writer.source, name, lambda version: writer.model if version == writer.model.version else None)
        swapped = verify(writer.source, name, lambda version: writer.model)
        victim = min(writer.members().items(), key=lambda member: member[1])
        writer.plant(writer.topics.kept, victim[0], None, cause="1")
        planted = verify(writer.source, name, writer.models.get)

    assert nothing_but(sound) == [] and sound.not_verified == []
    assert sound.clusters_checked == 350
    assert "who leaves after a switch depends on the bundle" in without.not_verified[0]
    assert without.differences == []
    assert swapped.cluster_differs > 50 and swapped.fate_differs > 0
    (missing,) = nothing_but(planted, "missing")
    assert (missing.id, missing.offset) == victim


def test_partitions_that_switched_in_different_ways_are_verified_from_the_beginning_and_from_a_snapshot(
    kafka: Connection, name: str, tmp_path: Path
) -> None:
    with StreamWriter(kafka, name, tmp_path, cap=9, ratio="2/3") as writer:
        writer.switch_apart(other(1, 2), other(2, 3), [f"pair {i}" for i in range(240)])
        whole = verify(writer.source, name, writer.models.get)
        snapshot(writer.source, tmp_path / "snapshot", manifest_only=True)
        writer.feed(f"pair {i}" for i in range(240, 300)).run()
        since = verify(writer.source, name, writer.models.get, taken=read_state(tmp_path / "snapshot"))

    for found in (whole, since):
        assert nothing_but(found) == [] and found.not_verified == []


@pytest.mark.parametrize("cap", [None, 9])
def test_from_a_snapshot_on_a_switch_is_proven_as_far_as_vectors_are_left(
    kafka: Connection, name: str, tmp_path: Path, cap: int | None
) -> None:
    with StreamWriter(kafka, name, tmp_path, partitions=1, cap=cap, ratio="2/3") as writer:
        writer.feed(f"pair {i}" for i in range(150)).run().switch(other(1, 2))
        writer.feed(f"pair {i}" for i in range(150, 200)).run()
        snapshot(writer.source, tmp_path / "snapshot", manifest_only=True)
        expire(writer, settled_end(kafka, writer.topics.codes))
        writer.feed(f"pair {i}" for i in range(200, 250)).run().switch(other(2, 3))
        writer.feed(f"pair {i}" for i in range(250, 300)).run()
        since = verify(writer.source, name, writer.models.get, taken=read_state(tmp_path / "snapshot"))

    manifest = json.loads((tmp_path / "snapshot" / "manifest.json").read_text())
    assert [epoch["bundle"] for epoch in manifest["epochs"]] == [writer.model.version, other(1, 2).version]
    assert [epoch["begins"] for epoch in manifest["epochs"]] == [{"0": 0}, {"0": 150}]
    assert sum(epoch["pairs"] for epoch in manifest["epochs"]) == manifest["counts"]["in_set"]
    assert [epoch["taken"] for epoch in manifest["epochs"]] == [epoch["pairs"] for epoch in manifest["epochs"]]
    assert manifest["counts"]["taken_down"] == 0
    if cap is None:
        assert nothing_but(since) == [] and since.not_verified == []
    else:  # it says what it cannot know: who left meanwhile was somewhere in between
        assert since.not_verified == [] or "nothing tells their clusters in between" in since.not_verified[0]
        assert nothing_but(since) == []


def test_from_a_snapshot_it_leaves_with_0_or_5_and_refuses_one_that_was_changed(
    kafka: Connection, name: str, tmp_path: Path
) -> None:
    def command(*arguments: str) -> Result:
        return CliRunner().invoke(
            app,
            ["verify", "--topic", name, "--bootstrap-servers", kafka.bootstrap_servers, "--model", "null", *arguments],
        )

    taken, manifest = tmp_path / "snapshot", tmp_path / "snapshot" / "manifest.json"
    with StreamWriter(kafka, name, tmp_path, partitions=1, model=NullModel()) as writer:
        writer.feed(f"pair {i}" for i in range(100)).run()
        snapshot(writer.source, taken, manifest_only=True)
        expire(writer, settled_end(kafka, writer.topics.codes))
        writer.feed(f"pair {i}" for i in range(100, 200)).run()
        alone, since = command(), command("--from", str(taken))
        writer.plant(writer.topics.kept, max(writer.members()), None, cause="1")
        planted = command("--from", str(taken))

    assert [done.exit_code for done in (alone, since, planted)] == [4, 0, 5]
    assert json.loads(manifest.read_text())["sha256"] in since.stdout
    whole = manifest.read_bytes()
    for change in (("counted", "1"), ("known", "2")):
        wrong = json.loads(whole)
        if change[0] == "counted":
            wrong["cells"]["rows"][0][3] += 1
        else:
            wrong["state"]["0"]["known"]["ids"] += 1
        manifest.write_text(json.dumps(wrong))
        assert_refused(command("--from", str(taken)), "is not as `snapshot` wrote it")
    manifest.write_bytes(whole)
    (taken / "state-00000.avro").write_bytes((taken / "state-00000.avro").read_bytes()[:-1] + b"x")
    assert_refused(command("--from", str(taken)), "is not the file that manifest.json speaks of")
    assert_refused(command("--from", str(tmp_path / "nowhere")), "cannot read")


def test_what_the_changelog_says_of_known_ids_and_cells_is_compared_too(
    kafka: Connection, name: str, tmp_path: Path
) -> None:
    with StreamWriter(kafka, name, tmp_path, partitions=1) as writer:
        writer.feed(f"pair {i}" for i in range(60)).feed([("pair 4", None)]).run()
        snapshot(writer.source, tmp_path / "snapshot", manifest_only=True)
        key, value = next(item for item in writer.stores[0].items() if item[0][:1] == b"C")
        writer.plant_record(writer.topics.changelog, key, value[:-1] + bytes([value[-1] ^ 1]))
        first = next(key for key, _ in writer.stores[0].items() if key[:1] == b"K")
        writer.plant_record(
            writer.topics.changelog, first, encode_known(np.array([9], "u8"), np.array([0], "u8"))[0][1]
        )
        writer.plant_record(writer.topics.changelog, forgotten_key(7), encode_forgotten(3))
        found, since = check(writer), check_from(writer, tmp_path / "snapshot")

    nothing_but(found, "cell_differs", "known_differs")
    (cell,) = (d for d in found.differences if d.kind == "cell_differs")
    assert "size" in cell.detail
    assert any(d.detail.startswith("forgotten since 3, not None") for d in found.differences)
    assert any("are not those of the snapshot" in d.detail for d in nothing_but(since, "cell_differs", "known_differs"))


def test_a_snapshot_of_another_stream_proves_nothing(kafka: Connection, name: str, tmp_path: Path) -> None:
    with (
        StreamWriter(kafka, name, tmp_path / "one", partitions=1) as writer,
        StreamWriter(kafka, f"{name}-two", tmp_path / "two", partitions=1) as other,
    ):
        writer.feed(["a pair"]).run()
        other.feed(["a pair"]).run()
        snapshot(other.source, tmp_path / "snapshot", manifest_only=True)

        with pytest.raises(TldrError, match=f"is a snapshot of the stream {name}-two"):
            check_from(writer, tmp_path / "snapshot")


def test_where_rows_after_the_snapshot_have_expired_too_it_says_so(
    kafka: Connection, name: str, tmp_path: Path
) -> None:
    with StreamWriter(kafka, name, tmp_path, partitions=1) as writer:
        writer.feed(f"pair {i}" for i in range(40)).run()
        snapshot(writer.source, tmp_path / "snapshot", manifest_only=True)
        writer.feed(f"pair {i}" for i in range(40, 120)).run()
        expire(writer, settled_end(kafka, writer.topics.codes) - 2)
        found = check_from(writer, tmp_path / "snapshot")

    assert nothing_but(found) == []
    assert "between the snapshot's cut 40 and input offset 80 have expired" in found.not_verified[0]


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
