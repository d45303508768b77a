"""`python dying_worker.py MOMENT NTH consume …`: the program, but it kills itself (-9) at a moment, the NTH time it comes.

The moments are those of `stream.transaction.commit`. Nothing of the program is changed but that this process ends there.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import stream.consume
from state.partition_store import PartitionStore
from stream.worker import Worker

MOMENTS = (
    "begin_transaction",  # everything is decided, nothing is written
    "produce",  # in the middle of a transaction's records
    "send_offsets_to_transaction",  # all records are with the client, not with the broker
    "commit_transaction",  # the broker has everything, and is about to be told that it counts
    "apply",  # Kafka has committed, LMDB has not
    "committed",  # both have
)


class Deadline:
    """Ends the process when `reached` is called with the moment for the nth time."""

    def __init__(self, moment: str, nth: int) -> None:
        self.moment, self.left = moment, nth

    def reached(self, moment: str) -> None:
        self.left -= moment == self.moment
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


class MortalProducer:
    """A producer that passes every call on, after a look at the deadline."""

    def __init__(self, producer: Any, deadline: Deadline) -> None:
        self._producer, self._deadline = producer, deadline

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._producer, name)

        def passed_on(*args: Any, **kwargs: Any) -> Any:
            if name == "send_offsets_to_transaction":
                self._producer.flush()  # the records are with the broker when we die
            self._deadline.reached(name)
            return call(*args, **kwargs)

        return passed_on


def main() -> None:
    moment, nth, *arguments = sys.argv[1:]
    if moment not in MOMENTS:
        raise SystemExit(f"no such moment: {moment}")
    deadline = Deadline(moment, int(nth))
    make_producer, apply = stream.consume._producer, PartitionStore.apply

    def mortal_producer(*args: Any) -> Any:
        return MortalProducer(make_producer(*args), deadline)

    running = False

    def mortal_apply(store: PartitionStore, records: Any, changelog_position: int) -> None:
        deadline.reached("apply" if running else "restore")
        apply(store, records, changelog_position)
        deadline.reached("committed" if running else "restored")

    commit_effects = Worker._commit

    def commit(worker: Any) -> None:
        nonlocal running
        running = True  # a restore applies records too, and is no commit
        try:
            commit_effects(worker)
        finally:
            running = False

    for owner, name, mortal in (
        (stream.consume, "_producer", mortal_producer),
        (PartitionStore, "apply", mortal_apply),
        (Worker, "_commit", commit),
    ):
        setattr(owner, name, mortal)
    sys.argv = ["tldr-stream", *arguments]
    from stream.cli import main as program

    program()


if __name__ == "__main__":
    main()
