"""`ptune eval` scores a soft prompt on records with answers; `ptune predict` answers records and writes JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ptune.cli.loading import Device, Dtype, Model, TrustRemoteCode, loading
from ptune.cli.unused import refuse_unused
from ptune.errors import ConfigError, DataError
from ptune.files import what_is_at

if TYPE_CHECKING:
    from rich.table import Table

    from ptune.engine.engine import Engine
    from ptune.tasks.task import Assessment, Task

_MOST_LABELS = 12
"""Of more labels a terminal is too narrow to show the confusion matrix."""

Prompt = Annotated[Path, typer.Argument(help="Folder of a soft prompt.")]
Fields = Annotated[
    list[str] | None, typer.Option("--field", help="Template field=column of the file; may be repeated.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Records answered at once.")]
By = Annotated[
    str | None,
    typer.Option(help="Column that names each record's soft prompt; PROMPT is then a folder of soft prompts."),
]
NoPrompt = Annotated[bool, typer.Option("--no-prompt", help="Ask the bare model, by the template's words alone.")]


def evaluate(
    prompt: Prompt,
    data: Annotated[str, typer.Option(help="File, folder or Hub name of records with their answers.")],
    split: Annotated[
        str | None, typer.Option(help="Which part of a folder or Hub name: test where there is one, or else dev.")
    ] = None,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    field: Fields = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many records.")] = None,
    batch_size: BatchSize = 32,
    by: By = None,
    no_prompt: NoPrompt = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write metrics, confusion matrix and calibration there.")
    ] = None,
) -> None:
    """Score a soft prompt, or each record's own, on records with their answers."""
    from ptune.cli.quiet import quiet

    quiet()
    from rich.markup import escape

    from ptune import __version__
    from ptune.files import file_place, write_json
    from ptune.records.data import data_hash, has_split, load_records

    place = None if json_file is None else file_place(json_file)
    _check_split(data, split)
    single = what_is_at(data) == "file"
    if split is None:
        split = "test" if single or has_split(data, "test") else "dev"
    records = load_records(data, split=split, fields=column_mapping(field), limit=limit)
    names = _names(prompt, records, by)
    own: dict[str, list[Any]] = {}
    for name, record in zip(names, records, strict=True):
        own.setdefault(name, []).append(record)
    with _engine(_folders(prompt, names, by), model, no_prompt, **loading(device, dtype, trust_remote_code)) as engine:
        backbone, found = engine.backbone, {}
        bare = _bare_tasks(engine, names, records) if no_prompt else {}
        for name, some in own.items():
            if no_prompt:
                found[name] = bare[name].assess(backbone, some, batch_size=batch_size)
            else:
                found[name] = engine.assess(name, some, batch_size=batch_size)
        about = {
            "prompt": str(prompt),
            "no_prompt": no_prompt,
            "data": data,
            "split": None if single else split,
            "records": len(records),
            "data_hash": data_hash(records),
            "backbone": backbone.name,
            "dtype": str(backbone.dtype).removeprefix("torch."),
            "device": backbone.device.type,
            "ptune": __version__,
        }
    part = "" if single else f" ({split})"
    without = ", without its virtual tokens" if no_prompt else ""
    title = escape(f"{prompt} on {len(records):,} records of {data}{part}{without}")
    if by is None:
        (assessment,) = found.values()
        _print_one(title, assessment)
        values = assessment.values()
    else:
        counts = {name: len(some) for name, some in own.items()}
        _print_each(title, found, counts)
        each = {name: {"records": counts[name]} | assessment.values() for name, assessment in found.items()}
        values = {"by": by, "prompts": each}
    if place is not None:
        write_json(place, about | values)


def _print_one(title: str, assessment: Assessment) -> None:
    """Print the metrics of one soft prompt, and its confusion matrix."""
    from rich.console import Console
    from rich.table import Column, Table

    from ptune.cli.progress import format_value

    table = Table("metric", Column("value", justify="right"), title=title)
    for metric, value in assessment.metrics.items():
        table.add_row(metric, format_value(metric, value))
    Console().print(table)
    if assessment.labels:
        Console().print(confusion_table(assessment.labels, assessment.confusion))


def _print_each(title: str, found: Mapping[str, Assessment], counts: Mapping[str, int]) -> None:
    """Print a line of metrics for each soft prompt."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    from ptune.cli.progress import format_metrics

    table = Table("soft prompt", Column("records", justify="right"), "metrics", title=title)
    for name, assessment in found.items():
        table.add_row(escape(name), f"{counts[name]:,}", format_metrics(assessment.metrics))
    Console().print(table)


def confusion_table(labels: Sequence[str], confusion: Sequence[Sequence[int]]) -> Table | str:
    """Return the confusion matrix as a table, or a line that says where to find one that no terminal holds."""
    from rich.markup import escape
    from rich.table import Table

    if len(labels) > _MOST_LABELS:
        return f"the confusion matrix of {len(labels)} labels is in the file that --json names"
    table = Table(title="rows: right labels; columns: given ones")
    table.add_column("")
    for number, _ in enumerate(labels, 1):
        table.add_column(str(number), justify="right")
    for number, (label, row) in enumerate(zip(labels, confusion, strict=True), 1):
        counts = [f"[bold]{count}[/]" if column == number else str(count) for column, count in enumerate(row, 1)]
        table.add_row(f"{number} {escape(label)}", *counts)
    return table


def predict(
    prompt: Prompt,
    data: Annotated[str, typer.Argument(help="File, folder or Hub name of records, or a text to classify.")],
    output: Annotated[Path | None, typer.Option(help="File of JSON lines; the terminal where absent.")] = None,
    split: Annotated[str | None, typer.Option(help="Which part of a folder or Hub name; test where absent.")] = None,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    field: Fields = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many records.")] = None,
    batch_size: BatchSize = 32,
    by: By = None,
    no_prompt: NoPrompt = False,
) -> None:
    """Answer records with a soft prompt, or each with its own, as JSON lines in the records' order.

    DATA is a file, a folder or a Hub name (owner/name). What is none of these, nor looks like one, is a text to answer.
    A record's columns stand beside its answer; one that is called as a part of the answer is written as given_NAME.
    """
    from ptune.cli.quiet import quiet

    quiet()
    from ptune.engine.mixed_batches import answer_together
    from ptune.files import file_place, write_text
    from ptune.records.data import load_records, looks_like_a_source

    place = None if output is None else file_place(output)
    is_text = what_is_at(data) is None and not looks_like_a_source(data)
    records: list[Any] = []
    if is_text:
        why = f'"{data}" is no file, folder or Hub name, but a text to answer'
        refuse_unused(why, split=split, field=field, limit=limit, by=by)
    else:
        _check_split(data, split)
        records = list(load_records(data, split=split or "test", fields=column_mapping(field), limit=limit))
    names = _names(prompt, records or [{}], by)
    with _engine(_folders(prompt, names, by), model, no_prompt, **loading(device, dtype, trust_remote_code)) as engine:
        if is_text:
            records = [engine.record_for(names[0], data)]
        if no_prompt:
            bare = _bare_tasks(engine, names, records)
            questions = [(bare[name], record) for name, record in zip(names, records, strict=True)]
            answers = answer_together(engine.backbone, questions, batch_size=batch_size)
        else:
            answers = engine.predict(names[0] if by is None else names, records, batch_size=batch_size)
    lines = "".join(
        json.dumps(_beside(record, answer), ensure_ascii=False, default=str) + "\n"  # a table may hold dates
        for record, answer in zip(records, answers, strict=True)
    )
    if place is None:
        typer.echo(lines, nl=False)
    else:
        write_text(place, lines)
        typer.echo(f"{len(answers)} answers written to {place}", err=True)


def _names(prompt: Path, records: Sequence[Mapping[str, Any]], by: str | None) -> list[str]:
    """Return which soft prompt answers each record: the one that was given, or that which its column names.

    Raises:
        DataError: a record names none.
    """
    from ptune.rendering.filling import location

    if by is None:
        return [prompt.resolve().name] * len(records)
    for record in records:
        if record.get(by) in (None, ""):
            raise DataError(f'{location(record)} names no soft prompt in its column "{by}"')
    return [str(record[by]) for record in records]


def _folders(prompt: Path, names: Sequence[str], by: str | None) -> dict[str, Path]:
    """Return the folders of the soft prompts that answer, by name: the one that was given, or those in it.

    Raises:
        SoftPromptError: there is no such soft prompt.
    """
    from ptune.soft_prompts.library import Library

    if by is None:
        return {prompt.resolve().name: prompt}
    library = Library(prompt)
    return {name: library.find(name) for name in dict.fromkeys(names)}


@contextmanager
def _engine(folders: Mapping[str, Path], model: str | None, no_prompt: bool, **loading: Any) -> Iterator[Engine]:
    """Give an engine that has soft prompts, each loaded when it is first used.

    Raises:
        ConfigError: the bare model is asked, and a soft prompt answers by a linear head.
        SoftPromptError, BackboneError: as `Engine.for_prompt`.
    """
    from ptune.config.task import head_outputs
    from ptune.engine.engine import Engine
    from ptune.soft_prompts.files import read_description

    for name, folder in folders.items() if no_prompt else ():
        if head_outputs(read_description(folder).task) is not None:
            raise ConfigError(
                f'"{name}" answers by a linear head that was trained beside its virtual tokens, and the bare model has '
                "none; leave --no-prompt out"
            )
    first, *others = folders
    with Engine.for_prompt(folders[first], model, name=first, **loading) as engine:
        for other in others:
            engine.offer(other, folders[other])
        yield engine


def _bare_tasks(engine: Engine, names: Sequence[str], records: Sequence[Mapping[str, Any]]) -> dict[str, Task]:
    """Return the tasks of soft prompts without their virtual tokens, by name.

    Args:
        engine: that has the soft prompts.
        names: of the one that each record goes to.
        records: that the bare model will be asked.

    Raises:
        DataError: nothing is left of a record.
    """
    from ptune.rendering.filling import location
    from ptune.training.comparison import asks_anything, without_prompt

    bare = {name: without_prompt(engine.hold(name).task) for name in dict.fromkeys(names)}
    for name, record in zip(names, records, strict=True):
        if bare[name].renderer.template.fields and not asks_anything(bare[name], record):
            raise DataError(
                f"{location(record)} leaves the bare model nothing to read, for without virtual tokens no word is "
                "left; leave the record out"
            )
    return bare


def _check_split(data: str, split: str | None) -> None:
    if what_is_at(data) == "file":
        refuse_unused(f'"{data}" is a single file', split=split)


def _beside(record: Mapping[str, Any], answer: Mapping[str, Any]) -> dict[str, Any]:
    """Return an answer beside its record, whose own columns of the same names are called ``given_...``."""
    return {f"given_{name}" if name in answer else name: value for name, value in record.items()} | dict(answer)


def column_mapping(pairs: list[str] | None) -> dict[str, str]:
    """Return ``field=column`` pairs as a mapping.

    Raises:
        ConfigError: one has no equals sign.
    """
    mapping = {}
    for pair in pairs or []:
        name, equals, column = pair.partition("=")
        if not equals:
            raise ConfigError(f'--field takes field=column, and got "{pair}"')
        mapping[name] = column
    return mapping
