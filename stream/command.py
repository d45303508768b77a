"""How every command of the command line behaves: where its options come from, and how its errors look.

Must not know any job. An option's value comes from the command line, else from its environment variable `TLDR_<OPTION>`,
else from the TOML file given with `--config` (a table named as the command, else the top level), else its default.
An error that the user can put right is one line on standard error; its exit status is in docs/reference.md.
"""

from __future__ import annotations

import sys
import tomllib
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import typer.main
from typer import _click
from typer.core import TyperCommand, TyperGroup, TyperOption

from models.errors import ModelError
from models.threads import set_thread_environment
from state.errors import StateError
from stream.errors import TldrError

ENVIRONMENT_PREFIX = "TLDR_"
USER_ERROR_STATUS = 2
INTERRUPTED_STATUS = 130


class JobCommand(TyperCommand):
    """A subcommand: adds `--config`, names each option's environment variable, and prints errors as one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for option in self.params:
            if isinstance(option, TyperOption) and option.name and not option.envvar:
                option.envvar = ENVIRONMENT_PREFIX + _plain(option.name).upper()
                option.show_envvar = False  # eighty of them drown the help; docs/reference.md has the rule
        self.params.append(_config_option())

    def get_short_help_str(self, limit: int = 0) -> str:
        """The whole first sentence, which the list of commands then wraps; `limit` would cut it."""
        return " ".join((self.help or "").split("\n\n")[0].split())

    def make_context(
        self, info_name: str | None, args: list[str], parent: _click.Context | None = None, **extra: Any
    ) -> _click.Context:
        try:
            return super().make_context(info_name, args, parent, **extra)
        except _click.exceptions.UsageError as error:
            command = " ".join(["tldr-stream", *_groups_of(parent), info_name or ""])
            fail(f"{error.format_message().rstrip('.')} (see {command} --help)", USER_ERROR_STATUS)

    def invoke(self, ctx: _click.Context) -> Any:
        set_thread_environment()
        # torch warns of what it will one day replace; the user of a command can do nothing about it.
        warnings.filterwarnings("ignore", category=FutureWarning)
        try:
            return super().invoke(ctx)
        except TldrError as error:
            fail(str(error), error.exit_status)
        except (ModelError, StateError) as error:
            fail(str(error), USER_ERROR_STATUS)
        except KeyboardInterrupt:
            fail("interrupted", INTERRUPTED_STATUS)


class JobGroup(TyperGroup):
    """The top level: an unknown command or option is one line too."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: _click.Context | None = None, **extra: Any
    ) -> _click.Context:
        try:
            return super().make_context(info_name, args, parent, **extra)
        except _click.exceptions.NoArgsIsHelpError:
            raise  # it is the help itself
        except _click.exceptions.UsageError as error:
            fail(f"{error.format_message().rstrip('.')} (see tldr-stream --help)", USER_ERROR_STATUS)

    def resolve_command(
        self, ctx: _click.Context, args: list[str]
    ) -> tuple[str | None, _click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except _click.exceptions.UsageError as error:
            fail(f"{error.format_message().rstrip('.')} (see tldr-stream --help)", USER_ERROR_STATUS)


def fail_on_the_command_line(ctx: typer.Context, param: typer.CallbackParam, message: str) -> None:
    """Refuses a value that stands on the command line; the environment and a file may hold it."""
    if param.name and ctx.get_parameter_source(param.name) == _click.core.ParameterSource.COMMANDLINE:
        fail(f"{message}; the command line is shown to everybody on this machine (ps)", USER_ERROR_STATUS)


def fail(message: str, status: int) -> NoReturn:
    """Prints one line and leaves with `status`."""
    line = " ".join(message.split())
    typer.echo(f"error: {line}", err=True)
    sys.stdout.flush()
    raise typer.Exit(status)


def _plain(name: str) -> str:
    """An option's own name: Python's words have an underscore behind them as parameters (`from_`)."""
    return name.rstrip("_")


def _groups_of(parent: _click.Context | None) -> list[str]:
    """The groups that a command stands in, below the program: ["dlq"] for `tldr-stream dlq list`."""
    if parent is None or parent.parent is None:
        return []
    return [*_groups_of(parent.parent), parent.info_name or ""]


def _config_option() -> TyperOption:
    """`--config FILE`, made by Typer itself, since its option classes are not meant to be built by hand."""
    probe = typer.Typer(add_completion=False)

    @probe.command()
    def _command(
        config: Annotated[
            str | None,
            typer.Option(
                is_eager=True,
                expose_value=False,
                envvar=f"{ENVIRONMENT_PREFIX}CONFIG",
                show_envvar=False,
                callback=_read_config,
                help="TOML file with options (top level, or a table named as the command); the environment wins.",
            ),
        ] = None,
    ) -> None: ...

    option = typer.main.get_command(probe).params[0]
    if not isinstance(option, TyperOption):
        raise TypeError("Typer no longer makes options of this kind: see stream/command.py")
    return option


def _read_config(ctx: typer.Context, value: str | None) -> None:
    """Makes the file's values the defaults of the command that is being parsed."""
    if value is None:
        return
    path = Path(value)
    try:
        tables = tomllib.loads(path.read_text())
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}", USER_ERROR_STATUS)
    except tomllib.TOMLDecodeError as error:
        fail(f"{path} is not TOML: {error}", USER_ERROR_STATUS)
    command = " ".join([*_groups_of(ctx.parent), ctx.command.name or ""])
    shared = {key: item for key, item in tables.items() if not isinstance(item, dict)}
    own = tables
    for name in command.split():  # [consume], or [dlq.list]
        own = own.get(name, {})
    options = {_plain(option.name): option.name for option in ctx.command.params if option.name}
    # A shared key may belong to another command; one in the command's own table can only be a mistake.
    for key in own:
        if key.replace("-", "_") not in options:
            fail(f"{path}: {command} has no option {key!r}", USER_ERROR_STATUS)
    values = {key.replace("-", "_"): item for key, item in {**shared, **own}.items()}
    ctx.default_map = {options[key]: item for key, item in values.items() if key in options}
