"""A broker with TLS, SCRAM and ACLs: everything works with the least rights, and whatever is refused is one line.

One secured broker for the whole file. What a worker shows to others is searched for the secrets that it was given.
"""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer
from typer.testing import CliRunner

from models.bundle import load_model
from stream.acl import Right
from stream.bundles import find_bundle
from stream.cli import app
from stream.consume import ConsumeOptions, consume
from stream.errors import TldrError
from stream.group_gap import GapWatch
from stream.kafka import Connection
from stream.pair_sources import BadEntry, open_source
from stream.raw_format import raw_reader
from stream.reader import KeptPairs
from stream.rights import LEAST_RIGHTS, least_rights, rights_table
from stream.topic_pairs import pairs_of_topic
from tests.end_to_end.outcome import NO_ANOMALY, Raw, create_topic, outcome_of, pairs, send
from tests.end_to_end.secured_broker import (
    PASSWORD,
    STORE_PASSWORD,
    Authority,
    SecuredBroker,
    properties_file,
    secured_broker,
)
from tests.end_to_end.worker_process import REPOSITORY, WorkerProcess, null_worker, refused, run_command, until, worker
from tests.stream.stream_writer import StreamWriter

SECRETS = (PASSWORD, STORE_PASSWORD)
BUNDLE = REPOSITORY / "bundles" / "sample"
SHARD = str(REPOSITORY / "corpus" / "sample" / "sample-000002.tar")
PICTURES = "pictures"
RECLUSTER = ["recluster", "--topic", PICTURES, "--bundle", str(BUNDLE)]
PAIRS = 60


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredBroker]:
    with secured_broker(tmp_path_factory.mktemp("secured")) as broker:
        yield broker


@pytest.fixture(scope="module")
def certificate(secured: SecuredBroker) -> Path:
    """The key store of CN=client."""
    return secured.authority.issue("client")


def run(*arguments: str, **environment: str) -> tuple[int, str]:
    """A command in this process, since two hundred starts of Python take minutes."""
    result = CliRunner().invoke(app, list(arguments), env=environment)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.exit_code, result.output


def called(job: Callable[[], object]) -> tuple[int, str]:
    """A job without its command: what the command would leave with, and say."""
    try:
        job()
    except TldrError as error:
        return error.exit_status, f"error: {error}"
    return 0, ""


def consume_all(connection: Connection, topic: str, folder: Path) -> None:
    """A worker in this process, to the end of the topic."""
    consume(
        ConsumeOptions(
            connection=connection, topic=topic, model="null", state_dir=folder / "state", instance_id="one",
            metrics_host="127.0.0.1", metrics_port=0, stop_at_end=True, session_timeout_s=6,
        )
    )  # fmt: skip


def connected(connection: Connection, folder: Path) -> list[str]:
    """The options with which a command connects."""
    folder.mkdir(exist_ok=True)
    file = properties_file(connection, folder / "kafka.properties")
    return ["--bootstrap-servers", connection.bootstrap_servers, "--kafka-properties", str(file)]


def worker_arguments(connection: Connection, topic: str, folder: Path, *more: str) -> list[str]:
    options = connected(connection, folder)[2:]
    return null_worker(connection, topic, folder / "state", "--instance-id", "one", *options, *more)


# -- a whole worker ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", ["scram", "tls"])
def test_a_worker_goes_from_raw_to_kept_pairs_and_shows_its_secrets_to_nobody(
    secured: SecuredBroker, certificate: Path, name: str, tmp_path: Path, door: str
) -> None:
    # given: somebody who has the least rights of these commands, and those to create what is missing
    if door == "scram":
        user, connection = f"user-{name}", secured.over_scram(f"user-{name}")
        secured.add_user(user)
    else:
        user, connection = "CN=client", secured.over_tls(certificate)
    create_topic(secured.everything, name)
    granted = least_rights("consume", raw=name, stream=name, instance="one")
    created = [
        Right("Create", "topic", need.name.replace("S", name, 1)) for need in LEAST_RIGHTS["consume"] if need.when
    ]
    for command in ("status", "snapshot", "verify"):
        granted += least_rights(command, raw=name, stream=name)
    secured.grant(user, granted)
    assert named(refused(*called(lambda: consume_all(connection, name, tmp_path)))) == set(created)
    secured.grant(user, created)
    send(secured.everything, name, pairs(PAIRS))
    shown = tmp_path / "shown"
    shown.mkdir()

    # when
    debug = ["--verbose", "--kafka", "debug=conf,security"]
    with worker(worker_arguments(connection, name, tmp_path / "worker", *debug), shown / "log") as running:
        running.until_it_runs(2)
        until_committed(running, PAIRS)
        process = Path("/proc") / str(running.process.pid)
        for what in ("cmdline", "environ"):
            (shown / what).write_bytes((process / what).read_bytes())
        (shown / "metrics").write_text(running.get("/metrics")[1])
        running.drain()
    options = ["--topic", name, *connected(connection, tmp_path / "reader")]
    for words in (["status", "--json"], ["snapshot", str(shown / "snapshot")], ["verify", "--model", "null"]):
        status, output = run(*words, *options)
        (shown / words[0]).with_suffix(".txt").write_text(output)
        assert status == 0, output

    # then
    assert json.loads((shown / "status.txt").read_text())["total"]["totals"]["counted"] == PAIRS
    assert "0 missing, 0 extra" in (shown / "verify.txt").read_text()
    files = [file for folder in (shown, tmp_path / "worker" / "state") for file in folder.rglob("*") if file.is_file()]
    assert len(files) > 8
    for file in files:
        content = file.read_bytes()
        assert not [secret for secret in SECRETS if secret.encode() in content], file
    secured.take_away(user)


def until_committed(running: WorkerProcess, records: int) -> None:
    def committed() -> bool:
        found = re.findall(r"^tldr_pairs_total\{[^}]*\} (\d+)", running.get("/metrics")[1], re.MULTILINE)
        return sum(map(int, found)) >= records

    until(committed, f"{records} records are committed")


# -- least rights ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stream(secured: SecuredBroker, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A stream with everything that a command may look at, dead letters and an announced bundle among it."""
    topic, folder = "looked-at", tmp_path_factory.mktemp("looked-at")
    create_topic(secured.everything, topic)
    send(secured.everything, topic, [*pairs(PAIRS), Raw("bad", value=b"not avro")])
    door = ["--bootstrap-servers", secured.everything.bootstrap_servers]
    consume_all(secured.everything, topic, folder)
    status, output = run("bundle", "announce", str(BUNDLE), *door)
    assert status == 0, output
    return topic


@pytest.fixture(scope="module")
def pictures(secured: SecuredBroker, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A stream whose bundle can be reclustered."""
    model: Any = load_model(BUNDLE, "cpu")
    found = [asdict(pair) for pair in open_source(SHARD) if not isinstance(pair, BadEntry)]
    records = [{"image_uri": None, "fields": {}} | {key: p[key] for key in ("id", "caption", "image")} for p in found]
    with StreamWriter(
        secured.everything, PICTURES, tmp_path_factory.mktemp(PICTURES), model=model, batch=100
    ) as writer:
        writer.feed(records).run()
    return PICTURES


def arguments_of(command: str, topic: str, folder: Path) -> list[str]:
    """The command on the stream `topic`, as short as it can be."""
    on_topic = ["--topic", topic]
    return {
        "consume": ["consume", *on_topic, "--model", "null", "--state-dir", str(folder / "state")],
        "bundle announce": ["bundle", "announce", str(BUNDLE)],
        "ingest": ["ingest", str(folder / "source"), *on_topic, "--again", "--journal", str(folder)],
        "forget": ["forget", "pair-1", *on_topic],
        "status": ["status", *on_topic],
        "snapshot": ["snapshot", str(folder / f"snapshot-{time.monotonic_ns()}"), "--manifest-only", *on_topic],
        "verify": ["verify", "--model", "null", *on_topic],
        "report": ["report", str(folder / "report.html"), *on_topic],
        "explain": ["explain", "pair-3", *on_topic],
        "bundle list": ["bundle", "list"],
        "recluster": [*RECLUSTER, "--out", str(folder / f"bundle-{time.monotonic_ns()}")],
        "recluster --dry-run": [*RECLUSTER, "--dry-run"],
        "topics": ["topics", *on_topic, "--partitions", "2"],
        "dlq list": ["dlq", "list", *on_topic],
        "dlq replay": ["dlq", "replay", *on_topic],
    }[command]  # fmt: skip


ACL_COMMAND = re.compile(r"`(kafka-acls\.sh [^`]*)`")


def named(line: str) -> set[Right]:
    """The rights that the commands of an error line would add."""
    rights = set()
    for command in ACL_COMMAND.findall(line):
        words = shlex.split(command)
        operations = [words[i + 1] for i, word in enumerate(words) if word == "--operation"]
        resource, resource_name = next(
            (word[2:], words[i + 1])
            for i, word in enumerate(words)
            if word in ("--topic", "--group", "--transactional-id")
        )
        rights |= {Right(operation, resource, resource_name) for operation in operations}
    return rights


@pytest.mark.parametrize("command", LEAST_RIGHTS)
def test_a_command_has_enough_with_the_rights_of_the_table_and_names_each_one_that_is_missing(
    secured: SecuredBroker, certificate: Path, stream: str, tmp_path: Path, command: str, request: pytest.FixtureRequest
) -> None:
    # given
    request.addfinalizer(lambda: secured.take_away("CN=client"))
    connection = secured.over_tls(certificate)
    if command.startswith("recluster"):
        stream = request.getfixturevalue("pictures")
    least = set(least_rights(command, raw=stream, stream=stream, instance="one"))
    options = connected(connection, tmp_path)
    picture = tmp_path / "source"
    picture.mkdir()
    (picture / "a.png").write_bytes(b"a picture")
    (picture / "a.txt").write_text("a caption")

    jobs: dict[str, Callable[[], object]] = {
        "consume": lambda: consume_all(connection, stream, tmp_path),
        "an announced bundle": lambda: find_bundle(connection, None, stream),
        "a raw topic to learn from": lambda: list(pairs_of_topic(connection, stream, raw_reader())),
        "KeptPairs": lambda: list(KeptPairs(connection, stream)),
    }

    def attempt() -> tuple[int, str]:
        if job := jobs.get(command):
            return called(job)
        return run(*arguments_of(command, stream, tmp_path), *options)

    # when: without any right, and with those that the lines name
    granted: set[Right] = set()
    status, output = attempt()
    while status != 0:
        missing = named(refused(status, output))
        assert missing and not missing & granted, output
        secured.grant("CN=client", missing)
        granted |= missing
        status, output = attempt()

    # then
    assert granted == least
    for right in sorted(least):
        secured.take_away("CN=client", right)
        assert named(refused(*attempt())) == {right}
        secured.grant("CN=client", [right])


def test_a_worker_sees_who_has_which_partition_with_its_least_rights(
    secured: SecuredBroker, certificate: Path, name: str, request: pytest.FixtureRequest
) -> None:
    # given: a member that has both partitions of a topic
    request.addfinalizer(lambda: secured.take_away("CN=client"))
    create_topic(secured.everything, name)
    secured.grant("CN=client", least_rights("consume", raw=name, stream=name, instance="one"))
    connection = secured.over_tls(certificate)
    member = Consumer(connection.config(group_id=name, enable_auto_commit=False))
    request.addfinalizer(member.close)
    member.subscribe([name])

    def found(watch: GapWatch) -> bool:
        member.poll(0.05)
        return watch.found()

    until(lambda: member.poll(0.05) is None and len(member.assignment()) == 2, "it has both")

    # then: a third one would be missed
    now = count(0, 10)
    watch = GapWatch(connection, name, name, 3, clock=lambda: float(next(now)))
    until(lambda: found(watch), "the group has a gap")


def test_the_reference_has_the_table_of_least_rights() -> None:
    assert "\n".join(rights_table()) in (REPOSITORY / "docs" / "reference.md").read_text()


# -- rights that are taken away while a worker runs --------------------------------------------------------------------


def test_a_right_that_is_taken_away_stops_the_worker_with_the_line_that_gives_it_back(
    secured: SecuredBroker, name: str, tmp_path: Path
) -> None:
    # given
    user, connection = f"user-{name}", secured.over_scram(f"user-{name}")
    secured.add_user(user)
    create_topic(secured.everything, name)
    rights = least_rights("consume", raw=name, stream=name, instance="one")
    secured.grant(user, [*rights, *(Right("Create", "topic", r.name) for r in rights if r.resource == "topic")])
    arguments = worker_arguments(connection, name, tmp_path)
    taken_away = [
        Right("Write", "topic", f"{name}.kept-pairs"),
        Right("Read", "topic", name),
        Right("Read", "group", name),
        Right("Write", "transactional-id", f"{name}-one"),
    ]

    for turn, right in enumerate(taken_away):
        with worker(arguments, tmp_path / "log") as running:
            running.until_it_runs(2)

            # when
            secured.take_away(user, right)
            send(secured.everything, name, pairs(PAIRS, prefix=f"turn-{turn}"))
            status = running.wait()

            # then
            line = last_line(running.log)
            assert status == 6, running.log
            assert named(line) == {right} and f"User:{user} " in line
            assert "Traceback" not in running.log
        secured.grant(user, named(line))

    # and with all of them back the stream goes on as if nothing had been
    with worker([*arguments, "--stop-at-end"], tmp_path / "log") as again:
        again.finish()
    outcome = outcome_of(secured.everything, name)
    assert outcome.anomalies() == NO_ANOMALY
    assert outcome.view.totals.counted == len(taken_away) * PAIRS


def last_line(log: str) -> str:
    line = log.strip().splitlines()[-1]
    assert line.startswith("error: "), log
    return line


# -- who is not let in -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strangers(secured: SecuredBroker, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Connection]:
    """Connections of those who have something wrong."""
    other = Authority(tmp_path_factory.mktemp("other") / "authority")
    secured.add_user("somebody")
    expired = secured.authority.issue("expired", "-startdate", "-10d", "-validity", "1")
    mine = secured.authority.issue("mine")
    return {
        "wrong password": secured.over_scram("somebody", password="another-" + PASSWORD),
        "unknown user": secured.over_scram("nobody"),
        "another mechanism": secured.over_scram("somebody", sasl_mechanism="PLAIN"),
        "untrusted broker": secured.over_scram("somebody", ssl_ca_location=str(other.certificate)),
        "no certificate": secured.over_tls(None),
        "expired certificate": secured.over_tls(expired),
        "certificate of another authority": secured.over_tls(other.issue("stranger")),
        "wrong key store password": secured.over_tls(mine, ssl_keystore_password="another-" + STORE_PASSWORD),
    }


@pytest.mark.parametrize(
    ("what", "remedy"),
    [
        ("wrong password", "sasl.password"),
        ("unknown user", "sasl.username"),
        ("another mechanism", "SCRAM-SHA-512"),
        ("untrusted broker", "ssl.ca.location"),
        ("no certificate", "ssl.keystore.location"),
        ("expired certificate", "ssl.keystore.location"),
        ("certificate of another authority", "ssl.keystore.location"),
        ("wrong key store password", "ssl.keystore"),
    ],
)
@pytest.mark.parametrize("command", ["status", "consume"])
def test_whoever_is_not_let_in_is_told_what_to_put_right_and_does_not_wait(
    strangers: dict[str, Connection], tmp_path: Path, command: str, what: str, remedy: str
) -> None:
    began = time.monotonic()

    status, output = run(*arguments_of(command, "any", tmp_path), *connected(strangers[what], tmp_path))

    line = refused(status, output)
    assert remedy in line
    assert not [secret for secret in SECRETS if secret in line]
    assert time.monotonic() - began < 5


def test_a_user_who_is_removed_while_the_worker_runs_stops_it_with_the_reason(
    secured: SecuredBroker, name: str, tmp_path: Path
) -> None:
    # given
    user, connection = f"user-{name}", secured.over_scram(f"user-{name}")
    secured.add_user(user)
    create_topic(secured.everything, name)
    rights = least_rights("consume", raw=name, stream=name, instance="one")
    secured.grant(user, [*rights, *(Right("Create", "topic", r.name) for r in rights if r.resource == "topic")])
    with worker(worker_arguments(connection, name, tmp_path), tmp_path / "log") as running:
        running.until_it_runs(2)

        # when: the broker asks again who it is (KIP-368)
        secured.remove_user(user)
        status = running.wait()

        # then
        assert status == 6, running.log
        assert "sasl.password" in last_line(running.log)
        assert not [secret for secret in SECRETS if secret in running.log]


# -- secrets on the way in ---------------------------------------------------------------------------------------------


def test_a_secret_may_come_from_the_environment(secured: SecuredBroker, stream: str) -> None:
    connection = secured.over_scram("from-the-environment")
    secured.add_user("from-the-environment")
    secured.grant("from-the-environment", least_rights("status", raw=stream, stream=stream))
    settings = " ".join(f"{key}={value}" for key, value in connection.settings.items())

    status, output = run_command(
        "status", "--topic", stream, "--bootstrap-servers", connection.bootstrap_servers, TLDR_KAFKA=settings
    )

    assert status == 0, output
