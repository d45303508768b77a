"""The topics of a stream: their names, and the settings with which missing ones are created.

Every output topic has the raw topic's partition count, and a pair's records sit in the partition of its raw record.
"""

from __future__ import annotations

from dataclasses import dataclass

BUNDLES = "model-bundles"

DAY_MS = 24 * 3600 * 1000
# Room for the refined captions, the index vector and the framing on top of the largest raw record.
KEPT_OVERHEAD_BYTES = 64 * 1024
# About so many bytes of rows go into one record of pair-codes: well under Kafka's default limit of 1 MB.
CODES_RECORD_BYTES = 512 * 1024


@dataclass(frozen=True)
class StreamTopics:
    """The output topics of the stream `name` (design: a stream's name owns its topics)."""

    name: str

    @property
    def kept(self) -> str:
        return f"{self.name}.kept-pairs"

    @property
    def changelog(self) -> str:
        return f"{self.name}.reservoir-changelog"

    @property
    def codes(self) -> str:
        return f"{self.name}.pair-codes"

    @property
    def dead(self) -> str:
        return f"{self.name}.dlq"

    def settings(self, record_bytes_max: int) -> dict[str, dict[str, str]]:
        """Topic settings by topic, for the largest kept record of `record_bytes_max` bytes."""
        room = str(record_bytes_max)
        return {
            # A snapshot can be cut at any offset of the last day before compaction eats what it needs.
            self.kept: {
                "cleanup.policy": "compact",
                "max.message.bytes": room,
                "min.compaction.lag.ms": str(DAY_MS),
                "delete.retention.ms": str(7 * DAY_MS),
            },
            # delete.retention.ms bounds how old a local store may be that is brought up to date by a replay.
            self.changelog: {
                "cleanup.policy": "compact",
                "max.message.bytes": room,
                "delete.retention.ms": str(7 * DAY_MS),
            },
            # `verify` needs every row; shorten the retention and it verifies the rest and says so.
            self.codes: {"cleanup.policy": "delete", "retention.ms": "-1"},
            self.dead: {"cleanup.policy": "delete", "retention.ms": str(30 * DAY_MS), "max.message.bytes": room},
        }
