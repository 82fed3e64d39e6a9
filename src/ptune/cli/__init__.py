"""The command line: `ptune train / search / eval / predict / inspect / report / merge / serve ...`. Each is thin.

Nothing here computes: commands read arguments, call the library and show what it returns. Nothing heavy is imported
before a command runs, so that help is instant. A `PtuneError` becomes one sentence and exit code 2.
"""

from __future__ import annotations

import os
import sys

import typer

from ptune.cli.cache import cache
from ptune.cli.demo import demo
from ptune.cli.evaluate import evaluate, predict
from ptune.cli.generate import generate
from ptune.cli.import_peft import import_peft
from ptune.cli.inspect import inspect
from ptune.cli.list import list_prompts
from ptune.cli.merge import merge
from ptune.cli.report import report
from ptune.cli.search import search
from ptune.cli.serve import serve
from ptune.cli.train import train
from ptune.errors import ConfigError, PtuneError

_ANY_SETTING = {"allow_extra_args": True, "ignore_unknown_options": True}

app = typer.Typer(
    name="ptune",
    help="P-tuning: teach a frozen language model a task by training a few virtual tokens, and nothing else.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command(context_settings=_ANY_SETTING)(train)
app.command(context_settings=_ANY_SETTING)(search)
app.command("eval")(evaluate)
app.command()(predict)
app.command()(generate)
app.command(context_settings=_ANY_SETTING)(inspect)
app.command()(report)
app.command("list")(list_prompts)
app.command()(merge)
app.command("import")(import_peft)
app.command()(serve)
app.command()(cache)
app.command()(demo)


@app.callback(invoke_without_command=True)
def _options(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        from ptune import __version__

        typer.echo(__version__)
        raise typer.Exit


def _check_arguments(arguments: list[str]) -> None:
    """See that all arguments are text.

    Raises:
        ConfigError: the bytes of one are not UTF-8.
    """
    for number, argument in enumerate(arguments, 1):
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError:
            raise ConfigError(
                f"argument {number} should be text in UTF-8, and is {os.fsencode(argument)!r}; set the terminal to "
                "UTF-8, or put the text into a file in UTF-8"
            ) from None


def main() -> None:
    """Run the command line. Exit codes: 0 done, 2 the user's mistake, 130 stopped by Ctrl-C."""
    try:
        _check_arguments(sys.argv[1:])
        app()
    except PtuneError as error:
        print(f"ptune: {error}", file=sys.stderr)
        sys.exit(2)
