"""Runs of two real processes: a folder of model and records, settings, and the launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tiny_models import tiny_model, tiny_tokenizer

from ptune.config import RunConfig
from ptune.config_file import config_yaml

SCRIPT = """
import json, os, sys
from ptune.config_file import load_config
from ptune.reporting import Reporter
from ptune.stopping import Stopped
from ptune.training import train

class Witness(Reporter):
    seen = {"plans": [], "step": None}

    def started(self, config, parts, total_steps, step):
        local = lambda weight: getattr(weight, "to_local", lambda: weight)().numel()
        self.seen["held"] = {n: [local(p), p.numel()] for n, p in parts.prompted.backbone.model.named_parameters()}

    def planned(self, plan, why):
        self.seen["plans"].append([plan, why])

try:
    train(load_config(sys.argv[1]), resume=sys.argv[2] == "resume", reporter=Witness())
except Stopped:
    sys.exit(0)
rank = os.environ["RANK"]
with open(sys.argv[1].removesuffix(".yaml") + f"-{rank}.json", "w") as file:
    json.dump(Witness.seen, file)
"""
SETTINGS: dict[str, Any] = {
    "task": {"type": "classification", "verbalizer": {"positive": " good", "negative": " bad"}},
    "training": {"epochs": 2, "batch_size": 4, "evaluations": 2, "learning_rate": 0.02, "samples": 0},
}


def make_folder(folder: Path, *families: str) -> None:
    """Write a tiny model of each family, training and dev records, and the script that trains."""
    for family in families:
        tiny_model(family).save_pretrained(folder / family)
        tiny_tokenizer(family).save_pretrained(folder / family)
    words = ("soup", "film", "room", "waiter", "apple", "hotel", "door", "song")
    rows: list[dict[str, Any]] = [
        {"text": f"{words[n % 8]} {n} {'great' if n % 3 else 'terrible'}", "label": "positive" if n % 3 else "negative"}
        for n in range(38)
    ]
    for row in rows:
        row["tokens"] = row["text"].split()
        row["tags"] = ["B-SIGN" if word in ("great", "terrible") else "O" for word in row["tokens"]]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:30]), encoding="utf-8")
    (folder / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[30:]), encoding="utf-8")
    (folder / "script.py").write_text(SCRIPT, encoding="utf-8")


def config_of(
    folder: Path,
    output: Path,
    template: str,
    task: dict[str, Any] = SETTINGS["task"],
    *,
    family: str = "llama",
    prompt: dict[str, Any] | None = None,
    **training: Any,
) -> RunConfig:
    """Return the settings of a run on what `make_folder` has written."""
    return RunConfig.model_validate(
        SETTINGS
        | {
            "model": str(folder / family),
            "data": {"train": str(folder / "train.jsonl"), "dev": str(folder / "dev.jsonl")},
            "task": task,
            "prompt": {"template": template} | (prompt or {}),
            "training": SETTINGS["training"] | training,
            "output": str(output),
        }
    )


def start(folder: Path, config: RunConfig, mode: str = "new", *launcher: str) -> subprocess.Popen[str]:
    """Begin a run of two processes, by torchrun unless another launcher is named."""
    file = config.output.with_suffix(".yaml")
    file.write_text(config_yaml(config), encoding="utf-8")
    torchrun = ("torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d")
    launcher = launcher or (*torchrun, "--rdzv-endpoint", "localhost:0")
    command = [sys.executable, "-m", *launcher, str(folder / "script.py"), str(file), mode]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def witnesses(config: RunConfig) -> list[dict[str, Any]]:
    """Return what each process of a finished run has seen."""
    files = [config.output.with_name(f"{config.output.name}-{rank}.json") for rank in range(2)]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]
