"""How a worker's log looks: one line an event, on standard error, with the time in UTC; as text, or as JSON for machines.

A line says in words what happened. What a machine may want to find again stands beside it in fields (`at`): the event's
name, and the topic, partitions and offsets that it is about, under the same names in every line that has them.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

TEXT, JSON = "text", "json"

# Partition → first and last offset, both included; nothing for a partition that an event is not about.
Spans = Mapping[int, tuple[int, int]]


def set_up_logs(verbose: bool = False, log_format: str = TEXT) -> None:
    """Logs to standard error: ours at info (debug if `verbose`), libraries at warning. log_format  TEXT or JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if log_format == JSON else _text_lines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    ours = logging.DEBUG if verbose else logging.INFO
    logging.getLogger("stream").setLevel(ours)
    # Kept quiet by stream/kafka.py otherwise.
    logging.getLogger("stream.librdkafka").propagate = verbose


def at(event: str, topic: str, spans: Spans, **more: Any) -> dict[str, Any]:
    """The fields of a line about offsets of a topic, as `extra` of a logging call."""
    return {"fields": {"event": event, "topic": topic, "offsets": offsets_of(spans), **more}}


def offsets_of(spans: Spans) -> list[dict[str, int]]:
    """Spans as JSON has them."""
    return [{"partition": p, "first": first, "last": last} for p, (first, last) in sorted(spans.items())]


def place(topic: str, spans: Spans) -> str:
    """The same in words: `raw-pairs 0:120-179 1:96-140`."""
    return " ".join([topic, *(f"{p}:{first}-{last}" for p, (first, last) in sorted(spans.items()))])


class JsonLines(logging.Formatter):
    """One JSON object a record: time, level, logger, message, the fields of `at`, and a traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def _text_lines() -> logging.Formatter:
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    return formatter
