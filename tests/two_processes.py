"""Runs of two real processes: a folder of model and records, settings, and the launcher."""

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
from tiny_models import tiny_model, tiny_tokenizer

from ptune.config.file import config_yaml
from ptune.config.run import RunConfig

SCRIPT = """
import json, os, sys
from ptune.models.backbone import Backbone
from ptune.config.file import load_config
from ptune.training.reporting import Reporter
from ptune.errors import Stopped
from ptune.training.train import train

config = load_config(sys.argv[1])
seen = {"plans": [], "written": [], "held": {}}

def watch(event, arguments):
    writes = event in ("os.mkdir", "os.rename", "os.remove") or (
        event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    )
    if writes and str(arguments[0]).startswith(str(config.output) + os.sep):
        seen["written"].append(str(arguments[0]))

class Witness(Reporter):
    def started(self, config, parts, total_steps, step):
        for name, weight in parts.prompted.backbone.model.named_parameters():
            own = weight.to_local() if hasattr(weight, "to_local") else weight
            seen["held"][name] = [own.untyped_storage().nbytes(), weight.numel() * weight.element_size()]

    def planned(self, plan, why):
        seen["plans"].append(plan)

sys.addaudithook(watch)
given = {"backbone": Backbone.load(config.model)} if sys.argv[2] == "given" else {}
try:
    train(config, resume=sys.argv[2] == "resume", reporter=Witness(), **given)
except Stopped:
    sys.exit(0)
with open(sys.argv[1].removesuffix(".yaml") + "-" + os.environ["RANK"] + ".json", "w") as file:
    json.dump(seen, file)
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
    dtype: str = "float32",
    prompt: dict[str, Any] | None = None,
    **training: Any,
) -> RunConfig:
    """Return the settings of a run on what `make_folder` has written."""
    return RunConfig.model_validate(
        SETTINGS
        | {
            "model": {"name": str(folder / family), "dtype": dtype},
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


def finish(folder: Path, config: RunConfig, mode: str = "new", *launcher: str) -> list[dict[str, Any]]:
    """Run two processes to their end, and return what each of them has seen; see `SCRIPT`."""
    process = start(folder, config, mode, *launcher)
    try:
        _, errors = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    assert process.returncode == 0, errors
    files = [config.output.with_name(f"{config.output.name}-{rank}.json") for rank in range(2)]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def kill(process: subprocess.Popen[str]) -> None:
    """Kill the launcher with its processes, which have sessions of their own."""
    for each in (*psutil.Process(process.pid).children(recursive=True), process):
        each.send_signal(signal.SIGKILL)
    process.communicate()


def break_off(folder: Path, config: RunConfig) -> None:
    """Begin a run of two processes and kill it in the middle, a checkpoint written."""
    process = start(folder, config)
    checkpoint = config.output / "run" / "checkpoint.safetensors"
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.01)
    time.sleep(0.2)
    kill(process)
    assert checkpoint.exists()
    assert not (config.output / "ptune.json").exists()
