"""`plan`: what a stream of so many pairs a second needs, as arithmetic on figures that were measured or are said to be assumed.

Pure: it asks no broker and no GPU. Every constant names where it comes from; docs/operate.md has the same formulas in words.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from state.quota import Ratio
from stream.errors import TldrError

DAY_S = 86_400
LINE_WIDTH = 100

# -- measured (benchmarks/RESULTS.md, README, docs/reference.md; two x86-64 cores, 2026-11-25) ---------------------------

# Processor time of a record but for decoding and the model: 22.4 µs at 400 B, 81.0 µs at 30 KB (make bench).
ENGINE_CPU_S = 21.6e-6
ENGINE_CPU_S_PER_BYTE = 1.98e-9
# … and what one process made of it: 22,818 and 7,223 records/s are 0.51 and 0.59 of a core's time.
ENGINE_SHARE = 0.5
# 512 x 384 JPEGs of 77 kB to 224 pixels, on one core (python benchmarks/decode_speed.py).
DECODE_PER_CORE = 700.0
# A store of 10,000,000 pairs, a quarter kept with 196 codes: 1,647 MB, of which known ids take 23 bytes each (make bench).
ENTRY_BYTES = 175
CODE_BYTES = 2
KNOWN_ID_BYTES = 23
# Of them the filters, which a new id touches and which therefore want to stay in memory (benchmarks/known_ids.py).
KNOWN_ID_FILTER_BYTES = 2
# … and so many of them in one partition were tried; the longest merge then took 1.4 s, and grows with their number. Ten times
# as many would take 14 s, below the 20 s that a rebalance waits for a worker.
KNOWN_IDS_TRIED, KNOWN_IDS_A_PARTITION = 10_000_000, 100_000_000
# Entries and known ids that a rebuild replays a second (make restart).
RESTORE_PER_S = 348_000.0
# A worker of the null model while it works off a backlog (make memory).
WORKER_BYTES = 268e6
# A live number of a cell, and the most of them a partition keeps (state/partition.py).
LIVE_BYTES, NUMBERS_OF_A_CELL, LIVE_NUMBERS_MAX = 60, 8, 2_000_000
# The paper's model on its device, bfloat16, batch 256, reserved (benchmarks/GPU.md).
DEVICE_BYTES = 3.3 * 2**30
# Its steps alone on an H200 (benchmarks/GPU.md): what an image takes, of which pixels to index vectors 0.151 and matching 0.013
# ms; and a caption of 30 pieces.
IMAGE_S, CAPTION_S = 0.164e-3, 0.445e-3
# K-Means' bound leaves so many rows a cluster to 3,000 of them (docs/reference.md).
BOOTSTRAP_ROWS_A_CLUSTER = 119
# Pairs of 10 kB that one process writes into WebDataset shards a second: 90,000 in 61 s, its start, the broker and other work
# beside it (python benchmarks/snapshot_memory.py).
SNAPSHOT_PER_S = 1_500.0
# The sample bundle on two cores, decoding, encoding, captions and commit (make bench).
SAMPLE_IMAGES_PER_S = 45.0

# -- counted from the records' fields ------------------------------------------------------------------------------------

ID_BYTES = 60
KEPT_TEXT_BYTES = 400  # generated and refined caption, headers
CODES_ROW_BYTES = ID_BYTES + 35  # and 2 for each code
CHANGELOG_ENTRY_BYTES = ID_BYTES + 60  # and 2 for each code
CHANGELOG_ID_BYTES = 12
CELL_BYTES = 60

# -- assumed ---------------------------------------------------------------------------------------------------------------

# Of what its steps alone would allow, a worker reached so much with the sample bundle on an H200 (2,710 of 5,300 images/s): 16
# threads decode beside it. That it is the same at the paper's sizes is assumed.
IN_A_WORKER = 0.5
# Python, PyTorch and the CUDA runtime in host memory.
TORCH_BYTES = 3e9
# Free pages of LMDB and the copy that a merge of known ids makes.
STORE_SLACK = 1.5
# A compacted topic before the cleaner comes (min.cleanable.dirty.ratio 0.5).
COMPACTION_SLACK = 2.0
# Fewer leave no room to grow, more than this were never tried.
PARTITIONS_MIN, PARTITIONS_MAX = 8, 256
# One worker could do it, but then a lost node stops everything.
WORKERS_MIN = 2


class Gpu(NamedTuple):
    """A data sheet's dense bf16 TFLOP/s and TB/s of memory."""

    tflops: float
    terabytes_per_s: float
    memory_gb: int


GPUS = {
    "h200": Gpu(989, 4.8, 141),
    "h100": Gpu(989, 3.35, 80),
    "a100": Gpu(312, 2.04, 80),
    "l40s": Gpu(362, 0.864, 48),
    "l4": Gpu(121, 0.3, 24),
}
CPU = "cpu"


@dataclass(frozen=True)
class Load:
    """What comes in and what shall come of it; `tldr-stream plan --help` says what each one means."""

    pairs_per_second: float
    gpu: str = "h100"
    images_per_second: float | None = None
    ratio: str = "25%"
    record_bytes: int = 30_000
    clusters: int = 3000
    tokens: int = 196
    days: float = 90.0
    duplicates: float = 0.0
    cell_cap: int | None = None
    dedupe_window: int | None = None
    raw_retention_days: float = 7.0
    replication: int = 3
    headroom: float = 1.5
    growth: float = 4.0
    decode_per_core: float = DECODE_PER_CORE


@dataclass(frozen=True)
class Sizing:
    """What `plan` found. Bytes are decimal; topics are sizes on all brokers together, replicas included."""

    load: Load
    images_per_second: float
    rate_source: str
    bound_by: str
    workers: int
    workers_needed: int
    partitions: int
    cores_per_worker: int
    memory_bytes_per_worker: float
    device_bytes: float
    pairs: float
    in_set: float
    known_ids: float
    store_bytes_per_worker: float
    store_bytes_per_million: float
    restore_s: float
    counted_per_cell_a_day: float
    bootstrap_pairs: int
    raw_bytes: float
    kept_bytes: float
    changelog_bytes: float
    codes_bytes: float
    read_bytes_per_s: float
    written_bytes_per_s: float
    snapshot_hours_one_process: float
    gpu_hours_a_day: float
    beyond: list[str]
    assumptions: list[str]

    def lines(self) -> Iterator[str]:
        """The sizing for a person."""
        load = self.load
        yield (
            f"{load.pairs_per_second:,.0f} pairs/s ({load.pairs_per_second * DAY_S / 1e6:,.1f} million a day) of "
            f"{load.record_bytes / 1000:,.0f} kB, M = {load.ratio}, N = {load.clusters:,}"
        )
        spare = (
            "" if self.workers == self.workers_needed else f"; {self.workers_needed} keeps up, one more for a lost node"
        )
        million = f"{self.store_bytes_per_million / 1e6:,.1f} MB"
        rows = [
            ("one worker", f"{self.images_per_second:,.0f} pairs/s on {load.gpu}, bound by the {self.bound_by}; "
                f"{self.rate_source}"),
            ("workers", f"{self.workers}, for {load.headroom:g} x the rate so that they catch up{spare}"),
            ("each", f"{self.cores_per_worker} cores, {gb(self.memory_bytes_per_worker)} of memory, "
                f"{gb(self.store_bytes_per_worker)} of disk after {load.days:g} days"),
            ("partitions", f"{self.partitions}, for ever"),
            ("cells", f"{load.clusters * self.partitions:,}, {self.counted_per_cell_a_day:,.1f} counted pairs a day each; "
                      f"bootstrap from {self.bootstrap_pairs:,} pairs"),
            ("the set", f"{self.in_set / 1e6:,.0f} of {self.pairs / 1e6:,.0f} million pairs after {load.days:g} days"),
            ("stores", f"{million} a million pairs; a lost one is rebuilt in {minutes(self.restore_s)}"),
            ("Kafka disk", f"raw {gb(self.raw_bytes)} ({load.raw_retention_days:g} days), kept {gb(self.kept_bytes)}, "
                f"changelog {gb(self.changelog_bytes)}, codes {gb(self.codes_bytes)}; {load.replication} replicas"),
            ("traffic", f"{self.read_bytes_per_s / 1e6:,.0f} MB/s to the workers, {self.written_bytes_per_s / 1e6:,.0f} MB/s "
                "from them"),
            ("snapshot", f"{self.snapshot_hours_one_process:,.1f} h in one process, divided by its parts"),
            ("cost", f"{self.gpu_hours_a_day:,.0f} {'worker' if load.gpu == CPU else 'GPU'} hours a day"),
            *(("beyond", line) for line in self.beyond),
            *(("assumed", line) for line in self.assumptions),
        ]  # fmt: skip
        for label, text in rows:
            yield from textwrap.wrap(f"  {label:11} {text}", LINE_WIDTH, subsequent_indent=" " * 14)


def gb(count: float) -> str:
    return f"{count / 1e12:,.1f} TB" if count >= 1e12 else f"{count / 1e9:,.1f} GB"


def minutes(seconds: float) -> str:
    return f"{seconds / 60:,.0f} min" if seconds >= 120 else f"{seconds:,.0f} s"


def plan(load: Load) -> Sizing:
    """The sizing of a stream. Raises TldrError (and StateError for the ratio) for what cannot be."""
    refuse_impossible(load)
    ratio = Ratio.parse(load.ratio).share
    share = float(ratio)
    model_rate, source, assumptions = _model_rate(load, share)
    engine_cpu_s = ENGINE_CPU_S + ENGINE_CPU_S_PER_BYTE * load.record_bytes
    engine_rate = ENGINE_SHARE / engine_cpu_s
    rate, bound_by = min((model_rate, "model"), (engine_rate, "engine (one process; records of this size)"))

    wanted = load.pairs_per_second * load.headroom
    needed = max(1, math.ceil(wanted / rate))
    workers = max(WORKERS_MIN, needed)
    pairs = load.pairs_per_second * DAY_S * load.days
    counted = pairs * (1 - load.duplicates)
    ids = counted if load.dedupe_window is None else 0.0  # a window is one of each partition, whatever their number
    partitions = _power_of_two(
        max(PARTITIONS_MIN, workers, needed * load.growth, min(PARTITIONS_MAX, ids / KNOWN_IDS_A_PARTITION))
    )
    # On a CPU decoding and model share the two cores that were measured.
    busy = min(rate, wanted / needed)
    cores = 2 if load.gpu == CPU else math.ceil(busy * (1 / load.decode_per_core + engine_cpu_s)) + 1

    cells = load.clusters * partitions
    in_set = counted * share
    if load.cell_cap is not None:
        in_set = min(in_set, float(load.cell_cap * cells))
    known = counted
    if load.dedupe_window is not None:
        known = min(counted, float(load.dedupe_window * partitions) + in_set)
    beyond = []
    if known / partitions > KNOWN_IDS_TRIED:
        advice = "" if known / partitions <= KNOWN_IDS_A_PARTITION else "; bound them with --dedupe-window"
        beyond.append(
            f"{known / partitions / 1e6:,.0f} million known ids a partition, and {KNOWN_IDS_TRIED // 10**6} million were "
            f"tried{advice}"
        )
    codes = CODE_BYTES * load.tokens
    store = (in_set * (ENTRY_BYTES + codes) + known * KNOWN_ID_BYTES) * STORE_SLACK
    a_partition = NUMBERS_OF_A_CELL * load.clusters + (0 if load.cell_cap is None else in_set / partitions)
    live = min(LIVE_NUMBERS_MAX, a_partition) * LIVE_BYTES * partitions / workers
    memory = WORKER_BYTES + TORCH_BYTES + live + known * KNOWN_ID_FILTER_BYTES / workers

    kept_record = load.record_bytes + codes + KEPT_TEXT_BYTES
    changelog = in_set * (CHANGELOG_ENTRY_BYTES + codes) + known * CHANGELOG_ID_BYTES + cells * CELL_BYTES
    per_pair_written = (
        share * (kept_record + CHANGELOG_ENTRY_BYTES + codes) + CODES_ROW_BYTES + codes + CHANGELOG_ID_BYTES
    )
    return Sizing(
        load=load,
        images_per_second=rate,
        rate_source=source,
        bound_by=bound_by,
        workers=workers,
        workers_needed=needed,
        partitions=partitions,
        cores_per_worker=cores,
        memory_bytes_per_worker=memory,
        device_bytes=0.0 if load.gpu == CPU else DEVICE_BYTES,
        pairs=pairs,
        in_set=in_set,
        known_ids=known,
        store_bytes_per_worker=store / workers,
        store_bytes_per_million=1e6 * store / pairs,
        restore_s=(in_set + known) / workers / RESTORE_PER_S,
        counted_per_cell_a_day=counted / load.days / cells,
        bootstrap_pairs=BOOTSTRAP_ROWS_A_CLUSTER * load.clusters,
        raw_bytes=load.pairs_per_second * DAY_S * load.raw_retention_days * load.record_bytes * load.replication,
        kept_bytes=in_set * kept_record * load.replication * (COMPACTION_SLACK if load.cell_cap is not None else 1),
        changelog_bytes=changelog * load.replication * COMPACTION_SLACK,
        codes_bytes=pairs * (CODES_ROW_BYTES + codes) * load.replication,
        read_bytes_per_s=load.pairs_per_second * load.record_bytes,
        written_bytes_per_s=load.pairs_per_second * per_pair_written,
        snapshot_hours_one_process=in_set / SNAPSHOT_PER_S / 3600,
        gpu_hours_a_day=24.0 * workers,
        beyond=beyond,
        assumptions=[
            *assumptions,
            f"ids of {ID_BYTES} bytes and {KEPT_TEXT_BYTES} bytes of captions; topics uncompressed; pair-codes for ever",
            f"{TORCH_BYTES / 1e9:g} GB for PyTorch; {STORE_SLACK:g} x for free pages of stores, {COMPACTION_SLACK:g} x "
            "before compaction",
        ],
    )


def refuse_impossible(load: Load) -> None:
    """Raises TldrError for a load that cannot be."""
    if load.gpu != CPU and load.gpu not in GPUS and load.images_per_second is None:
        raise TldrError(
            f"nothing is known of the GPU {load.gpu}: use {', '.join([*GPUS, CPU])}, or give --images-per-second as well"
        )
    for name in (
        "pairs_per_second", "record_bytes", "clusters", "tokens", "days", "raw_retention_days", "replication",
        "headroom", "growth", "decode_per_core",
    ):  # fmt: skip
        value = getattr(load, name)
        if not (math.isfinite(value) and value > 0):
            raise TldrError(f"--{name.replace('_', '-')} {value:g}: give a number above 0")
    if load.images_per_second is not None and not (
        math.isfinite(load.images_per_second) and load.images_per_second > 0
    ):
        raise TldrError(f"--images-per-second {load.images_per_second:g}: give a number above 0")
    if not 0 <= load.duplicates < 1:
        raise TldrError(f"--duplicates {load.duplicates:g}: give a share from 0 to below 1")
    if load.headroom < 1:
        raise TldrError(f"--headroom {load.headroom:g}: below 1 the workers would never keep up")
    if load.growth < 1:
        raise TldrError(f"--growth {load.growth:g}: give 1 or more; partitions cannot be added later")


def _power_of_two(at_least: float) -> int:
    return 1 << math.ceil(math.log2(at_least))


def _model_rate(load: Load, share: float) -> tuple[float, str, list[str]]:
    """(images a second of one worker's model, where that comes from, what it assumes)."""
    if load.images_per_second is not None:
        return load.images_per_second, "the model's rate as given with --images-per-second", []
    if load.gpu == CPU:
        said = "measured: the sample bundle on two shared cores (benchmarks/RESULTS.md); a ViT-B/16 is far slower"
        return SAMPLE_IMAGES_PER_S, said, []
    gpu, measured = GPUS[load.gpu], GPUS["h200"]
    # The encoder is bound by arithmetic, captions by the memory that they read.
    image_s = IMAGE_S * measured.tflops / gpu.tflops
    caption_s = share * CAPTION_S * measured.terabytes_per_s / gpu.terabytes_per_s
    said = "ASSUMED, from steps measured on an H200: put your own in with --images-per-second"
    return IN_A_WORKER / (image_s + caption_s), said, [
        f"{load.gpu}: {gpu.tflops:g} TFLOP/s and {gpu.terabytes_per_s:g} TB/s by its data sheet, the H200's steps in "
        f"proportion, and {IN_A_WORKER:.0%} of them in a worker; ViT-B/16 at 224, captions of 30 pieces",
    ]  # fmt: skip
