"""The quality benchmark on two tiny tasks: every row comes out, and nothing is computed twice."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer

pytest.importorskip("peft")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TASKS = {
    "sst2": {"positive": "the film was a wonder", "negative": "the waiter brought the wrong soup"},
    "shopping_zh": {"positive": "苹果很新鲜", "negative": "房间有点小"},
}
ROWS = ["frozen", "ptune", "peft_same_steps", "peft_same_time", "peft_default"]


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import quality

    return quality


@pytest.fixture
def peft_peer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import peft_peer

    return peft_peer


@pytest.fixture
def load_test(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import load_test

    return load_test


@pytest.fixture
def engine_speed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import engine_speed

    return engine_speed


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(tmp_path: Path, model: Path) -> list[str]:
    for task, texts in TASKS.items():
        (tmp_path / "data" / task).mkdir(parents=True)
        for split, count in (("train", 24), ("dev", 6), ("test", 8)):
            records = [
                {"text": f"{text} {number}", "label": label}
                for number in range(count // 2)
                for label, text in texts.items()
            ]
            lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            (tmp_path / "data" / task / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    options = {"--model": model, "--data": tmp_path / "data", "--output": tmp_path / "results" / "quality.json"}
    numbers = {"--steps": 4, "--evaluations": 1, "--seeds": 2}
    given = [str(part) for pair in (options | numbers).items() for part in pair]
    return [*given, "--tasks", *TASKS]


def test_all_five_rows_of_every_task_come_out_and_a_second_call_computes_nothing(
    quality: ModuleType, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quality.main([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    entries = json.loads(out)
    assert [entry["task"] for entry in entries] == list(TASKS)
    for entry in entries:
        assert list(entry["rows"]) == ROWS
        for name, row in entry["rows"].items():
            assert row["seeds"] == (0 if name == "frozen" else 2)
            assert 0 <= row["mean"] <= 1
            assert ("deviation" in row) == (name != "frozen")
        assert all(seconds > 0 for seconds in entry["seconds_per_step"].values())
        rows = entry["rows"]
        assert rows["ptune"]["steps"] == rows["peft_same_steps"]["steps"] == rows["peft_default"]["steps"] == 4
        assert rows["peft_default"]["learning_rate"] == 5e-5
    assert "38 cells computed" in err

    stored = tmp_path / "results" / "quality.json"
    before = stored.read_bytes()
    assert quality.main([*arguments]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"^0 cells computed", err, flags=re.MULTILINE)
    assert stored.read_bytes() == before
    table = out.splitlines()
    assert len(table) == 2 + len(TASKS)
    assert all(line.count("|") == 9 for line in table)
    assert all("±" in line for line in table[2:])


def test_a_stopped_benchmark_computes_only_what_is_missing(
    quality: ModuleType, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    only_one = [*arguments[: arguments.index("--tasks")], "--tasks", "shopping_zh"]
    assert quality.main(only_one) == 0
    stored = tmp_path / "results" / "quality.json"
    content = json.loads(stored.read_text())
    whole = dict(content["tasks"]["shopping_zh"]["cells"])
    del content["tasks"]["shopping_zh"]["cells"]["ptune/seed 0"], content["tasks"]["shopping_zh"]["cells"]["frozen"]
    stored.write_text(json.dumps(content))
    capsys.readouterr()
    assert quality.main(only_one) == 0
    assert "2 cells computed" in capsys.readouterr().err
    again = json.loads(stored.read_text())["tasks"]["shopping_zh"]["cells"]
    assert set(again) == set(whole)
    for name in ("ptune/seed 0", "frozen"):  # the same seed gives the same prompt
        assert again[name]["test"] == whole[name]["test"]
        assert again[name]["dev"] == whole[name]["dev"]


def test_a_few_shot_benchmark_draws_other_records_for_each_seed(
    quality: ModuleType, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[str]] = []
    tune = quality.train

    def watched(config: Any, *, records: Any, **named: Any) -> Any:
        train, dev = records
        assert len(train) == len(dev) == 4
        drawn.append([record["text"] for record in train])
        return tune(config, records=records, **named)

    monkeypatch.setattr(quality, "train", watched)
    only_one = [*arguments[: arguments.index("--tasks")], "--tasks", "sst2", "--shots", "2"]
    assert quality.main(only_one) == 0
    assert len(drawn) == 4  # three rates with the first seed, then the second seed
    assert drawn[0] == drawn[1] == drawn[2] != drawn[3]


def test_results_of_other_settings_are_not_mixed_in(
    quality: ModuleType, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = tmp_path / "results" / "quality.json"
    stored.parent.mkdir()
    cells = {"frozen": {"test": 0.5, "dev": 0.5}}
    stored.write_text(json.dumps({"tasks": {"sst2": {"settings": {"steps": 300}, "cells": cells}}}))
    assert quality.main(arguments) == 2
    error = capsys.readouterr().err
    assert "holds results of sst2 with" in error
    assert "name another --output, or remove that file" in error


def test_the_peer_scores_labels_as_its_own_model_does(peft_peer: ModuleType, model: Path) -> None:
    from ptune.models.backbone import Backbone

    backbone = Backbone.load(str(model))
    peer = peft_peer.PeftPeer(backbone, virtual_tokens=3)
    ids = torch.tensor([[10, 11, 12, 13], [14, 15, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    positions = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 0]]).bool()
    with torch.no_grad():
        found = peer(ids, mask, positions=positions)
        rows = peer.rows()  # [P, H]
        for row, length in ((0, 4), (1, 2)):
            embedded = torch.cat([rows, backbone.model.get_input_embeddings()(ids[row, :length])])[None]
            logits = backbone.model(inputs_embeds=embedded).logits[0, 3:]
            expected = logits[positions[row, :length]]
            got = found[:2] if row == 0 else found[2:]
            assert torch.allclose(got, expected, atol=1e-4)


def test_a_server_under_load_loses_and_crosses_nothing(
    load_test: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_test, "TEXTS", 6)
    report = tmp_path / "load.json"
    given = ["--requests", "250", "--at-once", "32", "--virtual-tokens", "6", "--json", str(report)]
    assert load_test.main(given) == 0, capsys.readouterr().out
    assert "0 lost, crossed or wrong" in capsys.readouterr().out
    counts = json.loads(report.read_text())["counts"]
    assert counts["labels"] + counts["texts"] + counts["refused"] + counts["gone"] == 250
    assert min(counts[kind] for kind in ("labels", "texts", "refused", "gone", "streams")) > 0


def test_a_load_test_sees_an_answer_that_is_not_the_engine_s(load_test: ModuleType) -> None:
    load = load_test.Load("", [], {})
    load._check(load_test.Reference(probabilities={"a": 0.5, "b": 0.5}), {"a": 0.6, "b": 0.4}, "one")
    load._check(load_test.Reference(text="w5"), "w6", "two")
    load._check(load_test.Reference(text="w5", tie=True), "w6", "three")
    assert [mistake.partition(":")[0] for mistake in load.mistakes] == ["one", "two"]


def test_engine_and_peer_compute_the_same_before_they_are_timed(
    engine_speed: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size, report = engine_speed.SIZES["tiny"], tmp_path / "speed.json"
    ours = engine_speed.Ours(size, 5, 2)
    theirs = engine_speed.Peft(ours, 5, 2)
    texts = [engine_speed.ids_of(size, 7, seed) for seed in range(2)]
    for task in (0, 1):
        assert ours.write([texts[task]], [task], [6]) == theirs.write([texts[task]], task, 6)
    with pytest.raises(SystemExit, match="do not compute the same"):
        engine_speed.check_scores(ours.scores(texts, [0, 1]), theirs.scores(texts, 0))
    given = ["--size", "tiny", "--rounds", "1", "--case", "8 tasks in a batch of 8", "--json", str(report)]
    assert engine_speed.main(given) == 0
    assert capsys.readouterr().out.count("| 8 tasks in a batch of 8 | PEFT, one call a task |") == 1
    assert len(json.loads(report.read_text())["rows"]) == 1
