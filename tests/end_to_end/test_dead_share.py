"""A worker stops before it makes dead letters of a corpus, commits nothing of what it stopped at, and goes on exactly."""

from __future__ import annotations

from pathlib import Path

import pytest

from stream.errors import Stopped
from stream.kafka import Connection, group_offsets
from stream.stream_view import read_view
from stream.verify import models_of, verify
from tests.stream.small_stream import Raw, SmallStream, pair, picture

GOOD, BAD = 2100, 900
PICTURE = picture(1)


def records(bad_from: int, count: int) -> list[Raw]:
    return [
        Raw(f"id-{i}".encode(), b"no Avro") if i >= bad_from and i % 3 else pair(f"id-{i}", "c", PICTURE)
        for i in range(count)
    ]  # fmt: skip


def test_a_worker_stops_above_the_limit_and_goes_on_exactly_with_a_higher_one(
    kafka: Connection, name: str, tmp_path: Path
) -> None:
    stream = SmallStream(kafka, name, tmp_path / "state", partitions=1)
    every = records(GOOD, GOOD + BAD)
    stream.produce(every[: GOOD + BAD // 2])
    stream.run()  # 300 of the last 2,000 are dead
    stream.produce(every[GOOD + BAD // 2 :])

    with pytest.raises(Stopped) as stopped:
        stream.run(batch_pairs=100, commit_interval_s=0)
    first = read_view(stream.source)
    with pytest.raises(Stopped):  # as a supervisor does: the same limit, from the last commit on
        stream.run(batch_pairs=100, commit_interval_s=0)
    second = read_view(stream.source)

    message = str(stopped.value)
    assert stopped.value.exit_status == 6
    assert "more than --dlq-limit 20%: " in message
    assert f"of them not-avro, from {name}/0 offset" in message
    assert "raise --dlq-limit" in message
    assert "\n" not in message
    assert 300 <= first.totals.dead <= second.totals.dead <= 400  # of the last 2,000, and what was open is dropped
    assert group_offsets(kafka, name, name, second.cut) == second.cut

    stream.run(dlq_limit="100%")
    totals = read_view(stream.source).totals
    assert (totals.read, totals.dead) == (GOOD + BAD, BAD * 2 // 3)
    found = verify(stream.source, name, models_of(stream.source, null=True))
    assert found.complete
    assert not found.differences
