"""A run that cannot go on says why, before it has touched what stands in its folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer

from ptune.config.run import RunConfig
from ptune.errors import ConfigError, MissingExtraError
from ptune.models.backbone import Backbone
from ptune.records.data import Record
from ptune.training.reporting import Reporter
from ptune.training.series import under_seeds
from ptune.training.train import train

ROWS = [{"text": f"room {n} {'great' if n % 3 else 'terrible'}", "label": "ab"[n % 3 == 0]} for n in range(18)]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone(tiny_model("llama"), tiny_tokenizer(), "tiny")


def config(output: Path, task: dict[str, Any] | None = None, template: str = "{text}[P*3]{answer}") -> RunConfig:
    return RunConfig.model_validate(
        {
            "task": task or {"type": "classification", "verbalizer": {"a": " good", "b": " bad"}},
            "prompt": {"template": template},
            "training": {"max_steps": 4, "batch_size": 4, "evaluations": 2, "samples": 0},
            "output": str(output),
        }
    )


def records(rows: list[dict[str, str]]) -> tuple[list[Record], list[Record]]:
    made = [Record(row, location=f"line {number}") for number, row in enumerate(rows, 1)]
    return made[:12], made[12:]


@pytest.mark.parametrize(("changed", "named"), [(2, "the training records"), (14, "the dev records")])
def test_a_run_is_not_resumed_with_other_records(backbone: Backbone, tmp_path: Path, changed: int, named: str) -> None:
    settings = config(tmp_path / "prompt")
    train(settings, backbone=backbone, records=records(ROWS))
    other = [row | {"text": "another room"} if number == changed else row for number, row in enumerate(ROWS)]
    with pytest.raises(ConfigError, match=f"goes on with what it began with, and {named} changed since"):
        train(settings, backbone=backbone, records=records(other), resume=True)
    assert torch.isfinite(train(settings, backbone=backbone, records=records(ROWS), resume=True).rows).all()


def test_a_run_is_not_resumed_on_another_model(backbone: Backbone, tmp_path: Path) -> None:
    settings = config(tmp_path / "prompt")
    train(settings, backbone=backbone, records=records(ROWS))
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = tiny_model("llama")
        torch.nn.init.normal_(model.get_input_embeddings().weight)
    with pytest.raises(ConfigError, match="and the model changed since; bring back what it had, or begin anew"):
        train(settings, backbone=Backbone(model, tiny_tokenizer(), "tiny"), records=records(ROWS), resume=True)


def test_half_a_line_of_the_log_does_not_hinder_a_resumed_run(backbone: Backbone, tmp_path: Path) -> None:
    settings = config(tmp_path / "prompt")
    rows = train(settings, backbone=backbone, records=records(ROWS)).rows
    log = tmp_path / "prompt" / "run" / "log.jsonl"
    whole = log.read_text(encoding="utf-8")
    log.write_text(whole + '{"step": 4, "los', encoding="utf-8")
    assert torch.equal(train(settings, backbone=backbone, records=records(ROWS), resume=True).rows, rows)
    assert log.read_text(encoding="utf-8") == whole


def test_a_metric_that_is_not_installed_leaves_the_old_run_alone(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "prompt"
    train(config(output), backbone=backbone, records=records(ROWS))
    before = {path: path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file()}
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    writing = config(output, {"type": "generation", "answer_field": "label", "metric": "bleu", "max_new_tokens": 4})
    with pytest.raises(MissingExtraError, match="sacrebleu"):
        train(writing, backbone=backbone, records=records(ROWS), overwrite=True)
    assert {path: path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file()} == before


@pytest.mark.parametrize("task", ["classification", "generation"])
def test_records_of_which_nothing_is_left_without_virtual_tokens_are_trained_on(tmp_path: Path, task: str) -> None:
    """They are left out where the bare model is asked, which has nothing to read."""
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    backbone = Backbone(tiny_model("llama"), tokenizer, "tiny")
    tasks: dict[str, dict[str, Any]] = {
        "classification": {"type": "classification", "verbalizer": {"a": " good", "b": " bad"}},
        "generation": {"type": "generation", "answer_field": "label", "max_new_tokens": 3},
    }
    rows = [row | {"text": "" if number % 2 else row["text"]} for number, row in enumerate(ROWS)]
    prompt = train(
        config(tmp_path / "prompt", tasks[task], "[P*3]{text}{answer}"), backbone=backbone, records=records(rows)
    )
    assert prompt.summary["steps"] == 4


class Warned(Reporter):
    """Remembers warnings."""

    def __init__(self) -> None:
        self.sentences: list[str] = []

    def warned(self, sentence: str) -> None:
        self.sentences.append(sentence)


def test_one_label_that_is_right_throughout_is_no_majority(backbone: Backbone, tmp_path: Path) -> None:
    rows = [row | {"label": "a"} for row in ROWS]
    settings = config(tmp_path / "prompt")
    settings = settings.model_copy(
        update={"training": settings.training.model_copy(update={"max_steps": 20, "learning_rate": 0.05})}
    )
    heard = Warned()
    prompt = train(settings, backbone=backbone, records=records(rows), reporter=heard)
    assert prompt.summary["after"]["accuracy"] == 1
    assert not any("nothing yet but the majority" in sentence for sentence in heard.sentences)


def test_seeds_of_a_series_hold_out_the_same_dev_records(tmp_path: Path) -> None:
    series = under_seeds(config(tmp_path / "prompt"), 3)
    assert [one.training.seed for one in series] == [0, 1, 2]
    assert {one.data.split_seed for one in series} == {0}
    few = RunConfig.model_validate(json.loads(config(tmp_path / "few").model_dump_json()) | {"data": {"shots": 4}})
    assert {one.data.split_seed for one in under_seeds(few, 3)} == {None}
