"""Writes docs/commands.md from the commands: `python docs/commands.py`. A test holds it up to date."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer.main import get_command

from ptune.cli import app

PAGE = Path(__file__).with_suffix(".md")
WIDTH = 100

INTRODUCTION = """# Commands

The help of every command. `train`, `search` and `inspect data` take every [setting](configuration.md) besides, by its
name. A mistake is one sentence and exit code 2; after Ctrl-C the exit code is 130.

Made from `src/ptune/cli/`.
"""


def page() -> str:
    """Return the whole page."""
    group: Any = get_command(app)
    parts = [INTRODUCTION, help_of(group, "ptune")]
    parts += [f"## {name}\n\n{help_of(command, f'ptune {name}')}" for name, command in group.commands.items()]
    return "\n".join(parts)


def help_of(command: Any, name: str) -> str:
    """Return a command's help as plain text of one width, whatever the terminal is."""
    command.rich_markup_mode = None  # no boxes, no colours
    context = command.context_class(command, info_name=name, terminal_width=WIDTH, max_content_width=WIDTH)
    return f"```text\n{command.get_help(context)}\n```\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE.name} written")
