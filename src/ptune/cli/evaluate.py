"""`ptune eval` scores a soft prompt on records with answers; `ptune predict` answers records and writes JSON lines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ptune.cli.loading import Device, Dtype, Model, TrustRemoteCode, loading
from ptune.cli.unused import refuse_unused
from ptune.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.table import Table

_MOST_LABELS = 12
"""Of more labels a terminal is too narrow to show the confusion matrix."""

Prompt = Annotated[Path, typer.Argument(help="Folder of a soft prompt.")]
Fields = Annotated[
    list[str] | None, typer.Option("--field", help="Template field=column of the file; may be repeated.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Records answered at once.")]


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
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write metrics, confusion matrix and calibration there.")
    ] = None,
) -> None:
    """Score a soft prompt on records with their answers."""
    from ptune.cli.quiet import quiet

    quiet()
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    from ptune.cli.progress import format_value
    from ptune.engine.engine import Engine
    from ptune.files import write_json
    from ptune.records.data import has_split, load_records

    _check_split(data, split)
    if split is None:
        split = "test" if Path(data).is_file() or has_split(data, "test") else "dev"
    records = load_records(data, split=split, fields=column_mapping(field), limit=limit)
    with Engine.for_prompt(prompt, model, **loading(device, dtype, trust_remote_code)) as engine:
        (name,) = engine.prompts
        assessment = engine.assess(name, records, batch_size=batch_size)
    metrics = assessment.metrics
    part = "" if Path(data).is_file() else f" ({split})"
    table = Table(
        "metric",
        Column("value", justify="right"),
        title=escape(f"{prompt} on {len(records):,} records of {data}{part}"),
    )
    for metric, value in metrics.items():
        table.add_row(metric, format_value(metric, value))
    Console().print(table)
    if assessment.labels:
        Console().print(confusion_table(assessment.labels, assessment.confusion))
    if json_file is not None:
        part_read = None if Path(data).is_file() else split
        about = {"prompt": str(prompt), "data": data, "split": part_read, "records": len(records)}
        write_json(json_file, about | assessment.values())


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
    by: Annotated[
        str | None,
        typer.Option(help="Column that names each record's soft prompt; PROMPT is then a folder of soft prompts."),
    ] = None,
) -> None:
    """Answer records with a soft prompt, or each with its own, as JSON lines in the records' order.

    DATA is a file, a folder or a Hub name (owner/name). What is none of these, nor looks like one, is a text to answer.
    A record's columns stand beside its answer; one that is called as a part of the answer is written as given_NAME.
    """
    from ptune.cli.quiet import quiet

    quiet()
    from ptune.engine.engine import Engine
    from ptune.files import write_text
    from ptune.records.data import load_records, looks_like_a_source

    is_text = not (Path(data).exists() or looks_like_a_source(data))
    records: list[Any] = []
    if is_text:
        why = f'"{data}" is no file, folder or Hub name, but a text to answer'
        refuse_unused(why, split=split, field=field, limit=limit, by=by)
    else:
        _check_split(data, split)
        records = list(load_records(data, split=split or "test", fields=column_mapping(field), limit=limit))
    folders = {prompt.resolve().name: prompt} if by is None else _named(prompt, records, by)
    first, *others = folders
    with Engine.for_prompt(folders[first], model, name=first, **loading(device, dtype, trust_remote_code)) as engine:
        for other in others:
            engine.offer(other, folders[other])
        if is_text:
            records = [engine.first_field(first, data)]
        names = first if by is None else [str(record[by]) for record in records]
        answers = engine.predict(names, records, batch_size=batch_size)
    lines = "".join(
        json.dumps(_beside(record, answer), ensure_ascii=False, default=str) + "\n"  # a table may hold dates
        for record, answer in zip(records, answers, strict=True)
    )
    if output is None:
        typer.echo(lines, nl=False)
    else:
        write_text(output, lines)
        typer.echo(f"{len(answers)} answers written to {output}", err=True)


def _named(prompts: Path, records: Sequence[Mapping[str, Any]], column: str) -> dict[str, Path]:
    """Return the folders of the soft prompts that a column of records names.

    Raises:
        DataError: a record names none, or there are no records.
        SoftPromptError: there is no such soft prompt.
    """
    from ptune.rendering.filling import location
    from ptune.soft_prompts.library import Library

    if not records:
        raise DataError("there are no records to answer")
    library = Library(prompts)
    folders: dict[str, Path] = {}
    for record in records:
        if record.get(column) in (None, ""):
            raise DataError(f'{location(record)} names no soft prompt in its column "{column}"')
        name = str(record[column])
        folders[name] = library.find(name)
    return folders


def _check_split(data: str, split: str | None) -> None:
    if Path(data).is_file():
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
