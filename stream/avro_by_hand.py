"""The two records of the hot path in Avro's binary encoding, written out: RawPair read and KeptPair written once a pair.

fastavro walks a schema for each record, which takes twice the time (docs/tried.md). These say the same in the order of
schemas/*.avsc and are held against fastavro in tests. Avro specification, "Binary encoding": numbers are zigzag varints,
texts and bytes have their length in front.
"""

from __future__ import annotations

from collections.abc import Mapping
from struct import Struct

_floats = Struct("<f").pack

RawValues = tuple[str, str, bytes | None, str | None, dict[str, str]]


def read_raw_pair(data: bytes, at: int) -> RawValues:
    """id, caption, image, image_uri and fields of the RawPair that begins at `at`.

    Raises ValueError or IndexError where it is not whole or not in the plainest form; fastavro then says what it is.
    """
    size, at = _length(data, at)
    pair_id = data[at : at + size].decode()
    size, at = _length(data, at + size)
    caption = data[at : at + size].decode()
    at += size
    image, image_uri = None, None
    branch = data[at]
    at += 1
    if branch == 2:  # the second of a union's branches, as zigzag
        size, at = _length(data, at)
        image = data[at : at + size]
        at += size
    elif branch:
        raise ValueError("no such branch")
    branch = data[at]
    at += 1
    if branch == 2:
        size, at = _length(data, at)
        image_uri = data[at : at + size].decode()
        at += size
    elif branch:
        raise ValueError("no such branch")
    fields = {}
    count, at = _length(data, at)
    while count:
        for _ in range(count):
            size, at = _length(data, at)
            name = data[at : at + size].decode()
            size, at = _length(data, at + size)
            fields[name] = data[at : at + size].decode()
            at += size
        count, at = _length(data, at)
    if at > len(data):
        raise ValueError("it ends early")
    return pair_id, caption, image, image_uri, fields


def write_kept_pair(
    pair_id: str, image: bytes, caption: str, generated: str, refined: str, epoch: int, cluster: int, position: int,
    vector: bytes, bundle: str, priority: bytes, rate: str, itm_original: float, itm_refined: float, topic: str,
    partition: int, offset: int, timestamp_ms: int, image_uri: str | None, fields: Mapping[str, str],
) -> bytes:  # fmt: skip
    """A KeptPair; vector and priority as their little-endian bytes."""
    parts = [
        *_text(pair_id), _long(len(image)), image, *_text(caption), *_text(generated), *_text(refined),
        _long(epoch), _long(cluster), _long(position), _long(len(vector)), vector, *_text(bundle),
        _long(len(priority)), priority, *_text(rate), _floats(itm_original), _floats(itm_refined), *_text(topic),
        _long(partition), _long(offset), _long(timestamp_ms),
    ]  # fmt: skip
    parts += (b"\0",) if image_uri is None else (b"\2", *_text(image_uri))
    if fields:
        parts.append(_long(len(fields)))
        for name, value in fields.items():
            parts += _text(name)
            parts += _text(value)
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
    number = (number << 1) ^ (number >> 63)
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


_SMALL = [_varint(number) for number in range(1024)]


def _long(number: int) -> bytes:
    return _SMALL[number] if 0 <= number < 1024 else _varint(number)


def _text(text: str) -> tuple[bytes, bytes]:
    encoded = text.encode()
    return _long(len(encoded)), encoded
