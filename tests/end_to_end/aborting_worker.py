"""`python aborting_worker.py N consume …`: the program, whose Nth transaction that switches the bundle is aborted."""

from __future__ import annotations

import sys
from typing import Any

import stream.worker as module
from stream.transaction import Aborted, Outlet, Sealed


def main() -> None:
    worker: Any = module
    nth, switched, send = int(sys.argv[1]), 0, worker.send

    def send_or_abort(sealed: Sealed, outlet: Outlet) -> None:
        nonlocal switched
        switched += bool(sealed.effects.switched)
        if sealed.effects.switched and switched == nth:
            outlet.producer.begin_transaction()
            outlet.producer.abort_transaction()
            raise Aborted("planted in the middle of a switch")
        send(sealed, outlet)

    worker.send = send_or_abort
    sys.argv = ["tldr-stream", *sys.argv[2:]]
    from stream.cli import main as program

    program()


if __name__ == "__main__":
    main()
