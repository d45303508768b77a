"""The same decisions on Quix Streams, for `engine.py`: known? → count in the cell → quota → kept. Its own Python runs this.

    python benchmarks/quix_worker.py {documented,by_hand} BOOTSTRAP TOPIC GROUP KEPT STATE_DIR SEED

`documented` is written as the documentation teaches: `group_by` the cell, then a stateful `apply`. `by_hand` opens the state of
the input partition itself, which saves the second trip through Kafka. The cluster of a pair stands in its record, so that no
model costs anything here; exactly once, RocksDB state with its changelog, a commit every second, a kept pair as it came.
"""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import fastavro
from quixstreams import Application, State, message_context  # type: ignore[import-not-found]

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from state.quota import Ratio, kept_positions

RATIO = Ratio(1, 4)
HEADER_BYTES = 10  # Avro's single-object encoding
SCHEMA = fastavro.schema.parse_schema(
    json.loads((Path(__file__).resolve().parent.parent / "stream/schemas/RawPair.avsc").read_text())
)


def read(value: bytes) -> dict[str, Any]:
    body = io.BytesIO(value)
    body.seek(HEADER_BYTES)
    pair: dict[str, Any] = fastavro.schemaless_reader(body, SCHEMA, None)  # type: ignore[assignment]
    return pair


def is_kept(pair_id: str, partition: int, cluster: int, known: State, cells: State, seed: int) -> bool:
    """Counts the pair in its cell unless its id is known; whether the quota takes it."""
    if known.exists(pair_id):
        return False
    known.set(pair_id, 1)
    cell = f"cell-{cluster}"
    counted, mask = cells.get(cell, (0, 0))
    block, place = divmod(counted, RATIO.q)
    if place == 0:
        mask = kept_positions(seed, 0, partition, cluster, block, RATIO)
    cells.set(cell, (counted + 1, mask))
    return bool(mask >> place & 1)


def main() -> None:
    way, bootstrap, topic, group, kept_topic, state_dir, seed_text = sys.argv[1:]
    seed = int(seed_text)
    app = Application(
        broker_address=bootstrap, consumer_group=group, processing_guarantee="exactly-once", commit_interval=1.0,
        auto_offset_reset="earliest", state_dir=state_dir, loglevel="WARNING",
    )  # fmt: skip
    raw = app.topic(topic, key_deserializer="str", value_deserializer="bytes")
    kept = app.topic(kept_topic, key_serializer="str", value_serializer="bytes")
    sdf = app.dataframe(raw)
    begun = False

    def cell_of(value: bytes) -> str:
        nonlocal begun
        if not begun:
            begun = True
            print("first", time.time(), time.process_time(), flush=True)
        return f"{message_context().partition} {read(value)['fields']['cluster']}"

    def decide(value: bytes, key: str, timestamp: int, headers: Any, state: State) -> bytes | None:
        partition, cluster = map(int, key.split())
        return value if is_kept(read(value)["id"], partition, cluster, state, state, seed) else None

    def decide_by_hand(value: bytes) -> bytes | None:
        nonlocal begun
        if not begun:
            begun = True
            print("first", time.time(), time.process_time(), flush=True)
        pair, partition = read(value), message_context().partition
        store = sdf.processing_context.checkpoint.get_store_transaction(stream_id=sdf.stream_id, partition=partition)
        known, cells = store.as_state(prefix=b"known"), store.as_state(prefix=b"cell")
        return value if is_kept(pair["id"], partition, int(pair["fields"]["cluster"]), known, cells, seed) else None

    if way == "documented":
        out = sdf.group_by(
            cell_of, name="cell", value_deserializer="bytes", key_deserializer="str", value_serializer="bytes",
            key_serializer="str",
        ).apply(decide, stateful=True, metadata=True)  # fmt: skip
    else:
        sdf.register_store()
        out = sdf.apply(decide_by_hand)
    out = out.filter(lambda value: value is not None)
    out.to_topic(kept, key=lambda value: read(value)["id"])
    app.run()


if __name__ == "__main__":
    main()
