"""Writes docs/configuration.md from the settings: `python docs/configuration.py`. A test holds it up to date."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ptune.config.candidates import SearchConfig
from ptune.config.run import (
    DataConfig,
    EncoderConfig,
    ModelConfig,
    PromptConfig,
    RunConfig,
    StartConfig,
    TrainingConfig,
)
from ptune.config.task import TASK_CONFIGS

PAGE = Path(__file__).with_suffix(".md")

SECTIONS: dict[str, type[BaseModel]] = {
    "model": ModelConfig,
    "data": DataConfig,
    **{f"task, type {settings.model_fields['type'].default}": settings for settings in TASK_CONFIGS},
    "prompt": PromptConfig,
    "prompt.encoder": EncoderConfig,
    "prompt.start": StartConfig,
    "training": TrainingConfig,
    "search, for `ptune search` alone": SearchConfig,
}

INTRODUCTION = """# Settings

All settings of a run, in one YAML file or as keyword arguments of `ptune.RunConfig`. Only `task` and `prompt.template`
must be given. On the command line each goes by its name: `--training.learning_rate 0.003`, or `--learning-rate 0.003`
where the last part is unique. A name that does not exist is refused with the nearest right one, and all mistakes are
reported at once.

Made from `src/ptune/config/run.py`, `src/ptune/config/task.py` and `src/ptune/config/candidates.py`.
"""

REASONS = """
## Why these defaults

- **The encoder is a residual `mlp`, zero at the start.** Virtual tokens that begin as words the model knows learn from
  the first step; from noise, most of a short run goes into finding the region where words live (prompt tuning in PEFT's
  own comparison of methods, GSM8K after 250 steps: 0.30 from sampled words, 0.00 from noise).
- **`learning_rate` 0.005.** ptune's encoder works in units of the embeddings' scale, so a rate means the same on every
  backbone. Trainer's 5e-5 leaves ten virtual tokens where they started.
- **No weight decay.** There are a few thousand trained numbers, and the best checkpoint on dev is kept anyway.
- **Warm-up and clipping are on**, since a prompt that is thrown far from the vocabulary in its first steps rarely comes
  back.
- **Ten evaluations, best checkpoint kept**: the last step is seldom the best.
"""


def page() -> str:
    """Return the whole page."""
    parts = [INTRODUCTION, table("top level", RunConfig)]
    parts += [table(name, settings) for name, settings in SECTIONS.items()]
    return "\n".join(parts) + REASONS


def table(name: str, settings: type[BaseModel]) -> str:
    """Return one class of settings as a heading and a table."""
    heading = [f"## {name}", "", (settings.__doc__ or "").strip().splitlines()[0].replace("``", "`"), ""]
    rows = ["| setting | values | default | |", "| --- | --- | --- | --- |"]
    rows += [row(field_name, field) for field_name, field in settings.model_fields.items()]
    return "\n".join([*heading, *rows, ""])


def row(name: str, field: FieldInfo) -> str:
    """Return the row of one setting."""
    default = field.get_default(call_default_factory=True)
    nested = isinstance(default, BaseModel)
    shown = "required" if field.is_required() else "below" if nested else f"`{plain(default)}`"
    description = (field.description or "").replace("|", "\\|")
    return f"| `{name}` | {values(field.annotation)} | {shown} | {description} |"


def plain(value: Any) -> str:
    """Return a default as YAML has it."""
    constants = {None: "null", True: "true", False: "false", (): "[]"}
    return constants[value] if value is None or isinstance(value, bool) or value == () else str(value)


def values(annotation: Any) -> str:
    """Return what a setting may be."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{argument}`" for argument in arguments)
    if origin in (Union, types.UnionType):
        kinds = [argument for argument in arguments if argument is not type(None)]
        if all(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in kinds):
            return "section"
        return " or ".join(values(kind) for kind in kinds)
    if origin in (dict, tuple):
        return {dict: "mapping", tuple: "list"}[origin]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return {"str": "text", "bool": "true, false", "int": "whole number", "float": "number", "Path": "path"}.get(
        getattr(annotation, "__name__", ""), "section"
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE.name} written")
