"""A worker's log: for people by default, for machines on request, and where in the topic each line is about."""

from __future__ import annotations

import json
import logging
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from stream.kafka import Connection
from stream.logs import JsonLines, at, place
from tests.end_to_end.outcome import Raw, create_topic, outcome_of, pairs, send
from tests.end_to_end.worker_process import null_worker, refused, run_command, worker

SPANS = {1: (96, 140), 0: (120, 179)}


def record_of(message: str, *args: object, **more: Any) -> logging.LogRecord:
    record = logging.LogRecord("stream.worker", logging.INFO, "worker.py", 1, message, args, more.pop("exc_info", None))
    record.__dict__.update(more)
    return record


def test_a_line_is_one_json_object_with_its_fields() -> None:
    line = JsonLines().format(record_of("read %d of\n%s", 3, "thé", **at("batch", "raw", SPANS, records=3)))

    assert "\n" not in line
    told = json.loads(line)
    assert told.pop("time").endswith("+00:00")
    assert told == {
        "level": "info",
        "logger": "stream.worker",
        "message": "read 3 of\nthé",
        "event": "batch",
        "topic": "raw",
        "offsets": [{"partition": 0, "first": 120, "last": 179}, {"partition": 1, "first": 96, "last": 140}],
        "records": 3,
    }


def test_an_exception_stays_in_its_line() -> None:
    try:
        raise ValueError("no such code")
    except ValueError:
        line = JsonLines().format(record_of("the model failed", exc_info=sys.exc_info()))

    assert "\n" not in line
    assert json.loads(line)["traceback"].endswith("ValueError: no such code")


def test_a_place_in_words_is_topic_partition_and_offsets() -> None:
    assert place("raw", SPANS) == "raw 0:120-179 1:96-140"


def events_of(log: str) -> list[dict[str, Any]]:
    """The worker's lines; each must be JSON."""
    return [json.loads(line) for line in log.splitlines()]


def test_every_offset_lies_in_one_batch_and_one_transaction_of_the_log(
    kafka: Connection, name: str, tmp_path: Path
) -> None:
    # given
    create_topic(kafka, name)
    send(kafka, name, [*pairs(200), Raw("bad-1", image=b"BAD"), *pairs(60, prefix="later"), Raw("bad-2", image=b"BAD")])
    arguments = null_worker(kafka, name, tmp_path / "state", "--stop-at-end", "--log-format", "json", "--verbose",
                            "--commit-interval-s", "0.2")  # fmt: skip

    # when
    with worker(arguments, tmp_path / "log") as running:
        running.finish()

    # then: in the order of each partition, without a gap and without an overlap
    events = events_of(running.log)
    outcome = outcome_of(kafka, name)
    for event in ("batch", "commit"):
        for partition in (0, 1):
            spans = [
                (span["first"], span["last"])
                for line in events
                if line.get("event") == event and line["topic"] == name
                for span in line["offsets"]
                if span["partition"] == partition
            ]
            assert spans[0][0] == 0
            assert spans[-1][1] == outcome.view.cut[partition] - 1
            assert all(before[1] + 1 == after[0] for before, after in pairwise(spans))
    # and a dead letter lies where its transaction says
    dead = [line for line in events if line.get("event") == "commit" and "dead" in line]
    assert all(line["level"] == "info" for line in dead)
    assert sum(line["dead"]["not-an-image"] for line in dead) == 2
    said = [(span["partition"], span["first"], span["last"]) for line in dead for span in line["dead_offsets"]]
    for letter, _ in outcome.dead:
        assert any(p == letter.partition and first <= letter.offset <= last for p, first, last in said)
    # restore and revocation too
    restored = {line["partition"]: line["next_offset"] for line in events if line.get("event") == "restore"}
    assert restored == {0: 0, 1: 0}
    left = next(line for line in events if line.get("event") in ("revoked", "lost"))
    assert {at["partition"]: at["next_offset"] for at in left["next_offsets"]} == outcome.view.cut


def test_at_info_a_transaction_has_a_line_only_if_something_in_it_died(
    kafka: Connection, name: str, tmp_path: Path
) -> None:
    create_topic(kafka, name)
    send(kafka, name, [*pairs(300), Raw("bad-1", image=b"BAD")])

    with worker(null_worker(kafka, name, tmp_path / "state", "--stop-at-end"), tmp_path / "log") as running:
        running.finish()

    about_commits = [line for line in running.log.splitlines() if "committed " in line]
    assert len(about_commits) == 1
    assert "dead letters between " in about_commits[0] and "1 not-an-image" in about_commits[0]
    # a restart says which part of the changelog it replays
    with worker(null_worker(kafka, name, tmp_path / "again", "--stop-at-end"), tmp_path / "log") as again:
        again.finish()
    assert "changelog records rebuilt in" in again.log and "s, offsets 0:0-" in again.log


def test_another_format_is_refused() -> None:
    assert "--log-format xml: use `text` or `json`" in refused(
        *run_command("consume", "--topic", "x", "--model", "null", "--log-format", "xml")
    )
