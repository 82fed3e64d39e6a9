"""What the benchmarks of servers share: a folder with a model and eight soft prompts, and a running `ptune serve`."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from engine_models import Size, save_model, soft_prompt
from transformers.utils.logging import disable_progress_bar

from ptune.models.backbone import Backbone

CLASSIFYING = tuple(f"label{number}" for number in range(4))
WRITING = tuple(f"write{number}" for number in range(4))


def make_folders(folder: Path, size: Size, virtual_tokens: int) -> tuple[Path, Path]:
    """Write a model and eight soft prompts for it, and return their folders."""
    disable_progress_bar()
    model, prompts = folder / "model", folder / "prompts"
    save_model(model, size)
    backbone = Backbone.load(str(model))
    for seed, name in enumerate((*CLASSIFYING, *WRITING)):
        soft_prompt(backbone, virtual_tokens, seed, writes=name in WRITING).save(prompts / name)
    return model, prompts


@contextlib.contextmanager
def started(command: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Start a server that says ``url`` in a line of JSON on its error output, and yield that and its process id."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PTUNE_SERVE_TOKENS": ""})
    assert process.stderr is not None
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("{") and (url := json.loads(line).get("url")):
                break
        else:
            raise SystemExit(f"the server did not start: {''.join(said)[-2000:]}")
        threading.Thread(target=_drain, args=(process.stderr,), daemon=True).start()
        yield str(url), process.pid
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def ptune_command(model: Path, prompts: Path, *options: str) -> list[str]:
    """Return the command of `ptune serve` on a free port, in float32 as PEFT runs."""
    command = [sys.executable, "-m", "ptune", "serve", "--port", "0", "--backbone", str(model), "--dtype", "float32"]
    return [*command, "--prompts", str(prompts), *options]


def _drain(lines: Iterator[str]) -> None:
    for _ in lines:
        pass
