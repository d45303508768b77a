"""One batch of raw records becomes decisions and nothing else: what each record causes, and what a batch given up leaves."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.null import NullModel
from state.partition import Fate, Partition
from state.partition_store import PartitionStore
from state.quota import Ratio
from state.settings import StreamSettings
from stream.raw_format import raw_reader
from stream.records import Codec
from stream.reduce import Cancelled, Effects, Reduction, reduce_batch

MODEL = NullModel(tokens=8, codebook_size=50, clusters=3)
RAW, KEPT = Codec("RawPair"), Codec("KeptPair")


@dataclass
class Message:
    """What reduce needs of a Kafka message."""

    at: int
    pair_id: str = ""
    image: bytes | None = b"picture"
    caption: str = "a caption"
    number: int = 0
    takedown: bool = False

    def partition(self) -> int:
        return self.number

    def offset(self) -> int:
        return self.at

    def key(self) -> bytes:
        return self.pair_id.encode()

    def value(self) -> bytes | None:
        if self.takedown:
            return None
        pair: dict[str, Any] = {"id": self.pair_id, "caption": self.caption, "image": self.image, "image_uri": None}
        return RAW.encode({**pair, "fields": {}})

    def timestamp(self) -> tuple[int, int]:
        return 1, 1_700_000_000_000


@pytest.fixture
def partition(tmp_path: Path) -> Iterator[Partition]:
    settings = StreamSettings(
        partition_count=1, raw_topic_id="raw", seed=7, ratio=Ratio(1, 1), cell_cap=None, dedupe_window=None, gate=None,
        rule="none", space=MODEL.space, tokens=MODEL.tokens,
    )  # fmt: skip
    with PartitionStore(tmp_path / "store") as store:
        live = Partition(store, settings, 0)
        live.adopt(MODEL.version, MODEL.space, 0)
        yield live


@pytest.fixture
def using() -> Iterator[Reduction]:
    with ThreadPoolExecutor(2) as pool:
        yield Reduction(
            model=MODEL, reader=raw_reader(), kept_codec=KEPT, fetch=None, pool=pool, threads=2, seed=7, rate="1/1",
            joiner=" ", kept_bytes_max=1_000_000, topic="raw",
        )  # fmt: skip


def reduced(messages: list[Message], partition: Partition, using: Reduction) -> Effects:
    effects = Effects()
    reduce_batch(messages, {0: partition}, using, effects)
    return effects


def fates(effects: Effects) -> list[Fate]:
    return [Fate(fate) for fate in effects.codes[0].fates]


def test_the_effects_are_in_the_order_of_the_records(partition: Partition, using: Reduction) -> None:
    effects = reduced(
        [Message(0, "a"), Message(1, "b"), Message(2, "a", takedown=True), Message(3, "c")], partition, using
    )

    assert [(effect.key, effect.value is None) for effect in effects.kept] == [
        (b"a", False), (b"b", False), (b"a", True), (b"c", False),
    ]  # fmt: skip
    assert [dict(effect.headers)["cause"] for effect in effects.kept] == [b"0", b"1", b"2", b"3"]


def test_records_of_a_partition_that_was_taken_away_are_passed_over(partition: Partition, using: Reduction) -> None:
    effects = reduced([Message(0, "a"), Message(5, "b", number=1), Message(1, "c")], partition, using)

    assert effects.records == 2
    assert list(effects.codes) == [0]


def test_records_that_were_decided_already_are_passed_over(partition: Partition, using: Reduction) -> None:
    reduced([Message(0, "a"), Message(1, "b")], partition, using)

    effects = reduced([Message(0, "a"), Message(1, "b"), Message(2, "c")], partition, using)

    assert effects.codes[0].offsets == [2]


def test_a_known_id_with_a_broken_image_is_a_duplicate_and_no_dead_letter(
    partition: Partition, using: Reduction
) -> None:
    effects = reduced([Message(0, "a"), Message(1, "a", b"BAD")], partition, using)

    assert fates(effects) == [Fate.KEPT, Fate.DUPLICATE]
    assert not effects.dead


def test_a_takedown_removes_a_pair_of_a_transaction_that_is_long_past(partition: Partition, using: Reduction) -> None:
    reduced([Message(0, "a"), Message(1, "b")], partition, using)
    partition.changes("worker", 0)
    partition.commit(1)

    effects = reduced([Message(2, "a", takedown=True), Message(3, "c"), Message(4, "a")], partition, using)

    assert fates(effects) == [Fate.FORGOTTEN, Fate.KEPT, Fate.FORGOTTEN]
    assert [(effect.key, effect.value is None) for effect in effects.kept] == [(b"a", True), (b"c", False)]


def test_after_a_dead_letter_the_id_counts_when_it_comes_whole(partition: Partition, using: Reduction) -> None:
    effects = reduced([Message(0, "a", b"BAD"), Message(1, "a")], partition, using)

    assert [letter.reason for letter in effects.dead] == ["not-an-image"]
    assert fates(effects) == [Fate.KEPT]


@pytest.mark.parametrize("at_once", [1, 2, 7, 20, 100])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_batch_is_the_same_in_however_many_parts_it_is_encoded(
    partition: Partition, using: Reduction, at_once: int, threads: int
) -> None:
    few_at_once = NullModel(tokens=8, codebook_size=50, clusters=3, batch=at_once)
    messages = [Message(i, f"pair-{i}", b"BAD" if i % 6 == 5 else b"picture %d" % i) for i in range(20)]

    effects = reduced(messages, partition, replace(using, model=few_at_once, threads=threads))

    codes = effects.codes[0]
    assert (
        codes.offsets
        == [i for i in range(20) if i % 6 != 5]
        == [int(dict(effect.headers)["cause"]) for effect in effects.kept]
    )
    assert [letter.message.offset() for letter in effects.dead] == [5, 11, 17]
    pictures = [MODEL.decode(message.image or b"") for message in messages if message.image != b"BAD"]
    assert np.array_equal(np.concatenate([rows.vectors for rows in codes.batches]), MODEL.encode(pictures))


@pytest.mark.parametrize("stages", range(5))
def test_a_batch_that_is_given_up_after_any_stage_has_not_happened(
    partition: Partition, using: Reduction, stages: int
) -> None:
    # given
    asked = iter(range(100))
    messages = [Message(i, f"pair-{i}") for i in range(20)]

    # when: given up after so many stages, then aborted as the worker does
    with pytest.raises(Cancelled):
        reduce_batch(messages, {0: partition}, using, Effects(), lambda: next(asked) >= stages)
    partition.abort()
    partition.adopt(MODEL.version, MODEL.space, 0)

    # then: the same records give all of it again
    effects = reduced(messages, partition, using)
    assert fates(effects) == [Fate.KEPT] * 20
    assert len(effects.kept) == 20


def test_columns_without_a_row_are_no_record(partition: Partition, using: Reduction) -> None:
    effects = reduced([Message(0, "bad", b"BAD")], partition, using)  # a batch of nothing but dead letters

    assert len(effects.dead) == 1
    assert list(effects.codes[0].records(0, 0, "bundle", MODEL.tokens, bytes_max=300)) == []


def test_columns_split_into_records_keep_every_row_with_its_own_vector(partition: Partition, using: Reduction) -> None:
    # given: kept pairs, and duplicates without a vector between them
    messages = [Message(i, f"pair-{i % 7}", b"picture %d" % (i % 7)) for i in range(20)]
    effects = reduced(messages, partition, using)

    # when
    records = list(effects.codes[0].records(0, 0, "bundle", MODEL.tokens, bytes_max=300))

    # then
    assert [pair_id for record in records for pair_id in record["ids"]] == [b"pair-%d" % (i % 7) for i in range(20)]
    assert len(records) > 3
    assert all(sum(map(len, record["ids"])) + len(record["vectors"]) <= 2 * 300 for record in records)
    vectors = np.concatenate([np.frombuffer(r["vectors"], "<u2").reshape(-1, MODEL.tokens) for r in records])
    pixels = [MODEL.decode(b"picture %d" % i) for i in range(7)]
    assert (vectors == MODEL.encode(pixels)).all()
    assert sum(len(record["duplicate_of"]) // 8 for record in records) == 13
