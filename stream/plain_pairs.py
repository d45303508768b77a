"""Many small RawPairs in Avro's binary encoding, read all at once: their places are found in columns.

To read a record by itself (`avro_by_hand.read_raw_pair`) is a dozen steps of Python; here each is a step for a whole batch.
Knows only the plainest form, and leaves the rest to whoever can read more.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stream.avro_by_hand import read_fields

# Larger records are read by themselves: to copy them together would cost more than it saves.
PLAIN_BYTES_MAX = 2048
# Each field is a step for the whole batch.
FIELDS_MAX = 16


class PlainPairs(NamedTuple):
    """Raw pairs with an id, a caption and an image each, a column for each thing that is known of them.

    rows   their numbers among the records that were given, ascending
    ids    as UTF-8
    tails  image_uri (there is none) and fields as they stand in the record, which is how a KeptPair ends
    """

    rows: list[int]
    ids: list[bytes]
    captions: list[str]
    images: list[bytes]
    tails: list[bytes]


NONE_PLAIN = PlainPairs([], [], [], [], [])


def read_plain_pairs(records: Sequence[bytes], header: bytes, bytes_max: int = PLAIN_BYTES_MAX) -> PlainPairs:
    """Those of the records that begin with `header`, are no larger than `bytes_max` and in the plainest form.

    Nothing is said of the others; where a text of one record is none, nothing is said of any.
    """
    sizes = np.fromiter(map(len, records), np.int64, len(records))
    rows = np.flatnonzero(sizes <= min(bytes_max, PLAIN_BYTES_MAX))
    if not len(rows):
        return NONE_PLAIN
    small = records if len(rows) == len(records) else [records[row] for row in rows.tolist()]
    # A damaged length may lead behind the last record: to zeros, and to no place where a record ends.
    data = np.frombuffer(b"".join([*small, bytes(len(header) + 2)]), np.uint8)
    ends = np.cumsum(sizes[rows])
    starts = ends - sizes[rows]
    heads = np.minimum(starts, len(data) - len(header))[:, None] + np.arange(len(header))
    plain = (data[heads] == np.frombuffer(header, np.uint8)).all(1)

    size, id_at, right = _lengths(data, starts + len(header))
    plain &= right & (size > 0)
    id_end = id_at + size
    size, caption_at, right = _lengths(data, id_end)
    plain &= right & (size > 0)
    caption_end = caption_at + size
    plain &= _bytes(data, caption_end) == 2  # the second branch of the union: there is an image
    size, image_at, right = _lengths(data, caption_end + 1)
    plain &= right & (size > 0)
    image_end = image_at + size
    plain &= _bytes(data, image_end) == 0  # and no image_uri
    count, at, right = _lengths(data, image_end + 1)
    plain &= right & (count <= FIELDS_MAX)
    for number in range(int(count[plain].max(initial=0))):
        its = np.flatnonzero(plain & (count > number))
        for _ in ("name", "value"):
            size, text_at, right = _lengths(data, at[its])
            at[its] = text_at + size
            plain[its] &= right
    # A map that has anything in it ends with a zero, and one that has not is one.
    plain &= (at + (count > 0) == ends) & (_bytes(data, ends - 1) == 0)

    found = np.flatnonzero(plain)
    if not len(found):
        return NONE_PLAIN
    if len(found) < len(small):
        small = [small[at] for at in found.tolist()]
    places = [(edge - starts)[found].tolist() for edge in (id_at, id_end, caption_at, caption_end, image_at, image_end)]
    try:
        columns: list[list[Any]] = [rows[found].tolist(), *_cut(small, *places)]
    except UnicodeDecodeError:
        return NONE_PLAIN
    begins = data[caption_at[found]]  # no caption of letters and figures is blank
    if ((begins < 33) | (begins > 126)).any():
        told = [not caption.isspace() for caption in columns[2]]
        columns = [list(compress(column, told)) for column in columns]
    return PlainPairs(*columns)


def _cut(
    records: Sequence[bytes], id_at: list[int], id_end: list[int], caption_at: list[int], caption_end: list[int],
    image_at: list[int], image_end: list[int],
) -> tuple[list[bytes], list[str], list[bytes], list[bytes]]:  # fmt: skip
    """Ids, captions, images and tails out of the records. Raises UnicodeDecodeError."""
    ids = [record[at:end] for record, at, end in zip(records, id_at, id_end, strict=True)]
    captions = [record[at:end].decode() for record, at, end in zip(records, caption_at, caption_end, strict=True)]
    images = [record[at:end] for record, at, end in zip(records, image_at, image_end, strict=True)]
    tails = [record[at:] for record, at in zip(records, image_end, strict=True)]
    # Each by itself: no letter of several bytes holds a line feed, so halves of one do not make a whole.
    b"\n".join(ids).decode()
    if not b"".join(tails).isascii():
        for tail in tails:
            if not tail.isascii():
                read_fields(tail, 1)
    return ids, captions, images, tails


def _bytes(data: NDArray[np.uint8], at: NDArray[np.int64]) -> NDArray[np.uint8]:
    return data[np.minimum(at, len(data) - 1)]


def _lengths(
    data: NDArray[np.uint8], at: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """The lengths at these places, where they end, and which of them are right: one or two bytes, in the shortest form."""
    low, high = _bytes(data, at).astype(np.int64), _bytes(data, at + 1).astype(np.int64)
    two = low > 127
    right = (low & 1 == 0) & (~two | ((high > 0) & (high < 128)))
    return np.where(two, low & 127 | high << 7, low) >> 1, at + 1 + two, right
