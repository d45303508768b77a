"""The figures of a bundle, whatever its decoder is shown and whoever judges its pairs."""

from pathlib import Path

from corpus.evaluate import evaluate
from stream.bootstrap import bootstrap
from stream.pair_sources import BadEntry, SourcePair, open_source
from tests.models.random_models import random_authors, random_blip

SHARD = Path(__file__).parents[2] / "corpus" / "sample" / "sample-000002.tar"


def pairs() -> list[SourcePair]:
    return [p for p in open_source(str(SHARD)) if not isinstance(p, BadEntry)][:20]


def test_a_bundle_that_looks_at_images_is_measured_beside_a_blip_that_is_not_its_own(tmp_path: Path) -> None:
    blip = random_blip(tmp_path / "blip")
    made = bootstrap(
        (), random_authors(tmp_path / "authors"), tmp_path / "bundle", clusters=2, topic_pairs=pairs, itm=f"blip:{blip}",
        progress=lambda line: None,
    )  # fmt: skip

    without, beside = (evaluate(made.out, [SHARD], 0, other) for other in (None, blip))

    rows = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in beside if line.count("|") > 2}
    assert any("not measured: no checkpoint was given" in line for line in without)
    # the same network on the same pairs: once as the bundle's scorer, once beside it
    assert rows["… of a BLIP ITM checkpoint"] == rows["ITM: AUC against shuffled captions"]
    assert 0 <= float(rows["… of the agreement of T_o and T_g in text space (SIEVE)"]) <= 1
    survive = next(value for name, value in rows.items() if name.startswith("refined captions whose T_g survives"))
    assert survive.endswith("; 100.00%")
