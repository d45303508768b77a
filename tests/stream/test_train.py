"""`train` from shards and from a topic, with any number overridden."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

from models.bundle import read_manifest
from models.captioner import TINY
from models.training import TrainingConfig
from models.vocabulary import of_pieces
from stream.errors import TldrError
from stream.kafka import Connection, create_missing
from stream.pair_sources import BadEntry, SourcePair
from stream.raw_format import raw_reader
from stream.records import Codec
from stream.topic_pairs import pairs_of_topic
from stream.train import train, with_settings
from tests.models.conftest import CAPTIONS, jpeg
from tests.stream.source_files import crawl_members, write_tar

NARROW = [
    "side=32", "vit_patch=8", "feature_width=16", "vit_layers=1", "vit_heads=2", "code_width=16", "codes=8",
    "decoder_layers=1", "decoder_width=16", "decoder_heads=2", "batch=8", "epochs_noisy=1", "epochs_clean=1",
    "precision=float32", "epochs_matching=1", "codebook_update=ema", "codebook_start=xavier",
]  # fmt: skip


def raw(pair_id: str, number: int) -> bytes:
    record: dict[str, Any] = {
        "id": pair_id,
        "caption": CAPTIONS[number],
        "image": jpeg(number),
        "image_uri": None,
        "fields": {},
    }
    return Codec("RawPair").encode(record)


@pytest.fixture
def topic(kafka: Connection, name: str) -> str:
    """Eight pairs in two partitions, one of them twice, one taken down, and a record that is none."""
    create_missing(kafka, {name: {}}, 2)
    producer = kafka.producer()
    for number in range(8):
        producer.produce(name, raw(f"p{number}", number), f"p{number}", number % 2)
    producer.produce(name, raw("p0", 1), "p0", 0)
    producer.produce(name, b"no pair", "x", 0)
    for partition in range(2):
        producer.produce(name, None, "p3", partition)
    producer.flush()
    return name


def test_a_topic_s_pairs_come_once_and_without_what_was_taken_down(kafka: Connection, topic: str) -> None:
    entries = list(pairs_of_topic(kafka, topic, raw_reader()))

    pairs = {e.id: e.caption for e in entries if isinstance(e, SourcePair)}
    assert pairs == {f"p{i}": CAPTIONS[i] for i in range(8) if i != 3}
    assert sum(isinstance(e, BadEntry) for e in entries) == 1


def test_only_the_newest_records_of_a_topic_are_read_where_a_number_is_given(kafka: Connection, topic: str) -> None:
    entries = list(pairs_of_topic(kafka, topic, raw_reader(), records=4))

    # the last two offsets of each partition: a bad record and a takedown in one, a pair and a takedown in the other
    assert sorted(getattr(e, "id", "bad") for e in entries) == ["bad", "p7"]


def test_one_command_trains_from_a_topic_and_from_shards_and_leaves_log_and_curves(
    kafka: Connection, topic: str, tmp_path: Path
) -> None:
    bert = tmp_path / "bert"
    words = of_pieces(sorted({w for c in CAPTIONS for w in c.split()}))
    torch.manual_seed(0)
    narrow: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    BertModel(BertConfig(vocab_size=len(words), **narrow)).save_pretrained(bert)
    words.save(bert / "tokenizer.json")
    shard = write_tar(tmp_path / "a.tar", crawl_members([(f"u{i}", jpeg(i), CAPTIONS[i]) for i in range(8)]))
    held_out = write_tar(tmp_path / "b.tar", crawl_members([("u0", jpeg(0), CAPTIONS[0])]))

    result = train(
        [str(shard)], [str(shard)], tmp_path / "out", settings=NARROW, exclude=[str(held_out)], text_encoder=str(bert),
        decoder_weights=str(bert), topic=topic, topic_pairs=lambda: pairs_of_topic(kafka, topic, raw_reader()),
        progress=lambda _: None,
    )  # fmt: skip

    assert result is not None
    assert (result.noisy_pairs, result.clean_pairs, result.excluded_pairs) == (14, 7, 1)
    entries = [json.loads(line) for line in result.log.read_text().splitlines()]
    assert [e["phase"] for e in entries] == ["noisy", "clean"] and result.curves.stat().st_size > 0
    manifest = read_manifest(tmp_path / "out").data
    assert manifest["config"]["tokens"] == 16 and manifest["config"]["decoder_width"] == 16
    assert sorted(f.name for f in (tmp_path / "out.training").iterdir()) == ["curves.png", "log.jsonl"]


def test_any_number_of_architecture_and_recipe_is_overridden_by_name() -> None:
    config, training = with_settings(
        TINY, TrainingConfig(), ["codes=500", "dropout=0.2", "augment=true", "codebook_start=xavier"]
    )

    assert (config.codes, config.dropout, config.decoder_layers) == (500, 0.2, TINY.decoder_layers)
    assert (training.augment, training.codebook_start, training.batch) == (True, "xavier", TrainingConfig().batch)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("code=5", "did you mean codes?"),
        ("codes=many", "takes a value of type int, for example"),
        ("augment=maybe", "takes a value of type bool"),
        ("zzz=1", "there are accumulation"),
    ],
)
def test_a_setting_that_is_none_is_refused_in_one_line(setting: str, said: str) -> None:
    with pytest.raises(TldrError) as error:
        with_settings(TINY, TrainingConfig(), [setting])

    assert said in str(error.value) and "\n" not in str(error.value)
