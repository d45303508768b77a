"""Switching the bundle of a stream while it runs, on a real broker: equal to the batch reference with the same switches."""

from __future__ import annotations

from pathlib import Path

from models.null import NullModel
from stream.bundles import Announcement, announce_folder
from stream.errors import TldrError
from stream.explain import explain
from stream.kafka import Connection, end_offsets
from stream.stream_view import StreamSource, read_view
from stream.topics import StreamTopics
from stream.verify import models_of, verify
from tests.end_to_end.load import Load
from tests.end_to_end.outcome import NO_ANOMALY, Raw, create_topic, outcome_of, pairs, processed, send
from tests.end_to_end.worker_process import REPOSITORY, null_worker, run_command, until, worker

LATE_S = 4.0  # a worker takes to fetch a bundle
RATE = 300.0  # records a second while it does


def source_of(kafka: Connection, name: str) -> StreamSource:
    return StreamSource(kafka, StreamTopics(name))


def bundles_of(kafka: Connection, name: str) -> dict[int, list[str]]:
    """The bundles of each partition's epochs, as committed."""
    view = read_view(source_of(kafka, name))
    return {p: [part.switches[epoch].bundle for epoch in sorted(part.switches)] for p, part in view.partitions.items()}


def switch(kafka: Connection, name: str, uri: str) -> Announcement:
    """Announces a bundle to the stream and waits until every partition runs with it."""
    announced = announce_folder(kafka, uri, name)
    until(
        lambda: all(its[-1] == announced.version for its in bundles_of(kafka, name).values()),
        f"the partitions run with {uri}",
    )
    return announced


def test_a_stream_with_two_switches_and_one_back_equals_the_batch_reference_with_the_same_switches(
    kafka: Connection, name: str, tmp_path: Path
) -> None:
    # given
    create_topic(kafka, name)
    many = pairs(400, pictures=60)
    arguments = null_worker(kafka, name, tmp_path / "state", "--ratio", "1/2", "--cell-cap", "5", "--instance-id", "w")
    versions = []

    # when
    with worker(arguments, tmp_path / "worker.log") as running:
        for part, uri in enumerate(("", "null:1/3", "null:2/2", "null:1/3")):
            if uri:
                versions.append(switch(kafka, name, uri).version)
            send(kafka, name, [*many[part * 100 : part * 100 + 100], Raw(f"pair-{part * 100 + 7}", value=None)])
            until(lambda: processed(kafka, name), f"part {part} is processed")
        announce_folder(kafka, "null:1/3", name)  # again: nothing happens
        send(kafka, name, pairs(100, prefix="late"))
        until(lambda: processed(kafka, name), "all is processed")
        running.drain()

    # then
    outcome = outcome_of(kafka, name)
    assert outcome.anomalies() == NO_ANOMALY
    assert bundles_of(kafka, name) == {p: [NullModel().version, *versions] for p in (0, 1)}
    assert versions[0] == versions[2]
    # not one cell is over its cap: 3 clusters, 2 partitions
    assert len(outcome.reduced_set) <= 30
    found = verify(source_of(kafka, name), name, models_of(source_of(kafka, name), null=True))
    assert (found.differences, found.not_verified) == ([], [])
    assert found.clusters_checked > 400

    last = max((row for row in outcome.rows if row.removed), key=lambda row: row.offset)
    gone = explain(source_of(kafka, name), last.removed[0])
    assert not gone.in_the_set
    assert f"bundle {versions[2][:12]}" in gone.verdict


def test_a_switch_whose_transaction_is_aborted_goes_back_to_the_bundle_before_and_is_done_again(
    kafka: Connection, name: str, tmp_path: Path
) -> None:
    # given: the second switch will be aborted, so that the bundle to go back to is one that came by a switch, too
    create_topic(kafka, name, partitions=1)
    arguments = null_worker(kafka, name, tmp_path / "state", "--ratio", "1/2", "--cell-cap", "5")
    entry = (str(REPOSITORY / "tests" / "end_to_end" / "aborting_worker.py"), "3")

    # when
    with worker(arguments, tmp_path / "worker.log", entry=entry) as running:
        send(kafka, name, pairs(100), partitions=1)
        until(lambda: processed(kafka, name), "the first part is processed")
        versions = [NullModel().version, switch(kafka, name, "null:1/3").version]
        # records keep coming, so that some are decided between the abort and the second try
        with Load(kafka, name, 1, REPOSITORY / "corpus" / "sample", rate=RATE):
            until(lambda: processed_records(kafka, name) > RATE, "the load flows")
            announced = announce_folder(kafka, "null:2/2", name)
            until(lambda: bundles_of(kafka, name)[0][-1] == announced.version, "the partition is switched after all")
        until(lambda: processed(kafka, name), "all is processed")
        running.drain()
        log = running.log

    # then
    assert "planted in the middle of a switch" in log
    assert bundles_of(kafka, name) == {0: [*versions, announced.version]}
    assert outcome_of(kafka, name).anomalies() == NO_ANOMALY
    found = verify(source_of(kafka, name), name, models_of(source_of(kafka, name), null=True))
    assert (found.differences, found.not_verified) == ([], [])


def test_a_partition_that_goes_straight_to_a_later_bundle_begins_anew_where_that_is_aborted(
    kafka: Connection, name: str, tmp_path: Path
) -> None:
    # given: a partition that runs with a bundle that the next worker cannot load
    create_topic(kafka, name, partitions=1)
    arguments = null_worker(kafka, name, tmp_path / "state", "--ratio", "1/2", "--cell-cap", "5")
    with worker(arguments, tmp_path / "first.log") as first:
        send(kafka, name, pairs(100), partitions=1)
        until(lambda: processed(kafka, name), "the first part is processed")
        lost = switch(kafka, name, "null:1/3")
        first.drain()
    later = announce_folder(kafka, "null:2/2", name)

    # when
    entry = (str(REPOSITORY / "tests" / "end_to_end" / "aborting_worker.py"), "1", "missing=null:1/3")
    send(kafka, name, pairs(100, prefix="later"), partitions=1)
    with worker(arguments, tmp_path / "second.log", entry=entry) as second:
        until(lambda: processed(kafka, name), "all is processed")
        second.drain()
        log = second.log

    # then
    assert "planted in the middle of a switch" in log
    assert bundles_of(kafka, name) == {0: [NullModel().version, lost.version, later.version]}
    assert outcome_of(kafka, name).anomalies() == NO_ANOMALY


def test_without_a_cap_a_switch_evicts_nobody_and_a_command_lists_who_runs_with_what(
    kafka: Connection, name: str, tmp_path: Path
) -> None:
    create_topic(kafka, name)
    with worker(null_worker(kafka, name, tmp_path / "state", "--ratio", "1/2"), tmp_path / "worker.log") as running:
        send(kafka, name, pairs(200))
        until(lambda: processed(kafka, name), "the first part is processed")
        before = set(outcome_of(kafka, name).reduced_set)
        announced = switch(kafka, name, "null:5/2")
        send(kafka, name, pairs(200, prefix="later"))
        until(lambda: processed(kafka, name), "the second part is processed")
        running.drain()

    outcome = outcome_of(kafka, name)
    status, listed = run_command("bundle", "list", "--topic", name, "--bootstrap-servers", kafka.bootstrap_servers)
    assert before <= set(outcome.reduced_set)
    assert outcome.anomalies() == NO_ANOMALY
    assert status == 0 and f"{announced.version[:12]}" in listed and "partitions 0, 1" in listed
    found = verify(source_of(kafka, name), name, models_of(source_of(kafka, name), null=True))
    assert (found.differences, found.not_verified) == ([], [])


def test_a_worker_that_is_late_with_a_bundle_keeps_nobody_waiting_and_follows_and_lag_stays_bounded_meanwhile(
    kafka: Connection, name: str, tmp_path: Path
) -> None:
    # given: one partition each, and records that keep coming
    create_topic(kafka, name)
    arguments = [
        null_worker(kafka, name, tmp_path / who, "--ratio", "1/2", "--cell-cap", "5", "--instance-id", who)
        for who in ("prompt", "late")
    ]
    late_entry = (str(REPOSITORY / "tests" / "end_to_end" / "late_worker.py"), f"{LATE_S}")
    lags: list[int] = []

    def epochs() -> list[int]:
        """Of each partition, having noted its lag."""
        view = read_view(source_of(kafka, name))
        lags.append(max(end - view.cut[p] for p, end in end_offsets(kafka, name, [0, 1]).items()))
        return sorted(max(part.switches) for part in view.partitions.values())

    with (
        worker(arguments[0], tmp_path / "prompt.log") as prompt,
        worker(arguments[1], tmp_path / "late.log", entry=late_entry) as late,
    ):
        until(lambda: prompt.partitions == late.partitions == 1, "each has its partition")
        with Load(kafka, name, 2, REPOSITORY / "corpus" / "sample", rate=RATE):
            until(lambda: processed_records(kafka, name) > RATE, "the load flows")

            # when
            announced = announce_folder(kafka, "null:1/3", name)
            until(lambda: epochs() == [0, 1], "the prompt one goes on in the new bundle")
            at = processed_records(kafka, name)
            took = until(lambda: epochs() == [1, 1], "the late one follows")
            in_between = processed_records(kafka, name) - at
        until(lambda: processed(kafka, name), "everything is processed")
        for one in (prompt, late):
            one.drain()

    # then
    assert took > LATE_S / 2 and in_between > RATE * took / 2  # both went on
    assert max(lags) < RATE / 2 * LATE_S * 3 / 4  # had it stopped to load, it would have been the whole of that time
    assert bundles_of(kafka, name) == {p: [NullModel().version, announced.version] for p in (0, 1)}
    assert outcome_of(kafka, name).anomalies() == NO_ANOMALY
    found = verify(source_of(kafka, name), name, models_of(source_of(kafka, name), null=True))
    assert (found.differences, found.not_verified) == ([], [])


def test_what_a_switch_leaves_behind_goes_once_the_last_restore_has_ended(
    kafka: Connection, name: str, tmp_path: Path
) -> None:
    # given: partition 0 runs, and the restore of partition 1, of which nothing was read yet, waits for a transaction to end
    create_topic(kafka, name)
    arguments = null_worker(kafka, name, tmp_path / "state", "--ratio", "1/2", "--cell-cap", "5")
    with worker([*arguments, "--stop-at-end"], tmp_path / "first.log") as first:
        send(kafka, name, pairs(20), partitions=1)
        first.finish()
    other = kafka.producer(transactional_id=f"{name}-other", transaction_timeout_ms=120_000)
    other.init_transactions(30)
    other.begin_transaction()
    other.produce(StreamTopics(name).changelog, b"of no known kind", b"?", 1)
    other.flush()
    unused = tmp_path / "state" / "bundles" / "0123456789abcdef"
    with worker(arguments, tmp_path / "second.log") as second:
        second.until_it_runs(1)
        unused.mkdir(parents=True)

        # when: partition 0 is switched; partition 1 begins with that bundle, so no other switch is to come
        changelog = StreamTopics(name).changelog
        stood_at = end_offsets(kafka, changelog, [0])[0]
        announce_folder(kafka, "null:1/3", name)
        second.until_it_says("partition 0: epoch 1 begins")
        until(lambda: end_offsets(kafka, changelog, [0])[0] > stood_at, "the switch is committed")
        assert unused.exists()
        other.abort_transaction(30)
        second.until_it_runs(2)

        # then
        until(lambda: not unused.exists(), "the unused bundle has gone")
        second.drain()


def processed_records(kafka: Connection, name: str) -> int:
    try:
        return sum(read_view(source_of(kafka, name)).cut.values())
    except TldrError:  # nothing is committed yet
        return 0
