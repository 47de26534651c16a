"""The `edgellm` command.

Exit codes: 0 done, 1 failed, 2 usage, 3 bad input file, 4 budget unreachable, 130 cancelled.
"""

from __future__ import annotations

import importlib
import logging
import sys
from typing import Annotated

import typer

import edgellm
from edgellm.cli.console import INTERRUPTED, report

# by name; the function stands in the module of that name
COMMANDS = {
    "convert": "convert", "chat": "chat", "run": "run", "batch": "batch", "draft": "draft", "inspect": "inspect",
    "models": "models", "tune": "tune", "bench": "bench", "doctor": "doctor", "demo": "demo", "eval": "evaluate",
}  # fmt: skip


def app_for(arguments: list[str]) -> typer.Typer:
    """With the command that is asked for, or where none is, with all: making all takes longer than starting."""
    app = typer.Typer(
        name="edgellm",
        no_args_is_help=True,
        add_completion=False,
        suggest_commands=False,  # click does
        rich_markup_mode=None,  # plain help and errors: rich is loaded only by commands that draw with it
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(edgellm_command)
    for name in arguments[:1] if arguments and arguments[0] in COMMANDS else COMMANDS:
        app.command(name)(getattr(importlib.import_module(f"edgellm.cli.{name}"), COMMANDS[name]))
    return app


def edgellm_command(
    version: Annotated[bool, typer.Option("--version", is_eager=True, help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the log, also of llama.cpp.")] = False,
) -> None:
    """Turn a fine-tuned model into a small GGUF, and run it on this machine."""


def main() -> None:
    """Run the command line and exit; what `edgellm` on the command line calls."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: list[str]) -> int:
    """One command line; returns its exit code and never raises."""
    arguments, debug = _take_debug(arguments)
    if "--version" in arguments[:1]:
        print(f"edgellm {edgellm.__version__}")
        return 0
    if debug:
        logging.basicConfig(stream=sys.stderr, level=logging.DEBUG)
    try:
        app_for(arguments)(arguments, prog_name="edgellm")
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as exc:
        # Ctrl-C inside a C function that calls back into Python can come out as a SystemError.
        return INTERRUPTED if isinstance(exc.__cause__, KeyboardInterrupt) else report(exc, debug)
    return 0


def _take_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """--debug counts wherever it stands before a `--`, as people put it last."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = [argument for argument in arguments[:end] if argument != "--debug"]
    return options + arguments[end:], len(options) < end
