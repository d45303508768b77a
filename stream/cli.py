"""The command line: options, help, examples. Each command calls one job and shows what it returns.

Must not do work: jobs are imported inside the commands, so that `--help` needs neither torch nor Kafka.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.main

from stream.command import JobCommand, JobGroup, fail_on_the_command_line

if TYPE_CHECKING:
    from stream.stream_view import StreamSource

app = typer.Typer(
    name="tldr-stream",
    cls=JobGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: Rich takes as long to import as all the rest (--help in under 0.5 s)
)


@app.callback()
def _top() -> None:
    """Shrinks an endless Kafka stream of image-text pairs to a small training set, continuously and exactly once."""


# Options that many commands share, so that they read the same everywhere.
def _no_secret_setting(ctx: typer.Context, param: typer.CallbackParam, value: list[str] | None) -> list[str] | None:
    from stream.secrets import is_secret

    for key in (each.partition("=")[0].strip() for each in value or ()):
        if is_secret(key):
            remedy = "put it into the file of --kafka-properties, or into TLDR_KAFKA"
            fail_on_the_command_line(ctx, param, f"--kafka {key}=… is a secret: {remedy}")
    return value


def _no_secret_url(ctx: typer.Context, param: typer.CallbackParam, value: str | None) -> str | None:
    from stream.secrets import has_password

    if value and has_password(value):
        remedy = "set TLDR_SCHEMA_REGISTRY, or give basic.auth.user.info in the file of --schema-registry-properties"
        fail_on_the_command_line(ctx, param, f"--schema-registry with a password in its URL is a secret: {remedy}")
    return value


BootstrapServers = Annotated[str, typer.Option(help="Kafka brokers, host:port[,host:port…].")]
KafkaSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--kafka",
        callback=_no_secret_setting,
        help="Any librdkafka setting, key=value; repeatable. Secrets belong in the file.",
    ),
]
KafkaProperties = Annotated[
    Path | None, typer.Option(help="File of librdkafka settings, key=value a line; never shown anywhere.")
]
Topic = Annotated[str, typer.Option(help="Topic of the raw pairs.")]
Stream = Annotated[
    str | None,
    typer.Option(help="Name of the stream; owns group, state and output topics.  [default: the topic's name]"),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
SchemaRegistry = Annotated[
    str | None,
    typer.Option(
        callback=_no_secret_url, help="Confluent Schema Registry URL; records are then framed in its wire format."
    ),
]
SchemaRegistryProperties = Annotated[
    Path | None, typer.Option(help="File of the registry client's settings, key=value a line; never shown anywhere.")
]
Schemas = Annotated[
    list[Path] | None, typer.Option(help="Folder of further Avro schemas (*.avsc) of other versions; repeatable.")
]

DEFAULT_BOOTSTRAP = "localhost:9092"


@app.command(cls=JobCommand)
def broker(
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 9092,
    data: Annotated[Path, typer.Option(help="Folder of the broker's data; survives restarts.")] = Path("kafka-data"),
) -> None:
    """Run a local Apache Kafka (KRaft, one node) for development, until Ctrl-C.

    Example: tldr-stream broker --port 9092 --data ./kafka-data
    """
    import signal

    from stream.broker import local_broker

    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with local_broker(data, port) as running:
        typer.echo(f"Apache Kafka listens at {running.bootstrap_servers}; data and log in {data}. Ctrl-C stops it.")
        try:
            status = running.wait()
        except KeyboardInterrupt:
            typer.echo("stopping")
            return
    raise typer.Exit(status)


@app.command(cls=JobCommand)
def consume(
    topic: Topic,
    stream: Stream = None,
    bundle: Annotated[
        str | None, typer.Option(help="Folder of the model bundle.  [default: the newest one announced]")
    ] = None,
    model: Annotated[
        str, typer.Option(help="`bundle`, or `null`: codes, clusters and captions from a hash, to test all the rest.")
    ] = "bundle",
    rule: Annotated[
        str | None, typer.Option(help="`paper` (25 %, 3000 clusters, no gate) or `authors` (50 %, 1000, better half).")
    ] = None,
    ratio: Annotated[
        str | None, typer.Option(help="Share M of each cell that is kept: 25, 25% or 1/4.  [default: 25%]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of every choice; fixed for the life of the stream.", min=0)] = 0,
    cell_cap: Annotated[
        int | None, typer.Option(help="Most pairs a cell (partition x cluster) may hold.  [default: no limit]", min=1)
    ] = None,
    dedupe_window: Annotated[
        int | None,
        typer.Option(help="Offsets for which an id outside the set is remembered.  [default: for ever]", min=1),
    ] = None,
    gate: Annotated[
        str | None, typer.Option(help="Least ITM score of a pair: `off`, `bundle` (its threshold) or a number.")
    ] = None,
    state_dir: Annotated[
        Path | None, typer.Option(help="Folder of the local stores.  [default: next free one of the stream's]")
    ] = None,
    instance_id: Annotated[
        str | None, typer.Option(help="Name of this worker, unique in the stream.  [default: kept in the state folder]")
    ] = None,
    bootstrap_servers: BootstrapServers = DEFAULT_BOOTSTRAP,
    kafka: KafkaSettings = None,
    kafka_properties: KafkaProperties = None,
    raw_format: Annotated[
        str, typer.Option(help="How the raw records are written: tldr, json, avro or confluent.")
    ] = "tldr",
    field: Annotated[
        list[str] | None,
        typer.Option(help="id, caption, image or image_uri=dotted.path in a raw record, e.g. id=url; repeatable."),
    ] = None,
    raw_schema: Annotated[
        Path | None, typer.Option(help="Avro schema (*.avsc) of plain raw records; with avro only.")
    ] = None,
    schemas: Schemas = None,
    schema_registry: SchemaRegistry = None,
    schema_registry_properties: SchemaRegistryProperties = None,
    fetch_allow: Annotated[
        list[str] | None,
        typer.Option(
            help="scheme://host[:port][/path] below which an image_uri may be fetched; repeatable.  [default: none]"
        ),
    ] = None,
    fetch_allow_private: Annotated[
        bool, typer.Option("--fetch-allow-private", help="Let an allowed host have a private address.")
    ] = False,
    fetch_bytes_max: Annotated[int, typer.Option(help="Most bytes of a fetched image.", min=1)] = 32 * 1024 * 1024,
    fetch_timeout_s: Annotated[
        float, typer.Option(help="Most seconds for one of three attempts to fetch an image.", min=0.1)
    ] = 10.0,
    joiner: Annotated[str, typer.Option(help="What stands between T_o and T_g in a refined caption.")] = " ",
    caption_tokens: Annotated[
        int | None,
        typer.Option(
            help="Shorten T_o so that T_g lies within so many words, as a trainer cuts.  [default: whole]", min=1
        ),
    ] = None,
    commit_interval_s: Annotated[float, typer.Option(help="Seconds between transactions.", min=0.0)] = 1.0,
    batch_pairs: Annotated[
        int | None, typer.Option(help="Raw records of one batch.  [default: 64 on a CPU, 1024 on a GPU]", min=1)
    ] = None,
    buffer_mb: Annotated[int, typer.Option(help="Megabytes of raw records that may wait for the model.", min=1)] = 64,
    session_timeout_s: Annotated[
        float, typer.Option(help="Seconds after which the group gives a silent worker's partitions away.", min=6)
    ] = 45.0,
    decode_threads: Annotated[
        int | None,
        typer.Option(help="Threads that decode images.  [default: one a core; one in all with --model null]", min=1),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda[:N].  [default: a GPU where there is one]")] = None,
    blip: Annotated[
        Path | None, typer.Option(help="The bundle's BLIP checkpoint, if it does not lie where it lay at bootstrap.")
    ] = None,
    metrics_host: Annotated[str, typer.Option(help="Address that serves /metrics, /healthz and /readyz.")] = "0.0.0.0",  # noqa: S104
    metrics_port: Annotated[
        int | None,
        typer.Option(help="Its port; 0 takes any.  [default: 9400, or the next free one above]", min=0, max=65535),
    ] = None,
    stop_at_end: Annotated[
        bool, typer.Option("--stop-at-end", help="Leave when the partitions of this worker are consumed to their ends.")
    ] = False,
    on_data_loss: Annotated[
        str,
        typer.Option(help="Raw offsets that the broker has deleted unread: `stop`, or `continue` and count them."),
    ] = "stop",
    dlq_limit: Annotated[
        str | None,
        typer.Option(
            help="Share of dead letters in 2,000 records above which the worker stops; 100%: never.  [default: 20%]"
        ),
    ] = None,
    transaction_timeout_s: Annotated[
        float,
        typer.Option(help="Seconds after which the broker ends the open transaction of a dead worker.", min=2),
    ] = 10.0,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log every batch and every transaction.")] = False,
    log_format: Annotated[
        str, typer.Option(help="text, or json: one object a line, with event, topic and offsets as fields.")
    ] = "text",
) -> None:
    """Run a worker: reduce the raw pairs of a topic, exactly once, until SIGTERM.

    Example: tldr-stream consume --topic raw-pairs --bundle ./bundles/sample
    """
    from stream.consume import ConsumeOptions
    from stream.consume import consume as job
    from stream.kafka import Connection
    from stream.logs import set_up_logs

    set_up_logs(verbose, log_format)
    job(
        ConsumeOptions(
            connection=Connection.of(bootstrap_servers, kafka or (), kafka_properties),
            topic=topic,
            stream=stream,
            bundle=bundle,
            model=model,
            rule=rule,
            ratio=ratio,
            seed=seed,
            cell_cap=cell_cap,
            dedupe_window=dedupe_window,
            gate=gate,
            state_dir=state_dir,
            instance_id=instance_id,
            raw_format=raw_format,
            fields=field or (),
            raw_schema=raw_schema,
            schemas=schemas or (),
            schema_registry=schema_registry,
            schema_registry_properties=schema_registry_properties,
            fetch_allow=fetch_allow or (),
            fetch_allow_private=fetch_allow_private,
            fetch_bytes_max=fetch_bytes_max,
            fetch_timeout_s=fetch_timeout_s,
            joiner=joiner,
            caption_tokens=caption_tokens,
            commit_interval_s=commit_interval_s,
            batch_pairs=batch_pairs,
            buffer_mb=buffer_mb,
            session_timeout_s=session_timeout_s,
            decode_threads=decode_threads,
            device=device,
            blip=blip,
            metrics_host=metrics_host,
            metrics_port=metrics_port,
            stop_at_end=stop_at_end,
            on_data_loss=on_data_loss,
            dlq_limit=dlq_limit,
            transaction_timeout_s=transaction_timeout_s,
            log_format=log_format,
        )
    )


@app.command(cls=JobCommand)
def ingest(
    source: Annotated[
        str,
        typer.Argument(
            help="A .tar or .parquet file, a folder of them or of images with captions, or a pattern of these."
        ),
    ],
    topic: Topic,
    partitions: Annotated[
        int | None, typer.Option(help="Partitions of the topic if it is created here.  [default: 4]", min=1)
    ] = None,
    field: Annotated[
        list[str] | None,
        typer.Option(help="Where the source has id, caption, image or image_uri, e.g. caption=alt; repeatable."),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Send everything once more, acknowledged or not.")] = False,
    journal: Annotated[
        Path | None,
        typer.Option(help="Folder of the journals of what was sent.  [default: $XDG_STATE_HOME/tldr-stream-ingest]"),
    ] = None,
    bad_entries: Annotated[
        Path | None, typer.Option(help="File for the list of entries that are no pairs.  [default: beside the journal]")
    ] = None,
    bootstrap_servers: BootstrapServers = DEFAULT_BOOTSTRAP,
    kafka: KafkaSettings = None,
    kafka_properties: KafkaProperties = None,
    schema_registry: SchemaRegistry = None,
    schema_registry_properties: SchemaRegistryProperties = None,
    json: Json = False,
) -> None:
    """Send image-text pairs from files to the raw topic, each once; run it again and it goes on where it stopped.

    Example: tldr-stream ingest './crawl/{00000..00099}.tar' --topic raw-pairs --partitions 8
    """
    from stream.ingest import IngestOptions
    from stream.ingest import ingest as job
    from stream.kafka import Connection
    from stream.results import show

    registry = None
    if schema_registry or schema_registry_properties:
        from stream.schema_registry import open_registry

        registry = open_registry(schema_registry, schema_registry_properties)
    options = IngestOptions(
        connection=Connection.of(bootstrap_servers, kafka or (), kafka_properties),
        source=source,
        topic=topic,
        partitions=partitions,
        fields=field or (),
        again=again,
        journal=journal,
        bad_entries=bad_entries,
        registry=registry,
    )
    show(job(options), json)


@app.command(cls=JobCommand)
def topics(
    topic: Topic,
    stream: Stream = None,
    partitions: Annotated[int, typer.Option(help="Partitions of the raw topic; they may never change.", min=1)] = 4,
    replication_factor: Annotated[
        int | None, typer.Option(help="Replicas of each partition.  [default: the brokers']", min=1)
    ] = None,
    min_insync_replicas: Annotated[
        int | None,
        typer.Option(help="Replicas that must have a record before it counts.  [default: the brokers']", min=1),
    ] = None,
    record_bytes: Annotated[int, typer.Option(help="Largest raw record in bytes.", min=1024)] = 8 * 1024 * 1024,
    retention_ms: Annotated[int, typer.Option(help="How long raw pairs stay; -1: for ever.", min=-1)] = 7
    * 24
    * 3600
    * 1000,
    bootstrap_servers: BootstrapServers = DEFAULT_BOOTSTRAP,
    kafka: KafkaSettings = None,
    kafka_properties: KafkaProperties = None,
    json: Json = False,
) -> None:
    """Create the topics of a stream that are missing, raw topic included, and tell where those that are there differ.

    Example: tldr-stream topics --topic raw-pairs --partitions 64 --replication-factor 3 --min-insync-replicas 2
    """
    from stream.kafka import Connection
    from stream.results import show
    from stream.topic_set import TopicOptions
    from stream.topic_set import make_topics as job

    connection = Connection.of(bootstrap_servers, kafka or (), kafka_properties)
    options = TopicOptions(
        topic, stream or topic, partitions, replication_factor, min_insync_replicas, record_bytes, retention_ms
    )
    show(job(connection, options), json)


@app.command(cls=JobCommand)
def forget(
    topic: Topic,
    ids: Annotated[list[str] | None, typer.Argument(metavar="ID...", help="Ids of the pairs.")] = None,
    ids_file: Annotated[Path | None, typer.Option(help="File of further ids, one a line.")] = None,
    snapshots: Annotated[
        list[Path] | None, typer.Option(help="Folder of an earlier snapshot to look into for the pairs; repeatable.")
    ] = None,
    bootstrap_servers: BootstrapServers = DEFAULT_BOOTSTRAP,
    kafka: KafkaSettings = None,
    kafka_properties: KafkaProperties = None,
    json: Json = False,
) -> None:
    """Take pairs out again, everywhere and for good: a null value under each id, in every partition of the topic.

    Example: tldr-stream forget https://example.org/cat.jpg --topic raw-pairs
    """
    from stream.forget import forget as job
    from stream.forget import held_by, read_ids
    from stream.kafka import Connection
    from stream.results import show

    connection = Connection.of(bootstrap_servers, kafka or (), kafka_properties)
    wanted = read_ids(ids or [], ids_file)
    held = held_by(snapshots or (), wanted)  # first: a folder that is none must not be found out after the takedown
    result = job(connection, topic, wanted)
    result.snapshots, result.held = len(snapshots or ()), held
    show(result, json)


@app.command(cls=JobCommand)
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo leaves; emptied first.")] = Path("demo"),
    corpus: Annotated[
        Path | None, typer.Option(help="Folder of WebDataset shards.  [default: the checkout's corpus/sample]")
    ] = None,
    bundle: Annotated[Path | None, typer.Option(help="Model bundle.  [default: the checkout's bundles/sample]")] = None,
    json: Json = False,
) -> None:
    """Run the whole service on this machine, on real images; one of two workers is killed in the middle.

    Example: tldr-stream demo --out ./demo
    """
    from stream.demo import demo as job
    from stream.errors import Stopped
    from stream.results import show

    result = job(out, corpus, bundle)
    show(result, json)
    if result.problems:
        raise Stopped(f"the demo did not show what it must: {'; '.join(result.problems)}")


bundle_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Model bundles: look into one, announce one to the workers."
)
app.add_typer(bundle_app, name="bundle", cls=JobGroup)


@bundle_app.command("inspect", cls=JobCommand)
def bundle_inspect(
    folder: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    json: Json = False,
) -> None:
    """Show what is in a bundle, every hash checked: parameters, codes with their keywords, clusters, baselines, examples.

    Example: tldr-stream bundle inspect ./bundles/sample
    """
    from stream.bundles import inspect
    from stream.results import show

    show(inspect(folder), json)


@bundle_app.command("announce", cls=JobCommand)
def bundle_announce(
    folder: Annotated[str, typer.Argument(help="Folder of the bundle as the workers see it, or an fsspec URL.")],
    stream: Annotated[str, typer.Option(help="Only for the workers of this stream.  [default: of any]")] = "",
    bootstrap_servers: BootstrapServers = DEFAULT_BOOTSTRAP,
    kafka: KafkaSettings = None,
    kafka_properties: KafkaProperties = None,
    json: Json = False,
) -> None:
    """Announce a bundle: workers that run without --bundle switch to the newest one announced, without stopping.

    Example: tldr-stream bundle announce ./bundles/sample
    """
    from stream.bundles import announce_folder, streams_of_other_spaces
    from stream.kafka import Connection
    from stream.results import show

    connection = Connection.of(bootstrap_servers, kafka or (), kafka_properties)
    announcement = announce_folder(connection, folder, stream)
    if others := streams_of_other_spaces(connection, announcement):
        _say(f"these streams stay as they are, having another encoder, codebook or gate: {', '.join(others)}")
    show(announcement, json)


@bundle_app.command("list", cls=JobCommand)
def bundle_list(
    topic: Annotated[str | None, typer.Option(help="Topic of the raw pairs: show its stream's epochs, too.")] = None,
    stream: Stream = None,
    bootstrap_servers: BootstrapServers = DEFAULT_BOOTSTRAP,
    kafka: KafkaSettings = None,
    kafka_properties: KafkaProperties = None,
    json: Json = False,
) -> None:
    """List the announced bundles, and which partitions of a stream run with which.

    Example: tldr-stream bundle list --topic raw-pairs
    """
    from stream.bundle_list import list_bundles
    from stream.kafka import Connection
    from stream.results import show

    connection = Connection.of(bootstrap_servers, kafka or (), kafka_properties)
    name = stream or topic
    source = None if name is None else _source(name, stream, bootstrap_servers, kafka, kafka_properties)
    show(list_bundles(connection, source), json)


@app.command(cls=JobCommand)
def status(
    topic: Topic,
    stream: Stream = None,
    once: Annotated[
        bool, typer.Option("--once", help="Show it once and leave, as it does where output is no terminal.")
    ] = False,
    every_s: Annotated[float, typer.Option(help="Seconds from one look to the next.", min=0.2)] = 2.0,
    bundle: Annotated[
        str | None,
        typer.Option(help="Folder of the bundle, to judge drift by.  [default: where it was announced to be]"),
    ] = None,
    bootstrap_servers: BootstrapServers = DEFAULT_BOOTSTRAP,
    kafka: KafkaSettings = None,
    kafka_properties: KafkaProperties = None,
    schemas: Schemas = None,
    schema_registry: SchemaRegistry = None,
    schema_registry_properties: SchemaRegistryProperties = None,
    json: Json = False,
) -> None:
    """Show what a stream is doing, live: lag, keep-rate, cells, ITM, drift, errors, and arithmetic that adds up.

    Example: tldr-stream status --topic raw-pairs
    """
    import sys

    from stream.results import show
    from stream.status import StatusReader, watch

    reader = StatusReader(
        _source(
            topic,
            stream,
            bootstrap_servers,
            kafka,
            kafka_properties,
            schemas,
            schema_registry,
            schema_registry_properties,
        ),
        topic,
        bundle,
    )
    if json or once or not sys.stdout.isatty():
        show(reader.read(), json)
    else:
        watch(reader, every_s)


@app.command(cls=JobCommand)
def report(
    out: Annotated[Path, typer.Argument(metavar="OUT.html", help="The file to write; an older one is replaced.")],
    topic: Topic,
    stream: Stream = None,
    bundle: Annotated[
        str | None,
        typer.Option(help="Folder of the bundle, for distances to the centroids.  [default: the one announced]"),
    ] = None,
    clusters: Annotated[
        int, typer.Option(help="Clusters to show: half of them the largest, half drawn.", min=1, max=24)
    ] = 12,
    seed: Annotated[int, typer.Option(help="Seed of what is drawn.", min=0)] = 0,
    bootstrap_servers: BootstrapServers = DEFAULT_BOOTSTRAP,
    kafka: KafkaSettings = None,
    kafka_properties: KafkaProperties = None,
    raw_format: Annotated[
        str, typer.Option(help="How the raw records are written: tldr, json, avro or confluent.")
    ] = "tldr",
    field: Annotated[
        list[str] | None,
        typer.Option(help="id, caption, image or image_uri=dotted.path in a raw record, e.g. id=url; repeatable."),
    ] = None,
    raw_schema: Annotated[
        Path | None, typer.Option(help="Avro schema (*.avsc) of plain raw records; with avro only.")
    ] = None,
    schemas: Schemas = None,
    schema_registry: SchemaRegistry = None,
    schema_registry_properties: SchemaRegistryProperties = None,
    json: Json = False,
) -> None:
    """Write pictures of what a stream did into one HTML file that needs nothing else.

    Example: tldr-stream report report.html --topic raw-pairs
    """
    from stream.raw_format import raw_reader
    from stream.report import ReportOptions
    from stream.report import report as job
    from stream.results import show

    source = _source(
        topic, stream, bootstrap_servers, kafka, kafka_properties, schemas, schema_registry, schema_registry_properties
    )
    reader = raw_reader(raw_format, field or (), schemas or (), raw_schema, source.registry)
    show(job(ReportOptions(source, topic, out, reader, bundle, clusters, seed)), json)


dlq_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Dead letters: list them, send them back to the raw topic."
)
app.add_typer(dlq_app, name="dlq", cls=JobGroup)

Reason = Annotated[list[str] | None, typer.Option(help="Only those of this reason; repeatable.")]


@dlq_app.command("list", cls=JobCommand)
def dlq_list(
    topic: Topic,
    stream: Stream = None,
    reason: Reason = None,
    limit: Annotated[int, typer.Option(help="How many to show, the newest.", min=0)] = 20,
    bootstrap_servers: BootstrapServers = DEFAULT_BOOTSTRAP,
    kafka: KafkaSettings = None,
    kafka_properties: KafkaProperties = None,
    json: Json = False,
) -> None:
    """List what could not be processed, and why.

    Example: tldr-stream dlq list --topic raw-pairs --reason truncated
    """
    from stream.dead_letters import parse_reasons
    from stream.dlq import list_dead_letters
    from stream.results import show

    reasons = parse_reasons(reason or ())
    source = _source(topic, stream, bootstrap_servers, kafka, kafka_properties)
    show(list_dead_letters(source, reasons, limit), json)


@dlq_app.command("replay", cls=JobCommand)
def dlq_replay(
    topic: Topic,
    stream: Stream = None,
    reason: Reason = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count them and send nothing.")] = False,
    bootstrap_servers: BootstrapServers = DEFAULT_BOOTSTRAP,
    kafka: KafkaSettings = None,
    kafka_properties: KafkaProperties = None,
    json: Json = False,
) -> None:
    """Send dead letters back to the raw topic as they came, after what made them dead is put right.

    Example: tldr-stream dlq replay --topic raw-pairs --reason uri-not-allowed
    """
    from stream.dead_letters import parse_reasons
    from stream.dlq import replay
    from stream.results import show

    reasons = parse_reasons(reason or ())
    source = _source(topic, stream, bootstrap_servers, kafka, kafka_properties)
    show(replay(source, topic, reasons, dry_run=dry_run), json)


@app.command(cls=JobCommand)
def snapshot(
    out: Annotated[Path, typer.Argument(help="Folder of the snapshot: empty, new, or that of an unfinished one.")],
    topic: Topic,
    stream: Stream = None,
    format: Annotated[str, typer.Option(help="webdataset or parquet.")] = "webdataset",  # noqa: A002
    ratio: Annotated[
        str | None,
        typer.Option(
            help="Share of the counted pairs, at most the stream's: 10, 10% or 1/10.  [default: the stream's]"
        ),
    ] = None,
    cut: Annotated[
        str | None,
        typer.Option(help="Input offsets 0:120,1:96, or the manifest of another snapshot.  [default: the newest]"),
    ] = None,
    manifest_only: Annotated[bool, typer.Option("--manifest-only", help="Say which pairs, write none.")] = False,
    shard_pairs: Annotated[int, typer.Option(help="Pairs in a shard, about.", min=1)] = 10_000,
    part: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Only every N-th partition from I on; N processes share a snapshot, the last one writes the manifest.",
        ),
    ] = None,
    scratch: Annotated[
        Path | None, typer.Option(help="Folder of the temporary index, on a local disk.  [default: OUT]")
    ] = None,
    bootstrap_servers: BootstrapServers = DEFAULT_BOOTSTRAP,
    kafka: KafkaSettings = None,
    kafka_properties: KafkaProperties = None,
    schemas: Schemas = None,
    schema_registry: SchemaRegistry = None,
    schema_registry_properties: SchemaRegistryProperties = None,
    json: Json = False,
) -> None:
    """Freeze the reduced set at one consistent cut, for training. The same cut gives the same bytes.

    Example: tldr-stream snapshot ./train --topic raw-pairs --format webdataset --ratio 10
    """
    from state.quota import Ratio
    from stream.cut import parse_cut
    from stream.results import show
    from stream.snapshot import snapshot as take
    from stream.snapshot_parts import Part

    source = _source(
        topic, stream, bootstrap_servers, kafka, kafka_properties, schemas, schema_registry, schema_registry_properties
    )
    taken = take(
        source,
        out,
        format=format,
        ratio=None if ratio is None else Ratio.parse(ratio),
        cut=None if cut is None else parse_cut(cut),
        manifest_only=manifest_only,
        shard_pairs=shard_pairs,
        part=None if part is None else Part.parse(part),
        scratch=scratch,
    )
    show(taken, json)


@app.command(cls=JobCommand)
def verify(
    topic: Topic,
    stream: Stream = None,
    bundle: Annotated[
        str | None, typer.Option(help="Folder of the bundle.  [default: where it was announced to be]")
    ] = None,
    model: Annotated[
        str, typer.Option(help="bundle, or null for a stream that was made with the null model.")
    ] = "bundle",
    from_: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Folder of a snapshot: start from its cut and its state.  [default: all that pair-codes still have]",
        ),
    ] = None,
    bootstrap_servers: BootstrapServers = DEFAULT_BOOTSTRAP,
    kafka: KafkaSettings = None,
    kafka_properties: KafkaProperties = None,
    schemas: Schemas = None,
    schema_registry: SchemaRegistry = None,
    schema_registry_properties: SchemaRegistryProperties = None,
    json: Json = False,
) -> None:
    """Compare the stream with the batch reference: 0 missing, 0 extra, or the pairs that differ.

    Exit status 0: equal; 5: something differs; 4: what proves it has expired in part, and the rest is equal.

    Example: tldr-stream verify --topic raw-pairs
    """
    from stream.errors import TldrError
    from stream.results import show
    from stream.snapshot_state import read_state
    from stream.verify import models_of
    from stream.verify import verify as compare

    if model not in ("bundle", "null"):
        raise TldrError(f"--model {model}: use `bundle` or `null`")
    taken = read_state(from_) if from_ is not None else None
    source = _source(
        topic, stream, bootstrap_servers, kafka, kafka_properties, schemas, schema_registry, schema_registry_properties
    )
    found = compare(source, topic, models_of(source, bundle, null=model == "null"), taken=taken)
    show(found, json)
    found.raise_for_status()


@app.command(cls=JobCommand)
def explain(
    pair_id: Annotated[str, typer.Argument(metavar="ID", help="Id of the pair.")],
    topic: Topic,
    stream: Stream = None,
    bootstrap_servers: BootstrapServers = DEFAULT_BOOTSTRAP,
    kafka: KafkaSettings = None,
    kafka_properties: KafkaProperties = None,
    schemas: Schemas = None,
    schema_registry: SchemaRegistry = None,
    schema_registry_properties: SchemaRegistryProperties = None,
    json: Json = False,
) -> None:
    """Tell why a pair was kept, dropped, evicted, forgotten or dead-lettered.

    Example: tldr-stream explain https://example.org/cat.jpg --topic raw-pairs
    """
    from stream.explain import explain as look_up
    from stream.results import show

    show(
        look_up(
            _source(
                topic,
                stream,
                bootstrap_servers,
                kafka,
                kafka_properties,
                schemas,
                schema_registry,
                schema_registry_properties,
            ),
            pair_id,
        ),
        json,
    )


def _source(
    topic: str,
    stream: str | None,
    bootstrap_servers: str,
    kafka: list[str] | None,
    kafka_properties: Path | None,
    schemas: list[Path] | None = None,
    schema_registry: str | None = None,
    schema_registry_properties: Path | None = None,
) -> StreamSource:
    """Where a command that only reads finds the stream."""
    from stream.kafka import Connection
    from stream.stream_view import StreamSource
    from stream.topics import StreamTopics

    registry = None
    if schema_registry or schema_registry_properties:
        from stream.schema_registry import open_registry

        registry = open_registry(schema_registry, schema_registry_properties)
    connection = Connection.of(bootstrap_servers, kafka or (), kafka_properties)
    return StreamSource(connection, StreamTopics(stream or topic), tuple(schemas or ()), registry)


@app.command(cls=JobCommand)
def train(
    out: Annotated[Path, typer.Option(help="Folder for the captioner.")],
    noisy: Annotated[
        list[str] | None, typer.Option(help="Source of noisy pairs, for pre-training; repeatable.")
    ] = None,
    topic: Annotated[
        str | None, typer.Option(help="Raw topic with noisy pairs, instead of sources or with them.")
    ] = None,
    records: Annotated[int | None, typer.Option(help="Newest records of the topic.  [default: all]", min=1)] = None,
    clean: Annotated[list[str] | None, typer.Option(help="Source of clean pairs for fine-tuning; repeatable.")] = None,
    architecture: Annotated[
        str, typer.Option(help="`paper` (ViT-B/16, 3000 codes, BERT decoder), `authors` or `tiny`, for CPUs.")
    ] = "paper",
    exclude: Annotated[
        list[str] | None, typer.Option(help="Source whose pairs are held out of training; repeatable.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any number of the architecture or its recipe; repeatable."),
    ] = None,
    text_encoder: Annotated[
        str | None, typer.Option(help="BERT that embeds keywords: folder or hub id.  [default: the packaged MiniLM]")
    ] = None,
    encoder_weights: Annotated[
        str | None, typer.Option(help="ViT or BLIP that the image encoder starts from: folder or hub id.")
    ] = None,
    decoder_weights: Annotated[
        str | None, typer.Option(help="BERT that the decoder starts from: folder or hub id.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder for the features of a frozen encoder.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of every choice.", min=0)] = 0,
    threads: Annotated[int | None, typer.Option(help="Threads of torch.  [default: one a core]", min=1)] = None,
    raw_format: Annotated[
        str, typer.Option(help="How the topic's records are written: tldr, json, avro or confluent.")
    ] = "tldr",
    field: Annotated[
        list[str] | None, typer.Option(help="id, caption or image=dotted.path in a raw record; repeatable.")
    ] = None,
    bootstrap_servers: BootstrapServers = DEFAULT_BOOTSTRAP,
    kafka: KafkaSettings = None,
    kafka_properties: KafkaProperties = None,
    schema_registry: SchemaRegistry = None,
    schema_registry_properties: SchemaRegistryProperties = None,
    json: Json = False,
) -> None:
    """Train a codebook captioner (the paper's stage 1); `bootstrap` makes a bundle of it. Typed again after a kill, it goes on.

    Example: tldr-stream train --noisy './noisy/*.tar' --clean './clean/*.tar' --architecture tiny --out ./captioner

    Several GPUs: torchrun --nproc-per-node 8 -m stream train --noisy … --out captioner
    """
    from stream.results import show
    from stream.train import train as job

    topic_pairs = None
    if topic is not None:
        from stream.raw_format import raw_reader
        from stream.topic_pairs import pairs_of_topic

        source = _source(
            topic, None, bootstrap_servers, kafka, kafka_properties, None, schema_registry, schema_registry_properties
        )
        reader = raw_reader(raw_format, field or (), registry=source.registry)
        topic_pairs = partial(pairs_of_topic, source.connection, topic, reader, records)
    result = job(
        noisy or [],
        clean or [],
        out,
        architecture=architecture,
        settings=settings or (),
        exclude=exclude or (),
        text_encoder=text_encoder,
        encoder_weights=encoder_weights,
        decoder_weights=decoder_weights,
        cache=cache,
        seed=seed,
        threads=threads,
        topic=topic and f"{topic}, {records or 'all'}",
        topic_pairs=topic_pairs,
        progress=_say,
    )
    if result is not None:  # only the first process of a torchrun has something to say
        show(result, json)


@app.command(cls=JobCommand)
def bootstrap(
    captioner: Annotated[
        Path, typer.Option(help="Folder that `train` wrote, or a bundle whose clusters are replaced.")
    ],
    sources: Annotated[
        list[str] | None, typer.Argument(metavar="[SOURCE...]", help="The bootstrap shard, as `ingest` reads it.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the bundle; not with --sweep.")] = None,
    topic: Annotated[
        str | None, typer.Option(help="Raw topic with the shard, instead of sources or with them.")
    ] = None,
    records: Annotated[int | None, typer.Option(help="Newest records of the topic.  [default: all]", min=1)] = None,
    clusters: Annotated[int | None, typer.Option(help="Clusters N.  [default: the rule's, else 3000]", min=1)] = None,
    rule: Annotated[str | None, typer.Option(help="`paper` (3000, raw vectors) or `authors` (1000).")] = None,
    feature: Annotated[
        str, typer.Option(help="What is clustered: codes; or image or text, to compare: no stream can use those.")
    ] = "codes",
    form: Annotated[
        str | None,
        typer.Option(help="Form of codes: mean, histogram, pca or raw.  [default: the rule's, else mean]"),
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Source whose pairs are left out; repeatable.")] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option(help="Source of pairs that training has not seen, for gate and ITM baseline; repeatable."),
    ] = None,
    itm: Annotated[
        str | None,
        typer.Option(help="Scorer: own (the bundle's head) or blip:FOLDER.  [default: what the captioner folder has]"),
    ] = None,
    text_encoder: Annotated[
        str | None,
        typer.Option(help="BERT that compares T_o with T_g: folder or hub id.  [default: the packaged MiniLM]"),
    ] = None,
    sweep: Annotated[
        list[int] | None, typer.Option(help="Fit this N, write nothing, show what comes of it; repeatable.")
    ] = None,
    volume: Annotated[int, typer.Option(help="With --sweep: records that are expected.", min=1)] = 1_000_000,
    partitions: Annotated[int, typer.Option(help="With --sweep: partitions of the raw topic.", min=1)] = 8,
    seed: Annotated[int, typer.Option(help="Seed of K-Means.", min=0)] = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda[:N].  [default: a GPU where there is one]")] = None,
    announce: Annotated[bool, typer.Option("--announce", help="Announce the bundle to the workers.")] = False,
    raw_format: Annotated[
        str, typer.Option(help="How the topic's records are written: tldr, json, avro or confluent.")
    ] = "tldr",
    field: Annotated[
        list[str] | None, typer.Option(help="id, caption or image=dotted.path in a raw record; repeatable.")
    ] = None,
    raw_schema: Annotated[
        Path | None, typer.Option(help="Avro schema (*.avsc) of plain raw records; with avro only.")
    ] = None,
    schemas: Schemas = None,
    bootstrap_servers: BootstrapServers = DEFAULT_BOOTSTRAP,
    kafka: KafkaSettings = None,
    kafka_properties: KafkaProperties = None,
    schema_registry: SchemaRegistry = None,
    schema_registry_properties: SchemaRegistryProperties = None,
    json: Json = False,
) -> None:
    """Fit clusters to the index vectors of a bootstrap shard, and write the bundle that workers load.

    Example: tldr-stream bootstrap './shard/*.tar' --captioner ./captioner --clusters 3000 --out ./bundle --announce
    """
    from stream.bootstrap import bootstrap as job
    from stream.bootstrap import sweep as sweep_job
    from stream.bundles import announce_folder
    from stream.errors import TldrError
    from stream.kafka import Connection
    from stream.raw_format import raw_reader
    from stream.results import show
    from stream.schema_registry import open_registry
    from stream.topic_pairs import pairs_of_topic

    connection = Connection.of(bootstrap_servers, kafka or (), kafka_properties)
    if not sources and topic is None:
        raise TldrError("nothing to cluster: name a source, or a raw topic with --topic")
    if announce and feature != "codes":
        raise TldrError(
            f"clusters of the feature {feature} cannot be announced: a stream records code indices and decides by them alone"
        )
    of_topic = None
    if topic is not None:
        registry = open_registry(schema_registry, schema_registry_properties)
        reader = raw_reader(raw_format, field or (), schemas or (), raw_schema, registry)
        of_topic = partial(pairs_of_topic, connection, topic, reader, records)
    if sweep:
        swept = sweep_job(
            sources or (),
            captioner,
            sweep,
            form=form,
            exclude=exclude or (),
            topic_pairs=of_topic,
            volume=volume,
            partitions=partitions,
            seed=seed,
            device=device,
            progress=_say,
        )
        show(swept, json)
        return
    if out is None:
        raise TldrError("--out FOLDER is missing: where shall the bundle be written?")
    result = job(
        sources or (),
        captioner,
        out,
        clusters=clusters,
        form=form,
        rule=rule,
        feature=feature,
        exclude=exclude or (),
        held_out=held_out or (),
        topic_pairs=of_topic,
        itm=itm,
        text_encoder=text_encoder,
        seed=seed,
        device=device,
        progress=_say,
    )
    if announce:
        announce_folder(connection, out)
    show(result, json)


@app.command(cls=JobCommand)
def plan(
    pairs_per_second: Annotated[float | None, typer.Option(help="Raw pairs a second, on average.")] = None,
    pairs_per_day: Annotated[float | None, typer.Option(help="… or a day.")] = None,
    gpu: Annotated[str, typer.Option(help="h200, h100, a100, l40s, l4; or cpu, with the sample bundle.")] = "h100",
    images_per_second: Annotated[
        float | None,
        typer.Option(help="What your GPU does with your bundle, measured.  [default: assumed for the GPU]"),
    ] = None,
    ratio: Annotated[str, typer.Option(help="Share M of each cell that is kept: 25, 25% or 1/4.")] = "25%",
    record_bytes: Annotated[int, typer.Option(help="Bytes of a raw record: image and caption.")] = 30_000,
    clusters: Annotated[int, typer.Option(help="Clusters N.")] = 3000,
    tokens: Annotated[int, typer.Option(help="Codes of an index vector, L.")] = 196,
    days: Annotated[float, typer.Option(help="How long the stream is to run on these disks.")] = 90.0,
    duplicates: Annotated[float, typer.Option(help="Share of the pairs that were seen before.")] = 0.0,
    cell_cap: Annotated[
        int | None, typer.Option(help="Most pairs a cell may hold.  [default: no limit]", min=1)
    ] = None,
    dedupe_window: Annotated[
        int | None, typer.Option(help="Offsets for which an id is remembered.  [default: for ever]", min=1)
    ] = None,
    raw_retention_days: Annotated[float, typer.Option(help="How long raw pairs stay on the topic.")] = 7.0,
    replication: Annotated[int, typer.Option(help="Replicas of each partition.")] = 3,
    headroom: Annotated[float, typer.Option(help="How much faster than the pairs come workers shall be.")] = 1.5,
    growth: Annotated[float, typer.Option(help="How many times the workers the partitions leave room for.")] = 4.0,
    decode_per_core: Annotated[float, typer.Option(help="Images that a core decodes a second.")] = 700.0,
    json: Json = False,
) -> None:
    """Compute what a stream needs: workers, partitions, cores, memory, disks, traffic; docs/operate.md has the formulas.

    Example: tldr-stream plan --pairs-per-second 1000 --gpu h100
    """
    from stream.errors import TldrError
    from stream.plan import DAY_S, Load
    from stream.plan import plan as compute
    from stream.results import show

    if (pairs_per_second is None) == (pairs_per_day is None):
        raise TldrError("give --pairs-per-second or --pairs-per-day, one of them")
    load = Load(
        pairs_per_second=pairs_per_second if pairs_per_second is not None else (pairs_per_day or 0.0) / DAY_S,
        gpu=gpu,
        images_per_second=images_per_second,
        ratio=ratio,
        record_bytes=record_bytes,
        clusters=clusters,
        tokens=tokens,
        days=days,
        duplicates=duplicates,
        cell_cap=cell_cap,
        dedupe_window=dedupe_window,
        raw_retention_days=raw_retention_days,
        replication=replication,
        headroom=headroom,
        growth=growth,
        decode_per_core=decode_per_core,
    )
    show(compute(load), json)


@app.command(cls=JobCommand)
def recluster(
    topic: Topic,
    stream: Stream = None,
    bundle: Annotated[
        str | None, typer.Option(help="Folder of the stream's bundle.  [default: where it was announced to be]")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(help="Folder or fsspec URL for the new bundle.  [default: STREAM-VERSION beside the live one]"),
    ] = None,
    records: Annotated[int, typer.Option(help="Newest raw records of the window.", min=1)] = 1_000_000,
    since: Annotated[
        str | None, typer.Option(help="Take no older ones than this: 30min, 12h, 7d.  [default: any]")
    ] = None,
    memory_mb: Annotated[
        int,
        typer.Option(
            help="Most megabytes for sampling, fitting and foretelling, beside the program and the bundle itself; of more "
            "pairs or entries than that holds, a uniform sample is taken.",
            min=64,
        ),
    ] = 1024,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what a switch would do; write and announce nothing.")
    ] = False,
    if_drift: Annotated[
        bool,
        typer.Option(
            "--if-drift", help="Only if cluster occupancy or quantisation error have drifted; for a cron job."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of sample and K-Means.", min=0)] = 0,
    bootstrap_servers: BootstrapServers = DEFAULT_BOOTSTRAP,
    kafka: KafkaSettings = None,
    kafka_properties: KafkaProperties = None,
    schemas: Schemas = None,
    schema_registry: SchemaRegistry = None,
    json: Json = False,
) -> None:
    """Fit new clusters to a stream's newest index vectors, say what changes, and announce the bundle to its workers.

    Exit status 0: announced (with --dry-run: predicted); 9: --if-drift found none, so nothing was done.

    Example: tldr-stream recluster --topic raw-pairs --since 7d --dry-run
    """
    from stream.recluster import ReclusterOptions
    from stream.recluster import recluster as job
    from stream.results import show

    source = _source(topic, stream, bootstrap_servers, kafka, kafka_properties, schemas, schema_registry)
    result = job(ReclusterOptions(source, bundle, out, records, since, memory_mb, seed, dry_run, if_drift), _say)
    show(result, json)
    if result.exit_status:
        raise typer.Exit(result.exit_status)


def _say(line: str) -> None:
    """Progress of a long job, apart from its result."""
    typer.echo(line, err=True)


def commands() -> dict[str, Any]:
    """Our commands by name, for the `typer` executable (stream/__init__.py)."""
    return dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def main() -> None:
    """The console script."""
    app(prog_name="tldr-stream")
