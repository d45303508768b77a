"""How a worker's log looks: one line an event, on standard error, with the time in UTC."""

from __future__ import annotations

import logging
import sys
import time


def set_up_logs(verbose: bool = False) -> None:
    """Logs to standard error: ours at info (debug if `verbose`), libraries at warning."""
    handler = logging.StreamHandler(sys.stderr)
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    ours = logging.DEBUG if verbose else logging.INFO
    logging.getLogger("stream").setLevel(ours)
    # Kept quiet by stream/kafka.py otherwise.
    logging.getLogger("stream.librdkafka").propagate = verbose
