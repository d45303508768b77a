"""tldr-stream: an endless Kafka stream of image-text pairs, reduced to a small training set, exactly once.

`typer stream consume …` is how the service is used. The `typer` executable knows only `run` and `utils` as commands of a
module, and imports this one while its own command group is the current context: so our commands are added to that group
here. Everywhere else importing `stream` does nothing.
"""

from __future__ import annotations

import sys

__version__ = "0.1.0"


def _join_the_typer_executable() -> None:
    cli = sys.modules.get("typer.cli")
    if cli is None:
        return
    import typer.main

    context = typer.main.get_current_context(silent=True)  # type: ignore[attr-defined]
    if context is None or not isinstance(context.command, cli.TyperCLIGroup):
        return
    from stream.cli import commands

    for name, command in commands().items():
        context.command.add_command(command, name)


_join_the_typer_executable()
