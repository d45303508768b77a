"""The local broker is a real Kafka that starts anywhere, keeps its data, and goes when it is told to."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from stream.broker import LocalBroker, free_port, local_broker
from stream.errors import TldrError
from stream.kafka import Connection, create_missing, end_offsets, partition_counts, read_partition
from tests.end_to_end.worker_process import until


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("local")


def test_it_starts_on_a_free_port_and_survives_a_restart_with_its_data(folder: Path) -> None:
    # given
    with local_broker(folder / "kafka") as first:
        kafka, port = Connection(first.bootstrap_servers), first.port
        create_missing(kafka, {"kept": {"max.message.bytes": "8000000"}}, 3)
        producer = kafka.producer()
        producer.produce("kept", b"x" * 5_000_000, b"key", 2)
        assert producer.flush(30) == 0

    # when
    with local_broker(folder / "kafka") as second:
        # then: the same address, topic and record
        assert second.port == port
        again = Connection(second.bootstrap_servers)
        assert partition_counts(again, ["kept"]) == {"kept": 3}
        end = end_offsets(again, "kept", [2])[2]
        (record,) = [m for batch in read_partition(again, "kept", 2, 0, end) for m in batch]
        assert (record.key(), len(record.value())) == (b"key", 5_000_000)


def test_transactions_that_a_kill_cut_off_hold_no_reader_back_once_the_broker_is_back(folder: Path) -> None:
    # given: open transactions whose time is over when the broker is back. One that took itself for the leader that it was
    # would lose the markers of some of them (KAFKA-20734).
    sweep = {"transaction.abort.timed.out.transaction.cleanup.interval.ms": "200"}
    broker = LocalBroker(folder / "killed", properties=sweep)
    broker.start()
    try:
        create_missing(Connection(broker.bootstrap_servers), {"cut-off": {}}, 5)
        for p in range(5):
            producer = Connection(broker.bootstrap_servers).producer(
                transactional_id=f"writer-{p}", transaction_timeout_ms=1000, socket_timeout_ms=1000
            )
            producer.init_transactions(30)
            producer.begin_transaction()
            producer.produce("cut-off", b"value", b"key", p)
            assert producer.flush(10) == 0

        # when
        broker.kill()
        broker.start()

        # then
        kafka = Connection(broker.bootstrap_servers)
        marked = dict.fromkeys(range(5), 2)  # a record and its marker
        until(lambda: end_offsets(kafka, "cut-off", range(5)) == marked, "every marker is there", timeout_s=20)
    finally:
        broker.kill()


@pytest.fixture
def command(folder: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`tldr-stream broker` as its user runs it, and its port."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "stream", "broker", "--port", str(port), "--data", str(folder / "command")],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )  # fmt: skip
    yield process, port
    process.kill()
    process.wait()


def test_the_command_says_where_it_listens_and_stops_cleanly_on_sigterm(
    command: tuple[subprocess.Popen[str], int], folder: Path
) -> None:
    process, port = command
    assert process.stdout is not None
    line = process.stdout.readline()
    assert f"127.0.0.1:{port}" in line, line
    (server,) = psutil.Process(process.pid).children()

    process.send_signal(signal.SIGTERM)

    assert process.wait(30) == 0
    assert not server.is_running()
    assert (folder / "command" / "logs" / ".kafka_cleanshutdown").exists()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_taken_port_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]

        with pytest.raises(TldrError, match=f"port {port} is taken .* --port"):
            LocalBroker(tmp_path, port).start()


def test_missing_jars_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLDR_KAFKA_JARS", str(tmp_path))

    with pytest.raises(TldrError, match="make kafka"):
        LocalBroker(tmp_path / "data").start()


def test_without_java_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(TldrError, match="JDK 17"):
        LocalBroker(tmp_path / "data").start()
