"""Dead letters: raw records that could not be processed, with the reason, the original bytes and headers.

A dead letter is written in the transaction that passes its offset, before the pair is counted; nothing becomes one later.
"""

from __future__ import annotations

from typing import Any, NamedTuple

HEADER_PREFIX = "tldr."
DETAIL_CHARACTERS_MAX = 500


class DeadLetter(NamedTuple):
    """A raw record and why it is dead. reason  a short stable slug; detail  one sentence for a person."""

    message: Any  # confluent_kafka.Message
    reason: str
    detail: str


def headers_of(letter: DeadLetter) -> list[tuple[str, bytes]]:
    """The original headers, then ours: why, and where the record came from."""
    message = letter.message
    ours = {
        "reason": letter.reason,
        "detail": letter.detail[:DETAIL_CHARACTERS_MAX],
        "topic": message.topic(),
        "partition": str(message.partition()),
        "offset": str(message.offset()),
    }
    return [
        *(message.headers() or []),
        *((HEADER_PREFIX + name, value.encode("utf-8", "replace")) for name, value in ours.items()),
    ]
