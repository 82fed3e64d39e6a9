"""Where records come from: one file, folder or Hub name -> records as they stand there.

Knows nothing of what fields mean but that turns of a conversation are no records, nor of templates, tokenizers or
models; data.py knows the fields' names.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from ptune.errors import DataError, did_you_mean
from ptune.files import decode, missing_file, one_line, parse_json, read_bytes, what_is_at
from ptune.records.conversations import TURNS, is_said
from ptune.records.record import Record

_SPLITS = {"train": ("train",), "dev": ("dev", "validation", "valid"), "test": ("test",)}
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")


class MissingSplitError(DataError):
    """A folder or Hub data set that can be read, and has no such split."""


def looks_like_a_source(text: str) -> bool:
    """Whether a text reads like a path, a data file or a Hub name with its owner, and not like something said."""
    if Path(text).suffix.lower() in _READERS or text.startswith(("/", "./", "../", "~")):
        return True
    return "/" in text and text.isascii() and _HUB_NAME.fullmatch(text) is not None


def has_split(source: str | Path, split: str) -> bool:
    """Return whether a folder or Hub data set brings a split of its own. A single file never does.

    Raises:
        DataError: nothing is there, or it cannot be read.
    """
    if what_is_at(source) == "file":
        return False
    try:
        read_records(source, split)
    except MissingSplitError:
        return False
    return True


def read_records(source: str | Path, split: str) -> Iterator[Record]:
    """Yield the records of a file, or of the ``split`` of a folder or Hub data set, each as it is asked for.

    Raises:
        DataError: nothing is there, or it cannot be read; names file and line.
    """
    path, found = Path(os.path.expanduser(source)), what_is_at(source)
    if found == "folder":
        return _read_folder(path, split)
    if found == "file":
        return _read_file(path)
    if _may_be_on_the_hub(str(source)):
        return _read_hub(str(source), split)
    raise DataError(missing_file(path))


def _read_file(path: Path) -> Iterator[Record]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        found = f'found "{path.suffix}"' if path.suffix else "found none"
        raise DataError(f"{path}: expected one of the suffixes {', '.join(_READERS)} and {found}; convert the file.")
    return reader(path)


def _read_json_lines(path: Path) -> Iterator[Record]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error
    with file:
        # Lines end at b"\n" alone: str.splitlines would break a text at U+2028, which JSON may hold as it is.
        for number, line in enumerate(file, 1):
            text = decode(line, path, DataError, number)
            if text.strip():
                yield _json_record(_json_line(text, path, number), f"{path}, line {number}", text)


def _json_line(text: str, path: Path, number: int) -> Any:
    try:
        return parse_json(text.rstrip(), path, DataError, number)  # a mistake at the end is on this line, not the next
    except DataError as error:
        if number == 1 and text.lstrip().startswith("["):
            raise DataError(
                f"{path}, line 1: expected one object a line and found the beginning of a list; name the file .json."
            ) from error
        raise


def _read_json(path: Path) -> Iterator[Record]:
    text = decode(read_bytes(path, DataError), path, DataError)
    if not text.strip() or _is_json_lines(text):
        yield from _read_json_lines(path)
        return
    value = parse_json(text, path, DataError)
    if isinstance(value, dict):
        lists = [name for name, member in value.items() if isinstance(member, list)]
        if len(lists) > 1:
            raise DataError(
                f"{path}: expected a list of objects, or an object with one, and found the lists {', '.join(lists)}; "
                "keep one list, or put the object in a list if it is a record."
            )
        is_record = not lists or (lists[0] in TURNS and is_said(value[lists[0]]))
        value = [value] if is_record else value[lists[0]]
    if not isinstance(value, list):
        raise DataError(f"{path}: expected a list of objects and found {_kind(value)}; put the records in a list.")
    for number, member in enumerate(value, 1):
        yield _json_record(member, f"{path}, record {number}", text)


def _is_json_lines(text: str) -> bool:
    lines = list(islice((line for line in io.StringIO(text, newline="\n") if line.strip()), 2))
    try:
        return len(lines) == 2 and isinstance(json.loads(lines[0]), dict)
    except (ValueError, RecursionError):
        return False


def _json_record(value: Any, location: str, text: str) -> Record:
    if not isinstance(value, dict):
        raise DataError(
            f'{location}: expected an object such as {{"text": "..."}} and found {_kind(value)}; make it an object.'
        )
    if _HALF_CHARACTER.search(text):
        for name, member in value.items():
            try:
                json.dumps([name, member], ensure_ascii=False).encode("utf-8")
            except UnicodeEncodeError as error:
                raise DataError(
                    f"{location}: field {name!r} holds half of a character (a lone surrogate, as in a cut emoji), "
                    "which no tokenizer reads; remove it or complete it."
                ) from error
    return Record(value, location)


def _kind(value: Any) -> str:
    kinds = {list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number", type(None): "null"}
    return kinds.get(type(value), "an object")


def _read_csv(path: Path) -> Iterator[Record]:
    return iter(_table(path, ","))


def _read_tsv(path: Path) -> Iterator[Record]:
    return iter(_table(path, "\t"))


def _table(path: Path, separator: str) -> list[Record]:
    text = decode(read_bytes(path, DataError), path, DataError)
    try:
        rows = list(_table_rows(text, path, separator, csv.QUOTE_MINIMAL))
    except DataError:
        if separator != "\t":
            raise
        # Many a tab-separated corpus (GLUE's) knows no quoting: a quote there is a character like any other.
        rows = list(_table_rows(text, path, separator, csv.QUOTE_NONE))
    if separator == "\t":
        rows = _unless_quotes_pair_by_chance(rows, text, path)
    if not rows:
        return []
    columns = [name.strip() for name in rows[0][1]]
    _check_columns(columns, path, rows[0][0], separator)
    records = []
    for line, row in rows[1:]:
        if len(row) != len(columns):
            raise DataError(
                f"{path}, line {line}: expected {len(columns)} values as in the header ({', '.join(columns)}) and "
                f"found {len(row)}; put quotes around a text that holds the separator."
            )
        # A column without a name (an exported row index, a separator at the end) is nothing that a template can name.
        values = {name: value for name, value in zip(columns, row, strict=True) if name}
        records.append(Record(values, f"{path}, line {line}"))
    return records


def _unless_quotes_pair_by_chance(
    rows: list[tuple[int, list[str]]], text: str, path: Path
) -> list[tuple[int, list[str]]]:
    """Return the rows of a tab-separated file, read anew without quoting where each line is a whole row that way.

    Two stray quotes, each at an edge of a text, would else make one text of all that stands between them, ends of lines
    and tabs among it.
    """
    several_columns = bool(rows) and len(rows[0][1]) > 1  # of one column every line is whole
    if not several_columns or not any(re.search(r"[\t\r\n]", value) for _, row in rows for value in row):
        return rows
    plain = list(_table_rows(text, path, "\t", csv.QUOTE_NONE))
    return plain if {len(row) for _, row in plain} == {len(rows[0][1])} else rows


def _table_rows(text: str, path: Path, separator: str, quoting: Literal[0, 3]) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, quoting=quoting, strict=True)
    previous_limit = csv.field_size_limit(sys.maxsize)  # of the whole process, so it is set back
    line = 1
    try:
        for row in reader:
            if row:
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, line {line}: broken CSV in the row that begins there ({error}); "
            "close each quote, and double a quote inside a text."
        ) from error
    finally:
        csv.field_size_limit(previous_limit)


def _check_columns(columns: list[str], path: Path, line: int, separator: str) -> None:
    twice = [name for index, name in enumerate(columns) if name and name in columns[:index]]
    if twice:
        raise DataError(f"{path}, line {line}: column {twice[0]!r} stands twice in the header; rename one.")
    others = [mark for mark in ";\t," if mark != separator and mark in columns[0]]
    if len(columns) == 1 and others:
        raise DataError(
            f"{path}, line {line}: expected columns separated by {separator!r} and found {others[0]!r} in the header; "
            "save the file with the separator of its suffix (.csv comma, .tsv tab)."
        )


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    # Read by pyarrow itself, which datasets brings: datasets would first write a copy into its cache.
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield Record(row, f"{path}, row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is damaged or not a Parquet file ({one_line(error)}); write it anew.") from error


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}


def _read_folder(folder: Path, split: str) -> Iterator[Record]:
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return _read_saved(folder, split)
    names = _SPLITS.get(split, (split,))
    pattern = re.compile(rf"({'|'.join(map(re.escape, names))})(-\d+-of-(\d+))?")
    sources: dict[tuple[Path, str, str, str | None], list[Path]] = {}
    for path in sorted([*folder.iterdir(), *(folder / "data").glob("*")]):
        match = pattern.fullmatch(path.stem)
        if match and path.suffix.lower() in _READERS and path.is_file():
            sources.setdefault((path.parent, path.suffix, match[1], match[3]), []).append(path)
    if not sources:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
        raise MissingSplitError(
            f"{folder} holds no {split} records: expected {' or '.join(names)} with one of the suffixes "
            f"{', '.join(_READERS)}, or a folder of datasets.save_to_disk, and found {found}; name a file."
        )
    if len(sources) > 1:
        candidates = ", ".join(str(paths[0].relative_to(folder)) for paths in sources.values())
        raise DataError(f"{folder}: expected one source of {split} records and found {candidates}; name one file.")
    ((_, _, _, count), paths) = next(iter(sources.items()))
    if count and len(paths) != int(count):
        raise DataError(
            f"{folder}: expected {int(count)} parts of {split} and found {len(paths)}; copy the others too."
        )
    return (record for path in paths for record in _read_file(path))


def _read_saved(folder: Path, split: str) -> Iterator[Record]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # it raises whatever its parts raise
        raise DataError(
            f"{folder} is not a whole folder of datasets.save_to_disk ({one_line(error)}); save it anew."
        ) from error
    return _dataset_records(saved, str(folder), split)


def _read_hub(name: str, split: str) -> Iterator[Record]:
    import datasets

    path, _, config = name.partition(":")
    try:
        loaded = datasets.load_dataset(path, config or None)
    except Exception as error:  # it raises whatever its parts raise, the network among them
        here = Path(name).parent
        near = did_you_mean(Path(name).name, sorted(path.name for path in here.iterdir())) if what_is_at(here) else ""
        raise DataError(
            f'"{name}" is neither a file here nor reachable as a data set on the Hub ({one_line(error)}); '
            f"check the name and the network, or give a path such as data/train.jsonl.{near}"
        ) from error
    return _dataset_records(loaded, name, split)


def _dataset_records(loaded: Any, name: str, split: str) -> Iterator[Record]:
    if isinstance(loaded, dict):
        found = next((alias for alias in _SPLITS.get(split, (split,)) if alias in loaded), None)
        if found is None:
            raise MissingSplitError(
                f"{name}: expected a split {split} and found {', '.join(loaded)}; name a file instead."
            )
        name, loaded = f"{name}, split {found}", loaded[found]
    rows = loaded.with_format(None)
    return (Record(row, f"{name}, row {number}") for number, row in enumerate(rows, 1))


def _may_be_on_the_hub(name: str) -> bool:
    if not _HUB_NAME.fullmatch(name) or Path(name).suffix.lower() in _READERS:
        return False
    owner, slash, _ = name.partition("/")
    return not (slash and what_is_at(owner) == "folder")
