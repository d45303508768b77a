"""`bootstrap` makes the bundle that workers load, says what it is worth, and refuses what no stream could use."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save
from typer.testing import CliRunner

from models.bundle import load_model, read_files, read_manifest, write_bundle
from models.errors import BundleError
from stream.bootstrap import BootstrapResult, bootstrap, sweep
from stream.bundles import Announcement, announce_folder, inspect
from stream.cli import app
from stream.consume import ConsumeOptions, _beside
from stream.errors import TldrError
from stream.kafka import Connection, create_missing
from stream.pair_sources import BadEntry, SourcePair, open_source
from stream.records import Codec
from tests.models.random_models import random_authors, random_blip

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "bundles" / "sample"
SHARD = str(ROOT / "corpus" / "sample" / "sample-000002.tar")


def first_pairs() -> Iterator[SourcePair | BadEntry]:
    """Twenty-four real pairs, as a topic would hand them out."""
    yield BadEntry("raw/0@0", "not-avro", "no record")
    yield from [p for p in open_source(SHARD) if not isinstance(p, BadEntry)][:24]


def small(out: Path, **options: object) -> BootstrapResult:
    return bootstrap((), BUNDLE, out, clusters=4, topic_pairs=first_pairs, progress=lambda line: None, **options)  # type: ignore[arg-type]


def made_space(made: BootstrapResult) -> str:
    return read_manifest(made.out).space


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


def bootstrapped_from(kafka: Connection, topic: str, out: Path, *more: str) -> list[int]:
    """Sizes of the four clusters that the command makes of a topic."""
    done = CliRunner().invoke(
        app,
        ["bootstrap", "--topic", topic, "--captioner", str(BUNDLE), "--clusters", "4", "--out", str(out),
         "--bootstrap-servers", kafka.bootstrap_servers, *more],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    sizes: list[int] = read_manifest(out).data["baselines"]["cluster_occupancy"]
    return sizes


def test_a_bundle_is_made_of_the_newest_records_of_a_raw_topic(kafka: Connection, name: str, tmp_path: Path) -> None:
    create_missing(kafka, {name: {}}, 2)
    producer = kafka.producer()
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

    assert sum(bootstrapped_from(kafka, name, tmp_path / "bundle", "--records", "16")) == 16


def test_a_bundle_is_made_of_a_foreign_topic_by_the_names_that_the_user_gives(
    kafka: Connection, name: str, tmp_path: Path
) -> None:
    create_missing(kafka, {name: {}}, 1)
    producer = kafka.producer()
    for pair in [p for p in first_pairs() if not isinstance(p, BadEntry)]:
        crawled = {"url": pair.id, "alt": pair.caption, "media": {"content": b64encode(pair.image or b"").decode()}}
        producer.produce(name, json.dumps(crawled).encode(), partition=0)
    producer.flush()
    names = ("--field", "id=url", "--field", "caption=alt", "--field", "image=media.content")

    assert sum(bootstrapped_from(kafka, name, tmp_path / "bundle", "--raw-format", "json", *names)) == 24


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


def test_gate_and_baselines_come_from_a_blip_where_one_is_chosen(made: BootstrapResult, tmp_path: Path) -> None:
    blip = random_blip(tmp_path / "blip")

    judged = small(tmp_path / "bundle", itm=f"blip:{blip}")

    manifest = read_manifest(judged.out)
    model = load_model(judged.out, "cpu")
    pairs = [p for p in first_pairs() if not isinstance(p, BadEntry)]
    pictures = [model.decode(p.image or b"") for p in pairs]
    scores = model.match(model.encode(pictures), [p.caption for p in pairs], pictures)
    assert judged.gate == manifest.data["gate"] == pytest.approx(float(np.median(scores)), abs=1e-6) != made.gate
    assert np.histogram(scores, 20, (0, 1))[0].tolist() == manifest.data["baselines"]["itm_histogram"]
    assert manifest.data["itm"]["scorer"] == judged.matching.scorer == "blip" and "BLIP" in judged.matching.line()
    assert manifest.space != read_manifest(made.out).space
    assert any(str(blip) in line for line in inspect(judged.out).lines())


def test_a_bundle_finds_its_blip_by_path_and_refuses_another(tmp_path: Path) -> None:
    made = small(tmp_path / "bundle", itm=f"blip:{random_blip(tmp_path / 'blip')}")
    moved = (tmp_path / "blip").rename(tmp_path / "moved")
    elsewhere = read_manifest(small(tmp_path / "again", itm=f"blip:{moved}").out)

    with pytest.raises(BundleError, match=r"blip has no config\.json"):
        load_model(made.out, "cpu")
    assert load_model(made.out, "cpu", blip=moved).space == made_space(made) == elsewhere.space
    assert load_model(made.out, "cpu", matching=False).clusters == 4
    random_blip(moved, seed=1)
    with pytest.raises(BundleError, match=r"its model\.safetensors has another SHA-256"):
        load_model(made.out, "cpu", blip=moved)


def test_a_worker_that_was_told_where_its_blip_lies_finds_it_for_a_bundle_with_another_decoder_too(
    tmp_path: Path,
) -> None:
    made = small(tmp_path / "bundle", itm=f"blip:{random_blip(tmp_path / 'blip')}")
    moved = (tmp_path / "blip").rename(tmp_path / "moved")
    manifest, contents = read_files(made.out)
    decoder = {name: array * 1.5 for name, array in load(contents["decoder.safetensors"]).items()}
    about = {k: v for k, v in manifest.data.items() if k not in ("format", "space", "files", "version")}
    other = write_bundle(tmp_path / "other", contents | {"decoder.safetensors": save(decoder)}, about)
    live = load_model(made.out, "cpu", blip=moved)
    options = ConsumeOptions(Connection("nowhere:1"), "raw", device="cpu", blip=moved)

    beside = _beside(
        Announcement(other.version[:16], str(tmp_path / "other"), other.space, "", 0), live, tmp_path / "cache", options
    )

    assert beside.version == other.version[:16] and beside.space == live.space


def test_new_clusters_for_a_bundle_keep_its_scorer(tmp_path: Path) -> None:
    judged = small(tmp_path / "bundle", itm=f"blip:{random_blip(tmp_path / 'blip')}")

    again = bootstrap(
        (), judged.out, tmp_path / "again", clusters=3, topic_pairs=first_pairs, progress=lambda line: None
    )

    assert again.matching.scorer == "blip" and made_space(again) == made_space(judged)


def test_a_blip_for_a_bundle_without_one_and_an_unknown_scorer_are_refused(
    made: BootstrapResult, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match="its own head"):
        load_model(made.out, "cpu", blip=tmp_path)
    with pytest.raises(TldrError, match="--itm clip: use `own`"):
        small(tmp_path / "bundle", itm="clip")


def test_the_agreement_of_both_captions_in_text_space_stands_beside_itm(made: BootstrapResult) -> None:
    baselines = read_manifest(made.out).data["baselines"]

    assert 0 <= baselines["agreement_auc"] <= 1 and -1 <= baselines["agreement_median"] <= 1
    assert any("agreement_auc" in line for line in inspect(made.out).lines())
    assert f"agreement of T_o and T_g {baselines['agreement_auc']:.3f}" in made.matching.line()


def test_without_a_text_encoder_the_agreement_is_not_measured_and_the_rest_is(tmp_path: Path) -> None:
    said: list[str] = []

    made = bootstrap(
        (), BUNDLE, tmp_path / "bundle", clusters=4, topic_pairs=first_pairs, text_encoder=str(tmp_path / "no"),
        progress=said.append,
    )  # fmt: skip

    assert made.matching.agreement_auc is None and 0 <= made.matching.auc <= 1
    assert any("not measured" in line for line in said) and "not measured" in made.matching.line()


def test_a_captioner_that_is_shown_the_image_is_judged_by_its_own_captions(tmp_path: Path) -> None:
    authors = random_authors(tmp_path / "authors")

    made = bootstrap((), authors, tmp_path / "bundle", clusters=2, topic_pairs=first_pairs, progress=lambda line: None)

    model = load_model(made.out, "cpu")
    pairs = [p for p in first_pairs() if not isinstance(p, BadEntry)]
    pictures = [model.decode(p.image or b"") for p in pairs]
    said = model.caption(model.encode(pictures), pictures)
    assert [e["generated"] for e in inspect(made.out).examples] == said[:8] and len(set(said)) > 1


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
