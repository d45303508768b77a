"""What a worker tells Prometheus: everything from the start, under conventional names, and what was committed."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from models.errors import Reason
from state.directory import StateDirectory
from state.partition import Fate
from stream.kafka import Connection
from stream.metrics import FATES, STAGES, CellSizes, Metrics
from tests.end_to_end.outcome import Raw, create_topic, outcome_of, pairs, send
from tests.end_to_end.worker_process import null_worker, until, worker

# Each has few values: a fate, a reason, a partition of this worker, … never an id, a cluster or a host of the crawl.
LABELS = {"fate", "reason", "stage", "outcome", "partition", "state", "version", "signal", "le"}
UNITS = ("_seconds", "_bytes", "_ratio", "_info", "_pairs", "_records", "_share", "_partitions", "_total")
COUNTED_THINGS = {"tldr_images", "tldr_captions", "tldr_transactions", "tldr_dead_letters", "tldr_fencings",
                  "tldr_misplaced_keys", "tldr_pairs"}  # fmt: skip
SCORES = {"tldr_itm_raw", "tldr_itm_kept", "tldr_itm_refined", "tldr_drift_effect", "tldr_drift_p_value"}
STATES = {"tldr_drift_alarm", "tldr_bundle_missing", "tldr_partition_epoch"}


def samples(text: str) -> dict[tuple[str, str], float]:
    """(name, value of its one label or "") → value."""
    return {
        (sample.name, next(iter(sample.labels.values()), "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_names_have_a_unit_and_labels_have_few_values() -> None:
    families = list(text_string_to_metric_families(generate_latest(Metrics().registry).decode()))

    ours = [family for family in families if not family.name.startswith("process_")]
    assert len(ours) > 30
    for family in ours:
        assert re.fullmatch(r"tldr_[a-z_]+", family.name)
        bare = re.sub(r"_(bucket|gcount|gsum|created)$", "", family.name)
        assert bare.endswith(UNITS) or bare in COUNTED_THINGS | SCORES | STATES | {"tldr_bundle", "tldr_build"}, (
            family.name
        )
        assert {label for sample in family.samples for label in sample.labels} <= LABELS
        assert len(family.documentation) > 20, family.name


def test_the_reference_lists_every_metric_as_the_code_describes_it() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference.md").read_text()
    (table,) = re.findall(r"\| metric \|.*\n\|---.*\n((?:\|.*\n)+)", page)
    collectors = list(Metrics().registry._collector_to_names)

    told = []
    for collector in collectors:
        labels = ", ".join(getattr(collector, "_labelnames", ()))
        for family in collector.collect():
            ending = {"counter": "_total", "info": "_info"}.get(family.type, "")
            name = f"{family.name}{ending}" + (f"{{{labels}}}" if labels else "")
            if name.startswith("tldr_"):
                told.append(f"| `{name}` | {family.type} | {family.documentation} |")

    assert table.splitlines() == told, "the table shall be:\n" + "\n".join(told)


def test_what_has_not_happened_yet_is_zero_and_not_absent() -> None:
    """A series that appears with its first event has no increase, so that no alert could see it."""
    told = samples(generate_latest(Metrics().registry).decode())

    for fate in Fate:
        assert told["tldr_pairs_total", fate.name.lower()] == 0
    for reason in Reason:
        assert told["tldr_dead_letters_total", str(reason)] == 0
    for stage in STAGES:
        assert told["tldr_stage_seconds_total", stage] == 0
    for outcome in ("committed", "aborted"):
        assert told["tldr_transactions_total", outcome] == 0
    assert told["tldr_fencings_total", ""] == 0


def test_cells_are_a_distribution_and_not_a_series_each() -> None:
    sizes = CellSizes("cells", "Cells by size.")

    sizes.set(np.array([3, 0, 7, 20, 2_000_000]))

    told = {(s.name, s.labels.get("le")): s.value for metric in sizes.collect() for s in metric.samples}
    assert told["cells_bucket", "0"] == 1
    assert told["cells_bucket", "5"] == 2
    assert told["cells_bucket", "20"] == 4
    assert told["cells_bucket", "1000000"] == 4
    assert told["cells_bucket", "+Inf"] == told["cells_gcount", None] == 5
    assert told["cells_gsum", None] == 2_000_030


def test_the_disk_is_looked_at_when_somebody_asks(tmp_path: Path) -> None:
    metrics = Metrics()

    metrics.watch_disk(tmp_path)

    told = samples(generate_latest(metrics.registry).decode())
    assert told["tldr_state_disk_size_bytes", ""] == shutil.disk_usage(tmp_path).total
    assert 0 < told["tldr_state_disk_free_bytes", ""] < told["tldr_state_disk_size_bytes", ""]


def test_the_metrics_of_a_worker_are_what_it_has_committed(kafka: Connection, name: str, tmp_path: Path) -> None:
    # given: new pairs, some of them twice, and two that nothing can be made of
    create_topic(kafka, name)
    bad = [Raw("bad-1", image=b"BAD"), Raw("bad-2", value=b"garbage")]
    send(kafka, name, [*pairs(300), *pairs(20), *bad])
    arguments = null_worker(kafka, name, tmp_path / "state", "--ratio", "1/3")
    with worker(arguments, tmp_path / "log") as running:
        running.until_it_runs(2)
        told: dict[tuple[str, str], float] = {}

        def all_is_committed() -> bool:
            nonlocal told
            told = samples(running.get("/metrics")[1])
            counted = sum(told["tldr_pairs_total", fate] for fate in FATES)
            return counted == 322 and told["tldr_partitions", "running"] == 2  # a gauge is set once a second

        # when
        until(all_is_committed, "all is committed")
        running.drain()

    # then
    outcome = outcome_of(kafka, name)
    totals = outcome.view.totals
    kept = totals.kept
    assert told["tldr_quota_ratio", ""] == 1 / 3
    assert told["tldr_stream_partitions", ""] == 2
    assert (told["tldr_pairs_total", "kept"], told["tldr_pairs_total", "duplicate"]) == (kept, 20)
    assert sum(told["tldr_pairs_total", fate] for fate in FATES) == totals.read == 322
    assert told["tldr_dead_letters_total", "not-an-image"] == told["tldr_dead_letters_total", "not-avro"] == 1
    assert told["tldr_itm_raw_count", ""] == totals.counted == told["tldr_images_total", ""]
    assert (
        told["tldr_itm_kept_count", ""] == told["tldr_itm_refined_count", ""] == told["tldr_captions_total", ""] == kept
    )
    # the kept pairs' own scores, not the first ones' or all of them
    originals = [pair["itm_original"] for pair in outcome.reduced_set.values()]
    np.testing.assert_allclose(told["tldr_itm_kept_sum", ""], sum(originals), rtol=1e-5)
    # and the cells were looked at with the first commit at the latest
    cells = sum(len(part.cells) for part in outcome.view.partitions.values())
    assert 0 < told["tldr_cell_counted_pairs_gcount", ""] <= cells
    assert 0 < told["tldr_largest_cell_counted_pairs", ""] <= totals.counted
    assert told["tldr_restore_seconds_count", ""] == 2
    assert told["process_start_time_seconds", ""] > 0


def test_a_fencing_is_remembered_by_the_next_worker_on_the_same_folder(tmp_path: Path) -> None:
    with StateDirectory(tmp_path) as first:
        assert first.fencings == 0
        first.note_fencing()
        first.note_fencing()

    with StateDirectory(tmp_path) as second:
        assert second.fencings == 2


def test_a_count_of_fencings_that_a_crash_cut_short_keeps_no_worker_from_starting(tmp_path: Path) -> None:
    (tmp_path / "fencings").write_text("")

    with StateDirectory(tmp_path) as directory:
        assert directory.fencings == 0
