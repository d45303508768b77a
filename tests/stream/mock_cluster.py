"""librdkafka's own mock cluster, reached through its C API: it answers what it is told to, and is used for nothing else.

It knows no isolation and no compaction (docs/tried.md): what Kafka promises is tested on a real one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import confluent_kafka

# The keys of Kafka's protocol.
PRODUCE, INIT_PRODUCER_ID, ADD_PARTITIONS, ADD_OFFSETS, END_TXN, TXN_OFFSET_COMMIT = 0, 22, 24, 25, 26, 28
CALLS = {
    "InitProducerId": INIT_PRODUCER_ID,
    "AddPartitionsToTxn": ADD_PARTITIONS,
    "Produce": PRODUCE,
    "AddOffsetsToTxn": ADD_OFFSETS,
    "TxnOffsetCommit": TXN_OFFSET_COMMIT,
    "EndTxn": END_TXN,
}
_PRODUCER = 0  # rd_kafka_type_t
_TEXT_BYTES = 512


class MockCluster:
    """One mock broker that speaks Kafka's protocol."""

    def __init__(self, library: ctypes.CDLL, cluster: int) -> None:
        self._library, self._cluster = library, cluster
        library.rd_kafka_mock_cluster_bootstraps.restype = ctypes.c_char_p
        self.bootstrap_servers = library.rd_kafka_mock_cluster_bootstraps(ctypes.c_void_p(cluster)).decode()

        library.rd_kafka_mock_start_request_tracking(ctypes.c_void_p(cluster))
        library.rd_kafka_mock_get_requests.restype = ctypes.POINTER(ctypes.c_void_p)
        library.rd_kafka_mock_request_api_key.restype = ctypes.c_int16

    def create_topic(self, topic: str, partitions: int) -> None:
        self._library.rd_kafka_mock_topic_create(ctypes.c_void_p(self._cluster), topic.encode(), partitions, 1)

    def answer(self, call: str, *errors: int) -> None:
        """The next requests of this kind are answered with these error codes of Kafka's protocol, one after the other."""
        codes = (ctypes.c_int * len(errors))(*errors)
        self._library.rd_kafka_mock_push_request_errors_array(
            ctypes.c_void_p(self._cluster), ctypes.c_int16(CALLS[call]), ctypes.c_size_t(len(errors)), codes
        )

    def asked(self, call: str) -> int:
        """How often a call of this kind has reached the broker."""
        count = ctypes.c_size_t()
        requests = self._library.rd_kafka_mock_get_requests(ctypes.c_void_p(self._cluster), ctypes.byref(count))
        keys = [self._library.rd_kafka_mock_request_api_key(ctypes.c_void_p(requests[at])) for at in range(count.value)]
        self._library.rd_kafka_mock_request_destroy_array(requests, count)
        return keys.count(CALLS[call])


@contextmanager
def mock_cluster() -> Iterator[MockCluster]:
    """A cluster that lives as long as the block."""
    package = Path(confluent_kafka.__file__).parent
    (file,) = (package.parent / "confluent_kafka.libs").glob("librdkafka*.so*")
    library = ctypes.CDLL(str(file))
    for name in ("rd_kafka_conf_new", "rd_kafka_new", "rd_kafka_mock_cluster_new"):
        getattr(library, name).restype = ctypes.c_void_p
    text = ctypes.create_string_buffer(_TEXT_BYTES)
    conf = ctypes.c_void_p(library.rd_kafka_conf_new())
    client = ctypes.c_void_p(library.rd_kafka_new(_PRODUCER, conf, text, ctypes.c_size_t(_TEXT_BYTES)))
    cluster = library.rd_kafka_mock_cluster_new(client, 1)
    try:
        yield MockCluster(library, cluster)
    finally:
        library.rd_kafka_mock_cluster_destroy(ctypes.c_void_p(cluster))
        library.rd_kafka_destroy(client)
