"""The command line ``des``: its commands, and one exit code for each way to end.

Every command takes ``--json`` and then prints one JSON object as the last line of standard output. Exit codes: 0 done,
2 the user's mistake, 130 and 143 interrupted (SIGINT, SIGTERM), 1 anything else. An error is one line on standard
error.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from components.launch.process_tie import told_to_end
from des_core import __version__
from des_core.errors import DesError, UserError, of_system
from pipelines.commands import checkpoint, day, schedule
from pipelines.commands.clean import clean
from pipelines.commands.compile import compile_
from pipelines.commands.evaluate import evaluate
from pipelines.commands.generate import generate
from pipelines.commands.ingest import ingest
from pipelines.commands.lineage import lineage
from pipelines.commands.output import crash, fail
from pipelines.commands.plan import plan
from pipelines.commands.predict import predict
from pipelines.commands.register import register
from pipelines.commands.run import run
from pipelines.commands.serve import serve
from pipelines.commands.submit import submit
from pipelines.commands.train import train

app = typer.Typer(
    name="des",
    help="Click models trained synchronously on several workers, from raw logs to a registered version.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

COMMANDS: dict[str, typer.Typer | Callable[..., None]] = {
    "run": run,
    "day": day.app,
    "compile": compile_,
    "submit": submit,
    "schedule": schedule.app,
    "ingest": ingest,
    "train": train,
    "evaluate": evaluate,
    "register": register,
    "predict": predict,
    "serve": serve,
    "lineage": lineage,
    "checkpoint": checkpoint.app,
    "clean": clean,
    "plan": plan,
    "generate": generate,
}
GO_ON = {
    "run": "; the same command goes on from what is done",
    "train": "; des train --resume goes on from the last checkpoint, if there is one",
}
"""What can be done after an interruption."""

for _name, _command in COMMANDS.items():
    if isinstance(_command, typer.Typer):
        app.add_typer(_command, name=_name)
    else:
        app.command(name=_name)(_command)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"des {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Entry point: one command, one exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        # A locale without a letter shows its escape.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(_run(words or ["--help"]))


class Interrupted(DesError):
    """A signal ended the command."""

    code = "interrupted"

    def __init__(self, words: list[str], number: int) -> None:
        super().__init__("interrupted" + GO_ON.get(words[0], ""))
        self.exit_code = 128 + number


def _run(words: list[str]) -> int:
    as_json = "--json" in words
    try:
        with told_to_end():
            code = app(words, prog_name="des", standalone_mode=False)
        sys.stdout.flush()
        return int(code or 0) if code != 128 + signal.SIGINT else fail(as_json, Interrupted(words, signal.SIGINT))
    except (KeyboardInterrupt, typer.Abort):
        return fail(as_json, Interrupted(words, signal.SIGINT))
    except SystemExit as error:
        if error.code != 128 + signal.SIGTERM:
            raise
        return fail(as_json, Interrupted(words, signal.SIGTERM))
    except typer.TyperException as error:
        return fail(as_json, UserError(f"{error.format_message().rstrip('.')}; see: {_help(words)}"))
    except BrokenPipeError:
        # The reader of our output, such as head, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        known = of_system(error) if isinstance(error, OSError) else error
        return fail(as_json, known if isinstance(known, DesError) else crash(error))


def _help(words: list[str]) -> str:
    """The command line that explains what was meant by a wrong one."""
    command = COMMANDS.get(words[0])
    known = [words[0]] if command else []
    if isinstance(command, typer.Typer):
        subcommands = typer.main.get_group(command).commands
        known += [word for word in words[1:2] if word in subcommands]
    return " ".join(["des", *known, "--help"])


if __name__ == "__main__":
    main()
