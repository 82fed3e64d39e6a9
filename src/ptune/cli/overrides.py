"""What the command line says of a run's settings, for every command that reads a config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ptune.errors import ConfigError


def check_config_first(config: Path, command: str) -> None:
    """See that the word in the config file's place is no option, as which typer leaves unknown ones there.

    Raises:
        ConfigError: it is one.
    """
    if str(config).startswith("--"):
        raise ConfigError(
            f"{config} stands before the config file; give the config file first, and settings behind it: "
            f"ptune {command} CONFIG.yaml {config} ..."
        )


def run_overrides(
    arguments: list[str], *, model: str | None = None, data: str | None = None, output: Path | None = None
) -> dict[str, Any]:
    """Return settings by their paths; each goes before the file's.

    Args:
        arguments: settings by name, as typer leaves them over.
        model: folder, Hub name or ``mini``.
        data: the training data; the file's dev part is not for it, one among the arguments is.
        output: folder of the soft prompt.

    Raises:
        ConfigError: as `parse_overrides`; or a setting is given by its short option and by its name.
    """
    from ptune.config.file import parse_overrides

    overrides = parse_overrides(arguments)
    for option, value, name in (("model", model, "model.name"), ("data", data, "data.train")):
        if value is not None and name in overrides:
            raise ConfigError(f"--{option} and --{name} both say the same thing; give one of the two")
    if model is not None:
        overrides["model.name"] = model
    if data is not None:
        overrides = {"data.train": data, "data.dev": None} | overrides
    if output is not None:
        overrides["output"] = str(output)
    return overrides
