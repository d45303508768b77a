"""What the tests share: one real Apache Kafka for the whole run, and a fresh name for every test."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import pytest

from models.threads import set_thread_environment
from stream.broker import LocalBroker
from stream.kafka import Connection

os.environ.setdefault("OMP_NUM_THREADS", "1")
set_thread_environment()
_counter = itertools.count()


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalBroker]:
    """A real Kafka, started by the first test that needs one."""
    server = LocalBroker(tmp_path_factory.mktemp("kafka"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def kafka(broker: LocalBroker) -> Connection:
    return Connection(broker.bootstrap_servers)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A topic or stream name that no other test uses."""
    return f"t{next(_counter)}-{os.getpid()}"
