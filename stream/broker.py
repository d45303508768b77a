"""A local Apache Kafka for development, demo and tests: one node in KRaft mode, started from Maven's jars.

Must not know what the topics are for. The server is the real one (deploy/kafka/pom.xml), only small.
"""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from stream.errors import TldrError, Unavailable

START_TIMEOUT_S = 60.0
LOGGING_FILE = "log4j2.properties"
METADATA = "logs/__cluster_metadata-0"
STOP_TIMEOUT_S = 30.0
REPOSITORY = Path(__file__).resolve().parent.parent

SERVER_PROPERTIES = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller_port}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
controller.listener.names=CONTROLLER
log.dirs={logs}
num.partitions=1
auto.create.topics.enable=false
message.max.bytes=33554432
replica.fetch.max.bytes=33554432
# One node: nothing can be replicated.
offsets.topic.replication.factor=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
# A rebalance need not wait for more members, and the internal topics need not have 50 partitions.
group.initial.rebalance.delay.ms=0
offsets.topic.num.partitions=4
transaction.state.log.num.partitions=4
"""

# A controller alone, on the data of a server that was killed. It takes a broker for dead at once, where the server's own
# waits 9 s.
CONTROLLER_PROPERTIES = """\
process.roles=controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller_port}
listeners=CONTROLLER://127.0.0.1:{controller_port}
controller.listener.names=CONTROLLER
log.dirs={logs}
broker.session.timeout.ms=200
broker.heartbeat.interval.ms=100
controller.quorum.append.linger.ms=0
"""
# What it says then. It says nothing where the broker counted as dead already (killed while it started).
FENCED, STARTED = b"Fencing broker 1 ", b"Kafka Server started"
FENCE_TIMEOUT_S, FENCE_AFTER_START_S = 20.0, 2.0


# Without a configuration log4j says nothing but errors; the file is written beside the server's own.
LOGGING = """\
appender.out.type=Console
appender.out.name=out
appender.out.layout.type=PatternLayout
appender.out.layout.pattern=%d{ISO8601} %p %c{1}: %m%n
rootLogger.level=info
rootLogger.appenderRef.out.ref=out
"""


def jars_folder() -> Path:
    """Where Kafka's jars lie: $TLDR_KAFKA_JARS, else .build/kafka of the checkout. Raises TldrError if they do not."""
    folder = Path(os.environ.get("TLDR_KAFKA_JARS", REPOSITORY / ".build" / "kafka"))
    if not any(folder.glob("kafka_2.13-*.jar")):
        raise TldrError(f"no Kafka jars in {folder}: run `make kafka` in the checkout, or set TLDR_KAFKA_JARS")
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class LocalBroker:
    """One Kafka server process. `port` 0 takes a free one and keeps it for later starts on the same data."""

    data: Path
    port: int = 0
    heap_mb: int = 512
    # Further server properties, for tests that need, say, fast log cleaning.
    properties: dict[str, str] = field(default_factory=dict)
    _process: subprocess.Popen[bytes] | None = None

    @property
    def bootstrap_servers(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        return self.data / "broker.log"

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Starts the server and waits until it listens.

        Raises TldrError where Java or the jars are missing or the port is taken, Unavailable if it does not come up.
        """
        java = shutil.which("java")
        if java is None:
            raise TldrError("no `java` on the PATH: install a JDK 17 or later")
        jars = jars_folder()
        self.data.mkdir(parents=True, exist_ok=True)
        config = self._configure(java, jars)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", self.port))
            except OSError as error:
                raise TldrError(
                    f"port {self.port} is taken ({error.strerror}): give another one with --port"
                ) from error
        if self._was_killed():
            self._fence_its_predecessor(java, jars)
        self._process = self._launch(java, jars, config)
        self._wait_until_it_listens()

    def stop(self) -> None:
        """Lets the server close its logs; kills it if that takes longer than STOP_TIMEOUT_S."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
        self._process = None

    def kill(self) -> None:
        """kill -9, as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def wait(self) -> int:
        """Waits until the server ends by itself; its exit status."""
        return self._process.wait() if self._process else 0

    def _launch(self, java: str, jars: Path, config: Path) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [
                    java,
                    f"-Xmx{self.heap_mb}m",
                    "-XX:+UseSerialGC",
                    f"-Dlog4j2.configurationFile={self.data.resolve() / LOGGING_FILE}",
                    "-cp",
                    f"{jars}/*",
                    "kafka.Kafka",
                    str(config),
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _was_killed(self) -> bool:
        """Whether there is data of a server that did not close it."""
        served = any((self.data / METADATA).glob("*.log"))  # not only formatted
        return served and not (self.data / "logs" / ".kafka_cleanshutdown").exists()

    def _fence_its_predecessor(self, java: str, jars: Path) -> None:
        """Lets a controller alone declare the killed broker dead, before a new one begins to work on its data.

        A server that starts again within 9 s takes itself for the leader that it was, until its own controller fences that
        one. A transaction whose markers are due in that moment loses them for good, since a partition without a leader looks
        like a deleted one (KAFKA-20734, in 4.4.0): its readers would wait for ever.
        """
        config = self.data / "controller.properties"
        config.write_text(CONTROLLER_PROPERTIES.format(controller_port=free_port(), logs=self.data / "logs"))
        begins_at = self.log.stat().st_size if self.log.exists() else 0
        controller = self._launch(java, jars, config)
        fenced_at: int | None = None  # the size of the controller's log when the broker was said to be dead
        deadline = time.monotonic() + FENCE_TIMEOUT_S
        try:
            while controller.poll() is None and time.monotonic() < deadline:
                size = sum(file.stat().st_size for file in (self.data / METADATA).glob("*.log"))
                # It is said before it is written; an idle controller writes twice a second, and in order.
                if fenced_at is not None and size > fenced_at:
                    return
                with self.log.open("rb") as log:
                    log.seek(begins_at)
                    said = log.read()
                if fenced_at is None and FENCED in said:
                    fenced_at = size
                if STARTED in said:
                    deadline = min(deadline, time.monotonic() + FENCE_AFTER_START_S)
                time.sleep(0.02)
        finally:
            controller.kill()
            controller.wait()

    def _configure(self, java: str, jars: Path) -> Path:
        config = self.data / "server.properties"
        known = _read_properties(config) if config.exists() else {}
        if not self.port:
            self.port = int(known.get("tldr.port", 0)) or free_port()
        # Written anew at every start: the data keeps its identity in meta.properties, not here.
        text = SERVER_PROPERTIES.format(port=self.port, controller_port=free_port(), logs=self.data / "logs")
        text += "".join(f"{key}={value}\n" for key, value in self.properties.items())
        config.write_text(f"{text}tldr.port={self.port}\n")
        (self.data / LOGGING_FILE).write_text(LOGGING)
        if not (self.data / "logs" / "meta.properties").exists():
            cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).rstrip(b"=").decode()
            # An id must not look like an option.
            cluster = f"t{cluster[1:]}"
            done = subprocess.run(
                [java, "-cp", f"{jars}/*", "kafka.tools.StorageTool", "format", "-t", cluster, "-c", str(config)],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                reason = next(iter(done.stderr.strip().splitlines()), "no reason given")  # a stack trace follows it
                raise TldrError(f"cannot format {self.data} for Kafka: {reason}")
        return config

    def _wait_until_it_listens(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if not self.running:
                raise Unavailable(f"the broker ended while starting: see {self.log}")
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1.0):
                return
            time.sleep(0.05)
        self.kill()
        raise Unavailable(f"the broker did not listen within {START_TIMEOUT_S:.0f} s: see {self.log}")


@contextlib.contextmanager
def local_broker(data: Path, port: int = 0, **properties: str) -> Iterator[LocalBroker]:
    """A running broker that stops with the block; its data stays. properties  more of the server's, _ for each dot."""
    broker = LocalBroker(data, port, properties={name.replace("_", "."): value for name, value in properties.items()})
    broker.start()
    try:
        yield broker
    finally:
        broker.stop()


def _read_properties(file: Path) -> dict[str, str]:
    lines = (line.strip() for line in file.read_text().splitlines())
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#") and "=" in line)
