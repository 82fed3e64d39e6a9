"""Two processes train the prompt that one process trains; one of them locks, writes and stops for both."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer

from ptune.config import RunConfig
from ptune.config_file import config_yaml
from ptune.soft_prompt import SoftPrompt
from ptune.training import train

SCRIPT = """
import sys
from ptune.config_file import load_config
from ptune.stopping import Stopped
from ptune.training import train
try:
    train(load_config(sys.argv[1]), resume=sys.argv[2] == "resume")
except Stopped:
    sys.exit(0)
"""
SETTINGS: dict[str, Any] = {
    "task": {"type": "classification", "verbalizer": {"positive": " good", "negative": " bad"}},
    "training": {"epochs": 2, "batch_size": 4, "evaluations": 2, "learning_rate": 0.02, "samples": 0},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    words = ("soup", "film", "room", "waiter", "apple", "hotel", "door", "song")
    rows = [
        {"text": f"{words[n % 8]} {n} {'great' if n % 3 else 'terrible'}", "label": "positive" if n % 3 else "negative"}
        for n in range(38)
    ]
    for row in rows:
        row["tokens"] = row["text"].split()
        row["tags"] = ["B-SIGN" if word in ("great", "terrible") else "O" for word in row["tokens"]]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:30]), encoding="utf-8")
    (folder / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[30:]), encoding="utf-8")
    (folder / "script.py").write_text(SCRIPT, encoding="utf-8")
    return folder


def config_of(
    folder: Path, output: Path, template: str, task: dict[str, Any] = SETTINGS["task"], **training: Any
) -> RunConfig:
    return RunConfig.model_validate(
        SETTINGS
        | {
            "model": str(folder / "model"),
            "data": {"train": str(folder / "train.jsonl"), "dev": str(folder / "dev.jsonl")},
            "task": task,
            "prompt": {"template": template},
            "training": SETTINGS["training"] | training,
            "output": str(output),
        }
    )


def start(folder: Path, config: RunConfig, mode: str = "new") -> subprocess.Popen[str]:
    file = config.output.with_suffix(".yaml")
    file.write_text(config_yaml(config), encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    launcher += ["--rdzv-endpoint", "localhost:0"]
    command = [*launcher, str(folder / "script.py"), str(file), mode]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("template", ["{text}[P*4]{answer}", "[P*4]{text}{answer}"])
def test_two_processes_train_the_prompt_of_one(folder: Path, tmp_path: Path, template: str) -> None:
    config = config_of(folder, tmp_path / "two", template)
    _, errors = (process := start(folder, config)).communicate(timeout=300)
    assert process.returncode == 0, errors
    # A step of two processes takes two batches, as one with an accumulation of two does.
    alone = train(config_of(folder, tmp_path / "one", template, gradient_accumulation_steps=2))
    both = SoftPrompt.load(tmp_path / "two")
    assert both.summary["steps"] == alone.summary["steps"]
    torch.testing.assert_close(both.rows, alone.rows, rtol=1e-4, atol=1e-5)
    log = (tmp_path / "two" / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(log) == len({json.loads(line)["step"] for line in log if "loss" in line})  # one of the two writes


@pytest.mark.parametrize(
    ("template", "task"),
    [
        ("{text}[P*4]{answer}", {"type": "linear_classification", "label_weights": {"negative": 2}}),
        ("[P*4]{text}{answer}", {"type": "linear_classification", "multi_label": True}),
        ("[P*4]{tokens}", {"type": "tagging"}),
    ],
)
def test_two_processes_train_the_head_of_one(folder: Path, tmp_path: Path, template: str, task: dict[str, Any]) -> None:
    config = config_of(folder, tmp_path / "two", template, task)
    _, errors = (process := start(folder, config)).communicate(timeout=300)
    assert process.returncode == 0, errors
    alone = train(config_of(folder, tmp_path / "one", template, task, gradient_accumulation_steps=2))
    both = SoftPrompt.load(tmp_path / "two")
    assert alone.head is not None
    assert both.head is not None
    assert both.summary["best_step"] == alone.summary["best_step"] > 0
    torch.testing.assert_close(both.rows, alone.rows, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both.head.weight, alone.head.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both.head.bias, alone.head.bias, rtol=1e-4, atol=1e-5)


def test_a_stopped_run_of_two_processes_is_gone_on_with(folder: Path, tmp_path: Path) -> None:
    whole = config_of(folder, tmp_path / "whole", "{text}[P*4]{answer}", max_steps=60)
    broken = config_of(folder, tmp_path / "broken", "{text}[P*4]{answer}", max_steps=60)
    _, errors = (process := start(folder, whole)).communicate(timeout=300)
    assert process.returncode == 0, errors
    process = start(folder, broken)
    checkpoint = broken.output / "run" / "checkpoint.safetensors"
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.01)
    time.sleep(0.2)
    for each in (*psutil.Process(process.pid).children(recursive=True), process):
        each.send_signal(signal.SIGKILL)  # the launcher's own processes have sessions of their own
    process.communicate()
    assert not (broken.output / "ptune.json").exists()
    _, errors = (process := start(folder, broken, "resume")).communicate(timeout=300)
    assert process.returncode == 0, errors
    assert torch.equal(SoftPrompt.load(broken.output).rows, SoftPrompt.load(whole.output).rows)
