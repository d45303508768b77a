"""The command line: options, help, examples. Each command calls one job and shows what it returns.

Must not do work: jobs are imported inside the commands, so that `--help` needs neither torch nor Kafka.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import typer.main

from stream.command import JobCommand, JobGroup

app = typer.Typer(
    name="tldr-stream",
    cls=JobGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@app.callback()
def _top() -> None:
    """Shrinks an endless Kafka stream of image-text pairs to a small training set, continuously and exactly once."""


# Options that many commands share, so that they read the same everywhere.
BootstrapServers = Annotated[str, typer.Option(help="Kafka brokers, host:port[,host:port…].")]
KafkaSettings = Annotated[
    list[str] | None,
    typer.Option("--kafka", help="Any librdkafka setting, key=value; repeatable. Secrets belong in a file."),
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
    str | None, typer.Option(help="Confluent Schema Registry URL; records are then framed in its wire format.")
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


def commands() -> dict[str, Any]:
    """Our commands by name, for the `typer` executable (stream/__init__.py)."""
    return dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def main() -> None:
    """The console script."""
    app(prog_name="tldr-stream")
