"""The files of a soft prompt: what stands in ``ptune.json``, and how a folder stays whole while it is saved anew.

    soft_prompt.safetensors   the virtual tokens, or a deep prompt's keys and values, and a linear head, written first
    adapter_*, README.md      PEFT's own pair where it fits, and a model card
    ptune.json                everything else and the SHA-256 of the tensors, written last: the save is complete

Until a new save is complete, the tensors that ``ptune.json`` means are kept beside the new ones, so that at every
moment the folder loads as the old soft prompt or the new one.

Knows the settings' names and nothing of templates, backbones or models. Shapes: P virtual tokens, H width, W as in
`keys_and_values`.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_serializer, field_validator
from pydantic_core import PydanticSerializationError
from torch import Tensor

from ptune.config.mistakes import said_of
from ptune.config.run import EncoderConfig, Overlong
from ptune.config.settings import Settings
from ptune.config.task import TaskConfig
from ptune.errors import OutputError, SoftPromptError
from ptune.files import (
    missing_file,
    read_json,
    read_tensors,
    tensors_hash,
    what_is_at,
    write_atomically,
    write_json,
    write_tensors,
)
from ptune.prompts.keys_and_values import KeyValueShape
from ptune.prompts.linear_head import LinearHead, head_from, head_tensors
from ptune.soft_prompts.model_card import CARD, is_model_card
from ptune.soft_prompts.peft_format import ADAPTER_CONFIG, ADAPTER_TENSORS

DESCRIPTION = "ptune.json"
TENSORS = "soft_prompt.safetensors"
FORMAT_VERSION = 1
_PREVIOUS = ".soft_prompt.previous.safetensors"
_KEY = "virtual_tokens"
_DEEP_KEY = "keys_and_values"
_ATTEMPTS = 3
"""How often a folder is read anew whose description and tensors differ, for another process may be saving in it."""


class Fingerprint(BaseModel):
    """What `Backbone.fingerprint` gives."""

    model_config = ConfigDict(extra="allow", frozen=True)
    kind: str
    config: dict[str, Any]
    rows: list[float]


class BackboneEntry(Settings):
    """Which backbone the soft prompt belongs to."""

    name: str
    fingerprint: Fingerprint


class TensorsEntry(Settings):
    """Which tensors belong to the description: P, H, and the SHA-256 of their file."""

    count: int
    width: int
    sha256: str


class HeadEntry(Settings):
    """Of which shape the linear head is: C outputs, and H."""

    outputs: int
    width: int


_SUMMARY: dict[str, type] = {
    **dict.fromkeys(("before", "after", "training", "model", "imported", "versions"), dict),
    **dict.fromkeys(("metric", "date"), str),
}
"""What readers of a summary look into, and as what; the rest of it is as its writer likes."""


class Description(Settings):
    """What ``ptune.json`` holds."""

    format_version: Literal[1]
    template: str
    task: TaskConfig
    max_length: int | None
    overlong: Overlong
    encoder: EncoderConfig | None
    backbone: BackboneEntry
    virtual_tokens: TensorsEntry
    deep: KeyValueShape | None = None
    head: HeadEntry | None = None
    temperature: float | None = Field(None, gt=0, allow_inf_nan=False)
    summary: dict[str, Any]

    @field_validator("summary")
    @classmethod
    def _summary_as_runs_write_it(cls, summary: dict[str, Any]) -> dict[str, Any]:
        for name, value in summary.items():
            kind = _SUMMARY.get(name)
            if kind is not None and value is not None and not isinstance(value, kind):
                raise ValueError(f"takes {'names with values' if kind is dict else 'a text'} as {name}")
        return summary

    @field_serializer("encoder")
    def _encoder_as_it_was_given(self, encoder: EncoderConfig | None) -> dict[str, Any] | None:
        return encoder_values(encoder)


def encoder_values(encoder: EncoderConfig | None) -> dict[str, Any] | None:
    """Return an encoder's settings as JSON values that the settings take back."""
    if encoder is None:
        return None
    # An embedding refuses every other setting, as it would be ignored, those it was filled up with included.
    return {"type": "embedding"} if encoder.type == "embedding" else encoder.model_dump(mode="json")


def begin_save(folder: Path, rows: Tensor, deep: KeyValueShape | None = None, head: LinearHead | None = None) -> str:
    """Write the virtual tokens ``[P, H]``, or keys and values ``[P, W]``, and the head; return their file's SHA-256.

    `end_save` makes them count.

    Raises:
        OutputError: the folder cannot be written.
    """
    with contextlib.suppress(SoftPromptError):  # there is nothing yet that would load
        if tensors_hash(folder / TENSORS, SoftPromptError) == read_description(folder).virtual_tokens.sha256:
            write_atomically(folder / _PREVIOUS, lambda temporary: _copy(folder / TENSORS, temporary))
    write_tensors(folder / TENSORS, {_DEEP_KEY if deep else _KEY: rows} | head_tensors(head), {"format": "pt"})
    return tensors_hash(folder / TENSORS, SoftPromptError)


def description_values(folder: Path, **members: Any) -> Any:
    """Return what ``ptune.json`` is to hold, the members of a `Description`, as JSON values.

    Raises:
        OutputError: a member is not what is read back, or JSON has no form for it.
    """
    try:
        text = Description(**members).model_dump_json()  # pydantic's, in which a metric that is not a number is null
    except ValidationError as error:
        raise OutputError(f'cannot write "{folder / DESCRIPTION}": {_mistakes(error)}') from None
    except PydanticSerializationError as error:
        raise OutputError(
            f'cannot write "{folder / DESCRIPTION}": the summary expected JSON values ({error}); give numbers and text'
        ) from error
    return json.loads(text)


def end_save(folder: Path, values: Any) -> None:
    """Write the description of `description_values`: from here on the folder holds the new soft prompt.

    Raises:
        OutputError: the folder cannot be written.
    """
    write_json(folder / DESCRIPTION, values)
    (folder / _PREVIOUS).unlink(missing_ok=True)


def read_soft_prompt(folder: Path) -> tuple[Tensor, LinearHead | None, Description]:
    """Return the virtual tokens as they are stored, ``[P, H]`` or ``[P, W]``, the linear head if any, and the rest.

    Raises:
        SoftPromptError: no such folder, no soft prompt in it, written by a newer ptune, or altered or cut short.
    """
    for _ in range(_ATTEMPTS):
        description = read_description(folder)
        tensors = _tensors_of(folder, description)
        if tensors is not None:
            return _rows_of(folder, tensors, description), head_from(tensors), description
    path = folder / TENSORS
    if not path.is_file():
        raise SoftPromptError(f'"{folder}" is damaged: it has no {TENSORS}; copy the folder again')
    raise SoftPromptError(
        f'"{path}" was altered or cut short: its SHA-256 is not the one in {DESCRIPTION}; copy the folder again, or '
        "save the soft prompt anew"
    )


def size_in_bytes(folder: str | Path) -> int:
    """Return how many bytes a soft prompt takes: all of its files, those of its run aside.

    Raises:
        SoftPromptError: there is no soft prompt in ``folder``.
    """
    folder = Path(folder)
    _check_folder(folder)
    names = (DESCRIPTION, TENSORS, ADAPTER_CONFIG, ADAPTER_TENSORS, CARD)
    return sum((folder / name).stat().st_size for name in names if (folder / name).is_file())


def remove_soft_prompt(folder: Path) -> None:
    """Remove a soft prompt's files, the description first, so that it is there whole or not at all.

    What else stands in the folder stays: its run, and a README that is not ptune's.

    Raises:
        OutputError: a file cannot be removed.
    """
    names = [DESCRIPTION, TENSORS, _PREVIOUS, ADAPTER_CONFIG, ADAPTER_TENSORS]
    if is_model_card(folder / CARD):
        names.append(CARD)
    try:
        for name in names:
            (folder / name).unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()
    except OSError as error:
        raise OutputError(f'cannot remove the soft prompt in "{folder}": {error}; see to its permissions') from error


def _check_folder(folder: Path) -> None:
    """See that a soft prompt stands in ``folder``.

    Raises:
        SoftPromptError: it does not; says what stands there instead.
    """
    found = what_is_at(folder)
    if found == "file":
        raise SoftPromptError(f'"{folder}" is a file; a soft prompt is given as its folder')
    if found is None:
        raise SoftPromptError(missing_file(folder, "soft prompt folder"))
    if (folder / DESCRIPTION).is_file():
        return
    within = sorted(p.parent.name for p in folder.glob(f"*/{DESCRIPTION}"))
    if within:
        mend = f"name one of the soft prompts in it: {', '.join(within)}"
    elif (folder / TENSORS).is_file():
        mend = "its saving or copying was cut off, so save or copy it again"
    elif (folder / ADAPTER_CONFIG).is_file():
        mend = "it is an adapter of PEFT, so import it first by `ptune import`"
    elif (folder / "run").is_dir():
        mend = "its run has not ended yet, so go on with it by --resume"
    else:
        mend = "name the folder that a run wrote"
    raise SoftPromptError(f'"{folder}" is no soft prompt: it has no {DESCRIPTION}; {mend}')


def read_description(folder: Path) -> Description:
    """Return what ``ptune.json`` says, its tensors unread.

    Raises:
        SoftPromptError: no such folder, no soft prompt in it, written by a newer ptune, or altered.
    """
    _check_folder(folder)
    path = folder / DESCRIPTION
    values = read_json(path, SoftPromptError)
    version = values.get("format_version") if isinstance(values, dict) else None
    if type(version) is not int or version < 1:
        raise SoftPromptError(
            f'"{path}" expected format_version {FORMAT_VERSION} and holds {version!r}; it is not ptune\'s or was '
            "altered, so copy it again"
        )
    if version > FORMAT_VERSION:
        raise SoftPromptError(
            f'"{path}" is of format_version {version}, and this ptune reads up to {FORMAT_VERSION}; it was written by '
            "a newer ptune: upgrade by pip install -U ptune"
        )
    try:
        return Description.model_validate(values)
    except ValidationError as error:
        raise SoftPromptError(
            f'"{path}" was altered or comes from another version of ptune ({_mistakes(error)}); copy it again or '
            "upgrade ptune"
        ) from None


def _mistakes(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, entry['loc']))}{said_of([entry])}" for entry in error.errors()[:3])


def _tensors_of(folder: Path, description: Description) -> dict[str, Tensor] | None:
    """Return the tensors that ``ptune.json`` means: the newest, or those before them if a save was cut off."""
    for name in (TENSORS, _PREVIOUS):
        with contextlib.suppress(SoftPromptError):  # gone or damaged: then it is not what is looked for
            tensors = read_tensors(folder / name, SoftPromptError)
            if tensors_hash(folder / name, SoftPromptError) == description.virtual_tokens.sha256:
                return tensors
    return None


def _rows_of(folder: Path, tensors: dict[str, Tensor], description: Description) -> Tensor:
    key, entry = _DEEP_KEY if description.deep else _KEY, description.virtual_tokens
    expected = {key: [entry.count, entry.width]}
    if (head := description.head) is not None:
        expected |= {"head.weight": [head.outputs, head.width], "head.bias": [head.outputs]}
    found = {name: list(tensor.shape) for name, tensor in sorted(tensors.items())}
    if found != expected:
        wanted, listed = (", ".join(f"{name} {shape}" for name, shape in all.items()) for all in (expected, found))
        raise SoftPromptError(
            f'"{folder / TENSORS}" expected {"the tensors" if head else "one tensor"} {wanted} and holds '
            f"{listed or 'none'}; copy the soft prompt's folder again"
        )
    return tensors[key]


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
