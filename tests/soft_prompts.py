"""Soft prompts for tests, and how two of them are compared."""

from __future__ import annotations

from typing import Any

import torch

from ptune.config.run import EncoderConfig
from ptune.config.task import ClassificationConfig
from ptune.models.backbone import Backbone
from ptune.soft_prompts.soft_prompt import SoftPrompt

TEMPLATE = "[P*4]Review: {text}\nVerdict:{answer}"
TASK = ClassificationConfig(verbalizer={"good": " great", "bad": " terrible"})
SUMMARY = {
    "metric": "accuracy",
    "before": {"accuracy": 0.5, "loss": 1.25},
    "after": {"accuracy": 0.9375, "loss": 0.125},
    "steps": 120,
    "seconds": 61.5,
    "dev_records": 64,
    "data_hash": "0123456789abcdef",
    "training": {"seed": 7},
    "versions": {"ptune": "0.1.0", "torch": "2.13.0"},
    "date": "2026-01-02T03:04:05+00:00",
}


def make(backbone: Backbone, **changes: Any) -> SoftPrompt:
    """Return a soft prompt of four virtual tokens for ``backbone``, but for ``changes``."""
    values = {
        "rows": torch.randn(4, backbone.hidden_size, generator=torch.Generator().manual_seed(0)),
        "template": TEMPLATE,
        "task": TASK,
        "overlong": "error",
        "backbone_name": backbone.name,
        "fingerprint": backbone.fingerprint(),
        "max_length": 64,
        "encoder": EncoderConfig(),
        "summary": SUMMARY,
    }
    return SoftPrompt(**values | changes)


def assert_same(one: SoftPrompt, other: SoftPrompt) -> None:
    assert torch.equal(one.rows, other.rows)
    assert {**vars(one), "rows": None} == {**vars(other), "rows": None}
