"""Options that every command which loads a soft prompt's backbone takes, and what they come to."""

from __future__ import annotations

from typing import Annotated, Any

import typer

Model = Annotated[
    str | None, typer.Option(help="The backbone's folder or Hub name, where it is not the one the prompt names.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, typer.Option(help="Of the backbone: auto, float32, bfloat16, float16.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]


def loading(device: str, dtype: str, trust_remote_code: bool) -> dict[str, Any]:
    """Return the options as settings of a model.

    Raises:
        ConfigError: no such dtype.
    """
    from pydantic import ValidationError

    from ptune.config.mistakes import said_of
    from ptune.config.run import ModelConfig
    from ptune.errors import ConfigError

    settings = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    try:
        ModelConfig.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(f"--dtype{said_of(error.errors())}") from None  # the only one that is not any text
    return settings
