"""What a user may rely on after any run: the reduced set is the batch reference's, whoever worked and however often."""

from __future__ import annotations

from pathlib import Path

import pytest

from state.partition import Fate
from stream.kafka import Connection
from tests.end_to_end.outcome import (
    NO_ANOMALY,
    Outcome,
    Raw,
    create_topic,
    outcome_of,
    pairs,
    processed,
    send,
    stores_of,
)
from tests.end_to_end.worker_process import null_worker, until, worker

PAIRS = 1200
STREAM = ("--ratio", "1/3", "--seed", "7")


class Run:
    """One raw topic, and the streams that different workers made of it."""

    def __init__(self, kafka: Connection, topic: str, folder: Path) -> None:
        self.kafka, self.topic, self.folder = kafka, topic, folder

    def alone(self, stream: str, *more: str, state: str | None = None) -> Outcome:
        """One worker from the first record to the last."""
        arguments = null_worker(self.kafka, self.topic, self.folder / (state or stream), *STREAM, *more)
        with worker([*arguments, "--stream", stream, "--stop-at-end"], self.folder / f"{stream}.log") as running:
            running.finish()
        return outcome_of(self.kafka, self.topic, stream)


@pytest.fixture(scope="module")
def run(broker: object, tmp_path_factory: pytest.TempPathFactory) -> Run:
    kafka = Connection(broker.bootstrap_servers)  # type: ignore[attr-defined]
    topic = f"reduced-{tmp_path_factory.getbasetemp().name}"
    create_topic(kafka, topic)
    send(kafka, topic, pairs(PAIRS))
    return Run(kafka, topic, tmp_path_factory.mktemp("reduced"))


@pytest.fixture(scope="module")
def alone(run: Run) -> Outcome:
    return run.alone(f"{run.topic}-alone")


def test_one_worker_gives_the_set_of_the_batch_reference(alone: Outcome) -> None:
    assert alone.anomalies() == NO_ANOMALY
    assert len(alone.reduced_set) == pytest.approx(PAIRS / 3, abs=2 * 12)  # within one of M·n in each cell


def test_the_totals_add_up(alone: Outcome) -> None:
    totals = alone.view.totals

    assert totals.read == PAIRS
    assert totals.read == totals.dead + totals.duplicates + totals.forgotten + totals.below_gate + totals.counted
    assert totals.counted == totals.kept + totals.over_quota + totals.over_cap
    assert totals.kept - totals.evicted - totals.removed == len(alone.reduced_set)


def test_every_kept_pair_has_one_visible_caption(alone: Outcome) -> None:
    kept = sum(row.fate == Fate.KEPT for row in alone.rows)

    assert len([record for record in alone.kept if record.value is not None]) / kept == 1.0


def test_a_refined_caption_begins_with_the_original_one(alone: Outcome) -> None:
    for pair in alone.reduced_set.values():
        assert pair["refined_caption"] == f"{pair['caption']} {pair['generated_caption']}"
        assert pair["generated_caption"]


@pytest.fixture(scope="module")
def together(run: Run, alone: Outcome) -> tuple[Outcome, list[int]]:
    """Two workers on input that comes while both of them run; and how many pairs each of them read."""
    topic = f"{run.topic}-two"
    create_topic(run.kafka, topic)
    arguments = [null_worker(run.kafka, topic, run.folder / f"two-{n}", *STREAM) for n in (1, 2)]
    with worker(arguments[0], run.folder / "two-1.log") as one, worker(arguments[1], run.folder / "two-2.log") as two:
        # Both join, and the group shares the partitions out before there is anything to read.
        until(lambda: one.partitions == two.partitions == 1, "each worker has a partition")
        send(run.kafka, topic, pairs(PAIRS))
        until(lambda: processed(run.kafka, topic), "all is processed")
        one.drain()
        two.drain()
    outcome = outcome_of(run.kafka, topic)
    return outcome, [view.totals.read for view in outcome.view.partitions.values()]


def test_two_workers_give_the_same_set_as_one(alone: Outcome, together: tuple[Outcome, list[int]]) -> None:
    outcome, shares = together

    assert outcome.anomalies() == NO_ANOMALY
    assert outcome.reduced_set.keys() == alone.reduced_set.keys()
    assert min(shares) > PAIRS / 5


def test_other_batches_and_commits_give_the_same_set(run: Run, alone: Outcome) -> None:
    outcome = run.alone(f"{run.topic}-batches", "--batch-pairs", "7", "--commit-interval-s", "0.1")

    assert outcome.anomalies() == NO_ANOMALY
    assert outcome.reduced_set.keys() == alone.reduced_set.keys()


def test_another_seed_gives_another_set_of_the_same_size(run: Run, alone: Outcome) -> None:
    outcome = run.alone(f"{run.topic}-seed", "--seed", "8")

    assert outcome.anomalies() == NO_ANOMALY
    assert outcome.reduced_set.keys() != alone.reduced_set.keys()


def test_with_a_cell_cap_evicted_pairs_get_a_tombstone(run: Run) -> None:
    outcome = run.alone(f"{run.topic}-cap", "--cell-cap", "5")

    assert outcome.anomalies() == NO_ANOMALY
    assert outcome.view.totals.evicted > 20
    assert len(outcome.reduced_set) == 2 * 12 * 5
    evicted = {gone for row in outcome.rows for gone in row.removed}
    assert evicted.isdisjoint(outcome.reduced_set)
    assert evicted == {record.id for record in outcome.newest.values() if record.value is None}


def test_a_gate_lets_only_pairs_with_a_higher_score_count(run: Run) -> None:
    outcome = run.alone(f"{run.topic}-gate", "--gate", "0.5")

    assert outcome.anomalies() == NO_ANOMALY
    assert {row.fate for row in outcome.rows if row.itm < 0.5} == {Fate.BELOW_GATE}
    assert all(pair["itm_original"] >= 0.5 for pair in outcome.reduced_set.values())


def test_a_restore_into_an_empty_directory_gives_the_same_store_key_by_key(run: Run, alone: Outcome) -> None:
    stream = f"{run.topic}-alone"
    # The instance id is what the worker keeps its place in the group by; another one waits for the session to end.
    instance = (run.folder / stream / "instance").read_text().strip()
    restored = run.alone(stream, "--instance-id", instance, state="elsewhere")

    before, after = (stores_of([run.folder / folder], 2) for folder in (stream, "elsewhere"))
    assert len(before) == 2 and before == after
    assert restored.reduced_set.keys() == alone.reduced_set.keys()
    assert " rebuilt in " in (run.folder / f"{stream}.log").read_text().rsplit("assigned", 1)[1]


# -- unusual pairs: one run over all of them ----------------------------------------------------------------------------

LONG = "a caption of any length, " * 4096 + "its end"
ANY_UNICODE = (
    "naïve 猫 \U0001f9ff\U0001f468\u200d\U0001f469\u200d\U0001f467 \u202eright to left\u202c e\u0301 "
    "\ufeff \0 \x1f \U0010ffff"
)


@pytest.fixture(scope="module")
def unusual(run: Run) -> Outcome:
    topic = f"{run.topic}-unusual"
    create_topic(run.kafka, topic)
    # Every pair of these is kept (M = 1), so that what is in the set says what was counted.
    send(
        run.kafka,
        topic,
        [
            *(Raw("twice-in-a-batch", f"caption {i}", b"picture") for i in range(2)),
            Raw("again-much-later", "the first one", b"picture"),
            Raw("taken-down", "soon gone", b"picture"),
            Raw("long", LONG, b"picture"),
            Raw("any-unicode", ANY_UNICODE, b"picture"),
            Raw("id-of-the-value", "without a key", b"picture", key=None),
            Raw("", "without an id in the value", b"picture", key=b"id-of-the-key"),
            Raw("with-fields", "carried along", b"picture", fields={"url": "https://example.org/ü", "": "x"}),
            Raw("id \U0001f408 /#?%&\n", "an id may be anything", b"picture"),
            *pairs(1000),
            Raw("again-much-later", "the second one", b"another picture"),
            Raw("taken-down", value=None),
            *pairs(300, prefix="more"),
            Raw("taken-down", "back again", b"picture"),
            Raw("never-seen", value=None),
            Raw("never-seen", "comes after its takedown", b"picture"),
        ],
    )
    arguments = null_worker(run.kafka, topic, run.folder / "unusual", "--ratio", "100%", "--stop-at-end")
    with worker(arguments, run.folder / "unusual.log") as running:
        running.finish()
    return outcome_of(run.kafka, topic)


def test_unusual_pairs_differ_in_nothing_from_the_batch_reference(unusual: Outcome) -> None:
    assert unusual.anomalies() == NO_ANOMALY


def test_a_pair_twice_in_a_batch_counts_once_and_the_first_one_wins(unusual: Outcome) -> None:
    assert unusual.fate("twice-in-a-batch") == ["kept", "duplicate"]
    assert unusual.reduced_set["twice-in-a-batch"]["caption"] == "caption 0"


def test_a_pair_that_comes_again_a_thousand_records_later_counts_once(unusual: Outcome) -> None:
    first, again = (row for row in unusual.rows if row.id == "again-much-later")

    assert (first.fate, again.fate) == (Fate.KEPT, Fate.DUPLICATE)
    assert again.duplicate_of == first.offset
    assert unusual.reduced_set["again-much-later"]["caption"] == "the first one"


def test_a_takedown_removes_the_pair_and_keeps_it_out(unusual: Outcome) -> None:
    assert unusual.fate("taken-down") == ["kept", "forgotten", "forgotten"]
    assert "taken-down" not in unusual.reduced_set
    last = [record for record in unusual.kept if record.id == "taken-down"][-1]
    assert last.value is None and last.cause is not None


def test_a_takedown_of_an_id_that_was_never_seen_keeps_it_out(unusual: Outcome) -> None:
    assert unusual.fate("never-seen") == ["forgotten", "forgotten"]
    assert "never-seen" not in unusual.reduced_set


def test_a_null_key_takes_the_id_from_the_value(unusual: Outcome) -> None:
    assert unusual.fate("id-of-the-value") == ["kept"]
    assert unusual.reduced_set["id-of-the-value"]["caption"] == "without a key"


def test_a_value_without_an_id_takes_it_from_the_key(unusual: Outcome) -> None:
    assert unusual.reduced_set["id-of-the-key"]["caption"] == "without an id in the value"


def test_a_caption_of_100_kb_is_kept_whole(unusual: Outcome) -> None:
    pair = unusual.reduced_set["long"]

    assert len(LONG) > 100_000
    assert pair["caption"] == LONG
    assert pair["refined_caption"].startswith(LONG)


def test_a_caption_of_any_unicode_is_kept_whole(unusual: Outcome) -> None:
    assert unusual.reduced_set["any-unicode"]["caption"] == ANY_UNICODE


def test_an_id_may_hold_any_character(unusual: Outcome) -> None:
    assert unusual.reduced_set["id \U0001f408 /#?%&\n"]["caption"] == "an id may be anything"


def test_the_source_s_own_fields_are_carried_along(unusual: Outcome) -> None:
    assert unusual.reduced_set["with-fields"]["fields"] == {"url": "https://example.org/ü", "": "x"}
