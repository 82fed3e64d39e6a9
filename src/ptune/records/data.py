"""The user's data as records: fields by name, what is held out, and their hash.

Knows nothing of templates, tokenizers or models: a record is the user's own mapping, plus where it stands.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from ptune.config.settings import label_text
from ptune.errors import DataError, did_you_mean
from ptune.records.conversations import TURNS, Exchange, read_conversation, read_history
from ptune.records.readers import has_split, looks_like_a_source, read_records
from ptune.records.record import Record

__all__ = ["data_hash", "draw", "draw_shots", "has_split", "load_records", "looks_like_a_source", "split_dev"]

_ABSENT = object()
_NOT_TEXT = ("id", "idx", "label", "labels")


def load_records(
    source: str | Path, *, split: str = "train", fields: Mapping[str, str] | None = None, limit: int | None = None
) -> list[Record]:
    """Return the records of a file, a folder or a data set on the Hub, the first ``limit`` of them.

    A file is read by its suffix: .jsonl, .ndjson, .json (a list, an object with one list, one record, or JSON lines),
    .csv, .tsv, .parquet. A folder holds files named by split (``dev.jsonl``, ``train-00000-of-00002.parquet``, in it or
    in its ``data``), or is one of ``datasets.save_to_disk``. Anything else is a Hub name, as in ``owner/name`` or
    ``owner/name:config``. ``split`` chooses within folders and Hub data sets; dev is also found as validation or valid.

    ``fields`` adds, under each field's name, the column that it names; ``a.b`` is the member b of an object in the
    column a. Two shapes need none: a record with ``instruction`` and ``output`` (Alpaca) gets an empty ``input`` where
    it has none, and as its ``history`` the questions and answers of a column of that name; a record with
    ``conversations`` or ``messages`` (ShareGPT, chat) gets ``system`` from its system turn, ``instruction`` and
    ``output`` from its last question and answer, an empty ``input``, and as its ``history`` what was said before. One
    that ends with a question has no ``output``.

    Raises:
        DataError: nothing is there, it cannot be read, or a named column is missing; names file, line and field.
    """
    records = list(islice(read_records(source, split), limit))
    if not records:
        raise DataError(f"{source} is empty: expected at least one record; check the file.")
    for record in records:
        _fill_from_conversation(record)
        if "instruction" in record and "output" in record:
            record.setdefault("input", "")
        _fill_from_history(record)
        _map_fields(record, fields or {})
        _fill_from_history(record)
    return records


def split_dev(
    records: Sequence[Record],
    fraction: float,
    limit: int | None = None,
    seed: int = 0,
    *,
    fields: Sequence[str] | None = None,
) -> tuple[list[Record], list[Record]]:
    """Hold out ``fraction`` of the records, at most ``limit``, and return ``(train, dev)``, each in its old order.

    The same seed gives the same split, whatever the order of the records. Records of the same text stand on one side:
    their text is ``fields``, or, without them, every value that is not a number, ids and labels left out.

    Raises:
        DataError: either side would be empty, or the records repeat too few texts too often.
    """
    groups: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        groups.setdefault(_text_of(record, fields), []).append(index)
    if len(groups) < 2:
        found = f"{len(records)} of the same text" if len(records) > 1 else f"{len(records)}"
        raise DataError(
            f"holding out dev needs at least two records that differ in text and found {found}; "
            "add records, or name a dev file."
        )
    wanted = min(max(1, round(fraction * len(records))), len(records) - 1, limit or len(records))
    dev: set[int] = set()
    ranked = sorted(groups, key=lambda text: _rank(text, seed))
    for text in ranked:
        if len(dev) + len(groups[text]) <= wanted:
            dev.update(groups[text])
    if not dev:
        dev.update(groups[min(ranked, key=lambda text: len(groups[text]))])
    if limit is not None and len(dev) > limit:
        raise DataError(
            f"holding out dev found no text that stands in {limit} records or fewer, the limit (dev_limit); "
            f"raise it to {len(dev)}, remove duplicates, or name a dev file."
        )
    train = [record for index, record in enumerate(records) if index not in dev]
    return train, [records[index] for index in sorted(dev)]


def draw(records: Sequence[Record], count: int, seed: int = 0) -> list[Record]:
    """Return ``count`` of the records, in their old order; the same for the same seed, whatever the order."""
    return [records[index] for index in sorted(_drawn(records, range(len(records)), count, seed))]


def draw_shots(
    records: Sequence[Record], label_field: str, count: int, seed: int = 0, *, exact: bool = False
) -> list[Record]:
    """Return ``count`` records of each label, in their old order: the data of a few-shot run.

    The same seed draws the same ones, whatever the order of the records. A record without a label stays, for the task
    to name it.

    Args:
        records: of any labels.
        label_field: which field holds them.
        count: of each; where a label has fewer, all that it has.
        seed: of the drawing.
        exact: refuse a label that has fewer.

    Raises:
        DataError: ``exact``, and a label has fewer records.
    """
    groups: dict[str, list[int]] = {}
    chosen: set[int] = set()
    for index, record in enumerate(records):
        if record.get(label_field) in (None, ""):
            chosen.add(index)
        else:
            groups.setdefault(label_text(record[label_field]), []).append(index)
    for label, indices in groups.items():
        if exact and len(indices) < count:
            raise DataError(
                f'data.shots asks for {count} records of each label, and "{label}" has {len(indices)}; lower it, or '
                "add records"
            )
        chosen.update(_drawn(records, indices, count, seed))
    return [records[index] for index in sorted(chosen)]


def _drawn(records: Sequence[Record], indices: Iterable[int], count: int, seed: int) -> list[int]:
    return sorted(indices, key=lambda index: _rank(_canonical(records[index]), seed))[:count]


def data_hash(records: Iterable[Mapping[str, Any]]) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of all records as canonical JSON, in their order."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(_canonical(record).encode("ascii") + b"\n")
    return digest.hexdigest()[:16]


def _rank(text: str, seed: int) -> bytes:
    """Return what to sort by for an order that looks drawn, and depends on nothing but text and seed."""
    return hashlib.sha256(f"{seed} {text}".encode()).digest()


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def _text_of(record: Record, fields: Sequence[str] | None) -> str:
    if fields:
        values = [record.get(name) for name in fields]
        values += [[dict(said.fields), said.answer] for said in record.history]
        return _canonical([value.strip() if isinstance(value, str) else value for value in values])
    text = {
        name: value.strip() if isinstance(value, str) else value
        for name, value in record.items()
        if name not in _NOT_TEXT and isinstance(value, (str, list, dict))
    }
    return _canonical(text or record)


def _fill_from_conversation(record: Record) -> None:
    if "instruction" in record and "output" in record:
        return
    column = next((name for name in TURNS if name in record), TURNS[-1])
    said = read_conversation(record.get(column), column, record.location)
    if said is None:
        return
    filled = {"system": said.system, "instruction": said.questions[-1], "input": ""}
    record.open_question = len(said.answers) < len(said.questions)
    if not record.open_question:
        filled["output"] = said.answers[-1]
    record.update({name: text for name, text in filled.items() if name not in record})
    record.history = tuple(
        Exchange({"instruction": question}, answer, learnt)
        for question, answer, learnt in zip(said.questions[:-1], said.answers, said.learnt, strict=False)
    )


def _fill_from_history(record: Record) -> None:
    """Take over what Alpaca's ``history`` holds, once the record's question is an ``instruction``."""
    if "instruction" in record and not record.history:
        record.history = read_history(record.get("history"), "history", record.location)


def _map_fields(record: Record, fields: Mapping[str, str]) -> None:
    columns, history = dict(record), record.history
    for field, column in fields.items():
        value = _column(columns, column)
        if value is _ABSENT:
            raise DataError(
                f"{record.location}: expected a column {column!r} for the field {field!r} and found "
                f"{', '.join(columns)}; correct data.fields.{did_you_mean(column, sorted(columns))}"
            )
        record[field] = value
    record.history = tuple(  # a question under another name is so in the whole conversation
        replace(said, fields={**said.fields, **{f: said.fields[c] for f, c in fields.items() if c in said.fields}})
        for said in history
    )


def _column(columns: Mapping[str, Any], name: str) -> Any:
    """Return a column's value.

    Unless a column has that name, ``a.b`` is the member b of an object in the column a, and ``a.0`` a list's first.
    """
    if name in columns:
        return columns[name]
    outer, dot, inner = name.partition(".")
    nested = columns.get(outer)
    if isinstance(nested, list):
        nested = {str(number): value for number, value in enumerate(nested)}
    return _column(nested, inner) if dot and isinstance(nested, Mapping) else _ABSENT
