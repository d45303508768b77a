"""The corpora: families keep near copies together, shards come out the same, the sample is honest."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from corpus.families import families, family_key
from corpus.render import render, thumbnail
from corpus.shards import Pair, read_json_members, write_shards
from corpus.sources import openclipart

SAMPLE = sorted((Path(__file__).parents[2] / "corpus" / "sample").glob("*.tar"))
RIGHTS = '<rdf:RDF><Work><dc:title>{title}</dc:title><cc:license rdf:resource="{licence}"/></Work></rdf:RDF>'
PUBLIC_DOMAIN = "http://web.resource.org/cc/PublicDomain"


def svg(title: str = "Red box", licence: str = PUBLIC_DOMAIN, size: str = "") -> str:
    rights = RIGHTS.format(title=title, licence=licence)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><!-- {rights} --><rect width="50" height="40" fill="red"/></svg>'


def test_titles_that_differ_in_numbers_are_one_family() -> None:
    assert family_key("Red Fish 01", "x/a.svg") == family_key("red fish 2", "x/b.svg") == "red fish"
    assert family_key("03", "x/blue_fish_2.svg") == "blue fish"


def test_nearly_identical_pictures_are_one_family_whatever_their_titles() -> None:
    pictures = np.random.default_rng(0).integers(0, 255, size=(4, 768)).astype(np.float32)
    pictures[2] = pictures[0] + 1

    assert families(["cat", "dog", "feline", "dog"], pictures) == ["cat", "dog", "cat", "dog"]


def test_two_sparse_drawings_are_not_one_family_for_being_mostly_white() -> None:
    one, other = np.full((2, 16, 16, 3), 255, np.float32)
    one[3, 2:12], other[12, 2:12] = 0, 0

    assert families(["line", "rule"], np.stack([one.ravel(), other.ravel()])) == ["line", "rule"]


@pytest.mark.parametrize(
    "size", ['width="50pt" height="40pt"', 'width="5cm" height="4cm"', 'width="50" height="40"', ""]
)
def test_a_drawing_of_any_unit_is_drawn_on_white(tmp_path: Path, size: str) -> None:
    (tmp_path / "a.svg").write_text(svg(size=size))

    drawn = render(tmp_path / "a.svg")

    assert drawn is not None
    picture = Image.open(io.BytesIO(drawn[0])).convert("RGB")
    assert max(picture.size) <= 256 and thumbnail(drawn[0]).shape == (768,)
    assert (255, 0, 0) in [c for _, c in picture.getcolors(100_000) or []] or drawn[1] == "jpg"


def test_only_files_that_say_public_domain_are_taken(tmp_path: Path) -> None:
    folder = tmp_path / "usr/share/openclipart/svg"
    folder.mkdir(parents=True)
    (folder / "free.svg").write_text(svg("Free fish"))
    (folder / "gpl.svg").write_text(svg("Other fish", "http://creativecommons.org/licenses/GPL/2.0/"))
    (folder / "silent.svg").write_text("<svg/>")
    (folder / "link.svg").symlink_to(folder / "free.svg")

    assert [item.title for item in openclipart(tmp_path)] == ["Free fish"]


def test_the_same_pairs_make_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    made = [Pair(f"id{i}", bytes([i]) * 10, "png", f"caption {i}", {"b": 1, "a": i}) for i in range(5)]

    one = write_shards(made, tmp_path / "one", "x", 2)
    other = write_shards(reversed(made), tmp_path / "other", "x", 2)

    assert len(one) == 3 and [f.read_bytes() for f in one] == [f.read_bytes() for f in other]


def test_the_sample_fits_the_repository_and_is_in_the_public_domain() -> None:
    about = [member for shard in SAMPLE for member in read_json_members(shard)]

    assert sum(shard.stat().st_size for shard in SAMPLE) <= 12_000_000
    assert 1_000 <= len(about) == len({a["uid"] for a in about})
    assert {a["licence"] for a in about} == {"public domain"}
    assert max(np.unique([a["family"] for a in about], return_counts=True)[1]) <= 40


def test_every_pair_of_the_sample_has_an_image_that_decodes_and_a_caption() -> None:
    from models.images import decode

    with tarfile.open(SAMPLE[0]) as tar:
        contents = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]

    for name in [n for n in contents if n.endswith(".json")][:100]:
        key = name.removesuffix(".json")
        image = contents.get(f"{key}.jpg") or contents[f"{key}.png"]
        assert decode(image, 64).shape == (64, 64, 3)
        assert contents[f"{key}.txt"].decode() == json.loads(contents[name])["caption"] != ""
