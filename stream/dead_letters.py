"""Dead letters: raw records that could not be processed, with the reason, the original bytes and headers.

A dead letter is written in the transaction that passes its offset, before the pair is counted; nothing becomes one later.
The reasons are one enumeration, models.errors.Reason.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from models.errors import Reason
from stream.errors import TldrError

HEADER_PREFIX = "tldr."
# What `headers_of` puts behind the original headers, in this order.
OURS = ("reason", "detail", "topic", "partition", "offset")
DETAIL_CHARACTERS_MAX = 500

Header = tuple[str, bytes]


class DeadLetter(NamedTuple):
    """A raw record and why it is dead. detail  one sentence for a person."""

    message: Any  # confluent_kafka.Message
    reason: Reason
    detail: str


def headers_of(letter: DeadLetter) -> list[Header]:
    """The original headers, then ours: why, and where the record came from."""
    message = letter.message
    values = (
        letter.reason,
        letter.detail[:DETAIL_CHARACTERS_MAX],
        message.topic(),
        str(message.partition()),
        str(message.offset()),
    )
    ours = zip(OURS, values, strict=True)
    return [
        *(message.headers() or []),
        *((HEADER_PREFIX + name, value.encode("utf-8", "replace")) for name, value in ours),
    ]


def original_headers(headers: list[Header]) -> list[Header]:
    """Inverse of `headers_of`: a raw record may have had headers with our names itself (a letter of another stream)."""
    if [name for name, _ in headers[-len(OURS) :]] != [HEADER_PREFIX + name for name in OURS]:
        return headers
    return headers[: -len(OURS)]


def parse_reasons(texts: Iterable[str]) -> list[Reason]:
    """Raises TldrError for a text that is no reason: a misspelt one would find nothing and say so as a result."""
    reasons = []
    for text in texts:
        try:
            reasons.append(Reason(text))
        except ValueError:
            raise TldrError(f"--reason {text}: there is none of that name; use {', '.join(Reason)}") from None
    return reasons
