"""The candidates of a search: which settings vary, the grid of their values, and the settings of each candidate.

All candidates share one backbone and one set of records, and go step by step together; so only what concerns the
prompt, its encoder and its optimizer can vary. Knows settings, and imports no torch.
"""

from __future__ import annotations

import functools
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from ptune.config.file import override, parse_config, read_values, typed_value, with_overrides
from ptune.config.mistakes import said_of
from ptune.config.other_words import COUNTS, own_word
from ptune.config.run import RunConfig
from ptune.config.settings import Settings
from ptune.errors import ConfigError, did_you_mean
from ptune.template import Template, Virtual

LENGTH = "prompt.length"
"""Name under which the number of virtual tokens varies: the N of the template's one run [P*N]."""

_VARIABLE = [
    "training.seed",
    "training.learning_rate",
    "training.schedule",
    "training.warmup_ratio",
    "training.weight_decay",
    "training.max_grad_norm",
    "prompt.template",
    LENGTH,
    "prompt.encoder",
    "prompt.encoder.type",
    "prompt.encoder.hidden_size",
    "prompt.encoder.num_layers",
    "prompt.encoder.dropout",
    "prompt.encoder.residual",
    "prompt.start",
    "prompt.start.method",
    "prompt.start.text",
    "prompt.start.prompt",
]
_TEXTS = ("prompt.template", "prompt.start.text", "prompt.start.prompt")
_RUN_OF_TOKENS = re.compile(r"\[P(?:\*\d+)?\]")


class SearchConfig(Settings):
    """Which candidates there are, and how many of them go on."""

    vary: dict[str, tuple[Any, ...]] = Field(
        default_factory=dict, description="Setting -> its values; every combination of values is a candidate."
    )
    sample: int | None = Field(None, gt=1, description="Only so many candidates, drawn from the grid by training.seed.")
    halvings: int = Field(
        2, ge=0, description="How often the better half goes on alone: at a quarter and half of the steps; 0 for never."
    )
    limit: int = Field(32, gt=1, description="More candidates than this are refused: each costs memory in every step.")


@dataclass(frozen=True)
class Candidate:
    """One of the runs that a search trains together.

    Attributes:
        number: from 1 on.
        varied: the settings in which it differs from others, by name.
        config: the settings of the run of it alone.
    """

    number: int
    varied: dict[str, Any]
    config: RunConfig


def load_search(
    path: str | Path, overrides: Mapping[str, Any] | None = None, search: Mapping[str, Any] | None = None
) -> tuple[RunConfig, SearchConfig]:
    """Read a YAML file with the settings of a run, and a section ``search`` or none.

    Args:
        path: the file.
        overrides: dotted name -> value, for the run.
        search: settings of the search that go before the file's; those in ``vary`` are added to it.

    Raises:
        ConfigError: as `ptune.config.file.load_config`, or the section holds a mistake.
    """
    values = dict(read_values(path))
    section = values.pop("search", None) or {}
    if not isinstance(section, Mapping):
        raise ConfigError(f"{path}: the section search should hold settings as `name: value`, and holds {section!r}")
    given = dict(search or {})
    vary = section.get("vary") or {}
    if not isinstance(vary, Mapping):
        raise ConfigError(f"{path}: search.vary should hold `setting: [values]`, and holds {vary!r}")
    lists = {str(name): each if isinstance(each, list | tuple) else [each] for name, each in vary.items()}
    merged = {**section, **given, "vary": lists | dict(given.get("vary", {}))}
    unknown = [name for name in merged if name not in SearchConfig.model_fields]
    if unknown:
        mend = did_you_mean(str(unknown[0]), list(SearchConfig.model_fields))
        raise ConfigError(f'{path}: there is no setting "search.{unknown[0]}".{mend}')
    try:
        settings = SearchConfig.model_validate(merged)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(["search", *map(str, first["loc"])])
        raise ConfigError(f'{path}: "{name}"{said_of([first])}') from None
    return parse_config(values, overrides, source=str(path)), settings


def parse_vary(words: Sequence[str]) -> dict[str, list[Any]]:
    """Return names and values of ``--vary name=value,value``; a name may come several times.

    Text is taken as it stands, commas and all: one value a time. A list in YAML's form is read as such.

    Raises:
        ConfigError: no ``=``, no value, or a setting that does not exist or cannot vary.
    """
    vary: dict[str, list[Any]] = {}
    for word in words:
        typed, equals, values = word.partition("=")
        if not equals or not values:
            raise ConfigError(f'--vary takes a setting and its values, as in training.seed=0,1,2, and got "{word}"')
        name = variable(typed)
        if name in _TEXTS:
            found = [values]
        elif name in ("prompt.encoder", "prompt.start"):
            found = _sections(name, values)
        else:
            read_as = "training.seed" if name == LENGTH else name
            found = [typed_value(read_as, value) for value in values.split(",")]
        vary.setdefault(name, []).extend(found)
    return vary


def variable(name: str) -> str:
    """Return the full name of a setting that may vary, for as much of its end as is unique.

    Raises:
        ConfigError: there is no such setting, or candidates cannot differ in it.
    """
    typed = name.replace("-", "_")
    ends = [full for full in _VARIABLE if full == typed or full.endswith(f".{typed}")]
    if typed in _VARIABLE:
        return typed
    if len(ends) == 1:
        return ends[0]
    leaves = [full.rsplit(".", 1)[-1] for full in _VARIABLE]
    try:
        full = override(name)
    except ConfigError:
        mend = f' Did you mean "{LENGTH}"?' if typed in COUNTS else own_word(name)
        mend = mend or did_you_mean(typed, [*_VARIABLE, *leaves])
        raise ConfigError(f'--vary: there is no setting "{name}".{mend}') from None
    if full in _VARIABLE:
        return full
    if full.startswith(("model.", "data.", "task.")) or full == "output":
        reason = "all candidates share one backbone, one data set, one task and one output"
    else:
        reason = "candidates take their steps together, so it is one for all"
    raise ConfigError(f"{full} cannot vary: {reason}; what can: {', '.join(_VARIABLE)}")


def candidates_of(config: RunConfig, search: SearchConfig) -> list[Candidate]:
    """Return the candidates, each with the settings of a run of its own.

    Where the encoder's type varies, an ``embedding`` has none of the encoder's other settings; combinations that come
    to the same run are one candidate.

    Raises:
        ConfigError: nothing varies, too much does, a setting cannot vary, or a combination makes no run.
    """
    vary = {variable(name): values for name, values in search.vary.items()}
    grid = math.prod(map(len, vary.values())) if vary else 0
    if grid < 2:
        raise ConfigError(
            "a search needs two candidates or more: vary a setting, as in --vary training.learning_rate=0.002,0.01, or "
            "in a section search of the file; one run alone is `ptune train`"
        )
    places: Sequence[int] = range(grid)
    if search.sample is not None and search.sample < grid:
        places = sorted(random.Random(config.training.seed).sample(places, search.sample))
    if len(places) > search.limit:
        raise ConfigError(
            f"{len(places)} candidates are more than search.limit, which is {search.limit}; vary less, draw some of "
            f"them (--sample {search.limit}), or raise the limit"
        )
    found: list[Candidate] = []
    for place in places:
        varied = _combination(vary, place)
        candidate = _candidate(config, varied, len(found) + 1)
        if all(candidate.config != other.config for other in found):
            found.append(candidate)
    if len(found) < 2:
        raise ConfigError("all combinations of the varied settings are one and the same run; vary something else")
    return found


def _combination(vary: Mapping[str, Sequence[Any]], place: int) -> dict[str, Any]:
    """Return one point of the grid; the last setting runs fastest."""
    varied: dict[str, Any] = {}
    for name, values in reversed(list(vary.items())):
        place, which = divmod(place, len(values))
        varied[name] = values[which]
    return {name: varied[name] for name in vary}


def _candidate(config: RunConfig, varied: dict[str, Any], number: int) -> Candidate:
    values = config.model_dump(mode="json")
    if varied.get("prompt.encoder.type") == "embedding":
        values["prompt"]["encoder"] = {}
        varied = {
            name: value
            for name, value in varied.items()
            if not name.startswith("prompt.encoder.") or name == "prompt.encoder.type"
        }
    if varied.get("prompt.start.method", config.prompt.start.method) != config.prompt.start.method:
        values["prompt"]["start"] = {}  # a text or a prompt to start from goes with its method
    if values["data"]["split_seed"] is None:
        values["data"]["split_seed"] = config.training.seed  # one data set, whatever the candidate's own seed
    overrides = {name: value for name, value in varied.items() if name != LENGTH}
    what = ", ".join(f"{name}={value}" for name, value in varied.items())
    source = f"candidate {number} ({what})"
    values = with_overrides(values, overrides)
    if LENGTH in varied:
        values["prompt"]["template"] = _of_length(values["prompt"]["template"], varied[LENGTH])
    run = parse_config(values, source=source)
    return Candidate(number, {name: _as_read(run, name, value) for name, value in varied.items()}, run)


def _as_read(config: RunConfig, name: str, value: Any) -> Any:
    """Return a varied value as the settings have it: YAML reads 1e-2 as a text, and a rate is a number."""
    if name == LENGTH or isinstance(value, Mapping):
        return value
    return functools.reduce(lambda section, part: section[part], name.split("."), config.model_dump(mode="json"))


def _of_length(template: str, count: Any) -> str:
    runs = [piece for piece in Template.parse(template).pieces if isinstance(piece, Virtual)]
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ConfigError(f"prompt.length is a number of virtual tokens, 1 or more, and is {count!r}")
    if len(runs) != 1 or len(_RUN_OF_TOKENS.findall(template)) != 1:
        raise ConfigError(
            f"prompt.length varies the N of a template's one run [P*N], and {template!r} has {len(runs)} of them; "
            "vary prompt.template instead"
        )
    return _RUN_OF_TOKENS.sub(f"[P*{count}]", template)


def _sections(name: str, typed: str) -> list[Any]:
    try:
        read = yaml.safe_load(typed)
    except yaml.YAMLError:
        read = None
    if not isinstance(read, list) or not all(isinstance(each, dict) for each in read):
        raise ConfigError(
            f"--vary {name} takes a list of sections, as in {name}=[{{...}}, {{...}}], and got '{typed}'; "
            f"or vary one of its settings, as in {name}.{'type' if name.endswith('encoder') else 'method'}"
        )
    return list(read)
