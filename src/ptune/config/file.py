"""Reads a run's settings from YAML and overrides, and words every mistake for the person who made it.

Knows the settings' names, not their meaning.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from ptune.config.mistakes import listed, said_of
from ptune.config.other_words import own_word
from ptune.config.run import RunConfig
from ptune.config.task import TASK_CONFIGS
from ptune.errors import ConfigError, did_you_mean
from ptune.files import missing_file, what_is_at


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a YAML file and return the settings of a run.

    Args:
        path: the file.
        overrides: dotted name -> value, as in ``{"training.seed": 3}``; they go before the file.

    Raises:
        ConfigError: no such file, no YAML, or settings that are unknown, missing or contradict each other: all at once.
    """
    return parse_config(read_values(path), overrides, source=str(path))


class _EachKeyOnce(yaml.SafeLoader):
    """Reads YAML, and refuses a name that stands twice in one mapping, of which YAML itself would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping.

        Raises:
            yaml.constructor.ConstructorError: a name stands there twice, or two are one value, as ``yes`` and ``true``.
        """
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and names.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value} stands there twice; leave one of the two out", node.start_mark
                )
        found: dict[Any, str] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                other = found.setdefault(self.construct_object(key), key.value)
                if other != key.value:
                    said = f"{other} and {key.value} are one value in YAML; put quotes around both"
                    raise yaml.constructor.ConstructorError(None, None, said, key.start_mark)
        return super().construct_mapping(node, deep)


def read_values(path: str | Path) -> dict[str, Any]:
    """Return what a YAML file of settings holds, not checked yet.

    Raises:
        ConfigError: no such file, no YAML, or something else than settings.
    """
    path = Path(os.path.expanduser(path))
    found = what_is_at(path)
    if found == "folder":
        raise ConfigError(f'"{path}" is a folder where a config file was expected; name a file in it')
    if found is None:
        raise ConfigError(missing_file(path, "config file"))
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _EachKeyOnce)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ConfigError(f'"{path}" is no readable YAML: {" ".join(str(error).split())}') from error
    except OSError as error:
        raise ConfigError(f'"{path}" cannot be read ({error.strerror}); check its permissions') from error
    if not isinstance(values, dict):
        raise ConfigError(f'"{path}" should hold settings as `name: value`, and holds {type(values).__name__}')
    return values


def parse_config(
    values: Mapping[str, Any], overrides: Mapping[str, Any] | None = None, *, source: str = "the config"
) -> RunConfig:
    """Return the settings of a run from nested values, or name every mistake in them.

    Raises:
        ConfigError: as `load_config`.
    """
    merged = with_overrides(values, overrides or {})
    found = _truth_values_for_numbers(merged)
    try:
        config = RunConfig.model_validate(merged)
    except ValidationError as error:
        found |= _by_setting(error)
    known = set(setting_names())  # sections are given in Python alone
    options = [f"{name}." for name in overrides or {} if {name, name.rpartition(".")[0]} & known]
    given = {name: any(f"{name}.".startswith(one) for one in options) for name in found}
    mistakes = [_sentence(name, entries, given=given[name]) for name, entries in found.items()]
    if mistakes:
        if all(given.values()):
            source = "the command line" if len(mistakes) > 1 else ""
        raise ConfigError(listed(source, mistakes))
    return config


def with_overrides(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of nested values with others put in at dotted names."""
    merged = _deep_copy(values)
    for name, value in overrides.items():
        _put(merged, name.split("."), value)
    return merged


def override(name: str) -> str:
    """Return the dotted name of a setting for what was typed: the whole of it, or as much of its end as is unique.

    Dashes and underscores mean the same. A key of a mapping may follow, as in ``data.fields.text``.

    Raises:
        ConfigError: no such setting, or several end in that name.
    """
    typed = name.replace("-", "_")
    known = setting_names()
    if typed in known:
        return typed
    leaves = [full for full in known if full.endswith(f".{typed}")]
    if len(leaves) == 1:
        return leaves[0]
    outer, dot, key = name.rpartition(".")
    if dot and not leaves:
        mapping = next((full for full in known if f".{full}".endswith(f".{outer.replace('-', '_')}")), None)
        if mapping in _mappings():
            return f"{mapping}.{key}"
    if leaves:
        raise ConfigError(f'several settings are called "{name}": {", ".join(leaves)}; give one of these')
    mend = own_word(name) or did_you_mean(typed, _names_and_leaves(known))
    raise ConfigError(f'there is no setting "{name}".{mend}')


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Return dotted names and values of what the command line was given: ``--training.seed 3 --learning-rate=1e-3``.

    Raises:
        ConfigError: a stray word, a missing or unreadable value, an unknown setting, or one that is given twice: all
            at once.
    """
    overrides: dict[str, Any] = {}
    mistakes: list[str] = []
    rest = list(arguments)
    while rest:
        try:
            full, value = _next_override(rest)
            if full in overrides:
                raise ConfigError(f"--{full} is given twice; leave one of the two out")
            overrides[full] = value
        except ConfigError as error:
            mistakes.append(str(error))
    if mistakes:
        raise ConfigError(listed("the command line" if len(mistakes) > 1 else "", mistakes))
    return overrides


def _next_override(rest: list[str]) -> tuple[str, Any]:
    """Take a name and its value from the front of what was typed.

    Raises:
        ConfigError: as `parse_overrides`.
    """
    word = rest.pop(0)
    if not word.startswith("--"):
        raise ConfigError(f'"{word}" stands alone; settings are given as --name value')
    name, equals, value = word[2:].partition("=")
    try:
        full = override(name)
    except ConfigError:
        if not equals and rest and not rest[0].startswith("--"):
            del rest[0]  # its value, which is no mistake of its own
        raise
    if not equals:
        if not rest:
            raise ConfigError(f"--{name} needs a value")
        if rest[0].startswith("--") and _is_setting(rest[0][2:].partition("=")[0]):
            raise ConfigError(f"--{name} needs a value, and {rest[0]} stands behind it")
        value = rest.pop(0)
    return full, typed_value(full, value)


def _is_setting(name: str) -> bool:
    try:
        override(name)
    except ConfigError:
        return False
    return True


def setting_names() -> list[str]:
    """Return the dotted names of all settings of a run."""
    return list(dict.fromkeys(name for name, _ in _leaves()))


def _mappings() -> list[str]:
    return [name for name, annotation in _leaves() if any(get_origin(part) is dict for part in _parts(annotation))]


def _leaves() -> Iterator[tuple[str, Any]]:
    for name, field in RunConfig.model_fields.items():
        for annotation in TASK_CONFIGS if name == "task" else [field.annotation]:
            yield from _leaves_of(name, annotation)


def _leaves_of(prefix: str, annotation: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for leaf, field in annotation.model_fields.items():
            yield from _leaves_of(f"{prefix}.{leaf}", field.annotation)
    else:
        yield prefix, annotation


def typed_value(name: str, typed: str) -> Any:
    """Return the value of a setting as it was typed on the command line.

    Raises:
        ConfigError: it cannot be read.
    """
    parts = _parts_of(name) or _values_of(name.rpartition(".")[0])
    if typed == "null" and type(None) in parts:
        return None
    # a text is taken as it stands: as YAML, `no` would be a boolean, and a template often no YAML at all
    if all(part in (str, Path, type(None)) or isinstance(part, str) for part in parts):
        return typed
    try:
        return yaml.safe_load(typed)
    except yaml.YAMLError:
        raise ConfigError(f"--{name} takes a value as it stands in a YAML file, and got '{typed}'") from None


def _parts_of(name: str) -> list[Any]:
    return [part for leaf, annotation in _leaves() if leaf == name for part in _parts(annotation)]


def _values_of(mapping: str) -> list[Any]:
    """Return what the values of a mapping may be."""
    return [get_args(part)[1] for part in _parts_of(mapping) if get_origin(part) is dict]


def _parts(annotation: Any) -> list[Any]:
    if get_origin(annotation) in (Union, UnionType, Literal):
        return [part for argument in get_args(annotation) for part in _parts(argument)]
    return [annotation]


def _names_and_leaves(names: Sequence[str]) -> list[str]:
    return [*names, *(name.rsplit(".", 1)[-1] for name in names)]


def _deep_copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _deep_copy(value) if isinstance(value, Mapping) else value for key, value in values.items()}


_KINDS = [kind.model_fields["type"].default for kind in TASK_CONFIGS]
_SHORT_FORM = {"model": "name", "data": "train"}


def _put(values: dict[str, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        inner = values.get(key)
        if isinstance(inner, str) and key in _SHORT_FORM:  # `model: mini` stands for `model: {name: mini}`
            inner = {_SHORT_FORM[key]: inner}
        values[key] = inner if isinstance(inner, dict) else {}
        values = values[key]
    values[path[-1]] = value


def _truth_values_for_numbers(values: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return, as `_by_setting` does, where a number should stand and YAML read true or false, which pydantic takes."""
    found: dict[str, list[Any]] = {}
    for name in setting_names():
        kinds = _parts_of(name)
        if bool not in kinds and (int in kinds or float in kinds):
            value: Any = values
            for part in name.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
            if isinstance(value, bool):
                found[name] = [{"type": "int_type" if int in kinds else "float_type", "input": value}]
    return found


def _by_setting(error: ValidationError) -> dict[str, list[Any]]:
    """Return what pydantic found, by the dotted names of settings as the user would write them."""
    found: dict[str, list[Any]] = {}
    for entry in error.errors():
        location = [str(part) for part in entry["loc"]]
        if location[:1] == ["task"] and location[1:2] and location[1] in _KINDS:
            del location[1]  # pydantic puts the chosen kind of a task into the location; the user never wrote it
        for length in range(1, len(location)):  # and the kind of a value that may be of several
            kinds = set(_parts_of(".".join(location[:length]))) - {type(None)}
            if len(kinds) > 1:
                del location[length:]
        found.setdefault(".".join(location), []).append(entry)
    return found


def _sentence(name: str, entries: Sequence[Any], *, given: bool) -> str:
    """Return what is wrong with one setting; with the whole config where it has no name.

    Args:
        name: dotted.
        entries: what pydantic says.
        given: it was given as an option and does not stand so in the file.
    """
    kind = entries[0]["type"]
    if kind == "extra_forbidden":
        section, _, leaf = name.rpartition(".")
        siblings = [n.rsplit(".", 1)[-1] for n in setting_names() if n.rsplit(".", 1)[0] == section]
        siblings += [] if section else [n.split(".")[0] for n in setting_names()]
        elsewhere = [n for n in setting_names() if n.rsplit(".", 1)[-1] == leaf]
        mend = (
            own_word(leaf) or did_you_mean(leaf, siblings) or (f' Did you mean "{elsewhere[0]}"?' if elsewhere else "")
        )
        owners = [kind.model_fields["type"].default for kind in TASK_CONFIGS if leaf in kind.model_fields]
        if section == "task" and owners:
            mend = f" It belongs to a task of type {' or '.join(owners)}, and this one is {entries[0]['loc'][1]}."
        if name == "search":
            mend = " It belongs to `ptune search`; take it out of the file, or search with it."
        return f'there is no setting "{name}".{mend}'
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        return f'"{name}.type" should be {", ".join(_KINDS[:-1])} or {_KINDS[-1]}'
    said = said_of(entries, null=type(None) in _parts_of(name))
    if not name:
        return said.removeprefix(": ")
    return f"--{name}{said}" if given else f'"{name}"{said}'


def config_yaml(config: RunConfig) -> str:
    """Return the settings of a run as YAML that `load_config` reads back to the same settings."""
    return yaml.safe_dump(config.model_dump(mode="json"), allow_unicode=True, sort_keys=False)


def differing_settings(one: RunConfig, other: RunConfig) -> list[str]:
    """Return the dotted names of settings in which two runs differ."""
    lines = difflib.ndiff(_flat(one.model_dump(mode="json")), _flat(other.model_dump(mode="json")))
    return sorted({line[2:].split("=", 1)[0] for line in lines if line[:2] in ("- ", "+ ")})


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    lines: list[str] = []
    for key, value in values.items():
        lines += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [f"{prefix}{key}={value!r}"]
    return lines
