"""The records of the hot path in Avro's binary encoding, written out: RawPair read, KeptPair and PairCodes written.

fastavro walks a schema for each record, which takes twice the time (docs/tried.md). These say the same in the order of
schemas/*.avsc and are held against fastavro in tests. Avro specification, "Binary encoding": numbers are zigzag varints,
texts and bytes have their length in front.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

RawValues = tuple[str, str, bytes | memoryview | None, str | None, dict[str, str]]
# From this size on an image is not copied out of its record.
VIEWED_BYTES = 2048


def read_raw_pair(data: bytes, at: int) -> RawValues:
    """id, caption, image, image_uri and fields of the RawPair that begins at `at`.

    Raises ValueError or IndexError where it is not whole or not in the plainest form; fastavro then says what it is.
    """
    # A length of one byte, which most are, is read in place: a call for each takes half of the time.
    size = data[at]
    if size & 129:
        size, at = _length(data, at)
    else:
        size, at = size >> 1, at + 1
    end = at + size
    pair_id = data[at:end].decode()
    size = data[end]
    if size & 129:
        size, at = _length(data, end)
    else:
        size, at = size >> 1, end + 1
    end = at + size
    caption = data[at:end].decode()
    image: bytes | memoryview | None = None
    image_uri: str | None = None
    branch = data[end]
    at = end + 1
    if branch == 2:  # the second of a union's branches, as zigzag
        size = data[at]
        if size & 129 == 128 and data[at + 1] < 128:
            size, at = (size & 127 | data[at + 1] << 7) >> 1, at + 2
        else:
            size, at = _length(data, at)
        end = at + size
        image = data[at:end] if size < VIEWED_BYTES else memoryview(data)[at:end]
        at = end
    elif branch:
        raise ValueError("no such branch")
    branch = data[at]
    at += 1
    if branch == 2:
        size, at = _length(data, at)
        end = at + size
        image_uri = data[at:end].decode()
        at = end
    elif branch:
        raise ValueError("no such branch")
    return pair_id, caption, image, image_uri, read_fields(data, at)


def read_fields(data: bytes, at: int) -> dict[str, str]:
    """The map at the end of a RawPair. Raises as `read_raw_pair`."""
    fields = {}
    count = data[at]
    if count & 129:
        count, at = _length(data, at)
    else:
        count, at = count >> 1, at + 1
    while count:
        for _ in range(count):
            size = data[at]
            if size & 129:
                size, at = _length(data, at)
            else:
                size, at = size >> 1, at + 1
            end = at + size
            name = data[at:end].decode()
            size = data[end]
            if size & 129:
                size, at = _length(data, end)
            else:
                size, at = size >> 1, end + 1
            end = at + size
            fields[name] = data[at:end].decode()
            at = end
        count = data[at]
        if count & 129:
            count, at = _length(data, at)
        else:
            count, at = count >> 1, at + 1
    if at > len(data):
        raise ValueError("it ends early")
    return fields


class KeptColumns(NamedTuple):
    """Kept pairs of one partition and epoch, a column for each thing that tells them apart; n pairs.

    names  the ids as UTF-8; tails  what `write_tail` makes
    vectors, priorities  (n, tokens) uint16, (n,) uint64; itms  (n, 2) float32, of the original and the refined caption
    """

    names: Sequence[bytes]
    images: Sequence[bytes | memoryview]
    captions: Sequence[str]
    generated: Sequence[str]
    refined: Sequence[str]
    clusters: Sequence[int]
    positions: Sequence[int]
    vectors: NDArray[np.uint16]
    priorities: NDArray[np.uint64]
    itms: NDArray[np.float32]
    offsets: Sequence[int]
    timestamps_ms: Sequence[int]
    tails: Sequence[bytes]


def write_kept_pairs(
    header: bytes, pairs: KeptColumns, epoch: int, bundle: str, rate: str, topic: str, partition: int
) -> list[bytes]:
    """KeptPairs, each behind the header."""
    # From the vector to the source partition they differ in what has a fixed width, so those bytes are made all at once.
    between = (
        _long(2 * pairs.vectors.shape[1]), _text(bundle) + _long(8), _text(rate), _text(topic) + _long(partition)
    )  # fmt: skip
    kinds = [
        ("a", f"S{len(between[0])}"), ("vector", "<u2", pairs.vectors.shape[1:]), ("b", f"S{len(between[1])}"),
        ("priority", "<u8"), ("c", f"S{len(between[2])}"), ("itms", "<f4", (2,)), ("d", f"S{len(between[3])}"),
    ]  # fmt: skip
    rows = np.empty(len(pairs.names), kinds)
    rows["a"], rows["b"], rows["c"], rows["d"] = between
    rows["vector"], rows["priority"], rows["itms"] = pairs.vectors, pairs.priorities, pairs.itms
    middle, width = rows.tobytes(), rows.itemsize
    epoch_bytes, join = _long(epoch), b"".join
    captions, generated, refined = (list(map(str.encode, x)) for x in (pairs.captions, pairs.generated, pairs.refined))
    columns = zip(
        _sizes(pairs.names), pairs.names, _sizes(pairs.images), pairs.images, _sizes(captions), captions,
        _sizes(generated), generated, _sizes(refined), refined, _longs(pairs.clusters), _longs(pairs.positions),
        range(0, len(middle), width), _longs(pairs.offsets), _longs(pairs.timestamps_ms), pairs.tails,
        strict=True,
    )  # fmt: skip
    return [
        join((header, a, name, b, image, c, caption, d, text, e, whole, epoch_bytes, cluster, position, middle[at : at + width],
              offset, timestamp, tail))
        for a, name, b, image, c, caption, d, text, e, whole, cluster, position, at, offset, timestamp, tail in columns
    ]  # fmt: skip


def write_tail(image_uri: str | None, fields: Mapping[str, str]) -> bytes:
    """How a KeptPair ends."""
    parts = [b"\0" if image_uri is None else b"\2" + _text(image_uri)]
    if fields:
        parts.append(_long(len(fields)))
        for name, value in fields.items():
            parts.append(_text(name))
            parts.append(_text(value))
    parts.append(b"\0")
    return b"".join(parts)


def write_pair_codes(header: bytes, record: Mapping[str, Any]) -> bytes:
    """A PairCodes record behind the header; its ids are UTF-8, its columns bytes or what can be joined to them."""
    parts = [
        header,
        _long(record["partition"]), _long(record["epoch"]), _text(record["bundle"]), _long(record["tokens"]),
    ]  # fmt: skip
    if ids := record["ids"]:
        parts.append(_long(len(ids)))
        parts.extend(chain.from_iterable(zip(_sizes(ids), ids, strict=True)))
    parts.append(b"\0")
    for column in ("offsets", "fates", "clusters", "positions", "priorities", "itms", "vectors", "duplicate_of"):
        parts += (_long(len(record[column])), record[column])
    if removed := record["removed"]:
        parts.append(_long(len(removed)))
        for removal in removed:
            parts += (_text(removal["id"]), _long(removal["row"]))
    parts.append(b"\0")
    return b"".join(parts)


def _length(data: bytes, at: int) -> tuple[int, int]:
    """A number that is not negative, and where it ends."""
    byte = data[at]
    if byte < 128:
        if byte & 1:
            raise ValueError("a negative length")
        return byte >> 1, at + 1
    number, shift = byte & 127, 7
    while byte >= 128:
        at += 1
        byte = data[at]
        number |= (byte & 127) << shift
        shift += 7
    if number & 1 or number >> 64:
        raise ValueError("a negative length, or none")
    return number >> 1, at + 1


def _varint(number: int) -> bytes:
    """A number below 2^64 as it stands, without zigzag."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


# The bytes of most lengths and counters, and the first two of longer numbers.
_SMALL = [_varint(number) for number in range(1 << 14)]
_FIRST = [bytes((number & 127 | 128, number >> 7 | 128)) for number in range(1 << 14)]
_LENGTHS = [_varint(2 * number) for number in range(1 << 14)]


def _long(number: int) -> bytes:
    number = number << 1 if number >= 0 else (number << 1) ^ -1
    if number < 16384:
        return _SMALL[number]
    rest = number >> 14
    if rest < 16384:
        return _FIRST[number & 16383] + _SMALL[rest]
    last = rest >> 14  # of a time in ms
    return _FIRST[number & 16383] + _FIRST[rest & 16383] + (_SMALL[last] if last < 16384 else _varint(last))


def _longs(numbers: Iterable[int]) -> list[bytes]:
    small = _LENGTHS
    return [small[number] if 0 <= number < 16384 else _long(number) for number in numbers]


def _sizes(column: Iterable[bytes | memoryview]) -> list[bytes]:
    return _longs(map(len, column))


def _text(text: str) -> bytes:
    encoded = text.encode()
    return _long(len(encoded)) + encoded
