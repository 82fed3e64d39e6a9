"""The tables of the benchmarks that are stored cell by cell, on tiny models: lines come out, nothing twice."""

from __future__ import annotations

import importlib
import importlib.util
import json
import random
from pathlib import Path
from types import ModuleType

import pytest
from tiny_models import tiny_model, tiny_tokenizer

pytest.importorskip("peft")

ROOT = Path(__file__).parents[1]
WORDS = ["the", "film", "was", "a", "wonder", "soup", "waiter", "room", "apple", "fresh", "small", "wrong", "dull"]
LABELS = {
    "trec": ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"),
    "clinc150": ("alarm", "apr", "calendar", "cancel"),
    "sst2": ("positive", "negative"),
    "shopping_zh": ("positive", "negative"),
    "waimai_zh": ("positive", "negative"),
}
TINY = ["--steps", "3", "--seeds", "2", "--train-limit", "16", "--dev-limit", "8"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Sets of a few sentences of random words, each with every label."""
    rng = random.Random(0)
    for name, labels in LABELS.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        for part in ("train", "dev", "test"):
            records = [{"text": " ".join(rng.choices(WORDS, k=6)), "label": label} for label in labels * 6]
            lines = "".join(json.dumps(record) + "\n" for record in records)
            (tmp_path / "data" / name / f"{part}.jsonl").write_text(lines, encoding="utf-8")
    return tmp_path / "data"


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    for family in ("llama", "bert"):
        tiny_model(family).save_pretrained(tmp_path / family)
        tiny_tokenizer(family).save_pretrained(tmp_path / family)
    return {family: tmp_path / family for family in ("llama", "bert")}


@pytest.fixture(params=["tasks_table", "spot", "defaults", "precision", "search_quality"])
def script(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module(request.param)


def arguments(script: ModuleType, data: Path, models: dict[str, Path], output: Path) -> list[str]:
    given = {
        "tasks_table": [
            *["--backbones", f"causal={models['llama']}", f"masked={models['bert']}"],
            *["--tasks", "trec", "--test-limit", "8", *TINY],
        ],
        "spot": [
            *["--model", models["llama"], "--pairs", "waimai_zh", "--source-steps", "2", "--test-limit", "8"],
            *TINY[2:],
        ],
        "defaults": [
            *["--model", models["llama"], "--questions", "schedule", "lead", "deep", "voting", "--tasks", "sst2"],
            *TINY,
        ],
        "precision": ["--model", models["llama"], "--tasks", "sst2", "--test-limit", "8", *TINY],
        "search_quality": ["--model", models["llama"], "--tasks", "sst2", "--test-limit", "8", *TINY],
    }[script.__name__]
    return [str(word) for word in ("--data", data, "--output", output, *given)]


def test_lines_come_out_and_a_second_call_computes_nothing(
    script: ModuleType,
    data: Path,
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "results.json"
    monkeypatch.setattr(script, "STEPS", (2, 3), raising=False)
    monkeypatch.setattr(script, "VARY", {"training.learning_rate": (0.002, 0.01)}, raising=False)
    given = arguments(script, data, models, output)
    assert script.main(given) == 0
    table = capsys.readouterr().out
    stored = output.read_bytes()
    assert script.main(given) == 0
    assert capsys.readouterr().out == table
    assert output.read_bytes() == stored
    assert script.main(["--markdown", "--output", str(output)]) == 0
    assert capsys.readouterr().out == table
    lines = [[word.strip() for word in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    if script.__name__ != "precision":
        assert len({len(line) for line in lines}) == 1
    if script.__name__ == "tasks_table":
        (trec,) = lines[2:]
        assert trec[0] == "trec"
        assert trec[-1] == "-"  # PEFT has no masked task
        assert ["±" in column for column in trec[1:]] == [False, True, True, False, True, False]
    elif script.__name__ == "spot":
        assert [line[:3] for line in lines[2:]] == [["shopping_zh -> waimai_zh", steps, "2"] for steps in ("2", "3")]
        for line in lines[2:]:
            scratch, started = (float(column.split()[0]) for column in line[3:5])
            assert float(line[5]) == pytest.approx(started - scratch, abs=0.11)
    elif script.__name__ == "precision":
        fewer = ["bfloat16", "int8", "int4"]
        assert [line[0] for line in lines[2:6]] == ["float32", *fewer]
        assert [line[0] for line in lines[8:]] == fewer
        cells = json.loads(stored)["tasks"]["sst2"]["cells"]
        assert len(cells) == 8
        changes = [
            100 * (cells[f"int4/seed {seed}"]["test"] - cells[f"float32/seed {seed}"]["test"]) for seed in (0, 1)
        ]
        assert float(lines[5][-1].split()[0]) == pytest.approx(sum(changes) / 2, abs=0.06)
        assert all(0 <= cells[f"float32/seed {seed}"][f"same in {name}"] <= 1 for seed in (0, 1) for name in fewer)
    elif script.__name__ == "search_quality":
        (sst2,) = lines[2:]
        assert sst2[0] == "sst2"
        assert all("±" in column for column in sst2[1:4])
        assert int(sst2[4]) >= 1
    else:
        assert [line[0] for line in lines] == [
            *["", "---", "default", "cosine", "constant"],
            *["", "---", "default", *importlib.import_module("leads").NAMES],
            *["", "---", "default", *(str(rate) for rate in script.DEEP_RATES)],
            *["", "---", "default", "voting of 2"],
        ]


def test_results_of_other_settings_are_refused(
    script: ModuleType,
    data: Path,
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(script, "STEPS", (2,), raising=False)
    output = tmp_path / "results.json"
    given = arguments(script, data, models, output)
    key = {"tasks_table": "trec on causal", "spot": "shopping_zh -> waimai_zh"}.get(script.__name__, "sst2")
    stored = {"tasks": {key: {"settings": {"model": "another"}, "cells": {"frozen/seed 0": {"test": 0.5}}}}}
    output.write_text(json.dumps(stored), encoding="utf-8")
    assert script.main(given) == 2
    assert f"holds results of {key}" in capsys.readouterr().err


def test_the_pages_hold_the_stored_tables() -> None:
    specification = importlib.util.spec_from_file_location("tables_of_pages", ROOT / "docs" / "tables.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    found = []
    for page in module.PAGES:
        text = page.read_text(encoding="utf-8")
        assert module.filled(text) == text, "run: python docs/tables.py"
        found += [name for name in module.SCRIPTS if f"<!-- {name} -->\n|" in text or f"<!-- {name} -->\n**" in text]
    assert sorted(found) == sorted(path.stem for path in module.RESULTS.glob("*.json") if path.stem in module.SCRIPTS)
    assert len(found) >= 2
    drawn = module.picture()
    assert not drawn or module.PICTURE.read_text(encoding="utf-8") == drawn, "run: python docs/tables.py"
