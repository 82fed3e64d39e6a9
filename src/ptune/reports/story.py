"""What there is to tell of a soft prompt: its folder's files, read and checked.

Of folders of the machine that made it only the last names are told. Knows a soft prompt's folder, and no HTML.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from ptune.errors import DataError, SoftPromptError
from ptune.files import read_json
from ptune.soft_prompts.nearest_words import NearestWords
from ptune.soft_prompts.soft_prompt import SoftPrompt
from ptune.tasks.calibration import Bin
from ptune.training.run_folder import ASSESSMENT, COMPARISON, LOG, SETTINGS

_PATHS = (("model", "name"), ("data", "train"), ("data", "dev"), ("prompt", "start", "prompt"), ("output",))
"""Settings that may hold paths."""
_NO_FILES = "The run's own files are not beside this soft prompt, so there are no curves."
_OTHER_RUN = (
    "The run's files in this folder are of a later run, which has not come to its end, and not of the one that made "
    "this soft prompt; so there are no curves and no settings."
)


@dataclass(frozen=True)
class Story:
    """What a report tells.

    Attributes:
        name: of the soft prompt's folder.
        described: what `SoftPrompt.describe` says.
        log: the run's lines, JSON values; empty where the run's files are gone.
        assessment: `Assessment.values` with what it was made on; None for tasks without labels.
        comparison: `Comparison.values`; None where the run's files are gone, or nothing could be asked.
        settings: of the run, as YAML.
        words: near to each virtual token; None where they are not known.
        no_words: a sentence on why they are not.
        no_log: a sentence on why there is no log.
    """

    name: str
    described: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]
    assessment: Mapping[str, Any] | None
    comparison: Mapping[str, Any] | None
    settings: str | None
    words: Sequence[NearestWords] | None
    no_words: str = ""
    no_log: str = ""


def read_story(
    folder: Path,
    prompt: SoftPrompt,
    *,
    evaluation: Path | None = None,
    words: Sequence[NearestWords] | None = None,
    no_words: str = "",
) -> Story:
    """Return what there is to tell of a soft prompt.

    Args:
        folder: the soft prompt's, with or without its run's files.
        prompt: loaded from it.
        evaluation: what `ptune eval --json` wrote; what dev said at the end of the run where absent.
        words: near to its virtual tokens.
        no_words: a sentence on why there are none.

    Raises:
        SoftPromptError: a file of the run was altered or cut short.
        DataError: the evaluation is none.
    """
    run = folder / "run"
    log = _read_log(run / LOG) if (run / LOG).is_file() else []
    settings = (run / SETTINGS).read_text(encoding="utf-8", errors="replace") if (run / SETTINGS).is_file() else None
    no_log = "" if log else _NO_FILES
    is_own = _is_of_run(prompt.summary, log, settings)
    if not is_own:
        log, settings, no_log = [], None, _OTHER_RUN
    assessment = None
    if evaluation is not None:
        assessment = read_json(evaluation, DataError)
        _check(assessment, evaluation, DataError, "write it by ptune eval --json")
    elif is_own and (run / ASSESSMENT).is_file():
        assessment = read_json(run / ASSESSMENT, SoftPromptError)
        _check(assessment, run / ASSESSMENT, SoftPromptError, "copy the folder again, or delete this file")
        assessment |= {"records": prompt.summary.get("dev_records"), "data": None}
    comparison = None
    if is_own and (run / COMPARISON).is_file():
        comparison = read_json(run / COMPARISON, SoftPromptError)
        _check_comparison(comparison, run / COMPARISON)
    return Story(
        folder.resolve().name,
        prompt.describe(),
        log,
        assessment if assessment and "labels" in assessment else None,
        comparison,
        None if settings is None else _settings_without_folders(settings),
        words,
        no_words.replace(prompt.backbone_name, last_name(prompt.backbone_name)),
        no_log,
    )


def _is_of_run(summary: Mapping[str, Any], log: Sequence[Mapping[str, Any]], settings: str | None) -> bool:
    """Whether a run's files are of the run that made the soft prompt, and not of a later one in the same folder.

    Args:
        summary: of the soft prompt.
        log: the run's lines, if there are any.
        settings: the run's, as YAML, if they are there.
    """
    if log and {"metric", "before", "after", "best_step"} <= summary.keys():
        evaluations = {line["step"]: line for line in log if summary["metric"] in line}
        for step, values in ((0, summary["before"]), (summary["best_step"], summary["after"])):
            if evaluations.get(step, {}).get(summary["metric"]) != values[summary["metric"]]:
                return False
    try:
        found = yaml.safe_load(settings or "")
    except yaml.YAMLError:  # written by somebody else
        return True
    training = found.get("training") if isinstance(found, dict) else None
    return training is None or "training" not in summary or training == summary["training"]


def last_name(text: str) -> str:
    """Return the last name of an absolute path, and any other text as it is."""
    path = Path(text)
    return path.name if path.is_absolute() or text.startswith("~") else text


def _settings_without_folders(text: str) -> str:
    """Return a run's settings, of whose absolute paths only the last names are left."""
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError:  # written by somebody else, so nobody knows what is a path
        return text
    for *outer, name in _PATHS:
        section = settings
        for key in outer:
            section = section.get(key) if isinstance(section, dict) else None
        if isinstance(section, dict) and isinstance(section.get(name), str):
            section[name] = last_name(section[name])
    return str(yaml.safe_dump(settings, allow_unicode=True, sort_keys=False))


def _read_log(path: Path) -> list[dict[str, Any]]:
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            line = None
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise SoftPromptError(
                f'"{path}", line {number}: expected an object with a step; it was altered or cut short, so remove the '
                "line, or the file for a report without curves"
            )
        lines.append(line)
    return lines


def _check(values: Any, path: Path, error: type[Exception], mend: str) -> None:
    """See that a file holds an assessment.

    Raises:
        Exception: ``error``; it does not.
    """
    known = isinstance(values, dict) and isinstance(values.get("metrics"), dict)
    if known and "labels" in values:
        count = len(values["labels"])
        table, calibration = values.get("confusion"), values.get("calibration")
        known = (
            isinstance(table, list)
            and [len(row) for row in table] == [count] * count
            and isinstance(calibration, dict)
            and {"temperature", "before", "after"} <= set(calibration)
            and all(_are_bins(calibration[name]) for name in ("before", "after"))
        )
    if not known:
        raise error(f'"{path}" expected the metrics, labels, confusion and calibration of an evaluation; {mend}')


def _check_comparison(values: Any, path: Path) -> None:
    """See that a file holds a comparison.

    Raises:
        SoftPromptError: it does not.
    """
    known = isinstance(values, dict) and values.keys() == {"changed", "total", "shift", "off_task"}
    if known:
        shift, off_task = values["shift"], values["off_task"]
        known = shift is None or isinstance(shift, int | float)
        if off_task is not None:
            known = known and isinstance(off_task, dict) and all(isinstance(text, str) for text in off_task.values())
            known = known and off_task.keys() == {"question", "without", "with"}
    if not known:
        raise SoftPromptError(
            f'"{path}" expected changed, total, shift and off_task of a run\'s comparison with the bare model; copy '
            "the folder again, or delete this file"
        )


def _are_bins(values: Any) -> bool:
    names = {field.name for field in fields(Bin)}
    return (
        isinstance(values, list)
        and len(values) > 0
        and all(isinstance(one, dict) and set(one) == names for one in values)
        and all(isinstance(number, int | float) for one in values for number in one.values())
    )
