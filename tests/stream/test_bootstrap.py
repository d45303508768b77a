"""`bootstrap` makes the bundle that workers load, says what it is worth, and refuses what no stream could use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka import Producer
from typer.testing import CliRunner

from models.bundle import load_model, read_manifest
from models.errors import BundleError
from stream.bootstrap import BootstrapResult, bootstrap, sweep
from stream.bundles import announce_folder, inspect
from stream.cli import app
from stream.errors import TldrError
from stream.kafka import Connection, create_missing
from stream.pair_sources import BadEntry, SourcePair, open_source
from stream.records import Codec

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "bundles" / "sample"
SHARD = str(ROOT / "corpus" / "sample" / "sample-000002.tar")


def first_pairs() -> Iterator[SourcePair | BadEntry]:
    """Twenty-four real pairs, as a topic would hand them out."""
    yield BadEntry("raw/0@0", "not-avro", "no record")
    yield from [p for p in open_source(SHARD) if not isinstance(p, BadEntry)][:24]


def small(out: Path, **options: object) -> BootstrapResult:
    return bootstrap((), BUNDLE, out, clusters=4, topic_pairs=first_pairs, progress=lambda line: None, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> BootstrapResult:
    return small(tmp_path_factory.mktemp("made") / "bundle", form="histogram")


def test_the_same_shard_and_seed_give_the_same_bytes(made: BootstrapResult, tmp_path: Path) -> None:
    again = small(tmp_path / "again", form="histogram")

    assert again.version == made.version
    assert (made.out / "clusters.safetensors").read_bytes() == (again.out / "clusters.safetensors").read_bytes()


def test_the_bundle_keeps_the_space_of_codes_and_tells_what_drift_is_measured_against(made: BootstrapResult) -> None:
    manifest = read_manifest(made.out).data
    baselines = manifest["baselines"]

    assert load_model(made.out, "cpu").clusters == 4
    assert sum(baselines["cluster_occupancy"]) == sum(baselines["itm_histogram"]) == baselines["itm_pairs"] == 24
    assert manifest["gate"] == made.gate and 0 <= baselines["itm_auc"] <= 1 and baselines["itm_held_out"] is False
    assert "pairs are few for 4 clusters" in str(made.warning)


def test_gate_and_baseline_come_from_the_pairs_that_were_held_out(tmp_path: Path) -> None:
    made = small(tmp_path / "bundle", held_out=[SHARD])

    baselines = read_manifest(made.out).data["baselines"]
    assert (made.matching.held_out, made.matching.pairs, baselines["itm_pairs"]) == (True, 166, 166)
    assert made.matching.auc > 0.7


def test_what_is_excluded_from_the_shard_may_be_what_is_held_out(tmp_path: Path) -> None:
    held_out = tmp_path / "held-out"
    held_out.mkdir()
    for number, pair in enumerate([p for p in first_pairs() if not isinstance(p, BadEntry)][:4]):
        (held_out / f"{number}.jpg").write_bytes(pair.image or b"")
        (held_out / f"{number}.txt").write_text(pair.caption)

    def all_of_them() -> Iterator[SourcePair | BadEntry]:
        yield from first_pairs()
        yield from open_source(str(held_out))

    made = bootstrap(
        (), BUNDLE, tmp_path / "bundle", clusters=4, topic_pairs=all_of_them, exclude=[str(held_out)],
        held_out=[str(held_out)], progress=lambda line: None,
    )  # fmt: skip

    assert (made.pairs, made.matching.pairs) == (24, 4)


@pytest.mark.parametrize("feature", ["image", "text"])
def test_clusters_of_anything_but_codes_are_for_comparison_only(
    feature: str, kafka: Connection, tmp_path: Path
) -> None:
    made = small(tmp_path / "bundle", feature=feature)

    assert made.pairs == 24 and made.clusters == 4
    for use in (lambda: load_model(made.out, "cpu"), lambda: announce_folder(kafka, made.out)):
        with pytest.raises(BundleError, match="cannot serve a stream"):
            use()


def test_a_bundle_is_made_of_the_newest_records_of_a_raw_topic(kafka: Connection, name: str, tmp_path: Path) -> None:
    create_missing(kafka, {name: {}}, 2)
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers})
    pairs = [p for p in first_pairs() if not isinstance(p, BadEntry)]
    for number, pair in enumerate(pairs):
        record: dict[str, object] = {
            "id": pair.id,
            "caption": pair.caption,
            "image": pair.image,
            "image_uri": None,
            "fields": {},
        }
        producer.produce(name, Codec("RawPair").encode(record), pair.id.encode(), number % 2)
    producer.flush()

    made = CliRunner().invoke(
        app,
        ["bootstrap", "--topic", name, "--records", "16", "--captioner", str(BUNDLE), "--clusters", "4",
         "--out", str(tmp_path / "bundle"), "--bootstrap-servers", kafka.bootstrap_servers],
    )  # fmt: skip

    assert made.exit_code == 0, made.output
    assert sum(read_manifest(tmp_path / "bundle").data["baselines"]["cluster_occupancy"]) == 16


def test_an_unknown_feature_and_too_few_pairs_are_one_line_each(tmp_path: Path) -> None:
    with pytest.raises(TldrError, match="use one of codes, image, text"):
        small(tmp_path / "a", feature="sound")
    with pytest.raises(TldrError, match="24 pairs cannot make 25 clusters"):
        bootstrap((), BUNDLE, tmp_path / "b", clusters=25, topic_pairs=first_pairs, progress=lambda line: None)


def test_a_sweep_shows_finer_clusters_with_less_inertia_and_smaller_cells() -> None:
    swept = sweep((), BUNDLE, [2, 8], topic_pairs=first_pairs, volume=4800, partitions=2, progress=lambda line: None)

    coarse, fine = swept.sweeps
    assert coarse.inertia > fine.inertia and coarse.cell_median == coarse.median * 100
    assert len(list(swept.lines())) == 5


def test_inspect_shows_sizes_codes_with_keywords_baselines_and_examples(made: BootstrapResult) -> None:
    seen = inspect(made.out)

    assert seen.parameters["encoder"] == 2_939_120 and seen.cluster_sizes[2] == made.largest_cluster
    assert seen.codes_used == made.codes_used and 1 < seen.code_perplexity <= seen.codes_used
    assert all(keyword for _, _, keyword in seen.frequent_codes) and len(seen.examples) == 8
    assert any("ITM" in line for line in seen.lines()) and seen.baselines["itm_pairs"] == 24


def test_inspect_refuses_a_damaged_bundle(made: BootstrapResult, tmp_path: Path) -> None:
    for file in made.out.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "decoder.safetensors").write_bytes(b"x")

    with pytest.raises(BundleError, match=r"decoder\.safetensors is damaged"):
        inspect(tmp_path)
