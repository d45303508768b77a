"""A bundle whose scorer and whose decoder look at the image itself does in a stream what it does at hand.

Weights are random: no package carries a BLIP's. What is promised is which network sees what.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models.bundle import load_model
from stream.bootstrap import bootstrap
from stream.kafka import Connection
from stream.pair_sources import BadEntry, SourcePair, open_source
from tests.end_to_end.outcome import NO_ANOMALY, Raw, create_topic, outcome_of, send
from tests.end_to_end.worker_process import run_command, worker
from tests.models.random_models import random_authors, random_blip

SHARD = str(Path(__file__).parents[2] / "corpus" / "sample" / "sample-000002.tar")


def pairs() -> list[SourcePair]:
    return [p for p in open_source(SHARD) if not isinstance(p, BadEntry)][:24]


def consuming(kafka: Connection, topic: str, bundle: Path, state: Path, *more: str) -> list[str]:
    return [
        "consume", "--topic", topic, "--bundle", str(bundle), "--bootstrap-servers", kafka.bootstrap_servers,
        "--state-dir", str(state), "--metrics-port", "0", "--session-timeout-s", "6", "--gate", "bundle", "--ratio", "100",
        "--device", "cpu", "--stop-at-end", *more,
    ]  # fmt: skip


def test_a_blip_judges_the_stream_and_authors_captions_come_from_the_image(
    kafka: Connection, name: str, tmp_path: Path
) -> None:
    # given: a bundle with both, made on the same pairs; its BLIP has moved since
    made = bootstrap(
        (), random_authors(tmp_path / "authors"), tmp_path / "bundle", clusters=2, topic_pairs=pairs,
        itm=f"blip:{random_blip(tmp_path / 'blip')}", device="cpu", progress=lambda line: None,
    )  # fmt: skip
    moved = (tmp_path / "blip").rename(tmp_path / "moved")
    create_topic(kafka, name, partitions=1)
    send(kafka, name, [Raw(p.id, p.caption, p.image) for p in pairs()], partitions=1)

    # when
    state = tmp_path / "state"
    lost = run_command(*consuming(kafka, name, made.out, state))
    with worker(consuming(kafka, name, made.out, state, "--blip", str(moved)), tmp_path / "log") as running:
        running.finish()

    # then: without its BLIP no worker starts; with it, the gate, both scores and the captions are the model's own
    assert lost[0] == 2 and "blip has no config.json" in lost[1] and "Traceback" not in lost[1]
    outcome = outcome_of(kafka, name)
    assert outcome.anomalies() == NO_ANOMALY and "other arithmetic" not in running.log
    model = load_model(made.out, "cpu", blip=moved)
    pictures = {p.id: model.decode(p.image or b"") for p in pairs()}
    seen = list(pictures.values())
    vectors = model.encode(seen)
    scores = dict(zip(pictures, model.match(vectors, [p.caption for p in pairs()], seen), strict=True))
    captions = dict(zip(pictures, model.caption(vectors, seen), strict=True))
    above = {pair_id for pair_id, score in scores.items() if score >= made.gate}
    assert {row.id: row.itm for row in outcome.rows} == pytest.approx(scores, abs=1e-5)
    assert outcome.reduced_set.keys() == above and len(above) == 12 == len(pictures) / 2
    assert {pair_id: pair["generated_caption"] for pair_id, pair in outcome.reduced_set.items()} == {
        pair_id: captions[pair_id] for pair_id in above
    }
    assert len({captions[pair_id] for pair_id in above}) > 1
    for pair_id, pair in outcome.reduced_set.items():
        vector = np.frombuffer(pair["index_vector"], "<u2")[None]
        (refined,) = model.match(vector, [pair["refined_caption"]], [pictures[pair_id]])
        assert pair["itm_refined"] == pytest.approx(refined, abs=1e-5)
