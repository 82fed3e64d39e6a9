"""A soft prompt of a revision on the Hub finds that revision again, whichever command loads its backbone."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import merged_models
import pytest
import soft_prompts

from ptune.config.run import ModelConfig
from ptune.models.backbone import Backbone

COMMANDS = """
import sys
from ptune.cli import app
for words in sys.argv[1].split(";"):
    app(words.split(), standalone_mode=False)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the Hub with two revisions of one model, and a soft prompt of the older one."""
    folder = tmp_path_factory.mktemp("revisions")
    cached = folder / "cache" / "models--someone--tiny"
    (cached / "refs").mkdir(parents=True)
    for name, commit in (("main", "a" * 40), ("v1", "b" * 40)):
        backbone = merged_models.on_disk(cached / "snapshots" / commit, "llama" if name == "main" else "gpt2")
        (cached / "refs" / name).write_text(commit, encoding="utf-8")
    prompt = merged_models.soft_prompt(backbone, soft_prompts.TEMPLATE, 4, labels=True)
    summary = soft_prompts.SUMMARY | {"model": {"revision": "v1"}}
    dataclasses.replace(prompt, backbone_name="someone/tiny", summary=summary).save(folder / "prompt")
    (folder / "dev.jsonl").write_text('{"text": "a soup", "label": "positive"}\n', encoding="utf-8")
    return folder


def test_every_command_loads_the_revision_that_a_prompt_was_trained_on(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    commands = (
        f"inspect {folder}/prompt",
        f"report {folder}/prompt --output {folder}/page.html",
        f"eval {folder}/prompt --data {folder}/dev.jsonl",
        f"merge {folder}/prompt --output {folder}/merged",
    )
    environment = os.environ | {"HF_HUB_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", COMMANDS, ";".join(commands)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Nearest words. Read little into them" in done.stdout
    assert (folder / "merged" / "model.safetensors").is_file()


def test_another_copy_is_taken_as_it_is_named(folder: Path) -> None:
    backbone = Backbone.load(str(folder / "cache" / "models--someone--tiny" / "snapshots" / ("b" * 40)))
    prompt = soft_prompts.make(backbone, backbone_name="someone/tiny", summary={"model": {"revision": "v1"}})
    assert prompt.model_config() == ModelConfig(name="someone/tiny", revision="v1")
    assert prompt.model_config("other/copy") == ModelConfig(name="other/copy")
    given = ModelConfig(name="other/copy", revision="v2", device="cpu")
    assert prompt.model_config(given) == given
    assert soft_prompts.make(backbone, summary={}).model_config() == ModelConfig(name=backbone.name)
