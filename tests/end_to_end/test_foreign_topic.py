"""A raw topic that is not ours: JSON, with other names for everything, and without keys."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from stream.kafka import Connection
from tests.end_to_end.outcome import create_topic, outcome_of
from tests.end_to_end.worker_process import null_worker, run_command, worker

PAIRS = 60
FIELDS = ("--raw-format", "json", "--field", "id=url", "--field", "image=media.content", "--field", "caption=alt")


def test_a_json_topic_is_reduced_by_the_names_that_the_user_gives(kafka: Connection, name: str, tmp_path: Path) -> None:
    # given: pairs under other names, one of them twice, and one record that is no JSON
    create_topic(kafka, name, partitions=1)
    producer = kafka.producer()
    for n in [*range(PAIRS), 0]:
        image = base64.b64encode(b"picture %d" % n).decode()
        crawled = {
            "url": f"https://example.org/{n}",
            "alt": f"picture {n}",
            "media": {"content": image},
            "licence": "CC0",
        }
        producer.produce(name, json.dumps(crawled).encode(), partition=0)
    producer.produce(name, b"{not json", partition=0, headers={"crawler": "7"})
    producer.flush()

    # when
    with worker([*null_worker(kafka, name, tmp_path / "state"), *FIELDS, "--stop-at-end"], tmp_path / "log") as running:
        running.finish()

    # then: ids and source fields are the user's, the duplicate counted once, the bad record a dead letter
    outcome = outcome_of(kafka, name)
    arguments = ["verify", "--topic", name, "--model", "null", "--bootstrap-servers", kafka.bootstrap_servers]
    status, output = run_command(*arguments)
    assert (status, "0 differences of other kinds" in output) == (0, True), output
    assert outcome.reduced_set
    for pair_id, pair in outcome.reduced_set.items():
        assert pair_id.startswith("https://example.org/")
        assert pair["image"] == b"picture " + pair_id.rsplit("/", 1)[1].encode()
        assert pair["fields"]["licence"] == "CC0"
    assert outcome.fate("https://example.org/0")[1:] == ["duplicate"]
    ((letter, message),) = outcome.dead
    assert letter.offset == PAIRS + 1
    assert message.value() == b"{not json" and ("crawler", b"7") in message.headers()
