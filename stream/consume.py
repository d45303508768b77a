"""The job behind `tldr-stream consume`: puts a worker together from its options, and runs it until it is told to stop.

Everything that a user can get wrong is found here, before the first poll.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import logging
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer

from models.errors import ModelError
from models.model import PairModel
from state.directory import StateDirectory
from state.errors import SettingsDiffer, StateError
from state.quota import Ratio
from state.settings import StreamSettings, rule_named
from stream.allocator import bound_heaps
from stream.broker_errors import Course, course_of, lacks_right
from stream.bundle_fetch import fetch, never, prune
from stream.bundle_switch import BundleSwitch
from stream.bundles import NULL, Announced, Announcement, find_bundle, fitting_for
from stream.dead_share import DEFAULT_LIMIT, NO_LIMIT, DeadShare, Stretch, recent_dead
from stream.errors import Fenced, RightLost, Stopped, TldrError, Unavailable
from stream.group_gap import GapWatch
from stream.kafka import (
    RECORD_BYTES_MAX,
    Connection,
    MissingRight,
    NoEntry,
    create_missing,
    partition_count,
    reach,
    topic_id,
    topic_setting,
)
from stream.logs import JSON, TEXT, at
from stream.metrics import HealthServer, Metrics
from stream.raw_format import raw_reader
from stream.records import Codec
from stream.reduce import Reduction
from stream.restore import Cancel, Restored, restore
from stream.rights import check_rights, lost_right
from stream.schema_registry import open_registry
from stream.stream_view import StreamSource, stored_settings
from stream.topics import KEPT_OVERHEAD_BYTES, StreamTopics
from stream.transaction import Outlet
from stream.worker import REVOKE_BUDGET_S, Pace, Worker

log = logging.getLogger(__name__)

DEFAULT_RATIO = Ratio(1, 4)  # paper Table 2e
DEFAULT_RECORD_BYTES = 1_048_588  # Kafka's own max.message.bytes
# An attempt to commit ends after this long, or after half of a shorter transaction time-out.
ATTEMPT_TIMEOUT_S = 5.0
MAX_POLL_INTERVAL_S = 300.0
# Kafka settings that other time-outs are chosen with, and so have an option or a meaning of their own.
OPTION_OF = {
    "session.timeout.ms": "--session-timeout-s",
    "transaction.timeout.ms": "--transaction-timeout-s",
    "socket.timeout.ms": "--transaction-timeout-s",  # librdkafka wants it to be at most as long
}
# What librdkafka may fetch ahead; a pause throws it away.
PREFETCH_KB = 32 * 1024
# … and of small records no more than this many of each partition, which keeps memory flat.
PREFETCH_MESSAGES = 5000
# What the broker waits for at the end of a partition before it answers that there is nothing.
FETCH_WAIT_MS = 100
RESTORE_AGAIN_AFTER_S = 1.0
BUNDLES_FOLDER = "bundles"  # in the state directory
GC_THRESHOLDS = (200_000, 20, 100)
# A thread that waits for Python's lock gets it after so long, a tenth of the usual: 2 % more records/s (docs/tried.md).
SWITCH_INTERVAL_S = 0.0005
# It names a folder and a part of the transactional id.
INSTANCE_ID = re.compile(r"(?!\.+$)[A-Za-z0-9._-]{1,200}")


@dataclass(frozen=True)
class ConsumeOptions:
    """The options of a worker; `tldr-stream consume --help` says what each one means."""

    connection: Connection
    topic: str
    stream: str | None = None
    bundle: str | None = None
    model: str = "bundle"
    rule: str | None = None
    ratio: str | None = None
    seed: int = 0
    cell_cap: int | None = None
    dedupe_window: int | None = None
    gate: str | None = None
    state_dir: Path | None = None
    instance_id: str | None = None
    raw_format: str = "tldr"
    fields: Sequence[str] = ()
    raw_schema: Path | None = None
    schemas: Sequence[Path] = ()
    schema_registry: str | None = None
    schema_registry_properties: Path | None = None
    fetch_allow: Sequence[str] = ()
    fetch_allow_private: bool = False
    fetch_bytes_max: int = 32 * 1024 * 1024
    fetch_timeout_s: float = 10.0
    joiner: str = " "
    caption_tokens: int | None = None
    commit_interval_s: float = 1.0
    batch_pairs: int | None = None
    buffer_mb: int = 64
    session_timeout_s: float = 45.0
    decode_threads: int | None = None
    device: str | None = None
    blip: Path | None = None
    metrics_host: str = "0.0.0.0"  # noqa: S104 (Prometheus scrapes from another machine)
    metrics_port: int | None = None
    stop_at_end: bool = False
    on_data_loss: str = "stop"
    dlq_limit: str | None = None
    transaction_timeout_s: float = 10.0
    log_format: str = TEXT


def consume(options: ConsumeOptions) -> None:
    """Runs a worker until SIGTERM, SIGINT or the end of the topic (`stop_at_end`).

    Raises TldrError (and models' and state's errors) before the first poll for whatever the user can put right, Stopped,
    Fenced or DataLoss where a running worker cannot go on.
    """
    bound_heaps()
    refuse_impossible(options)
    connection, topic = options.connection, options.topic
    stream = options.stream or topic
    registry = open_registry(options.schema_registry, options.schema_registry_properties)
    reader = raw_reader(options.raw_format, options.fields, options.schemas, options.raw_schema, registry)
    fetch = _fetcher(options)
    check_rights(connection, "consume", raw=topic, stream=stream)
    partitions = partition_count(connection, topic)
    topics = StreamTopics(stream)
    stored = stored_settings(connection, topics)
    candidates = _candidates(options, stream, stored.space if stored else None)
    record_bytes = int(topic_setting(connection, topic, "max.message.bytes") or DEFAULT_RECORD_BYTES)
    # T_o may stand three times in a kept pair, but an image that fills a record leaves no room for such a T_o.
    kept_bytes = min(2 * record_bytes + KEPT_OVERHEAD_BYTES, 2 * RECORD_BYTES_MAX)
    if created := create_missing(connection, topics.settings(kept_bytes), partitions):
        log.info("created %s", ", ".join(sorted(created)))
    kept_bytes = int(topic_setting(connection, topics.kept, "max.message.bytes") or kept_bytes)

    with _state_directory(options, stream) as directory:
        metrics = Metrics()
        model = _load(options, candidates, directory.path / BUNDLES_FOLDER)
        metrics.bundle.info({"version": model.version})
        metrics.watch_disk(directory.path)
        metrics.fencings.inc(directory.fencings)
        settings = _settings(options, model, partitions, topic_id(connection, topic))
        metrics.quota_ratio.set(float(settings.ratio.share))
        metrics.stream_partitions.set(partitions)
        log.info("models loaded: bundle %s, %d clusters, L = %d", model.version[:12], model.clusters, model.tokens)
        _warn_of_another_machine(model)
        # What the null model decodes is not worth handing to a thread.
        threads = options.decode_threads or (1 if options.model == "null" else os.cpu_count() or 1)
        with ThreadPoolExecutor(threads, "decode") as pool:
            using = Reduction(
                model=model,
                reader=reader,
                kept_codec=Codec("KeptPair", registry=registry),
                fetch=fetch,
                pool=pool,
                threads=threads,
                seed=settings.seed,
                rate=str(settings.ratio),
                joiner=options.joiner,
                kept_bytes_max=kept_bytes,
                topic=topic,
                caption_tokens=options.caption_tokens,
            )
            try:
                _run(options, settings, using, Codec("PairCodes", registry=registry), topics, directory, metrics)
            except Fenced:
                directory.note_fencing()  # the process ends before anybody could read a counter of its own
                raise


def refuse_impossible(options: ConsumeOptions) -> None:
    """Raises TldrError for options that cannot work together; asks nobody."""
    if options.model not in ("bundle", "null"):
        raise TldrError(f"--model {options.model}: use `bundle` or `null`")
    if options.model == "null" and options.bundle is not None:
        raise TldrError("--model null uses no bundle: leave --bundle out")
    if options.model == "null" and options.blip is not None:
        raise TldrError("--model null asks no BLIP: leave --blip out")
    if options.rule is not None:
        rule = rule_named(options.rule)
        if options.ratio is not None and Ratio.parse(options.ratio) != rule.ratio:
            raise TldrError(f"--rule {rule.name} keeps {rule.ratio}: leave --ratio out, or the rule")
        if options.gate is not None and (options.gate != "off") != rule.gated:
            raise TldrError(f"--rule {rule.name} is {'' if rule.gated else 'not '}gated: leave --gate out, or the rule")
    if options.ratio is not None:
        Ratio.parse(options.ratio)
    if options.gate not in (None, "off", "bundle"):
        _number(options.gate, "--gate")
    _dlq_limit(options)
    if options.on_data_loss not in ("stop", "continue"):
        raise TldrError(f"--on-data-loss {options.on_data_loss}: use `stop` or `continue`")
    if options.log_format not in (TEXT, JSON):
        raise TldrError(f"--log-format {options.log_format}: use `{TEXT}` or `{JSON}`")
    if options.stream is not None and not options.stream.strip():
        raise TldrError("--stream needs a name")
    if options.instance_id is not None and not INSTANCE_ID.fullmatch(options.instance_id):
        raise TldrError(f"--instance-id {options.instance_id!r}: use letters, digits, `.`, `_` and `-`")
    if options.fetch_allow_private and not options.fetch_allow:
        raise TldrError("--fetch-allow-private allows nothing by itself: say from where with --fetch-allow")
    for setting, option in OPTION_OF.items():
        if setting in options.connection.settings:
            raise TldrError(f"Kafka setting {setting} is chosen together with others here: use {option}")
    if options.session_timeout_s > _max_poll_interval_s(options):
        raise TldrError(
            f"--session-timeout-s {options.session_timeout_s:g} is above the poll interval of "
            f"{_max_poll_interval_s(options):g} s: shorten it, or raise --kafka max.poll.interval.ms=MS"
        )


def _max_poll_interval_s(options: ConsumeOptions) -> float:
    """How long the group waits for a worker that does not poll; a rebalance may wait as long. The user may set it."""
    text = options.connection.settings.get("max.poll.interval.ms")
    if text is None:
        return MAX_POLL_INTERVAL_S
    if not text.isdecimal():
        raise TldrError("Kafka setting max.poll.interval.ms must be a whole number of milliseconds")
    return int(text) / 1000


def _dlq_limit(options: ConsumeOptions) -> Ratio:
    try:
        return DEFAULT_LIMIT if options.dlq_limit is None else Ratio.parse(options.dlq_limit)
    except StateError as error:
        raise TldrError(f"--dlq-limit {options.dlq_limit}: give a percentage, and 100% for no limit") from error


def _number(text: str | None, option: str) -> float:
    number = float("nan")
    with contextlib.suppress(ValueError):
        number = float(text or "")
    if not math.isfinite(number):
        raise TldrError(f"{option} {text}: use `off`, `bundle` (the bundle's own threshold) or a number")
    return number


def _state_directory(options: ConsumeOptions, stream: str) -> StateDirectory:
    if options.state_dir is not None:
        return StateDirectory(options.state_dir, options.instance_id)
    home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    root = home / "tldr-stream" / stream
    if options.instance_id is not None:
        return StateDirectory(root / options.instance_id, options.instance_id)
    return StateDirectory.next_free(root)


def _candidates(options: ConsumeOptions, stream: str, space: str | None) -> list[Announcement]:
    """The announced bundles that a worker may begin with, oldest first. Raises TldrError where there is none."""
    if options.model == "null":
        return []
    if options.bundle is not None:
        find_bundle(options.connection, options.bundle, stream)
        return []
    return fitting_for(options.connection, stream, space)


def _load(options: ConsumeOptions, candidates: list[Announcement], cache: Path) -> PairModel:
    """The model to begin with: the newest candidate that can be had. Raises what the newest one raised if none can."""
    if options.model == "null":
        from models.null import NullModel

        return NullModel()
    from models.bundle import load_model

    if options.bundle is not None:
        return load_model(options.bundle, options.device, blip=options.blip)
    first: Exception | None = None
    for announcement in reversed(candidates):
        try:
            return load_model(_fetched(announcement, cache), options.device, blip=options.blip)
        except (ModelError, TldrError, OSError) as error:
            log.warning("bundle %s cannot be loaded: %s", announcement.version[:12], error)
            first = first or error
    raise first or TldrError("no bundle was announced")


def _fetched(announcement: Announcement, cache: Path, cancelled: Callable[[], bool] = never) -> Path:
    if (
        "://" not in announcement.uri
        and not Path(announcement.uri).is_dir()
        and not (cache / announcement.version).is_dir()
    ):
        raise TldrError(
            f"the announced bundle {announcement.version[:12]} lies at {announcement.uri}, which is not on this machine: "
            "copy it here and give --bundle FOLDER, or announce it at a URL"
        )
    return fetch(announcement.uri, announcement.version, cache, cancelled=cancelled)


def _beside(
    announcement: Announcement,
    base: PairModel,
    cache: Path,
    options: ConsumeOptions,
    cancelled: Callable[[], bool] = never,
) -> PairModel:
    """The model of an announced bundle, with the networks of `base` where they are the same."""
    if announcement.uri.startswith(NULL):
        from models.null import NullModel

        return NullModel.at(announcement.uri)
    from models.bundle import load_beside

    return load_beside(_fetched(announcement, cache, cancelled), base, options.device, blip=options.blip)


def _settings(options: ConsumeOptions, model: PairModel, partitions: int, raw_topic_id: str) -> StreamSettings:
    ratio = Ratio.parse(options.ratio) if options.ratio is not None else DEFAULT_RATIO
    gated = options.gate == "bundle"
    gate = _number(options.gate, "--gate") if options.gate not in (None, "off", "bundle") else None
    if options.rule is not None:
        rule = rule_named(options.rule)
        if model.clusters != rule.clusters:
            raise TldrError(
                f"--rule {rule.name} is about {rule.clusters} clusters and the bundle has {model.clusters}: bootstrap one "
                f"with --clusters {rule.clusters}, or leave --rule out"
            )
        ratio, gated = rule.ratio, rule.gated
    if gated:
        if model.gate is None:
            raise TldrError("the bundle has no gate: bootstrap one that has, or give --gate a number")
        gate = model.gate
    return StreamSettings(
        partition_count=partitions,
        raw_topic_id=raw_topic_id,
        seed=options.seed,
        ratio=ratio,
        cell_cap=options.cell_cap,
        dedupe_window=options.dedupe_window,
        gate=gate,
        rule=options.rule or "none",
        space=model.space,
        tokens=model.tokens,
    )


def _warn_of_another_machine(model: PairModel) -> None:
    """Says where the bundle was made on another kind of machine: a few images may get other codes there."""
    different = [
        f"{key} {model.made_with[key]} there and {value} here"
        for key, value in model.fingerprint.items()
        if model.made_with.get(key, value) != value
    ]
    if different:
        log.warning(
            "the bundle was made with other arithmetic, so a few index vectors may differ: %s", "; ".join(different)
        )


def _run(
    options: ConsumeOptions,
    settings: StreamSettings,
    using: Reduction,
    codes: Codec,
    topics: StreamTopics,
    directory: StateDirectory,
    metrics: Metrics,
) -> None:
    connection, group, instance, model = options.connection, topics.name, directory.instance_id, using.model
    worker: Worker | None = None

    def explained(lost: RightLost) -> TldrError:
        """Before anything ran, a right that is missing; afterwards, one that was taken away."""
        missing = lost_right(connection, lost.reason, "consume", raw=options.topic, stream=group, instance=instance)
        return Stopped(str(missing)) if worker is not None and worker.has_run else missing

    def on_statistics(text: str) -> None:
        if worker is not None:
            worker.on_statistics(text)

    def on_error(error: KafkaError) -> None:
        if worker is not None:
            worker.on_error(error)

    def let_work() -> None:
        reach(connection)
        check_rights(connection, "consume", raw=options.topic, stream=group)

    def new_producer() -> Producer:
        return _producer(
            connection, f"{group}-{instance}", using.kept_bytes_max, options.transaction_timeout_s, on_error
        )

    cache = directory.path / BUNDLES_FOLDER
    models: dict[str, PairModel] = {}
    using = replace(using, models=models)
    switch = BundleSwitch(
        model,
        options.topic,
        group,
        Announced(connection) if options.bundle is None else None,
        lambda announcement, cancelled: _beside(announcement, model, cache, options, cancelled),
        lambda: {} if worker is None else dict(worker.assignment.running),
        settings.cell_cap is not None,
        metrics,
        models,
        lambda used: prune(cache, used),
    )
    dead_share = DeadShare(_dlq_limit(options))
    dead_before: dict[int, Stretch] = {}  # from the threads that restore to the one that judges
    try:
        producer = new_producer()
    except RightLost as lost:
        raise explained(lost) from lost
    consumer = _consumer(options, group, instance, on_statistics, on_error)

    def restore_partition(number: int, cancel: Cancel) -> Restored | None:
        if number >= settings.partition_count:
            raise TldrError(
                f"topic {options.topic} was given more partitions: keys have moved, so start another --stream on it"
            )
        path = directory.store_path(number)
        while True:
            try:
                restored = restore(
                    connection, topics, options.topic, group, settings, number, path,
                    continue_after_loss=options.on_data_loss == "continue", cancelled=cancel,
                )  # fmt: skip
                if restored is not None and not _made_ready(restored, switch, cancel):
                    return None
                if restored is not None and dead_share.limit != NO_LIMIT:
                    dead_before[number] = _recent_dead(StreamSource(connection, topics), restored)
                return restored
            except Unavailable as error:  # the broker moves or is away: a running worker outlives that
                log.warning("partition %d cannot be restored yet: %s; trying on", number, error)
                if cancel.wait(RESTORE_AGAIN_AFTER_S):
                    return None

    def adopt(restored: Restored) -> None:
        switch.begin(restored.partition, restored.next_offset)
        position = restored.partition.store.position()
        if position is not None and (stretch := dead_before.pop(restored.partition.partition, None)):
            dead_share.remember(restored.partition.partition, position.wall_clock_ms, stretch)

    attempt_s = min(ATTEMPT_TIMEOUT_S, options.transaction_timeout_s / 2)
    outlet = Outlet(
        producer, consumer, topics, options.topic, codes, instance, settings.partition_count, attempt_s,
        options.transaction_timeout_s,
    )  # fmt: skip
    batch = options.batch_pairs or model.pairs_at_once
    revoke_budget_s = min(REVOKE_BUDGET_S, _max_poll_interval_s(options) / 2)
    pace = Pace(options.commit_interval_s, batch, options.stop_at_end, revoke_budget_s)
    worker = Worker(
        consumer,
        options.topic,
        using,
        outlet,
        restore_partition,
        adopt,
        pace,
        options.buffer_mb << 20,
        metrics,
        new_producer,
        GapWatch(connection, group, options.topic, settings.partition_count).found,
        dead_share,
        let_work,
        switch,
    )
    server = HealthServer(
        metrics, options.metrics_host, options.metrics_port, lambda: worker.healthy, lambda: worker.ready
    )
    faulthandler.register(signal.SIGUSR1)  # a worker that hangs tells where: docs/reference.md
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.stop())
    log.info("worker %s of stream %s: metrics on port %d, state in %s", instance, group, server.port, directory.path)
    # Pairs are trees: counting references frees them, and a search for cycles among a second's worth of them took a sixth
    # of the time.
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        switch.start()
        worker.run()
    except RightLost as lost:
        raise explained(lost) from lost
    except (MissingRight, NoEntry) as refused:
        if worker.has_run:
            raise Stopped(str(refused)) from refused
        raise
    except SettingsDiffer as error:
        raise TldrError(str(error)) from error
    except StateError as error:
        raise Stopped(str(error)) from error
    finally:
        switch.close()
        server.close()
    log.info("worker %s has left", instance)


def _made_ready(restored: Restored, switch: BundleSwitch, cancel: Cancel) -> bool:
    """Closes the store where the partition cannot be run after all."""
    ready = False
    try:
        ready = switch.make_ready(restored.partition, restored.next_offset, cancel)
    finally:
        if not ready:
            restored.partition.store.close()
    return ready


def _recent_dead(source: StreamSource, restored: Restored) -> Stretch:
    """What became dead shortly before this worker came; a stream without dead letters asks nobody."""
    totals, number = restored.partition.totals, restored.partition.partition
    if not totals.dead:
        return Stretch(totals.read, [])
    try:
        return recent_dead(source, number, restored.next_offset, totals.read)
    except TldrError as error:  # they expire under our eyes, or the broker moves: not worth a worker
        log.warning(
            "partition %d: the dead letters before offset %d are not known (%s), so --dlq-limit judges only those that come",
            number, restored.next_offset, error,
            extra=at("dead letters unknown", source.topics.dead, {}, partition=number, next_offset=restored.next_offset),
        )  # fmt: skip
        return Stretch(0, [])


def _fetcher(options: ConsumeOptions) -> Any:
    if not options.fetch_allow:
        return None
    from stream.image_fetch import ImageFetcher

    return ImageFetcher(
        options.fetch_allow,
        bytes_max=options.fetch_bytes_max,
        timeout_s=options.fetch_timeout_s,
        allow_private=options.fetch_allow_private,
    ).fetch


def _producer(
    connection: Connection,
    transactional_id: str,
    record_bytes: int,
    transaction_timeout_s: float,
    on_error: Callable[[KafkaError], None],
) -> Producer:
    """The transactional producer: fences a predecessor of the same id and waits for what it left open.

    on_error  must not raise: without one, the client's own raises inside whichever callback comes next.
    """
    producer = connection.producer(
        {"compression.type": "lz4", "linger.ms": 5, "error_cb": on_error},
        transactional_id=transactional_id,
        transaction_timeout_ms=int(transaction_timeout_s * 1000),
        socket_timeout_ms=int(transaction_timeout_s * 1000),  # at most transaction.timeout.ms + 100 (docs/tried.md)
        message_max_bytes=max(record_bytes, DEFAULT_RECORD_BYTES) + KEPT_OVERHEAD_BYTES,
    )
    while True:
        try:
            producer.init_transactions(2 * transaction_timeout_s)
            return producer
        except KafkaException as error:
            reason = error.args[0]
            course = course_of(reason)
            if course is Course.FENCED:
                raise Fenced(f"another worker took over the instance id: {reason.str()}") from error
            if lacks_right(reason):
                raise RightLost(f"the broker grants no transactions to {transactional_id}", reason) from error
            if course is not Course.REPEAT:
                raise TldrError(f"the broker grants no transactions to {transactional_id}: {reason.str()}") from error
            log.warning("waiting for the transaction coordinator: %s", reason.str())


def _consumer(options: ConsumeOptions, group: str, instance: str, on_statistics: Any, on_error: Any) -> Consumer:
    return Consumer(
        options.connection.config(
            {
                "queued.max.messages.kbytes": PREFETCH_KB,
                "queued.min.messages": PREFETCH_MESSAGES,
                "fetch.queue.backoff.ms": 20,  # librdkafka waits a whole second by default once its queue is full
                "fetch.wait.max.ms": FETCH_WAIT_MS,
                "max.poll.interval.ms": int(MAX_POLL_INTERVAL_S * 1000),
            },
            group_id=group,
            group_instance_id=instance,
            # KIP-848 refuses the successor of a killed static member until its session ends (docs/tried.md).
            group_protocol="classic",
            partition_assignment_strategy="cooperative-sticky",
            session_timeout_ms=int(options.session_timeout_s * 1000),
            enable_auto_commit=False,
            enable_auto_offset_store=False,
            auto_offset_reset="error",
            isolation_level="read_committed",
            enable_partition_eof=True,
            fetch_message_max_bytes=RECORD_BYTES_MAX,
            statistics_interval_ms=1000,
        )
        | {"stats_cb": on_statistics, "error_cb": on_error},
        logger=logging.getLogger("stream.librdkafka"),
    )
