"""The records of the hot path in Avro's binary encoding, written out: RawPair read, KeptPair and PairCodes written.

fastavro walks a schema for each record, which takes twice the time (docs/tried.md). These say the same in the order of
schemas/*.avsc and are held against fastavro in tests. Avro specification, "Binary encoding": numbers are zigzag varints,
texts and bytes have their length in front.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from itertools import chain
from struct import Struct
from typing import Any

_two_floats = Struct("<ff").pack

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


def write_kept_pair(
    name: bytes, image: bytes | memoryview, caption: str, generated: str, refined: str, epoch: int, cluster: int,
    position: int, vector: bytes, bundle: str, priority: bytes, rate: str, itm_original: float, itm_refined: float, topic: str,
    partition: int, offset: int, timestamp_ms: int, tail: bytes,
) -> bytes:  # fmt: skip
    """A KeptPair; name is its id in UTF-8, vector and priority are little-endian bytes, tail is what `write_tail` makes."""
    caption_bytes = caption.encode()
    generated_bytes, refined_bytes = generated.encode(), refined.encode()
    parts: list[bytes | memoryview] = [
        _long(len(name)), name, _long(len(image)), image, _long(len(caption_bytes)), caption_bytes,
        _long(len(generated_bytes)), generated_bytes, _long(len(refined_bytes)), refined_bytes,
        _long(epoch), _long(cluster), _long(position), _long(len(vector)), vector, _same_text(bundle),
        _long(len(priority)), priority, _same_text(rate), _two_floats(itm_original, itm_refined), _same_text(topic),
        _long(partition), _long(offset), _long(timestamp_ms),
    ]  # fmt: skip
    parts.append(tail)
    return b"".join(parts)


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


def write_pair_codes(record: Mapping[str, Any]) -> bytes:
    """A PairCodes record, whose columns are bytes."""
    parts = [
        _long(record["partition"]), _long(record["epoch"]), _text(record["bundle"]), _long(record["tokens"]),
    ]  # fmt: skip
    if ids := record["ids"]:
        parts.append(_long(len(ids)))
        encoded = list(map(str.encode, ids))
        sizes = list(map(len, encoded))
        # A takedown's id may be as long as a key.
        length = _LENGTHS.__getitem__ if max(sizes) < len(_LENGTHS) else _long
        parts.extend(chain.from_iterable(zip(map(length, sizes), encoded, strict=True)))
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
    return _FIRST[number & 16383] + (_SMALL[rest] if rest < 16384 else _varint(rest))


def _text(text: str) -> bytes:
    encoded = text.encode()
    return _long(len(encoded)) + encoded


# A worker has one bundle, one rate and one raw topic.
_same_text = lru_cache(16)(_text)
