"""Several runs in turn: each as if it ran alone, on one loaded model, refused early where they collide."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from typer.testing import CliRunner

from ptune.cli import app
from ptune.config.file import config_yaml
from ptune.config.run import RunConfig
from ptune.errors import ConfigError, DataError, OutputError
from ptune.models.backbone import Backbone
from ptune.records.data import draw_shots
from ptune.records.record import Record
from ptune.soft_prompts.soft_prompt import SoftPrompt
from ptune.training.series import check_series, in_turn, spread, under_seeds
from ptune.training.train import train

WORDS = ("soup", "film", "room", "waiter", "apple", "hotel", "door", "song")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("series")
    tiny_model("llama").save_pretrained(place / "model")
    tiny_tokenizer().save_pretrained(place / "model")
    rows = [
        {"text": f"{WORDS[number % 8]} {number} {'great' if number % 3 else 'terrible'}", "label": bool(number % 3)}
        for number in range(60)
    ]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {
        "model": str(place / "model"),
        "data": {"train": str(place / "rows.jsonl"), "shots": 6},
        "task": {"type": "classification", "verbalizer": {True: " good", False: " bad"}},
        "prompt": {"template": "{text}[P*3]{answer}"},
        "training": {"max_steps": 3, "batch_size": 4, "evaluations": 1, "learning_rate": 0.05, "samples": 0},
    }


def config_of(settings: dict[str, Any], output: Path, **training: Any) -> RunConfig:
    return RunConfig.model_validate(
        settings | {"output": str(output), "training": settings["training"] | training},
    )


def test_each_run_of_a_series_is_the_run_alone(settings: dict[str, Any], tmp_path: Path) -> None:
    configs = under_seeds(config_of(settings, tmp_path / "series", seed=4), 2)
    assert [config.output.name for config in configs] == ["seed-4", "seed-5"]
    pairs = in_turn(configs, lambda config, backbone: (train(config, backbone=backbone), backbone))
    assert pairs[0][1] is pairs[1][1]
    alone = train(config_of(settings, tmp_path / "alone", seed=5))
    assert torch.equal(pairs[1][0].rows, alone.rows)
    assert not torch.equal(pairs[0][0].rows, alone.rows)
    values = [prompt.summary["after"]["loss"] for prompt, _ in pairs]
    assert spread([prompt for prompt, _ in pairs], "loss") == (statistics.fmean(values), statistics.stdev(values))


def test_a_backbone_is_loaded_once_though_its_runs_stand_apart(settings: dict[str, Any], tmp_path: Path) -> None:
    other = settings | {"model": {"name": settings["model"], "dtype": "bfloat16"}}
    first, second, third = (
        config_of(one, tmp_path / name) for one, name in ((settings, "a"), (other, "b"), (settings, "c"))
    )
    given = in_turn([first, second, third], lambda config, backbone: (config, backbone))
    assert [config.output.name for config, _ in given] == ["a", "c", "b"]
    assert given[0][1] is given[1][1]
    assert given[2][1].dtype is torch.bfloat16


def test_a_backbone_is_let_go_before_the_next_is_loaded(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, models, alive = Backbone.load, [], []

    def loaded(*arguments: Any, **options: Any) -> Backbone:
        alive.append(sum(model() is not None for model in models))
        backbone = load(*arguments, **options)
        models.append(weakref.ref(backbone.model))
        return backbone

    monkeypatch.setattr(Backbone, "load", loaded)
    other = settings | {"model": {"name": settings["model"], "dtype": "bfloat16"}}
    files = []
    for name, one in (("a", settings), ("b", other)):
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(config_yaml(config_of(one, tmp_path / name)), encoding="utf-8")
    done = CliRunner().invoke(app, ["train", *map(str, files)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert alive == [0, 0]


def test_runs_that_collide_are_refused_before_the_first(settings: dict[str, Any], tmp_path: Path) -> None:
    one = config_of(settings, tmp_path / "one")
    with pytest.raises(ConfigError, match="two runs name the output"):
        check_series([one, config_of(settings, tmp_path / "x" / ".." / "one", seed=1)])
    train(one)
    with pytest.raises(OutputError, match="holds another run"):
        check_series([config_of(settings, tmp_path / "two"), one])
    assert not (tmp_path / "two").exists()
    check_series([config_of(settings, tmp_path / "two"), one], resume=True)


def test_shots_are_so_many_of_each_label_whatever_the_order() -> None:
    records = [Record({"text": f"t{n}", "label": n % 3 == 0}, f"line {n}") for n in range(60)]
    drawn = draw_shots(records, "label", 5, seed=1)
    assert [record["label"] for record in drawn].count(True) == 5
    assert len(drawn) == 10
    assert drawn == [record for record in records if record in drawn]
    backwards = draw_shots(records[::-1], "label", 5, seed=1)
    assert sorted(record["text"] for record in backwards) == sorted(record["text"] for record in drawn)
    assert draw_shots(records, "label", 5, seed=2) != drawn
    assert len(draw_shots(records, "label", 30)) == 50
    nameless = Record({"text": "of no label"}, location="line 51")
    assert nameless in draw_shots([*records, nameless], "label", 5, seed=1, exact=True)  # for the task to name
    with pytest.raises(DataError, match=r'asks for 30 records of each label, and "true" has 20'):
        draw_shots(records, "label", 30, exact=True)


def test_shots_without_labels_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data.shots draws records of each label, and the task is generation"):
        config_of(settings | {"task": {"type": "generation"}}, tmp_path)


def test_a_few_shot_run_uses_so_many_records(settings: dict[str, Any], tmp_path: Path) -> None:
    summary = train(config_of(settings, tmp_path / "few")).summary
    assert summary["train_examples"] == 12
    assert summary["dev_records"] <= 12


def test_the_command_line_trains_tasks_in_turn_and_seeds_with_their_spread(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    def ptune(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "160", "TERM": "dumb"}
        command = [sys.executable, "-m", "ptune", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == code, done.stderr
        return done

    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text(json.dumps(settings | {"output": f"prompts/{name}"}), encoding="utf-8")
    said = ptune("train", "a.yaml", "b.yaml", "--max-steps", 2).stdout
    assert "1 of 2: prompts/a" in said
    assert "2 of 2: prompts/b" in said
    assert SoftPrompt.load(tmp_path / "prompts" / "b").summary["steps"] == 2
    said = ptune("train", "a.yaml", "--output", "prompts/few", "--seeds", 2).stdout
    table = said[said.index("over 2 seeds") :]
    assert re.search(r"mean .* \d+\.\d% ± \d+\.\d%", table)
    shown = ptune("list").stdout
    assert [line.split()[0] for line in shown.splitlines()[1:]] == ["a", "b", "few/seed-0", "few/seed-1"]
    refused = ptune("train", "a.yaml", "b.yaml", "--output", "prompts/one", code=2)
    assert "two runs name the output" in refused.stderr
    assert "--seeds goes with one file" in ptune("train", "a.yaml", "b.yaml", "--seeds", 2, code=2).stderr
