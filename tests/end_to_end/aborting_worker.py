"""`python aborting_worker.py N [missing=URI] consume …`: the program, whose Nth transaction that begins an epoch is aborted.

URI is a null model that it cannot load.
"""

from __future__ import annotations

import sys
from typing import Any

import stream.worker as module
from models.null import NullModel
from state.changelog import SWITCH
from stream.errors import TldrError
from stream.transaction import Aborted, Outlet, Sealed


def main() -> None:
    worker: Any = module
    nth, begun, send, at = int(sys.argv.pop(1)), 0, worker.send, NullModel.at
    missing = sys.argv.pop(1).removeprefix("missing=") if sys.argv[1].startswith("missing=") else ""

    def send_or_abort(sealed: Sealed, outlet: Outlet) -> None:
        nonlocal begun
        begins = any(key[:1] == SWITCH for changes in sealed.changes.values() for key, _ in changes)
        begun += begins
        if begins and begun == nth:
            outlet.producer.begin_transaction()
            outlet.producer.abort_transaction()
            raise Aborted("planted in the middle of a switch")
        send(sealed, outlet)

    def at_or_not(uri: str) -> NullModel:
        if uri == missing:
            raise TldrError(f"{uri} is cut off")
        return at(uri)

    worker.send = send_or_abort
    NullModel.at = staticmethod(at_or_not)  # type: ignore[method-assign]
    from stream.cli import main as program

    sys.argv[0] = "tldr-stream"
    program()


if __name__ == "__main__":
    main()
