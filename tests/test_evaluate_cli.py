"""`ptune eval` and `predict` with each record's own soft prompt, and with none: the bare model on the same words."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import soft_prompts
import torch
from tiny_models import tiny_model, tiny_tokenizer
from typer.testing import CliRunner

import ptune
from ptune.cli import app
from ptune.config.task import GenerationConfig, LinearClassificationConfig
from ptune.engine.engine import Engine
from ptune.errors import ConfigError, DataError, SoftPromptError
from ptune.models.backbone import Backbone
from ptune.prompts.linear_head import LinearHead
from ptune.records.data import data_hash, load_records
from ptune.tasks.registry import task_for
from ptune.template import Template

RECORDS = [
    {"text": f"{word} soup", "label": label, "output": word, "task": task}
    for number, word in enumerate(["great", "bad", "wonderful", "awful"])
    for label, task in (("good", "one"), ("bad", "more/two"), ("bad" if number else "good", "writes"))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, four soft prompts of it, and records that each name one."""
    folder = tmp_path_factory.mktemp("evaluate")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    backbone = Backbone.load(str(folder / "model"))
    rows = torch.randn(3, 4, backbone.hidden_size, generator=torch.Generator().manual_seed(1))
    soft_prompts.make(backbone, rows=rows[0], temperature=2.5).save(folder / "prompts" / "one")
    soft_prompts.make(backbone, rows=rows[1]).save(folder / "prompts" / "more" / "two")
    writes = GenerationConfig(max_new_tokens=4)
    soft_prompts.make(backbone, rows=rows[2], task=writes, overlong="cut").save(folder / "prompts" / "writes")
    head = LinearHead(torch.randn(2, backbone.hidden_size), torch.zeros(2))
    linear = LinearClassificationConfig(labels=("good", "bad"))
    soft_prompts.make(backbone, task=linear, head=head).save(folder / "prompts" / "linear")
    (folder / "test.jsonl").write_text("".join(json.dumps(one) + "\n" for one in RECORDS), encoding="utf-8")
    return folder


def run(*words: object) -> str:
    """Return what a command prints; what it refuses is raised."""
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def of(name: str) -> list[dict[str, Any]]:
    return [record for record in RECORDS if record["task"] == name]


def test_eval_scores_each_record_by_the_soft_prompt_that_its_column_names(folder: Path, tmp_path: Path) -> None:
    data = folder / "test.jsonl"
    said = run("eval", folder / "prompts", "--data", data, "--by", "task", "--json", tmp_path / "scores.json")
    result = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert (result["by"], result["records"], list(result["prompts"])) == ("task", 12, ["one", "more/two", "writes"])
    with Engine(str(folder / "model"), prompts=folder / "prompts") as engine:
        for name, scores in result["prompts"].items():
            expected = engine.assess(name, of(name))
            assert scores.pop("records") == 4
            assert scores["metrics"] == pytest.approx(expected.metrics, rel=1e-5)
            assert scores.keys() == expected.values().keys()
            assert re.search(rf"{name} +│ +4 │ (accuracy|loss) \d", said), said


def test_eval_says_what_a_score_was_had_on(folder: Path, tmp_path: Path) -> None:
    data, prompt = folder / "test.jsonl", folder / "prompts" / "one"
    run("eval", prompt, "--data", data, "--json", tmp_path / "scores.json", "--dtype", "float32", "--device", "cpu")
    result = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert result["ptune"] == ptune.__version__
    assert result["data_hash"] == data_hash(load_records(data))
    assert (result["backbone"], result["dtype"], result["device"]) == (str(folder / "model"), "float32", "cpu")
    assert (result["prompt"], result["no_prompt"]) == (str(prompt), False)


def test_data_below_the_home_folder_is_a_single_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folder))
    typed = ["eval", str(folder / "prompts" / "one"), "--data=~/test.jsonl", "--json", str(tmp_path / "metrics.json")]
    done = CliRunner().invoke(app, typed)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "metrics.json").read_text())["split"] is None


def test_the_bare_model_is_scored_and_answers_by_the_same_words(folder: Path, tmp_path: Path) -> None:
    """Held against a task without virtual tokens that no soft prompt was ever part of."""
    words = soft_prompts.TEMPLATE.replace("[P*4]", "")
    backbone = Backbone.load(str(folder / "model"))
    task = task_for(backbone, soft_prompts.TASK, Template.parse(words), max_length=64)
    data, prompt = folder / "test.jsonl", folder / "prompts" / "one"
    said = run("eval", prompt, "--data", data, "--no-prompt", "--json", tmp_path / "scores.json")
    assert "without its virtual tokens" in " ".join(said.split())
    result = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert result["no_prompt"] is True
    assert result["metrics"] == pytest.approx(task.assess(backbone, RECORDS, batch_size=4).metrics, rel=1e-5)
    assert result["calibration"]["temperature"] is None  # it was fitted on the soft prompt's scores

    lines = run("predict", prompt, data, "--no-prompt").splitlines()
    for line, expected in zip(lines, task.predict(backbone, RECORDS, batch_size=4), strict=True):
        assert json.loads(line)["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-5)
    (text,) = run("predict", prompt, "great soup", "--no-prompt").splitlines()
    assert json.loads(text)["probabilities"] == pytest.approx(json.loads(lines[0])["probabilities"], abs=1e-5)


def test_the_bare_model_is_asked_without_a_prior_that_it_cannot_read(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backbone = Backbone.load(str(folder / "model"))
    task = soft_prompts.TASK.model_copy(update={"calibration": "prior"})
    soft_prompts.make(backbone, task=task, template="{text}[P*4]{answer}").save(tmp_path / "prompt")
    expected = task_for(backbone, soft_prompts.TASK, Template.parse("{text}{answer}"))
    run("eval", tmp_path / "prompt", "--data", folder / "test.jsonl", "--no-prompt", "--json", tmp_path / "scores.json")
    result = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert result["metrics"] == pytest.approx(expected.assess(backbone, RECORDS, batch_size=4).metrics, rel=1e-5)
    (line,) = run("predict", tmp_path / "prompt", "great soup", "--no-prompt").splitlines()
    (answer,) = expected.predict(backbone, [{"text": "great soup"}], batch_size=1)
    assert json.loads(line)["probabilities"] == pytest.approx(answer["probabilities"], abs=1e-5)
    assert caplog.text.count("scores are taken without calibration by a prior") == 2


def test_the_bare_model_answers_each_record_by_the_words_of_its_own_task(folder: Path, tmp_path: Path) -> None:
    data, prompts = folder / "test.jsonl", folder / "prompts"
    lines = [json.loads(line) for line in run("predict", prompts, data, "--by", "task", "--no-prompt").splitlines()]
    for name in ("one", "more/two", "writes"):
        (tmp_path / "own.jsonl").write_text("".join(json.dumps(one) + "\n" for one in of(name)), encoding="utf-8")
        alone = run("predict", prompts / name, tmp_path / "own.jsonl", "--no-prompt").splitlines()
        key = "text" if name == "writes" else "label"
        assert [line[key] for line in lines if line["task"] == name] == [json.loads(line)[key] for line in alone]


def test_what_the_bare_model_cannot_be_asked_is_refused(folder: Path, tmp_path: Path) -> None:
    data, linear = folder / "test.jsonl", folder / "prompts" / "linear"
    for words in (("eval", linear, "--data", data), ("predict", linear, "soup")):
        with pytest.raises(ConfigError, match='^"linear" answers by a linear head .* leave --no-prompt out$'):
            run(*words, "--no-prompt")
    with pytest.raises(DataError, match='line 1 names no soft prompt in its column "prompt"'):
        run("eval", folder / "prompts", "--data", data, "--by", "prompt")
    (tmp_path / "unknown.jsonl").write_text(json.dumps(RECORDS[0] | {"task": "on"}) + "\n", encoding="utf-8")
    with pytest.raises(SoftPromptError, match='no soft prompt "on" is in .* Did you mean "one"'):
        run("eval", folder / "prompts", "--data", tmp_path / "unknown.jsonl", "--by", "task")


def test_a_record_of_which_only_virtual_tokens_are_left_is_named(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    backbone = Backbone.load(str(tmp_path / "model"))
    soft_prompts.make(backbone, template="[P*4]{text}{answer}").save(tmp_path / "prompt")
    (tmp_path / "test.jsonl").write_text('{"text": "soup"}\n{"text": " "}\n', encoding="utf-8")
    with pytest.raises(DataError, match="line 2 leaves the bare model nothing to read"):
        run("predict", tmp_path / "prompt", tmp_path / "test.jsonl", "--no-prompt")
