"""Entities written out as text and read back as spans, from tags of every scheme and from spans of characters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model, tiny_tokenizer

from ptune.config.task import ExtractionConfig
from ptune.engine.mixed_batches import answer_together
from ptune.errors import ConfigError, DataError
from ptune.families import MASKED
from ptune.models.backbone import Backbone
from ptune.records.data import load_records
from ptune.records.record import Record
from ptune.rendering.renderer import Renderer
from ptune.tasks.entity_text import EntityText, Passage
from ptune.tasks.extraction import Extraction, extraction_scores
from ptune.tasks.registry import build_task
from ptune.tasks.spans import Span, scheme_of, spans_of
from ptune.template import Template

V = 352
TYPES = {"PER": "person", "LOC": "place"}
WORDS = EntityText(TYPES, "; ", "none")
TOKENS = ["John", "Smith", "met", "Smith", "in", "Paris", "."]
RECORD = {"tokens": TOKENS, "tags": ["B-PER", "I-PER", "O", "B-PER", "O", "B-LOC", "O"]}


def task_of(kind: Any = None, **config: Any) -> Extraction:
    settings = ExtractionConfig.model_validate({"types": TYPES, "max_new_tokens": 8} | config)
    renderer = Renderer(Template.parse("{tokens}\n{answer}"), tiny_tokenizer(), V, **({"kind": kind} if kind else {}))
    task = build_task(settings, renderer)
    assert isinstance(task, Extraction)
    return task


@pytest.mark.parametrize(
    ("tags", "scheme"),
    [
        ("B-PER I-PER O B-PER O B-LOC O", "BIO"),
        ("B-PER E-PER O S-PER O S-LOC O", "BMES"),
        ("B-PER E-PER O B-PER O S-LOC O", "BMES"),
    ],
)
def test_schemes_are_read_alike(tags: str, scheme: str) -> None:
    assert spans_of(tags.split()) == [Span(0, 2, "PER"), Span(3, 4, "PER"), Span(5, 6, "LOC")]
    assert scheme_of(tags.split()) == scheme


def test_long_spans_neighbours_and_what_is_out_of_order() -> None:
    long = [Span(0, 3, "ORG"), Span(3, 4, "ORG")]
    for tags in ("B-ORG I-ORG I-ORG B-ORG", "B-ORG I-ORG E-ORG S-ORG", "B-ORG M-ORG E-ORG S-ORG"):
        assert spans_of(tags.split()) == long
    assert scheme_of(["B-ORG", "I-ORG", "E-ORG"]) == "BIOES"
    assert scheme_of(["B-ORG", "M-ORG", "E-ORG"]) == "BMES"
    assert spans_of(["O", "I-PER", "I-LOC", "O", "E-LOC"]) == [Span(1, 2, "PER"), Span(2, 3, "LOC"), Span(4, 5, "LOC")]
    assert spans_of([]) == []
    for tag in ("PER", "X-PER", "B-", "o", ""):
        with pytest.raises(ValueError, match=f'the tag "{tag}" is of none of the schemes BIO, BIOES and BMES'):
            spans_of(["O", tag])
    with pytest.raises(ValueError, match="both occur"):
        scheme_of(["B-A", "M-A", "I-A"])


@given(spans=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4), st.sampled_from(["A", "B-C"])), max_size=6))
@settings(deadline=None)
def test_any_spans_come_back_from_their_tags_in_every_scheme(spans: list[tuple[int, int, str]]) -> None:
    expected, place = [], 0
    for gap, length, kind in spans:
        expected.append(Span(place + gap, place + gap + length, kind))
        place += gap + length
    for inside, last, only in ("IIB", "IES", "MES"):
        tags = ["O"] * (place + 1)
        for span in expected:
            marks = ["B", *inside * (span.end - span.start - 1)]
            marks[-1] = (last if last != "I" else marks[-1]) if len(marks) > 1 else only
            tags[span.start : span.end] = [f"{mark}-{span.type}" for mark in marks]
        assert spans_of(tags) == expected


def test_the_answer_is_the_canonical_text_and_reads_back() -> None:
    task = task_of()
    assert task.answer(RECORD) == "person: John Smith; person: Smith; place: Paris"
    assert task.answer({"tokens": ["Hm"], "tags": ["O"]}) == "none"
    text = {"text": "Smith met John Smith。", "spans": [{"start": 10, "end": 20, "type": "PER"}]}
    assert task.answer(text) == "person: John Smith"
    for record in (RECORD, text):
        reading = WORDS.read(task.passage(record), task.answer(record))
        assert list(reading.spans) == task.spans(record)
        assert reading.parses
    chinese = task_of(types={"NAME": "姓名", "ORG": "单位"}, separator="；", none="无")
    tokens = list("高勇任北京物资学院教授")
    tags = ["B-NAME", "E-NAME", "O", "B-ORG", *["M-ORG"] * 4, "E-ORG", "O", "O"]
    assert chinese.answer({"tokens": tokens, "tags": tags}) == "姓名: 高勇；单位: 北京物资学院"


@pytest.mark.parametrize(
    ("text", "spans", "unknown", "missing", "parses"),
    [
        ("none", [], 0, 0, True),
        (" none \n", [], 0, 0, True),
        ("", [], 0, 0, False),
        ("I do not know", [], 1, 0, False),
        ("person: Smith; person: Smith", [(1, 2), (3, 4)], 0, 0, True),
        ("person:Smith ;person: Smith;  person: Smith", [(1, 2), (3, 4)], 0, 0, True),
        ("person: John Smith; person: Smith", [(0, 2), (3, 4)], 0, 0, True),
        ("person: Smith; person: John", [(1, 2), (0, 1)], 0, 0, True),
        ("person: John Smi; person: ohn", [], 0, 2, True),
        ("animal: John; person: Smith", [(1, 2)], 1, 0, False),
        ("person: Jo", [], 0, 1, True),
        ("person: John; wild animal: Smith", [(0, 1)], 1, 0, False),
        ("person: John; person:", [(0, 1)], 0, 1, False),
    ],
)
def test_reading_is_robust(text: str, spans: list[tuple[int, int]], unknown: int, missing: int, parses: bool) -> None:
    reading = WORDS.read(Passage.of_tokens(TOKENS), text)
    assert [(span.start, span.end) for span in reading.spans] == sorted(spans)
    assert (reading.unknown_types, reading.not_found, reading.parses) == (unknown, missing, parses)


def test_a_mention_may_hold_the_separator() -> None:
    passage = Passage.of_text("We saw Tom; Jerry and Paris.")
    spans = [Span(7, 17, "PER"), Span(22, 27, "LOC")]
    assert WORDS.write(passage, spans) == "person: Tom; Jerry; place: Paris"
    assert list(WORDS.read(passage, "person: Tom; Jerry; place: Paris").spans) == spans


@given(text=st.text("John Smith;: personplace,none\n", max_size=60))
@settings(deadline=None)
def test_anything_can_be_read(text: str) -> None:
    for span in WORDS.read(Passage.of_tokens(TOKENS), text).spans:
        assert 0 <= span.start < span.end <= len(TOKENS)


def test_scores_count_type_and_both_ends() -> None:
    passage = Passage.of_tokens(TOKENS)
    readings = [
        WORDS.read(passage, text) for text in ("person: John Smith; place: Smith", "none", "nonsense", "place: Mars")
    ]
    targets = [spans_of(RECORD["tags"]), [], [Span(0, 1, "PER")], []]
    scores = extraction_scores(readings, targets)
    assert scores["precision"] == 1 / 2
    assert scores["recall"] == 1 / 4
    assert scores["f1"] == pytest.approx(2 * 1 / 6)
    assert (scores["parsed"], scores["unknown_types"], scores["not_found"]) == (3 / 4, 1, 1)
    assert extraction_scores(readings[1:2], [[]])["f1"] == 0


def test_predictions_have_spans_alone_and_among_others() -> None:
    backbone = Backbone(tiny_model("gpt2"), tiny_tokenizer(), "tiny")
    task = task_of()
    (alone,) = task.predict(backbone, [RECORD])
    assert set(alone) == {"text", "finish_reason", "spans", "dropped"}
    assert answer_together(backbone, [(task, RECORD)] * 2) == [alone, alone]
    metrics = task.evaluate(backbone, [RECORD])
    assert {"loss", "f1", "precision", "recall", "parsed", "unknown_types", "not_found"} <= set(metrics)
    assert task.metric == "f1"
    assert "f1" not in task_of(metric="loss").evaluate(backbone, [RECORD])
    with pytest.raises(ConfigError, match="writes no text, so it cannot learn a task of type extraction"):
        task_of(MASKED)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "expected as many tags as tokens, and found 1 for 2; give each"),
        ({"tokens": ["a"], "tags": ["PERSON"]}, 'the tag "PERSON" is of none of the schemes .*; rewrite the tags'),
        ({"tokens": ["a", "b", "c"], "tags": ["B-PER", "M-PER", "I-PER"]}, "M- and I- both occur"),
        ({"tokens": ["a"], "tags": ["B-PRE"]}, 'the type "PRE" is none of task.types.*Did you mean "PER"'),
        ({"tokens": ["a"], "tag": ["O"]}, 'has no entities: .*"tags" and has tokens, tag; .*Did you mean "tag"'),
        ({"words": ["a"]}, 'lacks a list of words in the field "tokens", or text in "text", and has words'),
        (
            {"text": "abc", "spans": [{"start": 1, "end": 9, "type": "PER"}]},
            "span 1: 1 to 9 does not lie in the text of 3",
        ),
        (
            {"text": "abc", "spans": [{"start": 0, "end": 2, "type": "PER", "text": "bc"}]},
            "span 1: its text is 'bc', and from 0 to 2 stands 'ab'; correct the numbers",
        ),
        ({"text": "abc", "spans": [[0, 1, "PER"]]}, "span 1: expected type, start and end, and found"),
    ],
)
def test_records_that_do_not_fit_are_refused(record: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"^a\.jsonl, line 3: .*{message}|^a\.jsonl, line 3 {message}"):
        task_of().answer(Record(record, "a.jsonl, line 3"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"types": {"A": "x:y"}}, "holds a colon or the separator"),
        ({"types": {"A": "x", "B": "x"}}, "two types have one word"),
        ({"types": {"A": "none"}}, "or one has that of no entity"),
        ({"types": {"A": "x"}, "separator": ":"}, "the separator is empty or the colon"),
    ],
)
def test_settings_that_cannot_be_read_back_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExtractionConfig.model_validate(config)


@pytest.mark.parametrize(("name", "least"), [("conll2003", 0.99), ("resume_ner_zh", 0.99)])
def test_real_entities_come_back_from_their_own_text(name: str, least: float, real_data: Path) -> None:
    records = load_records(real_data / name, split="dev", limit=400)
    types = {span.type for record in records for span in spans_of(record["tags"])}
    task = task_of(types={kind: kind.lower() for kind in types})
    readings = [task._words.read(task.passage(record), task.answer(record)) for record in records]
    scores = extraction_scores(readings, [task.spans(record) for record in records])
    assert scores["f1"] > least
    assert scores["parsed"] == 1


def test_a_run_in_a_terminal_and_mistakes_that_exit_with_2(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [RECORD, {"tokens": ["Good", "soup"], "tags": ["O", "O"]}] * 8
    bad = {
        "spans": [{"text": "abc", "spans": [{"start": 1, "end": 9, "type": "PER"}]}],
        "tags": [{"tokens": ["a"], "tags": ["PERSON"]}],
        "lengths": [{"tokens": ["a"], "tags": []}],
    }
    for name, given_rows in ({"rows": rows} | bad).items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in [*given_rows, *rows]), encoding="utf-8")
    config: dict[str, Any] = {
        "model": str(tmp_path / "model"),
        "task": {"type": "extraction", "types": TYPES, "max_new_tokens": 8},
        "prompt": {"template": "[P*3]{tokens}\n{answer}"},
        "training": {"max_steps": 2, "evaluations": 1},
        "output": str(tmp_path / "prompt"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")

    def ptune(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ptune", *map(str, arguments)],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        )

    done = ptune("train", tmp_path / "run.yaml", "--data", tmp_path / "rows.jsonl", "--dev", tmp_path / "rows.jsonl")
    assert done.returncode == 0, done.stderr
    done = ptune("predict", tmp_path / "prompt", tmp_path / "rows.jsonl", "--limit", 1)
    (line,) = done.stdout.splitlines()
    answer = json.loads(line)
    assert answer["tags"] == RECORD["tags"]
    assert isinstance(answer["spans"], list)
    said = ptune("predict", tmp_path / "prompt", "John met Ann").stdout
    assert {"tokens", "text", "spans", "dropped"} < set(json.loads(said))
    config["task"] |= {"separator": ":"}
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    done = ptune("train", tmp_path / "broken.yaml", "--data", tmp_path / "rows.jsonl")
    assert done.returncode == 2
    assert "the separator is empty or the colon" in done.stderr
    for name in bad:
        where = ["--data", tmp_path / f"{name}.jsonl"]
        where += ["--output", tmp_path / name, "--prompt.template", "[P]x {answer}"]
        done = ptune("train", tmp_path / "run.yaml", *where)
        assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1), done.stderr
        assert f"{name}.jsonl, line 1" in done.stderr
