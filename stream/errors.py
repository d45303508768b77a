"""Every error that a user of the command line can cause, as one tree.

A message is one line: what happened, to what, and what to do. The command line prints it and leaves with `exit_status`
(docs/reference.md has the table); anything that is not in this tree is a bug and keeps its traceback.
"""

from __future__ import annotations

from typing import Any


class TldrError(Exception):
    """A mistake or a state of the world that the user can put right. Exit status 2: nothing was started."""

    exit_status = 2


class Unavailable(TldrError):
    """A broker, registry or store of images does not answer. Exit status 3: try again later."""

    exit_status = 3


class NotVerified(TldrError):
    """The stream could not be verified as a whole, because what proves it has expired. Exit status 4."""

    exit_status = 4


class Differs(TldrError):
    """`verify` found a difference between the stream and the batch reference. Exit status 5."""

    exit_status = 5


class Stopped(TldrError):
    """A running worker stopped itself so that nothing is lost; the message says why. Exit status 6."""

    exit_status = 6


class RightLost(Stopped):
    """Kafka's ACLs refuse what a running worker does. reason  the broker's own error, which names no resource."""

    def __init__(self, message: str, reason: Any) -> None:
        super().__init__(message)
        self.reason = reason


class Fenced(Stopped):
    """Another worker owns this instance id or these partitions; this one touches nothing more. Exit status 7."""

    exit_status = 7


class DataLoss(Stopped):
    """Input that the stream has not processed, or its changelog's beginning, is no longer on the broker. Exit status 8."""

    exit_status = 8
