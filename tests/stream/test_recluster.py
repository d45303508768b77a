"""`recluster` on a stream of real pictures: it predicts what a switch does, keeps what has not changed, and says why not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from models.bundle import load_model, read_manifest, write_bundle
from models.drift import ERROR, ITM, OCCUPANCY, SIGNALS, Baseline
from models.loaded import LoadedModel
from state.changelog import decode_entry
from state.partition import Fate
from stream.broker import LocalBroker
from stream.bundle_list import list_bundles
from stream.bundles import announce, announce_folder, announced
from stream.cli import app
from stream.errors import TldrError
from stream.kafka import Connection
from stream.live_bundle import live_bundle, open_bundle
from stream.pair_sources import BadEntry, SourcePair, open_source
from stream.raw_format import raw_reader
from stream.recent_codes import Rows, Sample, recent_rows, rows_of
from stream.recluster import NOTHING_TO_DO, ReclusterOptions, drift_window, recluster
from stream.report import ReportOptions, report
from stream.report_data import gather
from stream.report_drift import DriftWalk
from stream.status import StatusReader
from stream.stream_view import CodesRow, read_codes, read_view, whole
from tests.stream.other_bundle import bundle_with_other_centroids
from tests.stream.stream_writer import StreamWriter

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "bundles" / "sample"
SHARD = str(ROOT / "corpus" / "sample" / "sample-000002.tar")


@dataclass
class Made:
    """A stream of 166 pictures under the sample bundle."""

    writer: StreamWriter
    model: LoadedModel
    kafka: Connection

    def options(self, **given: Any) -> ReclusterOptions:
        return replace(ReclusterOptions(self.writer.source, str(BUNDLE)), **given)


def record_of(pair: SourcePair) -> dict[str, Any]:
    return {"id": pair.id, "caption": pair.caption, "image": pair.image, "image_uri": None, "fields": {}}


@pytest.fixture(scope="module")
def made(broker: LocalBroker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    model = load_model(BUNDLE, "cpu")
    assert isinstance(model, LoadedModel)
    kafka = Connection(broker.bootstrap_servers)
    found = [p for p in open_source(SHARD) if not isinstance(p, BadEntry)]
    records: list[dict[str, Any]] = [
        {"id": p.id, "caption": p.caption, "image": p.image, "image_uri": None, "fields": {}} for p in found
    ]
    folder = tmp_path_factory.mktemp("recluster")
    with StreamWriter(kafka, "recluster", folder, model=model, batch=100) as writer:  # type: ignore[arg-type]
        writer.feed(records).run()
        yield Made(writer, model, kafka)


def vectors_of(made: Made) -> np.ndarray:
    view = read_view(made.writer.source)
    return np.concatenate([rows.vectors for rows in recent_rows(made.writer.source, view, 10_000)])


def test_the_window_is_the_newest_raw_records_of_each_partition(made: Made) -> None:
    view = read_view(made.writer.source)

    found = list(recent_rows(made.writer.source, view, 100))

    for p in (0, 1):
        offsets = np.concatenate([rows.offsets for rows in found if rows.partition == p])
        assert (offsets.min(), offsets.max()) == (view.cut[p] - 50, view.cut[p] - 1)
        assert len(offsets) == 50


def test_nothing_is_older_than_since(made: Made) -> None:
    view = read_view(made.writer.source)

    assert list(recent_rows(made.writer.source, view, 10_000, since_ms=4_000_000_000_000)) == []
    assert sum(len(r.offsets) for r in recent_rows(made.writer.source, view, 10_000, since_ms=0)) == view.totals.counted


def test_a_sample_is_uniform_and_does_not_depend_on_how_the_rows_come() -> None:
    rng = np.random.default_rng(0)
    vectors = np.arange(4000, dtype=np.uint16)[:, None]
    parts = [
        Rows(
            0, 0, offsets, np.zeros(len(offsets), np.int32), np.zeros(len(offsets), np.float32), vectors[offsets],
            np.ones(len(offsets), bool),
        )
        for offsets in np.array_split(np.arange(4000), 37)
    ]  # fmt: skip
    taken = []
    for order in (range(37), rng.permutation(37)):
        sample = Sample(500, seed=3)
        for i in order:
            sample.offer(parts[i])
        taken.append(sample.rows()[:, 0])

    assert (taken[0] == taken[1]).all() and len(taken[0]) == 500 and sample.offered == 4000
    assert np.histogram(taken[0], 4, (0, 4000))[0].min() > 90  # 125 expected


def test_a_dry_run_says_what_then_happens_to_recent_pairs_and_to_every_entry_and_writes_nothing(
    made: Made, tmp_path: Path
) -> None:
    before = announced(made.kafka)  # of other streams
    predicted = recluster(made.options(dry_run=True))
    assert (predicted.done, predicted.version, announced(made.kafka)) == ("predicted", None, before)

    done = recluster(made.options(out=str(tmp_path / "new")))

    old, new = open_bundle(BUNDLE).clustering, open_bundle(tmp_path / "new").clustering
    entries = [decode_entry(v) for store in made.writer.stores for _, v in store.entries()]
    of_entries = np.stack([entry.vector for entry in entries])
    pairs = vectors_of(made)
    assert predicted.recent is not None and predicted.entries is not None
    assert predicted.entries.pairs == predicted.entries.of == len(entries)
    for foretold, vectors in ((predicted.recent, pairs), (predicted.entries, of_entries)):
        were, are = old.assign(vectors), new.assign(vectors)
        quota = np.abs(np.bincount(were, minlength=16) - np.bincount(are, minlength=16)).sum() / 2 / len(vectors)
        assert foretold.moved == pytest.approx((were != are).mean(), abs=1e-9)
        assert foretold.quota_moved == pytest.approx(quota, abs=1e-9)
        assert foretold.margin == 0
    assert predicted.coming is not None and 0 < predicted.coming.margin < 0.1  # 166 pairs tell no more of what comes
    cells = [
        {(p, c) for p, c in zip(_partitions(made), x.assign(of_entries).tolist(), strict=True)} for x in (old, new)
    ]
    assert (predicted.entries.cells_emptied, predicted.entries.cells_made) == (
        len(cells[0] - cells[1]),
        len(cells[1] - cells[0]),
    )
    assert done.done == "announced" and done.entries == predicted.entries


def _partitions(made: Made) -> list[int]:
    return [p for p, store in enumerate(made.writer.stores) for _ in store.entries()]


def test_the_new_bundle_is_whole_of_the_same_space_and_carries_itm_and_code_baselines_over(
    made: Made, tmp_path: Path
) -> None:
    done = recluster(made.options(out=str(tmp_path / "new")))

    old, new = read_manifest(BUNDLE).data, read_manifest(tmp_path / "new").data
    newest = announced(made.kafka)[-1]
    assert (newest.version, newest.uri, newest.stream) == (done.version, str(tmp_path / "new"), "recluster")
    assert newest.space == made.model.space == load_model(tmp_path / "new", "cpu").space
    for name in ("itm_histogram", "code_usage", "pairs", "itm_pairs"):
        assert new["baselines"][name] == old["baselines"][name]
    assert sum(new["baselines"]["cluster_occupancy"]) == new["baselines"]["occupancy_pairs"] == len(vectors_of(made))
    assert Baseline.of(new).missing == ()
    assert new["reclustered"]["from"] == made.model.version


def test_if_drift_does_nothing_on_the_window_that_was_fitted_and_says_so_by_its_status(
    made: Made, tmp_path: Path
) -> None:
    recluster(made.options(out=str(tmp_path / "new")))
    live = replace(open_bundle(tmp_path / "new"))
    vectors = vectors_of(made)
    window = drift_window(made.writer.source, read_view(made.writer.source), open_bundle(BUNDLE))
    assert window.pairs == min(len(vectors), 2000)

    from models.drift import signals

    clusters = live.clustering.assign(vectors)
    found = signals(
        live.baseline, np.full(len(vectors), np.nan, np.float32), clusters, vectors, live.clustering.errors(vectors, clusters)
    )  # fmt: skip

    assert not [s.name for s in found if s.name in (OCCUPANCY, ERROR) and s.alarm]


def bundle_with(out: Path, occupancy: list[int], itm: list[int] | None = None) -> Path:
    """The sample bundle, but for what it says of the past."""
    live = open_bundle(BUNDLE)
    data = {k: v for k, v in live.manifest.data.items() if k not in ("version", "space", "files", "format")}
    baselines = data["baselines"] | {"cluster_occupancy": occupancy}
    write_bundle(out, live.contents, data | {"baselines": baselines | ({"itm_histogram": itm} if itm else {})})
    return out


def test_if_drift_acts_on_occupancy_and_not_on_itm(
    broker: LocalBroker, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream whose clusters are as they were leaves its bundle alone, however its captions are; the other way round not."""
    monkeypatch.setattr("models.drift.LEAST_PAIRS", 100)
    usual = np.bincount(made.model.assign(vectors_of(made)), minlength=16)
    records = [p for p in open_source(SHARD) if not isinstance(p, BadEntry)][:150]
    found = {}
    for name, occupancy in (("quiet", usual * 3), ("drifted", np.eye(16, dtype=int)[3] * 900)):
        folder = bundle_with(tmp_path / name, occupancy.tolist(), itm=[900] + [0] * 19)
        model = load_model(folder, "cpu")
        with StreamWriter(made.kafka, f"if-{name}", tmp_path / f"{name}-stores", model=model) as writer:  # type: ignore[arg-type]
            pairs = [record_of(p) for p in records]
            writer.feed(pairs).run()
            announce_folder(made.kafka, folder, f"if-{name}")
            itm = next(
                s
                for s in drift_window(writer.source, read_view(writer.source), open_bundle(folder)).look()
                if s.name == ITM
            )
            assert itm.alarm
        found[name] = CliRunner().invoke(
            app, ["recluster", "--topic", f"if-{name}", "--if-drift", "--bootstrap-servers", broker.bootstrap_servers]
        )

    assert found["quiet"].exit_code == NOTHING_TO_DO and "nothing was done" in found["quiet"].output
    assert found["drifted"].exit_code == 0, found["drifted"].output
    assert "announced bundle" in found["drifted"].output
    assert len(list(tmp_path.glob("if-drifted-*"))) == 1

    again = CliRunner().invoke(
        app, ["recluster", "--topic", "if-drifted", "--if-drift", "--bootstrap-servers", broker.bootstrap_servers]
    )
    assert again.exit_code == NOTHING_TO_DO and "is announced already" in again.output


def test_if_drift_announces_one_bundle_in_the_place_of_a_live_one_that_was_never_announced(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was announced to any stream before it began is no sign that anything waits for its workers."""
    monkeypatch.setattr("models.drift.LEAST_PAIRS", 100)
    folder = bundle_with(tmp_path / "given", (np.eye(16, dtype=int)[3] * 900).tolist())
    announce(made.kafka, str(tmp_path / "before"), "fedcba9876543210", made.model.space)
    with StreamWriter(made.kafka, "given", tmp_path / "stores", model=load_model(folder, "cpu")) as writer:  # type: ignore[arg-type]
        records = [p for p in open_source(SHARD) if not isinstance(p, BadEntry)][:150]
        writer.feed([record_of(p) for p in records]).run()
        options = ReclusterOptions(writer.source, str(folder), if_drift=True)

        first = recluster(options)
        again = recluster(replace(options, seed=1))

    assert (first.done, again.done) == ("announced", "nothing")
    assert f"bundle {(first.version or '')[:12]} is announced already" in again.because


def test_what_is_wrong_is_one_line_that_says_what_to_do(
    made: Made, tmp_path: Path, kafka: Connection, name: str
) -> None:
    def refused(match: str, **given: Any) -> None:
        with pytest.raises(TldrError, match=match):
            recluster(made.options(**given))

    refused("cannot make 16 clusters: take a longer window", records=10)
    refused("give a time like", since="yesterday")
    refused("exists: a bundle is never changed", out=str(BUNDLE))
    refused("there is no bundle at", bundle=str(tmp_path / "none"))
    refused("the stream runs with bundle", bundle=str(bundle_with(tmp_path / "other", [1] * 16)))
    with pytest.raises(TldrError, match="there is no stream"):
        recluster(
            replace(made.options(), source=replace(made.writer.source, topics=replace(made.writer.topics, name="no")))
        )


def test_the_memory_that_is_given_bounds_what_sampling_fitting_and_foretelling_add_to_the_process() -> None:
    """With as many tokens as the paper has, by a process of its own, of which the kernel keeps the most that it had."""
    command = [sys.executable, str(ROOT / "benchmarks" / "recluster_memory.py"), "--child"]
    said = subprocess.run(
        [*command, "--sizes", "paper, N = 16", "--forms", "pca", "--memory-mb", "96"],
        check=True, cwd=ROOT, capture_output=True, text=True,
    ).stdout  # fmt: skip

    assert json.loads(said)["rows"] > 10_000
    assert json.loads(said)["mb"] < 96


def test_clusters_that_the_memory_has_no_room_for_are_refused_with_what_would_be_enough(made: Made) -> None:
    with pytest.raises(TldrError, match="--memory-mb 1 has no room to fit 16 clusters: give 25 or more"):
        recluster(made.options(memory_mb=1))


def test_the_live_bundle_is_found_by_the_newest_switch_record(made: Made, tmp_path: Path) -> None:
    view = read_view(made.writer.source)
    announce_folder(made.kafka, BUNDLE)
    announce(made.kafka, str(tmp_path / "later"), "0123456789abcdef", made.model.space)

    assert live_bundle(made.kafka, view).uri == str(BUNDLE.resolve())


# -- what status and report say of drift -------------------------------------------------------------------------------


def test_status_judges_the_newest_pairs_by_the_bundle_and_says_what_it_cannot_judge(made: Made, tmp_path: Path) -> None:
    status = StatusReader(made.writer.source, made.writer.name, str(BUNDLE)).read()

    found = {signal.name: signal for signal in status.drift.signals}
    missing = open_bundle(BUNDLE).baseline.missing
    assert status.drift.pairs == read_view(made.writer.source).totals.counted
    assert set(found) == set(SIGNALS) - set(missing)
    window = drift_window(made.writer.source, read_view(made.writer.source), open_bundle(BUNDLE)).look()
    assert {s.name: round(s.effect, 9) for s in window} == {n: round(s.effect, 9) for n, s in found.items()}
    lines = "\n".join(status.lines())
    assert all(" ".join(signal.words.split()[:3]) in lines for signal in found.values())
    if missing:
        assert f"no baseline in this bundle of {', '.join(missing)}" in lines


def test_the_report_shows_the_window_against_the_baseline_and_each_signal_over_time(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    report(ReportOptions(made.writer.source, made.writer.name, out, raw_reader(), str(BUNDLE), 2))

    text = out.read_text()
    assert "Has the data drifted?" in text
    for chart in ("drift-itm", "drift-clusters", "drift-codes", "drift-changed-codes", "drift-time"):
        assert f'id="{chart}-' in text
    assert "median ITM" in text and "are in other clusters than before" in text


# -- partitions that have come to their bundle in different ways -------------------------------------------------------


@pytest.fixture(scope="module")
def apart(broker: LocalBroker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """Epoch 1 has the newest bundle in partition 0 and another one in the partitions 1 and 2; that one stays in 2."""
    folder, kafka = tmp_path_factory.mktemp("apart"), Connection(broker.bootstrap_servers)
    folders = [BUNDLE, *(bundle_with_other_centroids(folder / f"bundle-{seed}", seed) for seed in (1, 2))]
    first, between, newest = (load_model(one, "cpu") for one in folders)
    assert isinstance(newest, LoadedModel)
    records = [record_of(p) for p in open_source(SHARD) if not isinstance(p, BadEntry)]
    with StreamWriter(kafka, "apart", folder, 3, model=first, batch=100) as writer:  # type: ignore[arg-type]
        for one in folders:
            announce_folder(kafka, one, "apart")
        writer.switch_apart(between, newest, records, stays=(2,))
        yield Made(writer, newest, kafka)


def rows_with(made: Made) -> list[CodesRow]:
    """The rows that the newest bundle gave a cluster, by what each says of itself."""
    source, view = made.writer.source, read_view(made.writer.source)
    rows = read_codes(source, whole(made.kafka, source.topics.codes, range(3)), below=view.cut)
    found = [row for row in rows if row.bundle == made.model.version and row.vector is not None]
    assert {(row.partition, row.epoch) for row in found} == {(0, 1), (1, 2)}
    return found


def test_drift_is_judged_by_all_pairs_of_the_newest_bundle_whatever_the_number_of_their_epoch(apart: Made) -> None:
    view = read_view(apart.writer.source)
    live = live_bundle(apart.kafka, view)
    status = StatusReader(apart.writer.source, apart.writer.name).read()

    window = drift_window(apart.writer.source, view, live)

    rows = rows_with(apart)
    assert live.version == apart.model.version
    assert sorted(window.itms.tolist()) == sorted(row.itm for row in rows)
    assert status.drift.pairs == window.pairs
    assert [one.effect for one in status.drift.signals] == pytest.approx([one.effect for one in window.look()])


def test_the_list_of_bundles_says_in_which_epoch_each_partition_runs_with_one(apart: Made) -> None:
    view = read_view(apart.writer.source)

    listed = list_bundles(apart.kafka, apart.writer.source).bundles

    uses = {(p, use.epoch): one.version for one in listed for use in one.uses for p in use.begins}
    assert uses == {(p, epoch): s.bundle for p, part in view.partitions.items() for epoch, s in part.switches.items()}
    now = {one.version: sorted(p for use in one.uses for p in use.now) for one in listed if one.uses}
    assert [sorted(now[view.running[p].bundle]) for p in range(3)] == [[0, 1], [0, 1], [2]]


def test_a_report_shows_the_clusters_and_the_drift_of_the_newest_bundle_in_all_partitions_that_run_with_it(
    apart: Made, tmp_path: Path
) -> None:
    source, view = apart.writer.source, read_view(apart.writer.source)
    live, rows = live_bundle(apart.kafka, view), rows_with(apart)
    walk = DriftWalk(view, live.version, 0)
    data = gather(
        source, view, live.version, apart.writer.name, raw_reader(), 16, 0, lambda codes: walk.add(rows_of(codes))
    )
    report(ReportOptions(source, apart.writer.name, tmp_path / "report.html", raw_reader()))

    counted = Counter(row.cluster for row in rows)
    assert {shown.cluster: shown.counted for shown in data.clusters} == counted
    kept = {row.id for row in rows if row.fate == Fate.KEPT}
    assert {pair.id for shown in data.clusters for pair in shown.kept} <= kept
    assert sum(len(vectors) for vectors in data.vectors.values()) == len(rows)
    (stretch,) = walk.stretches(live)
    assert {signal.pairs for signal in stretch.signals} == {len(rows)}
    page = (tmp_path / "report.html").read_text()
    assert f"{apart.model.version}, epoch 1 in partition 0, epoch 2 in partition 1; partition 2 runs with" in page
