"""Two processes train the prompt that one process trains; one of them locks, writes and stops for both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from two_processes import break_off, config_of, finish, make_folder

from ptune.soft_prompts.soft_prompt import SoftPrompt
from ptune.training.train import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    make_folder(folder, "llama")
    return folder


@pytest.mark.parametrize("template", ["{text}[P*4]{answer}", "[P*4]{text}{answer}"])
def test_two_processes_train_the_prompt_of_one(folder: Path, tmp_path: Path, template: str) -> None:
    config = config_of(folder, tmp_path / "two", template)
    first, second = finish(folder, config)
    # A step of two processes takes two batches, as one with an accumulation of two does.
    alone = train(config_of(folder, tmp_path / "one", template, gradient_accumulation_steps=2))
    both = SoftPrompt.load(tmp_path / "two")
    assert both.summary["steps"] == alone.summary["steps"]
    torch.testing.assert_close(both.rows, alone.rows, rtol=1e-4, atol=1e-5)
    assert first["written"]
    assert not second["written"]


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
    finish(folder, config)
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
    finish(folder, whole)
    break_off(folder, broken)
    finish(folder, broken, "resume")
    assert torch.equal(SoftPrompt.load(broken.output).rows, SoftPrompt.load(whole.output).rows)
