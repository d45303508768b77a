"""What a reader of a stream's topics may rely on: what was committed counts, even if its markers are still on their way."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from state.changelog import POSITION, encode_position
from stream.kafka import Connection
from stream.stream_view import ChangelogFollower, read_view
from tests.stream.stream_writer import StreamWriter


@pytest.mark.parametrize("commits", [True, False], ids=["commits", "aborts"])
def test_a_view_waits_for_a_transaction_whose_markers_are_on_their_way(
    kafka: Connection, name: str, tmp_path: Path, commits: bool
) -> None:
    with StreamWriter(kafka, name, tmp_path, partitions=1) as writer:
        # given: a partition that has gone on by 10 records in a transaction without a marker yet
        writer.feed(f"pair-{n}" for n in range(40)).run()
        before = writer.stores[0].position()
        assert before is not None
        after = before._replace(next_offset=before.next_offset + 10)
        producer = kafka.producer(transactional_id=f"{name}-other", transaction_timeout_ms=60_000)
        producer.init_transactions(30)
        producer.begin_transaction()
        producer.produce(writer.topics.changelog, encode_position(after), POSITION, 0)
        producer.flush()

        with ThreadPoolExecutor(1) as thread:
            # when
            waiting = thread.submit(read_view, writer.source)
            time.sleep(1.0)
            still_waits = not waiting.done()
            at_once = ChangelogFollower(writer.source).advance()
            (producer.commit_transaction if commits else producer.abort_transaction)(30)
            view = waiting.result(30)

        # then: it has what was committed, and only that; who does not wait has the state before
        assert still_waits
        assert view.cut == {0: (after if commits else before).next_offset}
        assert at_once.cut == {0: before.next_offset}
