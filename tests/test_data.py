"""Every shape of data becomes records; every bad input is one sentence with file, line and field."""

from __future__ import annotations

import csv
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ptune.errors import DataError
from ptune.records.conversations import Exchange
from ptune.records.data import data_hash, has_split, load_records, split_dev
from ptune.records.record import Record

ROWS = [{"text": "a, b", "label": "yes"}, {"text": 'say "提示"\nnow', "label": "no"}]
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


def json_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_table(path: Path, rows: list[dict[str, str]], delimiter: str) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def fails(source: str | Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        load_records(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Formats


@pytest.mark.parametrize(
    ("name", "writer"),
    [
        ("a.jsonl", lambda path: write(path, json_lines(ROWS))),
        ("a.ndjson", lambda path: write(path, json_lines(ROWS).replace("\n", "\r\n"))),
        ("a.JSONL", lambda path: write(path, json_lines(ROWS).rstrip("\n"))),
        ("a.json", lambda path: write(path, json.dumps(ROWS, indent=2))),
        ("lines.json", lambda path: write(path, json_lines(ROWS))),
        ("inside.json", lambda path: write(path, json.dumps({"version": "1", "data": ROWS}))),
        ("a.csv", lambda path: write_table(path, ROWS, ",")),
        ("a.tsv", lambda path: write_table(path, ROWS, "\t")),
        ("a.parquet", lambda path: write_parquet(path, ROWS)),
    ],
)
def test_every_format_gives_the_same_records(tmp_path: Path, name: str, writer: Callable[[Path], Path]) -> None:
    assert load_records(writer(tmp_path / name)) == ROWS
    assert load_records(str(tmp_path / name), limit=1) == ROWS[:1]


@given(rows=st.lists(st.fixed_dictionaries({"text": TEXT, "other": TEXT}), min_size=1))
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_text_of_any_characters_comes_through_every_format(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    assert load_records(write(tmp_path / "a.jsonl", json_lines(rows))) == rows
    assert load_records(write(tmp_path / "a.json", json.dumps(rows))) == rows
    assert load_records(write_table(tmp_path / "a.csv", rows, ",")) == rows
    assert load_records(write_parquet(tmp_path / "a.parquet", rows)) == rows


@pytest.mark.parametrize(
    ("name", "content", "locations"),
    [
        ("a.jsonl", '\n{"a": 1}\n\n  \n{"a": 2}\n', ["line 2", "line 5"]),
        ("a.json", '[{"a": 1},\n {"a": 2}]', ["record 1", "record 2"]),
        ("a.csv", 'a,b\n"x\ny",1\n\nz,2\n', ["line 2", "line 5"]),
        ("a.csv", "\na,b\r\nx,1\r\n", ["line 3"]),
    ],
)
def test_a_record_knows_its_line_past_blank_ones(tmp_path: Path, name: str, content: str, locations: list[str]) -> None:
    path = write(tmp_path / name, content)
    assert [record.location for record in load_records(path)] == [f"{path}, {location}" for location in locations]


def test_a_path_is_located_as_the_user_wrote_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "train.jsonl", '{"a": 1}\n')
    monkeypatch.chdir(tmp_path)
    assert load_records("train.jsonl")[0].location == "train.jsonl, line 1"


def test_a_record_keeps_its_location_when_pickled() -> None:
    record = pickle.loads(pickle.dumps(Record({"a": 1}, "train.jsonl, line 12")))
    assert record == {"a": 1}
    assert record.location == "train.jsonl, line 12"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv"])
def test_a_byte_order_mark_is_tolerated(tmp_path: Path, name: str) -> None:
    content = "text\nhello\n" if name.endswith("sv") else '{"text": "hello"}\n{"text": "again"}\n'
    assert load_records(write(tmp_path / name, b"\xef\xbb\xbf" + content.encode()))[0] == {"text": "hello"}


def test_a_line_separator_within_a_text_ends_no_line(tmp_path: Path) -> None:
    rows = [{"text": "one\u2028two\x85three\x0cfour"}]
    assert load_records(write(tmp_path / "a.jsonl", json_lines(rows))) == rows


def test_quotes_in_a_tab_separated_file_without_quoting_are_characters(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", 'text\tlabel\n"good" he said\t1\nit is 5" wide\t0\n')
    assert load_records(path) == [{"text": '"good" he said', "label": "1"}, {"text": 'it is 5" wide', "label": "0"}]


def test_quotes_that_pair_by_chance_swallow_no_lines(tmp_path: Path) -> None:
    lines = ['"hello there\t1', "another one\t0", 'quote end"\t1', "last\t0"]
    records = load_records(write(tmp_path / "a.tsv", "\n".join(["text\tlabel", *lines, ""])))
    assert records == [dict(zip(("text", "label"), line.split("\t"), strict=True)) for line in lines]
    assert [record.location for record in records] == [f"{tmp_path / 'a.tsv'}, line {n}" for n in range(2, 6)]
    quoted = write(tmp_path / "b.tsv", 'text\tlabel\n"two\nlines"\t1\n"a\ttab"\t0\n')
    assert load_records(quoted) == [{"text": "two\nlines", "label": "1"}, {"text": "a\ttab", "label": "0"}]
    assert load_records(write(tmp_path / "c.tsv", 'text\n"two\nlines"\n')) == [{"text": "two\nlines"}]


@pytest.mark.parametrize("column", ["conversations", "messages"])
def test_an_object_that_is_a_record_is_one(tmp_path: Path, column: str) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (record,) = load_records(write(tmp_path / "a.json", json.dumps({column: turns, "id": 7}, indent=2)))
    assert (record["instruction"], record["output"], record["id"]) == ("q", "a", 7)
    assert record.location == f"{tmp_path / 'a.json'}, record 1"
    assert (
        load_records(write(tmp_path / "b.json", json.dumps({column: [{column: turns}] * 2})))
        == [{column: turns, "system": "", "instruction": "q", "input": "", "output": "a"}] * 2
    )
    assert load_records(write(tmp_path / "c.json", json.dumps({column: ROWS}))) == ROWS
    assert load_records(write(tmp_path / "d.json", json.dumps(ROWS[0]) + "\n")) == ROWS[:1]


def test_columns_without_a_name_are_left_out(tmp_path: Path) -> None:
    assert load_records(write(tmp_path / "a.csv", ",text, label,\n0,good,1,\n")) == [{"text": "good", "label": "1"}]


def test_a_long_text_in_csv_is_read_and_the_process_keeps_its_limit(tmp_path: Path) -> None:
    csv.field_size_limit(131_072)
    assert len(load_records(write(tmp_path / "a.csv", f"text,b\n{'x' * 200_000},1\n"))[0]["text"]) == 200_000
    assert csv.field_size_limit() == 131_072


def test_tokenised_records_pass_through(tmp_path: Path) -> None:
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}]
    assert load_records(write(tmp_path / "a.jsonl", json_lines(rows))) == rows
    assert load_records(write_parquet(tmp_path / "a.parquet", rows)) == rows


# Folders, datasets, the Hub


@pytest.mark.parametrize("name", ["dev.jsonl", "validation.jsonl", "valid.jsonl", "data/validation.jsonl"])
def test_a_folder_is_read_by_split(tmp_path: Path, name: str) -> None:
    write(tmp_path / "train.jsonl", '{"a": "train"}')
    write(tmp_path / "test.jsonl", '{"a": "test"}')
    write(tmp_path / "notes.txt", "anything")
    write(tmp_path / name, '{"a": "dev"}')
    for split in ("train", "dev", "test"):
        assert load_records(tmp_path, split=split) == [{"a": split}]


def test_a_folder_tells_whether_it_holds_a_split_and_a_file_never_does(tmp_path: Path) -> None:
    file = write(tmp_path / "train.jsonl", '{"a": 1}')
    assert not has_split(tmp_path, "dev")
    write(tmp_path / "valid.csv", "a\n1\n")
    assert has_split(tmp_path, "dev")
    assert not has_split(file, "dev")
    assert not has_split(file, "train")
    with pytest.raises(DataError, match="nowhere"):
        has_split(tmp_path / "nowhere", "dev")


def test_a_field_may_be_a_member_of_an_object(tmp_path: Path) -> None:
    rows = [{"target": {"span": {"text": "Tina"}}, "target.plain": "as it is", "label": 1}]
    file = write(tmp_path / "a.jsonl", json_lines(rows))
    (record,) = load_records(file, fields={"noun": "target.span.text", "plain": "target.plain"})
    assert record["noun"] == "Tina"
    assert record["plain"] == "as it is"
    assert "'target.span.txt'" in fails(file, fields={"noun": "target.span.txt"})


def test_parts_of_a_split_are_read_in_their_order(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", [{"a": 2}])
    assert "expected 2 parts of train and found 1; copy the others too." in fails(tmp_path)
    first = write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", [{"a": 0}, {"a": 1}])
    records = load_records(tmp_path)
    assert records == [{"a": 0}, {"a": 1}, {"a": 2}]
    assert records[1].location == f"{first}, row 2"


def test_a_folder_with_two_sources_of_a_split_is_ambiguous(tmp_path: Path) -> None:
    write(tmp_path / "dev.jsonl", '{"a": 1}')
    write(tmp_path / "validation.csv", "a\n1\n")
    message = f"{tmp_path}: expected one source of dev records and found dev.jsonl, validation.csv; name one file."
    assert fails(tmp_path, split="dev") == message


def test_a_folder_with_nothing_to_read_says_what_was_looked_for(tmp_path: Path) -> None:
    assert fails(tmp_path).endswith("and found nothing; name a file.")
    write(tmp_path / "notes.txt", "anything")
    assert fails(tmp_path, split="dev") == (
        f"{tmp_path} holds no dev records: expected dev or validation or valid with one of the suffixes .jsonl, "
        ".ndjson, .json, .csv, .tsv, .parquet, or a folder of datasets.save_to_disk, and found notes.txt; name a file."
    )


def test_saved_datasets_are_read(tmp_path: Path) -> None:
    import datasets

    one = datasets.Dataset.from_list([*ROWS, *ROWS])
    one.save_to_disk(tmp_path / "one")
    records = load_records(tmp_path / "one", limit=3)
    assert records == [*ROWS, ROWS[0]]
    assert records[2].location == f"{tmp_path / 'one'}, row 3"
    datasets.DatasetDict({"train": one, "validation": one.select([1])}).save_to_disk(tmp_path / "both")
    assert load_records(tmp_path / "both") == [*ROWS, *ROWS]
    dev = load_records(tmp_path / "both", split="dev")
    assert dev == ROWS[1:]
    assert dev[0].location == f"{tmp_path / 'both'}, split validation, row 1"
    message = f"{tmp_path / 'both'}: expected a split test and found train, validation; name a file instead."
    assert fails(tmp_path / "both", split="test") == message


def test_a_damaged_saved_dataset_is_refused(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    (tmp_path / "one" / "data-00000-of-00001.arrow").write_bytes(b"ARROW1")
    assert f"{tmp_path / 'one'} is not a whole folder of datasets.save_to_disk (" in fails(tmp_path / "one")


def test_what_datasets_loads_by_name_becomes_records(tmp_path: Path) -> None:
    folder = tmp_path / "sets"
    write(folder / "train.jsonl", json_lines(ROWS))
    write(folder / "validation.jsonl", json_lines(ROWS[:1]))
    program = (
        "import sys; from ptune.records.readers import _read_hub\n"
        "for split in ('train', 'dev'):\n"
        "    for record in _read_hub(sys.argv[1], split): print(dict(record), record.location)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-c", program, str(folder)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.stdout.splitlines() == [
        f"{ROWS[0]} {folder}, split train, row 1",
        f"{ROWS[1]} {folder}, split train, row 2",
        f"{ROWS[0]} {folder}, split validation, row 1",
    ], result.stderr


@pytest.mark.parametrize("name", ["nobody/no-such-data", "trian", "owner/name:config"])
def test_a_name_that_is_neither_here_nor_on_the_hub_is_one_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / "train").mkdir()
    program = (
        "import os, sys; from ptune.records.data import load_records; from ptune.errors import DataError\n"
        "os.chdir(sys.argv[2])\n"
        "try: load_records(sys.argv[1])\n"
        "except DataError as error: print(error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-c", program, name, str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.stdout.startswith(f'"{name}" is neither a file here nor reachable as a data set on the Hub (')
    assert "check the name and the network, or give a path such as data/train.jsonl." in result.stdout
    assert result.stdout.count("\n") == 1
    assert ('Did you mean "train"?' in result.stdout) == (name == "trian")


# Bad input


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", " is empty: expected at least one record; check the file."),
        ("a.jsonl", "\n \n", " is empty: expected at least one record; check the file."),
        ("a.json", "", " is empty: expected at least one record; check the file."),
        ("a.json", "[]", " is empty: expected at least one record; check the file."),
        ("a.csv", "text,label\n", " is empty: expected at least one record; check the file."),
        (
            "a.jsonl",
            '{"a": 1}\n\n {"a" 1}\n',
            ", line 3, column 7: broken JSON (Expecting ':' delimiter); correct it there or just before.",
        ),
        (
            "a.json",
            '[{"a": 1},\n {"b" 2}]',
            ", line 2, column 7: broken JSON (Expecting ':' delimiter); correct it there or just before.",
        ),
        (
            "a.json",
            '{"a": 1}\n{"b" 2}\n',
            ", line 2, column 6: broken JSON (Expecting ':' delimiter); correct it there or just before.",
        ),
        (
            "a.jsonl",
            '{"a": 1}\n[1, 2]\n',
            ', line 2: expected an object such as {"text": "..."} and found a list; make it an object.',
        ),
        (
            "a.json",
            '[{"a": 1}, "text"]',
            ', record 2: expected an object such as {"text": "..."} and found text; make it an object.',
        ),
        (
            "a.jsonl",
            '[\n{"a": 1}\n]\n',
            ", line 1: expected one object a line and found the beginning of a list; name the file .json.",
        ),
        (
            "a.jsonl",
            '{"a": 1}\n[1 2]\n',
            ", line 2, column 4: broken JSON (Expecting ',' delimiter); correct it there or just before.",
        ),
        ("a.json", "3", ": expected a list of objects and found a number; put the records in a list."),
        (
            "a.json",
            '{"a": [], "b": []}',
            ": expected a list of objects, or an object with one, and found the lists a, b; keep one list, or "
            "put the object in a list if it is a record.",
        ),
        (
            "a.jsonl",
            b'{"a": "b"}\n{"a": "\xc4\xe3"}\n',
            ", line 2, byte 8: expected UTF-8 and found 0xc4; save the file as UTF-8, for instance by iconv -f GB18030 "
            "(or whatever its encoding is) -t UTF-8.",
        ),
        (
            "a.csv",
            b"text\n\xff\n",
            ", line 2, byte 1: expected UTF-8 and found 0xff; save the file as UTF-8, for instance by iconv -f GB18030 "
            "(or whatever its encoding is) -t UTF-8.",
        ),
        (
            "a.jsonl",
            '{"a": "cut \\ud83d"}\n',
            ", line 1: field 'a' holds half of a character (a lone surrogate, as in a cut emoji), which no tokenizer "
            "reads; remove it or complete it.",
        ),
        (
            "a.csv",
            "text,label\na,1\nb,c,2\n",
            ", line 3: expected 2 values as in the header (text, label) and found 3; put quotes around a text that "
            "holds the separator.",
        ),
        (
            "a.csv",
            'text,label\n"a\nb",1\nb\n',
            ", line 4: expected 2 values as in the header (text, label) and found 1; put quotes around a text that "
            "holds the separator.",
        ),
        (
            "a.csv",
            'text,label\na,1\n"b,2\nc,3\n',
            ", line 3: broken CSV in the row that begins there (unexpected end of data); close each quote, and "
            "double a quote inside a text.",
        ),
        ("a.csv", "text,text\na,b\n", ", line 1: column 'text' stands twice in the header; rename one."),
        (
            "a.csv",
            "text;label\na;1\n",
            ", line 1: expected columns separated by ',' and found ';' in the header; save the file with the separator "
            "of its suffix (.csv comma, .tsv tab).",
        ),
        (
            "a.txt",
            "text",
            ': expected one of the suffixes .jsonl, .ndjson, .json, .csv, .tsv, .parquet and found ".txt"; '
            "convert the file.",
        ),
        (
            "a",
            "text",
            ": expected one of the suffixes .jsonl, .ndjson, .json, .csv, .tsv, .parquet and found none; "
            "convert the file.",
        ),
    ],
)
def test_bad_input_is_one_sentence_with_its_place(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    path = write(tmp_path / name, content)
    assert fails(path) == f"{path}{message}"


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet at all", b"PAR1" + bytes(100) + b"PAR1"])
def test_a_parquet_file_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path / "a.parquet", content)
    message = fails(path)
    assert message.startswith(f"{path} is damaged or not a Parquet file (")
    assert message.endswith("); write it anew.")


def test_a_missing_file_is_named_with_the_nearest_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "data" / "train.jsonl", "{}")
    path = tmp_path / "data" / "trian.jsonl"
    assert fails(path) == f'{path} does not exist; check the path. Did you mean "train.jsonl"?'
    path = tmp_path / "no" / "train.jsonl"
    assert fails(path) == f"{path} does not exist, for there is no folder {path.parent}; check the path."
    monkeypatch.chdir(tmp_path)
    assert fails("zzz.csv") == "zzz.csv does not exist; check the path."
    assert fails("data/train.jsnl") == 'data/train.jsnl does not exist; check the path. Did you mean "train.jsonl"?'


# Fields and shapes


def test_fields_are_added_by_column_and_may_be_exchanged(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"prompt": "q", "a": 1, "b": 2}')
    fields = {"instruction": "prompt", "a": "b", "b": "a"}
    assert load_records(path, fields=fields) == [{"prompt": "q", "instruction": "q", "a": 2, "b": 1}]


def test_members_of_a_list_are_columns_by_number(tmp_path: Path) -> None:
    row = {"candidates": ["Paris", {"text": "Rome"}], "candidates.2": "Bern"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row), encoding="utf-8")
    fields = {"first": "candidates.0", "second": "candidates.1.text", "third": "candidates.2"}
    (record,) = load_records(str(tmp_path / "rows.jsonl"), fields=fields)
    assert [record[name] for name in fields] == ["Paris", "Rome", "Bern"]
    with pytest.raises(DataError, match=r"expected a column 'candidates.3' for the field 'a' and found candidates"):
        load_records(str(tmp_path / "rows.jsonl"), fields={"a": "candidates.3"})


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"prompt": "q", "label": 1}\n{"label": 1}\n')
    assert fails(path, fields={"text": "promt"}) == (
        f"{path}, line 1: expected a column 'promt' for the field 'text' and found prompt, label; "
        'correct data.fields. Did you mean "prompt"?'
    )
    assert fails(path, fields={"text": "prompt"}).startswith(f"{path}, line 2: expected a column 'prompt' for")


def test_alpaca_records_need_no_mapping_and_get_an_empty_input(tmp_path: Path) -> None:
    rows = [{"instruction": "q", "input": "i", "output": "a"}, {"instruction": "q", "output": "a"}]
    assert load_records(write(tmp_path / "a.json", json.dumps(rows))) == [rows[0], {**rows[1], "input": ""}]


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([("human", "q"), ("gpt", "a")], ("", "q", "a")),
        ([("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "q2"), ("assistant", "a2")], ("s", "q2", "a2")),
        ([("human", "q"), ("gpt", "a"), ("human", "q2")], ("", "q2", None)),
    ],
)
def test_a_conversation_gives_its_last_question_and_answer_and_what_was_said_before(
    tmp_path: Path, turns: list[tuple[str, str]], expected: tuple[str, str, str | None]
) -> None:
    share = [{"from": name, "value": text} for name, text in turns]
    chat = [{"role": name, "content": text} for name, text in turns]
    path = write(tmp_path / "a.jsonl", json_lines([{"conversations": share}, {"messages": chat}]))
    filled: dict[str, Any] = dict(zip(("system", "instruction", "output"), expected, strict=True)) | {"input": ""}
    if filled["output"] is None:
        del filled["output"]
    records = load_records(path)
    assert records == [{"conversations": share, **filled}, {"messages": chat, **filled}]
    before = (Exchange({"instruction": "q"}, "a"),) if len(turns) > 2 else ()
    assert [record.history for record in records] == [before, before]
    assert [record.open_question for record in records] == [expected[2] is None] * 2


def test_a_question_under_another_name_is_so_in_the_whole_conversation(tmp_path: Path) -> None:
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "abcd", strict=True)]
    path = write(tmp_path / "a.jsonl", json_lines([{"messages": turns}]))
    (record,) = load_records(path, fields={"text": "instruction"})
    assert (record["text"], record.history) == ("c", (Exchange({"instruction": "a", "text": "a"}, "b"),))


def test_two_fields_that_are_swapped_are_so_in_what_was_said_before(tmp_path: Path) -> None:
    rows = [{"instruction": "I", "input": "X", "output": "o", "history": [["q", "a"]]}]
    path = write(tmp_path / "a.jsonl", json_lines(rows))
    (record,) = load_records(path, fields={"instruction": "input", "input": "instruction"})
    assert (record["instruction"], record["input"]) == ("X", "I")
    assert record.history == (Exchange({"instruction": "", "input": "q"}, "a"),)


def test_columns_beside_a_conversation_are_kept(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    path = write(tmp_path / "a.jsonl", json_lines([{"conversations": turns, "system": "mine", "id": "7"}]))
    filled = {"system": "mine", "id": "7", "instruction": "q", "input": "", "output": "a"}
    assert load_records(path) == [{"conversations": turns, **filled}]


@pytest.mark.parametrize("system", [[], [{"from": "system", "value": "s"}]])
def test_a_greeting_before_any_question_is_left_out(tmp_path: Path, system: list[dict[str, str]]) -> None:
    turns = [{"from": "gpt", "value": "hello"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    (record,) = load_records(write(tmp_path / "a.jsonl", json_lines([{"conversations": [*system, *turns]}])))
    assert (record["instruction"], record["output"], record.history) == ("q", "a", ())


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (
            [],
            "has no answer: expected a user's turn and an assistant's behind it, .* no turn; complete the record",
        ),
        ([("human", "q")], "has no answer: .* and found human; complete the record or remove it"),
        ([("system", "s"), ("human", "q")], "has no answer: .* and found system, human; complete"),
        ([("gpt", "a"), ("human", "q")], "has no answer: .* and found human; complete the record or remove it"),
        (
            [("gpt", "a"), ("gpt", "b"), ("human", "q")],
            "turn 1: expected a turn of human or user at the beginning and found gpt; remove",
        ),
        ([("human", "q"), ("human", "r")], "turn 2: expected .* behind a question and found human; join the two, or"),
        (
            [("human", "q"), ("gpt", "a"), ("gpt", "b")],
            "turn 3: expected .* behind an answer and found gpt; remove it, or",
        ),
        ([("human", "q"), ("system", "s")], "turn 2: .* found system; move it to the front, or remove the record"),
        (
            [("human", "q"), ("assitant", "a")],
            "turn 2: expected one of the roles human, .*'assitant'.*mean \"assistant\"",
        ),
        ([("human", None), ("gpt", "a")], "turn 1: expected text and found NoneType; write what human says, or remove"),
    ],
)
def test_turns_that_make_no_conversation_are_refused(
    tmp_path: Path, turns: list[tuple[str, str | None]], message: str
) -> None:
    said = [{"from": role, "value": text} for role, text in turns]
    path = write(tmp_path / "a.jsonl", "\n" + json_lines([{"conversations": said}]))
    assert re.match(rf"^{re.escape(str(path))}, line 2: conversations,? {message}", fails(path))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": "three new messages"},
        {"messages": ["a", "b"]},
        {"messages": [{"id": 1}]},
        {"messages": [], "instruction": "q", "input": "", "output": "a"},
    ],
)
def test_a_column_called_messages_that_is_no_conversation_is_left_alone(tmp_path: Path, row: dict[str, Any]) -> None:
    assert load_records(write(tmp_path / "a.jsonl", json_lines([row]))) == [row]


# Holding out


@given(
    texts=st.lists(st.sampled_from("abcdefgh"), max_size=60),
    fraction=st.floats(0.01, 0.99),
    limit=st.none() | st.integers(1, 20),
    seed=st.integers(0, 1000),
)
@settings(max_examples=300, deadline=None)
def test_a_split_keeps_every_record_and_no_text_on_both_sides(
    texts: list[str], fraction: float, limit: int | None, seed: int
) -> None:
    records = [Record({"id": str(i), "text": text, "label": str(i % 2)}) for i, text in enumerate(texts)]
    smallest = min((texts.count(text) for text in texts), default=0)
    if len(set(texts)) < 2 or (limit is not None and smallest > limit):
        with pytest.raises(DataError, match=r"^holding out dev "):
            split_dev(records, fraction, limit, seed)
        return
    train, dev = split_dev(records, fraction, limit, seed)
    assert sorted([*train, *dev], key=lambda record: int(record["id"])) == records
    assert train
    assert dev
    assert not {record["text"] for record in train} & {record["text"] for record in dev}
    assert len(dev) <= max(smallest, round(fraction * len(records)))
    assert limit is None or len(dev) <= limit
    for side in (train, dev):
        assert [int(record["id"]) for record in side] == sorted(int(record["id"]) for record in side)
    assert split_dev(records, fraction, limit, seed) == (train, dev)


def test_distinct_records_are_split_by_the_fraction_and_the_limit() -> None:
    records = [Record({"text": str(i)}) for i in range(1000)]
    assert len(split_dev(records, 0.1)[1]) == 100
    assert len(split_dev(records, 0.1, 30)[1]) == 30
    assert len(split_dev(records[:2], 0.99)[0]) == 1


def test_a_split_hangs_on_the_seed_and_not_on_the_order() -> None:
    records = [Record({"text": str(i)}) for i in range(200)]
    dev = {record["text"] for record in split_dev(records, 0.1, None, 3)[1]}
    assert {record["text"] for record in split_dev(records[::-1], 0.1, None, 3)[1]} == dev
    assert {record["text"] for record in split_dev(records, 0.1, None, 4)[1]} != dev


def test_the_split_is_the_same_in_every_process_and_version() -> None:
    records = [Record({"text": str(i)}) for i in range(20)]
    assert [record["text"] for record in split_dev(records, 0.2, None, 0)[1]] == ["1", "11", "15", "16"]


def test_a_split_tells_texts_by_the_named_fields() -> None:
    records = [Record({"text": "ab"[i % 2] + " " * i, "source": str(i)}) for i in range(10)]
    train, dev = split_dev(records, 0.5, fields=["text"])
    assert len({record["text"].strip() for record in dev}) == 1
    assert len({record["text"].strip() for record in train}) == 1


def test_tokenised_records_and_numbers_can_be_split() -> None:
    for rows in ([{"input_ids": [i // 2]} for i in range(10)], [{"number": i} for i in range(10)]):
        train, dev = split_dev([Record(row) for row in rows], 0.2)
        assert len(dev) == 2
        assert not any(record in train for record in dev)


@pytest.mark.parametrize(
    ("texts", "limit", "message"),
    [
        ("", None, "needs at least two records that differ in text and found 0; add records, or name a dev file."),
        ("a", None, "needs at least two records that differ in text and found 1; add records, or name a dev file."),
        ("aa", 5, "that differ in text and found 2 of the same text; add records, or name a dev file."),
        ("aabb", 1, "found no text that stands in 1 records or fewer, the limit (dev_limit); raise it to 2, remove"),
    ],
)
def test_a_split_that_cannot_be_says_why(texts: str, limit: int | None, message: str) -> None:
    with pytest.raises(DataError) as caught:
        split_dev([Record({"text": text}) for text in texts], 0.5, limit, 0)
    assert message in str(caught.value)


# The hash


def test_the_hash_sees_every_change_but_not_the_order_of_fields() -> None:
    records = [Record({"text": "提示", "label": 1}), Record({"text": "b", "label": None})]
    assert data_hash(records) == "90eccede328f287a"
    assert data_hash([{"label": 1, "text": "提示"}, records[1]]) == data_hash(records)
    assert data_hash(records[::-1]) != data_hash(records)
    assert data_hash(records[:1]) != data_hash(records)
    assert data_hash([{**records[0], "label": "1"}, records[1]]) != data_hash(records)
    assert data_hash([]) != data_hash([{}])


def test_values_that_json_lacks_can_be_hashed(tmp_path: Path) -> None:
    from datetime import date
    from decimal import Decimal

    rows = [{"day": date(2020, 1, 2), "price": Decimal("1.50"), "raw": b"\xff"}]
    records = load_records(write_parquet(tmp_path / "a.parquet", rows))
    assert records == rows
    assert data_hash(records) != data_hash([{**rows[0], "day": date(2020, 1, 3)}])


# Real data


def test_real_data_sets_are_read_and_split(real_data: Path) -> None:
    folders = [folder for folder in sorted(real_data.iterdir()) if (folder / "train.jsonl").is_file()]
    assert len(folders) >= 10
    for folder in folders:
        for split in ("train", "dev", "test"):
            records = load_records(folder, split=split, limit=2000)
            path = folder / f"{split}.jsonl"
            first = json.loads(path.read_text(encoding="utf-8").split("\n", 1)[0])
            assert records[0].items() >= first.items()
            assert records[0].location == f"{path}, line 1"
        train, dev = split_dev(records, 0.1, 1000, 0)
        assert train
        assert dev
