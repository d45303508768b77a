"""What a worker refuses before its first poll: one line that says what to do, and a status of its own; never a traceback."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import NewPartitions

from stream.broker import free_port
from stream.kafka import Connection, group_offsets
from tests.end_to_end.outcome import NO_ANOMALY, create_topic, outcome_of, pairs, send
from tests.end_to_end.worker_process import null_worker, refused, run_command, worker

SAMPLE_BUNDLE = Path(__file__).resolve().parents[2] / "bundles" / "sample"


def test_a_topic_that_does_not_exist_with_the_command_that_creates_it(
    kafka: Connection, name: str, tmp_path: Path
) -> None:
    message = refused(*run_command(*null_worker(kafka, name, tmp_path)))

    assert f"topic {name} does not exist" in message
    assert f"--create --topic {name}" in message


def test_a_state_directory_that_another_worker_holds(kafka: Connection, name: str, tmp_path: Path) -> None:
    create_topic(kafka, name)
    arguments = null_worker(kafka, name, tmp_path / "state")
    with worker(arguments, tmp_path / "log") as holder:
        holder.until_it_runs(2)

        message = refused(*run_command(*arguments))

        assert f"process {holder.process.pid}" in message and "--state-dir" in message
        assert holder.running


@pytest.fixture(scope="module")
def started(broker: object, tmp_path_factory: pytest.TempPathFactory) -> tuple[Connection, str, Path]:
    """A stream that has committed something, whose worker has left."""
    kafka = Connection(broker.bootstrap_servers)  # type: ignore[attr-defined]
    folder = tmp_path_factory.mktemp("started")
    topic = f"started-{folder.parent.name}"
    create_topic(kafka, topic)
    send(kafka, topic, pairs(100))
    with worker([*null_worker(kafka, topic, folder / "state"), "--stop-at-end"], folder / "log") as first:
        first.finish()
    return kafka, topic, folder / "state"


@pytest.mark.parametrize(
    ("option", "value", "both"),
    [
        ("--seed", "9", "seed is 0 in the stream and 9 here"),
        ("--ratio", "1/2", "ratio is 1/4 in the stream and 1/2 here"),
        ("--cell-cap", "10", "cell_cap is None in the stream and 10 here"),
        ("--dedupe-window", "100", "dedupe_window is None in the stream and 100 here"),
        ("--gate", "0.5", "gate is None in the stream and 0.5 here"),
    ],
)
def test_other_settings_than_the_stream_s_with_both_values(
    started: tuple[Connection, str, Path], option: str, value: str, both: str
) -> None:
    kafka, topic, state = started

    message = refused(*run_command(*null_worker(kafka, topic, state), option, value))

    assert both in message and "--stream" in message


def test_a_changed_partition_count(kafka: Connection, name: str, tmp_path: Path) -> None:
    # given
    create_topic(kafka, name)
    arguments = [*null_worker(kafka, name, tmp_path / "state"), "--stop-at-end"]
    send(kafka, name, pairs(20))
    with worker(arguments, tmp_path / "log") as first:
        first.finish()

    # when
    for done in kafka.admin.create_partitions([NewPartitions(name, 3)]).values():
        done.result()

    # then
    message = refused(*run_command(*arguments))
    assert "2 partitions" in message and "3" in message and "--stream" in message


def test_a_recreated_topic(kafka: Connection, name: str, tmp_path: Path) -> None:
    # given
    create_topic(kafka, name)
    send(kafka, name, pairs(20))
    arguments = [*null_worker(kafka, name, tmp_path / "state"), "--stop-at-end"]
    with worker(arguments, tmp_path / "log") as first:
        first.finish()

    # when
    _delete_topic(kafka, name)
    create_topic(kafka, name)
    send(kafka, name, pairs(20))

    # then
    message = refused(*run_command(*arguments))
    assert "raw_topic_id" in message and "--stream" in message


def _delete_topic(kafka: Connection, name: str) -> None:
    from stream.kafka import partition_counts
    from tests.end_to_end.worker_process import until

    for done in kafka.admin.delete_topics([name]).values():
        done.result()
    until(lambda: not partition_counts(kafka, [name]), "the topic is gone")


def test_group_offsets_that_somebody_reset_with_the_command_that_puts_them_right(
    kafka: Connection, name: str, tmp_path: Path
) -> None:
    # given
    create_topic(kafka, name, partitions=1)
    send(kafka, name, pairs(100), partitions=1)
    arguments = [*null_worker(kafka, name, tmp_path / "state", "--session-timeout-s", "6"), "--stop-at-end"]
    with worker(arguments, tmp_path / "log") as first:
        first.finish()
    assert group_offsets(kafka, name, name, [0]) == {0: 100}
    # and the static member has left, or nobody may reset anything
    _reset(kafka, name, 30)

    # when
    message = refused(*run_command(*arguments))

    # then: both values, and where to reset it to
    assert "stands at offset 30" in message and "changelog at 100" in message
    assert "--reset-offsets --to-offset 100" in message
    # and after that command the stream goes on as if nothing had been
    _reset(kafka, name, 100)
    send(kafka, name, pairs(50, prefix="more"), partitions=1)
    with worker(arguments, tmp_path / "log") as again:
        again.finish()
    assert outcome_of(kafka, name).anomalies() == NO_ANOMALY


def _reset(kafka: Connection, group: str, offset: int) -> None:
    """What kafka-consumer-groups.sh --reset-offsets does, once the group is empty."""
    from confluent_kafka import ConsumerGroupTopicPartitions, KafkaException

    from tests.end_to_end.worker_process import until

    def done() -> bool:
        asked = [ConsumerGroupTopicPartitions(group, [TopicPartition(group, 0, offset)])]
        try:
            for answer in kafka.admin.alter_consumer_group_offsets(asked).values():
                answer.result()
        except KafkaException:  # the session of the member that left goes on for a while
            return False
        return group_offsets(kafka, group, group, [0]) == {0: offset}

    until(done, "the group's offset is reset")


def test_offsets_that_expired_are_no_reason_to_stop(kafka: Connection, name: str, tmp_path: Path) -> None:
    # given: a group that Kafka has forgotten
    create_topic(kafka, name)
    send(kafka, name, pairs(100))
    arguments = [*null_worker(kafka, name, tmp_path / "state"), "--stop-at-end"]
    with worker(arguments, tmp_path / "log") as first:
        first.finish()
    _forget_group(kafka, name)
    send(kafka, name, pairs(100, prefix="more"))

    # when
    with worker(arguments, tmp_path / "log") as second:
        second.finish()

    # then: the changelog knew where to go on
    outcome = outcome_of(kafka, name)
    assert outcome.anomalies() == NO_ANOMALY
    assert outcome.view.totals.read == 200


def _forget_group(kafka: Connection, group: str) -> None:
    from confluent_kafka import KafkaException

    from tests.end_to_end.worker_process import until

    def done() -> bool:
        try:
            for answer in kafka.admin.delete_consumer_groups([group]).values():
                answer.result()
        except KafkaException:  # not empty before the session ends
            return False
        return True

    until(done, "the group is deleted")


def test_a_bundle_with_one_flipped_bit(kafka: Connection, name: str, tmp_path: Path) -> None:
    # given
    create_topic(kafka, name)
    bundle = shutil.copytree(SAMPLE_BUNDLE, tmp_path / "bundle")
    largest = max(bundle.iterdir(), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)

    # when
    status, output = run_command(
        "consume", "--topic", name, "--bundle", str(bundle), "--bootstrap-servers", kafka.bootstrap_servers,
        "--state-dir", str(tmp_path / "state"), "--metrics-port", "0",
    )  # fmt: skip

    # then
    message = refused(status, output)
    assert largest.name in message and "damaged" in message


def test_no_bundle_anywhere(kafka: Connection, name: str, tmp_path: Path) -> None:
    create_topic(kafka, name)

    message = refused(
        *run_command("consume", "--topic", name, "--bundle", str(tmp_path / "nothing"),
                     "--bootstrap-servers", kafka.bootstrap_servers, "--state-dir", str(tmp_path / "state"))
    )  # fmt: skip

    assert "there is no bundle at" in message and "bootstrap" in message


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "null", "--bundle", "x"], "leave --bundle out"),
        (["--model", "other"], "use `bundle` or `null`"),
        (["--rule", "paper", "--ratio", "50%"], "leave --ratio out"),
        (["--rule", "authors", "--gate", "off"], "leave --gate out"),
        (["--rule", "nobody"], "authors, paper"),
        (["--ratio", "150%"], "ratio"),
        (["--ratio", "some"], "some"),
        (["--gate", "high"], "`off`, `bundle`"),
        (["--gate", "nan"], "`off`, `bundle`"),
        (["--stream", " "], "--stream"),
        (["--session-timeout-s", "3600"], "above the poll interval of 300 s"),
        (["--session-timeout-s", "30", "--kafka", "max.poll.interval.ms=10000"], "above the poll interval of 10 s"),
        (["--kafka", "max.poll.interval.ms=ten"], "whole number of milliseconds"),
        (["--kafka", "session.timeout.ms=9000"], "use --session-timeout-s"),
        (["--kafka", "transaction.timeout.ms=9000"], "use --transaction-timeout-s"),
        (["--on-data-loss", "ignore"], "`stop` or `continue`"),
        (["--raw-format", "xml"], "tldr, json, avro, confluent"),
        (["--raw-format", "confluent"], "--schema-registry"),
        (["--field", "id=url"], "--field"),
        (["--kafka", "group.id=other"], "group.id"),
        (["--kafka", "nonsense"], "key=value"),
        (["--kafka", "no.such.setting=1"], "no.such.setting"),
        (["--kafka", "security.protocol=carrier-pigeon"], "security.protocol"),
        (["--fetch-allow", "everything"], "--fetch-allow"),
        (["--instance-id", ""], "--instance-id"),
        (["--fetch-allow-private"], "--fetch-allow"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_cannot_work_together_before_anything_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], said: str
) -> None:
    # In this process, since two dozen starts of Python take half a minute; nobody listens at this address.
    from typer.testing import CliRunner

    from stream.cli import app

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    more = [] if "--model" in options or "--bundle" in options else ["--model", "null"]
    began = time.monotonic()
    result = CliRunner().invoke(
        app, ["consume", "--topic", "raw-pairs", "--bootstrap-servers", f"127.0.0.1:{free_port()}", *more, *options]
    )

    message = refused(result.exit_code, result.output)
    assert said in message
    assert time.monotonic() - began < 5  # it asked nobody
    assert not list(tmp_path.iterdir())
