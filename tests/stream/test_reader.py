"""Promises of `KeptPairs`: every pair of the set once, however many ranks and loader workers share the work."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from stream.broker import LocalBroker
from stream.errors import TldrError
from stream.kafka import CONNECT_TIMEOUT_S, Connection
from stream.reader import KeptPairs
from tests.stream.stream_writer import StreamWriter, raw


@pytest.fixture
def writer(kafka: Connection, name: str, tmp_path: Path) -> Iterator[StreamWriter]:
    """A set with evicted pairs and one taken down."""
    with StreamWriter(kafka, name, tmp_path / "state", cap=35) as stream:
        stream.feed(raw(f"pair {i}", f"caption {i}") for i in range(400)).run()
        stream.feed([(sorted(stream.members())[0], None)])
        yield stream.run()


def pairs(writer: StreamWriter, **options: Any) -> KeptPairs:
    return KeptPairs(writer.kafka.bootstrap_servers, writer.name, block_offsets=16, **options)


def test_two_ranks_with_two_loader_workers_each_see_every_pair_once(writer: StreamWriter) -> None:
    seen: Counter[str] = Counter()
    shares = []
    for rank in range(2):
        dataset = pairs(writer, rank=rank, world_size=2)
        ids = [i for batch in DataLoader(dataset, batch_size=7, num_workers=2) for i in batch["id"]]
        seen.update(ids)
        shares.append(len(ids))

    assert seen == Counter(list(writer.members()))
    assert min(shares) > 0.3 * sum(shares)


def test_a_sample_has_the_image_as_crawled_and_the_refined_caption(writer: StreamWriter) -> None:
    sample = next(iter(pairs(writer)))

    assert sample["image"].endswith(sample["id"].encode())
    assert sample["caption"].startswith(f"{sample['original_caption']} codes ")
    assert sample["index_vector"].shape == (8,)
    assert next(iter(pairs(writer, transform=lambda sample: sample["id"]))) == sample["id"]


@pytest.mark.parametrize("stop", [1, 40, 111])
def test_resuming_in_the_middle_repeats_nothing_and_loses_nothing(writer: StreamWriter, stop: int) -> None:
    dataset = pairs(writer)
    reading = iter(dataset)
    first = [next(reading)["id"] for _ in range(stop)]
    state = json.loads(json.dumps(dataset.state_dict()))
    writer.feed(f"later {i}" for i in range(20)).run()

    resumed = pairs(writer)
    resumed.load_state_dict(state)
    rest = [sample["id"] for sample in resumed]

    assert not set(first) & set(rest)
    assert not any(pair_id.startswith("later") for pair_id in rest)
    assert {*first, *rest} >= {pair_id for pair_id in writer.members() if pair_id.startswith("pair")}
    assert len([sample["id"] for sample in resumed]) == len(writer.members())  # the next epoch is whole again


def test_a_run_goes_on_with_another_number_of_ranks_and_workers(writer: StreamWriter) -> None:
    seen: list[str] = []
    states = []
    for rank in range(2):
        dataset = pairs(writer, rank=rank, world_size=2)
        for number, batch in enumerate(DataLoader(dataset, batch_size=5, num_workers=2)):
            seen += batch["id"]
            dataset.consumed(batch["partition"], batch["offset"], workers=2)
            if number == 3:
                break
        states.append(dataset.state_dict())
    for rank in range(3):
        dataset = pairs(writer, rank=rank, world_size=3)
        dataset.load_state_dict(states)
        seen += [sample["id"] for sample in dataset]

    assert Counter(seen) == Counter(list(writer.members()))


def test_following_yields_new_pairs_and_tells_of_removed_ones(writer: StreamWriter) -> None:
    reading = iter(pairs(writer, follow=True, removals=True))
    before = [next(reading)["id"] for _ in writer.members()]
    assert Counter(before) == Counter(list(writer.members()))

    gone = before[0]
    writer.feed([(gone, None)]).run()
    told = next(reading)
    assert (told["id"], told["removed"]) == (gone, True)

    writer.feed(f"new {i}" for i in range(6)).run()
    new = {pair_id for pair_id in writer.members() if pair_id.startswith("new")}
    seen: set[str] = set()
    while not new <= seen:
        seen.add(next(reading)["id"])


def test_a_run_that_begins_while_the_broker_is_away_waits_for_it(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    broker = LocalBroker(tmp_path / "kafka")
    broker.start()
    with StreamWriter(Connection(broker.bootstrap_servers), name, tmp_path / "state") as stream:
        stream.feed(raw(f"pair {i}", f"caption {i}") for i in range(20)).run()
        members = stream.members()
    broker.kill()
    back = threading.Timer(2 * CONNECT_TIMEOUT_S - 4, broker.start)
    back.start()

    try:
        seen = [sample["id"] for sample in KeptPairs(broker.bootstrap_servers, name)]

        assert sorted(seen) == sorted(members)
        assert "trying for 60 s" in caplog.text
    finally:
        back.join()
        broker.kill()


def test_the_state_of_another_stream_and_a_rank_out_of_range_are_refused(writer: StreamWriter) -> None:
    state = pairs(writer).state_dict() | {"stream": "another"}

    with pytest.raises(TldrError, match="another"):
        pairs(writer).load_state_dict(state)
    with pytest.raises(TldrError, match="rank 2 of 2"):
        pairs(writer, rank=2, world_size=2)
    with pytest.raises(TldrError, match="no stream"):
        next(iter(KeptPairs(writer.kafka, "nowhere")))
