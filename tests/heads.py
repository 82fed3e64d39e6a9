"""Runs with linear heads for tests: small sets of records that can be learnt, and their settings."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tiny_models import tiny_model, tiny_tokenizer

from ptune.config.run import RunConfig
from ptune.models.backbone import Backbone
from ptune.records.record import Record

WORDS = ["soup", "film", "room", "waiter", "apple", "hotel", "door", "song"]
LABELS = ("bad", "fair", "good")
LINEAR = {"type": "linear_classification"}
MULTI = {"type": "linear_classification", "multi_label": True, "label_field": "topics"}
TAGGING = {"type": "tagging"}
VERBALIZER = {"type": "classification", "verbalizer": {"good": " great", "bad": " terrible", "fair": " film"}}


def records(count: int, seed: int) -> list[Record]:
    """Return records that hold a label, several labels and tags for the words of their text."""
    chance = random.Random(seed)
    made = []
    for number in range(count):
        label = chance.choice(LABELS)
        sign = {"bad": "terrible", "fair": "some", "good": "great"}[label]
        words = [*chance.sample(WORDS, chance.randint(1, 5)), sign]
        tags = [{"soup": "B-FOOD", "apple": "B-FOOD", sign: "B-SIGN"}.get(word, "O") for word in words]
        values = {"text": " ".join(words), "label": label, "tokens": words, "tags": tags, "output": label}
        topics = [word for word in ("soup", "film") if word in words]
        made.append(Record(values | {"topics": topics}, f"record {number}"))
    return made


RECORDS = (records(32, 0), records(16, 1))


def backbone_of(family: str, **how: Any) -> Backbone:
    """Return a tiny backbone."""
    return Backbone(tiny_model(family, **how), tiny_tokenizer(family), family)


def settings(output: Path, task: dict[str, Any], prompt: dict[str, Any] | None = None, **training: Any) -> RunConfig:
    """Return the settings of a short run."""
    template = "[P*4]{tokens}" if task["type"] == "tagging" else "[P*4]{text} It was{answer}"
    steps = {"max_steps": 8, "batch_size": 4, "evaluations": 2, "learning_rate": 0.02}
    return RunConfig.model_validate(
        {
            "model": "tiny",
            "task": task,
            "prompt": {"template": template} | (prompt or {}),
            "training": steps | training,
            "output": str(output),
        }
    )
