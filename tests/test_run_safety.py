"""A run that cannot go on says why, before it has touched what stands in its folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_models import tiny_model, tiny_tokenizer

from ptune.config.file import load_config
from ptune.config.run import RunConfig
from ptune.errors import ConfigError, MissingExtraError, Stopped, TrainingError
from ptune.files import read_tensors, write_tensors
from ptune.models.backbone import Backbone
from ptune.records.record import Record
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


def _files(folder: Path, *, model: bool = True) -> dict[str, Any]:
    """Write data, and a model unless it is there, to a folder; return the settings that name them."""
    folder.mkdir(exist_ok=True)
    for name, rows in (("train", ROWS[:12]), ("dev", ROWS[12:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if model:
        tiny_model("llama").save_pretrained(folder / "model")
        tiny_tokenizer().save_pretrained(folder / "model")
    data = {name: str(folder / f"{name}.jsonl") for name in ("train", "dev")}
    return {"model": str(folder / "model"), "data": data}


class Interrupting(Reporter):
    """Asks for a stop after the second step."""

    def stepped(self, step: int, loss: float, learning_rate: float) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_run_goes_on_with_data_and_model_that_were_moved(tmp_path: Path) -> None:
    values = config(tmp_path / "whole").model_dump(mode="json")
    whole = train(RunConfig.model_validate(values | _files(tmp_path / "here")))
    output = {"output": str(tmp_path / "prompt")}
    with pytest.raises(Stopped):
        train(RunConfig.model_validate(values | _files(tmp_path / "here") | output), reporter=Interrupting())
    (tmp_path / "here").rename(tmp_path / "there")
    moved = RunConfig.model_validate(values | _files(tmp_path / "there", model=False) | output)
    stored = tmp_path / "prompt" / "run" / "config.yaml"

    rows = (tmp_path / "there" / "train.jsonl").read_text(encoding="utf-8")
    (tmp_path / "there" / "train.jsonl").write_text(rows.replace("room 3", "room 33"), encoding="utf-8")
    before = stored.read_bytes()
    with pytest.raises(ConfigError, match="goes on with what it began with, and the training records changed since"):
        train(moved, resume=True)
    assert stored.read_bytes() == before
    (tmp_path / "there" / "train.jsonl").write_text(rows, encoding="utf-8")

    assert torch.equal(train(moved, resume=True).rows, whole.rows)
    assert load_config(stored) == moved  # where they stand now, for the next time


def test_a_kill_before_the_first_checkpoint_leaves_no_line_twice(backbone: Backbone, tmp_path: Path) -> None:
    settings = config(tmp_path / "prompt")
    whole = train(settings, backbone=backbone, records=records(ROWS)).rows
    run = tmp_path / "prompt" / "run"
    log = (run / "log.jsonl").read_text(encoding="utf-8")
    (run / "log.jsonl").write_text(log.splitlines(keepends=True)[0], encoding="utf-8")  # the evaluation before training
    for path in (run / "checkpoint.safetensors", tmp_path / "prompt" / "ptune.json"):
        path.unlink()
    assert torch.equal(train(settings, backbone=backbone, records=records(ROWS), resume=True).rows, whole)
    assert (run / "log.jsonl").read_text(encoding="utf-8") == log


def _rewritten(checkpoint: Path, **metadata: str | None) -> None:
    """Change what a checkpoint says of itself; None takes it out."""
    with safe_open(checkpoint, framework="pt") as file:
        said = dict(file.metadata()) | metadata
    tensors = read_tensors(checkpoint, TrainingError)
    write_tensors(checkpoint, tensors, {name: value for name, value in said.items() if value is not None})


def test_a_checkpoint_of_another_ptune_is_told_from_one_of_other_settings(backbone: Backbone, tmp_path: Path) -> None:
    settings, checkpoint = config(tmp_path / "prompt"), tmp_path / "prompt" / "run" / "checkpoint.safetensors"
    rows = train(settings, backbone=backbone, records=records(ROWS)).rows
    whole = checkpoint.read_bytes()
    with safe_open(checkpoint, framework="pt") as file:
        progress = json.loads(file.metadata()["progress"])

    def refused(**metadata: str | None) -> str:
        checkpoint.write_bytes(whole)
        _rewritten(checkpoint, **metadata)
        with pytest.raises(TrainingError) as caught:
            train(settings, backbone=backbone, records=records(ROWS), resume=True)
        assert "--overwrite" not in str(caught.value)
        return str(caught.value)

    assert refused(format_version="2") == (
        f'checkpoint "{checkpoint}" is of format_version 2, and this ptune reads 1; go on with the ptune that wrote '
        "it, or upgrade this one by pip install -U ptune"
    )
    said = refused(progress=json.dumps(progress | {"moon": 1}))
    assert said.endswith("this ptune writes (moon); go on with the ptune that wrote it")
    assert "is damaged: it does not say how far the run had come" in refused(progress=None)
    checkpoint.write_bytes(whole)
    assert torch.equal(train(settings, backbone=backbone, records=records(ROWS), resume=True).rows, rows)


OTHER_DEVICE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_run_safety import ROWS, config, records
from tiny_models import tiny_model, tiny_tokenizer
from ptune.models.backbone import Backbone
from ptune.training.train import train
backbone = Backbone(tiny_model("llama"), tiny_tokenizer(), "tiny")
print(train(config(Path(sys.argv[2])), backbone=backbone, records=records(ROWS)).summary["device"])
"""


def test_a_loaded_backbone_is_trained_where_it_is_and_not_where_accelerate_would_be(tmp_path: Path) -> None:
    """As on a machine with a GPU, which accelerate takes, and a backbone that was loaded on the processor."""
    command = [sys.executable, "-c", OTHER_DEVICE, str(Path(__file__).parent), str(tmp_path / "prompt")]
    environment = os.environ | {"ACCELERATE_TORCH_DEVICE": "meta"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.splitlines()[-1:] == ["cpu"], done.stderr


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
