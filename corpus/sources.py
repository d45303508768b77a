"""What the packages say about each image: path, titles, keywords, licence, and the caption that a crawler would find.

Captions stay as they are found, noise and repetition included: this corpus stands for a raw crawl.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
PUBLIC_DOMAIN = ("http://web.resource.org/cc/PublicDomain", "http://creativecommons.org/licenses/publicdomain/")
LICENCE_LINK = re.compile(r'<\w+:license\s[^>]*resource="([^"]+)"')
OPENCLIPART = "usr/share/openclipart/svg"
TUXPAINT = "usr/share/tuxpaint/stamps"


@dataclass(frozen=True)
class Item:
    """One image of a package and the words around it."""

    source: str  # "openclipart" or "tuxpaint"
    path: str  # within the package: stable from release to release, so that it can be the id
    file: Path
    caption: str
    title: str
    keywords: tuple[str, ...]
    description: str
    licence: str

    @property
    def uid(self) -> str:
        """Stable id: a hash of where the image comes from, never of where it stands in a shard."""
        return hashlib.sha256(f"{self.source}/{self.path}".encode()).hexdigest()[:20]


def openclipart(root: Path) -> Iterator[Item]:
    """Every SVG of Debian's openclipart-svg whose own metadata dedicates it to the public domain."""
    base = root / OPENCLIPART
    for file in sorted(base.rglob("*.svg")):
        if file.is_symlink():
            continue
        text = file.read_text("utf-8", errors="replace")
        licences = LICENCE_LINK.findall(text)
        if not licences or any(link not in PUBLIC_DOMAIN for link in licences):
            continue
        title, description, keywords = _metadata(text)
        path = file.relative_to(root).as_posix()
        if caption := _found_caption(path, title, description, keywords):
            yield Item("openclipart", path, file, caption, title, keywords, description, "public domain")


def tuxpaint(root: Path) -> Iterator[Item]:
    """Every stamp of tuxpaint-stamps-default that has an English caption: the first line of its .txt."""
    base = root / TUXPAINT
    for file in sorted([*base.rglob("*.png"), *base.rglob("*.svg")]):
        text = file.with_suffix(".txt")
        if file.stem.endswith("_mirror") or file.stem.endswith("_flip") or not text.exists():
            continue
        caption = _one_line(text.read_text("utf-8", errors="replace").split("\n", 1)[0])
        if caption:
            path = file.relative_to(root).as_posix()
            yield Item("tuxpaint", path, file, caption, caption, file.parts[-3:-1], "", "GPL-2")


def _metadata(svg: str) -> tuple[str, str, tuple[str, ...]]:
    """Title, description and keywords of the work (not of its author or publisher, who carry titles too)."""
    work = re.search(r"<(\w+:)?Work\b.*?</(\w+:)?Work>", svg, re.DOTALL)
    block = work.group(0) if work else ""
    own = re.sub(r"<(\w+:)?Agent\b.*?</(\w+:)?Agent>", "", block, flags=re.DOTALL)
    keywords = tuple(
        k for k in (_one_line(_text(k)) for k in re.findall(r"<rdf:li>(.*?)</rdf:li>", own, re.DOTALL)) if k
    )
    return _field(own, "title"), _field(own, "description"), keywords


def _field(block: str, name: str) -> str:
    found = re.search(rf"<dc:{name}>(.*?)</dc:{name}>", block, re.DOTALL)
    return _one_line(_text(found.group(1))) if found else ""


def _text(xml: str) -> str:
    try:
        return "".join(ET.fromstring(f"<x>{xml}</x>").itertext())
    except ET.ParseError:
        return re.sub(r"<[^>]*>", " ", xml)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _found_caption(path: str, title: str, description: str, keywords: tuple[str, ...]) -> str:
    """What a crawler finds around the image: the title, its description, or the tags, drawn by the path.

    Web pages differ in which of them becomes the alternative text; a fixed draw keeps that variety reproducible.
    """
    tags = " ".join(keywords)
    choices = [c for c in (title, f"{title} {tags}".strip(), description[:300], tags) if re.search(r"[A-Za-z]{2}", c)]
    if not choices:
        return ""
    draw = hashlib.sha256(f"caption/{path}".encode()).digest()[0]
    weights = (0, 0, 1, 1, 1, 2, 3) if len(choices) == 4 else tuple(range(len(choices)))
    return choices[weights[draw % len(weights)]]
