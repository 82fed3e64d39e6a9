"""Half precision where it is faster: which models get it, that it is said, and that what is trained stays float32."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, tiny_tokenizer
from transformers import AutoModelForCausalLM

from ptune.config.file import config_yaml
from ptune.config.run import RunConfig
from ptune.engine.engine import Engine
from ptune.models.backbone import Backbone
from ptune.pretrained.precision import precision_for
from ptune.training.train import train

CPU = torch.device("cpu")


def fast_here() -> bool:
    """Whether the kernel says that this processor has tiles for bfloat16."""
    about = Path("/proc/cpuinfo")
    return about.exists() and "amx_bf16" in about.read_text().split()


HERE = torch.bfloat16 if fast_here() else torch.float32


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model just wide enough, with records to train on."""
    folder = tmp_path_factory.mktemp("wide")
    config = FAMILIES["llama"]()
    config.hidden_size, config.head_dim = 256, 64
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [{"text": f"soup {n}", "label": "good" if n % 2 else "bad"} for n in range(12)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def config_of(folder: Path, output: Path, **model: str) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"name": str(folder / "model"), "device": "cpu"} | model,
            "data": {"train": str(folder / "train.jsonl"), "dev": str(folder / "train.jsonl")},
            "task": {"type": "classification", "verbalizer": {"good": " good", "bad": " bad"}},
            "prompt": {"template": "{text}[P*3]{answer}"},
            "training": {"max_steps": 3, "batch_size": 4, "evaluations": 1, "samples": 0},
            "output": str(output),
        }
    )


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="what the processor can do is read from Linux")
@pytest.mark.parametrize(
    ("asked", "width", "dtype"),
    [
        ("auto", 256, HERE),
        ("auto", 255, torch.float32),
        ("float32", 4096, torch.float32),
        ("bfloat16", 32, torch.bfloat16),
        ("float16", 32, torch.float16),
    ],
)
def test_wide_models_are_bfloat16_where_the_processor_has_it(asked: str, width: int, dtype: torch.dtype) -> None:
    assert precision_for(asked, CPU, width).dtype is dtype


def test_a_device_of_which_nothing_is_known_has_float32() -> None:
    found = precision_for("auto", torch.device("mps"), 4096)
    assert found.dtype is torch.float32
    assert found.why == "this mps device is not known to multiply bfloat16 fast"


@pytest.mark.parametrize(("asked", "dtype"), [("auto", HERE), ("float32", torch.float32)])
def test_what_is_trained_is_float32_and_the_summary_names_the_dtype(
    asked: str, dtype: torch.dtype, wide: Path, tmp_path: Path
) -> None:
    config = config_of(wide, tmp_path / "prompt", dtype=asked)
    backbone = Backbone.load(config.model)
    assert backbone.dtype is dtype
    prompt = train(config, backbone=backbone)
    assert prompt.rows.dtype is torch.float32
    assert prompt.summary["dtype"] == str(dtype).removeprefix("torch.")


def test_a_prompt_trained_in_one_dtype_runs_in_the_other(wide: Path, tmp_path: Path) -> None:
    train(config_of(wide, tmp_path / "prompt", dtype="bfloat16"))
    probabilities = {}
    for asked in ("auto", "bfloat16", "float32"):
        with Engine.for_prompt(tmp_path / "prompt", dtype=asked, device="cpu") as engine:
            (answer,) = engine.classify("prompt", ["soup 1"])
            probabilities[engine.backbone.dtype] = answer["probabilities"]["good"]
    assert {torch.bfloat16, torch.float32} == set(probabilities)
    assert probabilities[torch.bfloat16] == pytest.approx(probabilities[torch.float32], abs=0.02)


def test_the_dtype_is_said_before_while_and_after_training(wide: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(config_yaml(config_of(wide, tmp_path / "prompt")), encoding="utf-8")
    dtype = str(HERE).removeprefix("torch.")

    def ptune(*arguments: str) -> str:
        command = [sys.executable, "-m", "ptune", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    why = "this processor multiplies it fast" if fast_here() else "this processor is not known to multiply"
    assert f"backbone: {dtype} ({why}" in ptune("train", str(file), "--explain")
    assert f"parameters in {dtype}, all frozen; trained:" in ptune("train", str(file))
    inspected = ptune("inspect", str(tmp_path / "prompt"))
    assert ["trained", "in", dtype, "on", "cpu"] in [line.split() for line in inspected.splitlines()]
