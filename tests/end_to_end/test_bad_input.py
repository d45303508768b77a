"""Every kind of bad or odd input has a fate, and the same one each time. One worker with the sample bundle reads them all."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from state.partition import Fate
from stream.broker import LocalBroker
from stream.kafka import Connection, create_missing
from stream.topics import StreamTopics
from tests.end_to_end.outcome import NO_ANOMALY, Outcome, Raw, create_topic, outcome_of, send
from tests.end_to_end.worker_process import worker

SAMPLE_BUNDLE = Path(__file__).resolve().parents[2] / "bundles" / "sample"
KEPT_BYTES_MAX = 400_000
HEADERS = (("source", b"a crawl"), ("binary", b"\x00\xff"))


def picture(seed: int = 0, side: int = 96) -> Image.Image:
    """Soft blobs of colour, another picture for every seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def saved(image: Image.Image, form: str, **how: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **how)
    return out.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims to be large, with next to nothing in it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def animated(form: str, **how: Any) -> bytes:
    return saved(picture(1).quantize(64), form, save_all=True, append_images=[picture(2).quantize(64)], **how)


def sixteen_bit() -> Image.Image:
    grey = np.asarray(picture(3).convert("L")).astype(np.uint16)
    return Image.fromarray(grey << 8)


def half_transparent() -> Image.Image:
    image = picture(4).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def on_white(image: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


FIRST_FRAME = saved(picture(1).quantize(64).convert("RGB"), "PNG")
# Each of these is decoded to the same pixels as a plain picture that is sent beside it.
CONVERTED: dict[str, tuple[bytes, bytes]] = {
    "gif": (animated("GIF"), FIRST_FRAME),
    "animated-webp": (animated("WEBP", lossless=True), FIRST_FRAME),
    "palette": (saved(picture(5).quantize(32), "PNG"), saved(picture(5).quantize(32).convert("RGB"), "PNG")),
    "16-bit": (saved(sixteen_bit(), "PNG"), saved(picture(3).convert("L"), "PNG")),
    "alpha": (saved(half_transparent(), "PNG"), saved(on_white(half_transparent()), "PNG")),
    "cmyk": (
        saved(picture(6).convert("CMYK"), "JPEG", quality=95),
        saved(Image.open(io.BytesIO(saved(picture(6).convert("CMYK"), "JPEG", quality=95))).convert("RGB"), "PNG"),
    ),
}
JPEG = saved(picture(7, 256), "JPEG", quality=90)
NOISE = saved(Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)), "PNG")
# id → (record, reason)
DEAD: dict[str, tuple[Raw, str]] = {
    raw.id: (raw, reason)
    for raw, reason in (
        (Raw("truncated-jpeg", image=JPEG[: len(JPEG) * 2 // 3], headers=HEADERS), "truncated"),
        (Raw("huge-png", image=png_header(50_000, 50_000), headers=HEADERS), "too-large"),
        (Raw("narrow", image=saved(picture(8).resize((15, 200)), "PNG"), headers=HEADERS), "too-small"),
        (Raw("no-picture", image=b"<html>404</html>", headers=HEADERS), "not-an-image"),
        (Raw("no-caption", caption="", image=JPEG, headers=HEADERS), "empty-caption"),
        (Raw("blank-caption", caption=" \n\t\u3000", image=JPEG, headers=HEADERS), "empty-caption"),
        (Raw("does-not-fit", image=NOISE, headers=HEADERS), "too-large"),
        (Raw("neither", headers=HEADERS), "no-image"),
        (Raw("by-uri", image_uri="https://example.org/cat.jpg", headers=HEADERS), "uri-not-allowed"),
        (Raw("no-avro", value=b'{"id": 1}', headers=HEADERS), "not-avro"),
        (Raw("empty-value", value=b"", headers=HEADERS), "not-avro"),
        (Raw("unknown-schema", value=b"\xc3\x01" + bytes(8) + b"x", headers=HEADERS), "unknown-schema"),
        (Raw("id-too-long", value=b"=", headers=HEADERS, image=JPEG, fields={}), "id-too-long"),
        (Raw("", image=JPEG, key=None, headers=HEADERS), "no-id"),
        (Raw("nothing-at-all", key=None, value=None, headers=HEADERS), "no-id"),
    )
}
LONG_ID = "x" * 10_000
CORRUPT_EVERY = 20  # 5 %
BATCH = 60


@pytest.fixture(scope="module")
def outcome(broker: LocalBroker, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    kafka, folder = Connection(broker.bootstrap_servers), tmp_path_factory.mktemp("bad")
    topic = f"bad-{folder.parent.name}"
    create_topic(kafka, topic, partitions=1)
    # An operator made the kept topic, and made it small.
    create_missing(kafka, {StreamTopics(topic).kept: {"max.message.bytes": str(KEPT_BYTES_MAX)}}, 1)
    records = [Raw(name, f"a picture, {name}", image) for name, (image, _) in CONVERTED.items()]
    records += [Raw(f"{name}-plain", f"a picture, {name}", image) for name, (_, image) in CONVERTED.items()]
    records += [Raw(LONG_ID, raw.caption, raw.image, key=b"id-too-long", headers=HEADERS) if name == "id-too-long" else raw
                for name, (raw, _) in DEAD.items()]  # fmt: skip
    records += [
        Raw(f"corrupt-{i}", value=b"\xc3\x01 rubbish") if i % CORRUPT_EVERY == 7 else Raw(f"sound-{i}", f"n {i}", JPEG)
        for i in range(BATCH)
    ]
    send(kafka, topic, records, partitions=1)
    arguments = [
        "consume", "--topic", topic, "--bundle", str(SAMPLE_BUNDLE), "--bootstrap-servers", kafka.bootstrap_servers,
        "--ratio", "100%", "--state-dir", str(folder / "state"), "--metrics-port", "0", "--stop-at-end",
        "--batch-pairs", "1000",
    ]  # fmt: skip
    with worker(arguments, folder / "log") as running:
        running.finish()
    return outcome_of(kafka, topic)


def test_nothing_is_lost_and_the_rest_is_the_batch_reference_s(outcome: Outcome) -> None:
    assert outcome.anomalies() == NO_ANOMALY
    totals = outcome.view.totals
    assert totals.dead == len(DEAD) + BATCH // CORRUPT_EVERY
    assert totals.read == totals.dead + totals.kept


@pytest.mark.parametrize("name", CONVERTED)
def test_an_odd_image_is_seen_as_its_plain_first_frame_and_kept_untouched(outcome: Outcome, name: str) -> None:
    odd, plain = outcome.reduced_set[name], outcome.reduced_set[f"{name}-plain"]

    assert odd["image"] == CONVERTED[name][0]
    assert odd["index_vector"] == plain["index_vector"]
    assert odd["cluster"] == plain["cluster"]
    assert odd["generated_caption"] == plain["generated_caption"]


@pytest.mark.parametrize("name", [name or "no-id" for name in DEAD])
def test_what_cannot_be_kept_is_a_dead_letter_with_reason_bytes_and_headers(outcome: Outcome, name: str) -> None:
    raw, reason = DEAD["" if name == "no-id" else name]
    place = len(CONVERTED) * 2 + list(DEAD).index(raw.id)

    (seen, letter), *more = [(s, m) for s, m in outcome.dead if s.offset == place]

    assert not more
    assert seen.reason == reason
    assert seen.detail
    headers = dict(letter.headers())
    assert [pair for pair in letter.headers() if not pair[0].startswith("tldr.")] == list(HEADERS)
    assert headers["tldr.offset"] == str(place).encode()
    assert headers["tldr.topic"] == letter.topic().removesuffix(".dlq").encode()
    if raw.value != b"=":
        assert letter.value() == raw.value
    elif raw.image is not None:
        assert raw.image in letter.value()
    assert letter.key() == (raw.id.encode() if raw.key == b"=" else raw.key)


@pytest.mark.parametrize("say", [lambda r: r["image"], lambda r: r["refined_caption"]], ids=["image", "caption"])
def test_with_5_percent_corrupt_records_in_a_batch_the_others_go_through(
    outcome: Outcome, say: Callable[[dict[str, Any]], Any]
) -> None:
    sound = [f"sound-{i}" for i in range(BATCH) if i % CORRUPT_EVERY != 7]

    assert len(sound) == BATCH * 0.95
    assert all(say(outcome.reduced_set[name]) for name in sound)
    assert {outcome.fate(f"corrupt-{i}")[0] for i in range(7, BATCH, CORRUPT_EVERY)} == {"dead: unknown-schema"}


def test_a_dead_letter_does_not_make_its_id_known(outcome: Outcome) -> None:
    assert not [row for row in outcome.rows if row.id in DEAD]
    assert {row.fate for row in outcome.rows} == {Fate.KEPT}
