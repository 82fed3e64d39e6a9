"""What a soft prompt tells of the run it came from: how it was made, on what, and how well it did.

Knows a run's parts and progress; writes nothing itself.
"""

from __future__ import annotations

import platform
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

from ptune import __version__
from ptune.config.run import RunConfig
from ptune.tasks.task import Task
from ptune.training.assembly import Parts
from ptune.training.checkpoint import Progress


def summary(config: RunConfig, parts: Parts, progress: Progress, task: Task) -> dict[str, Any]:
    """Return the summary that is stored in ``ptune.json``: JSON values only."""
    metrics = {int(entry["step"]): entry for entry in progress.history}
    return {
        "metric": task.metric,
        "before": _without_step(metrics[0]),
        "after": _without_step(metrics[progress.best_step]),
        "best_step": progress.best_step,
        "steps": progress.step,
        "seconds": round(progress.seconds, 1),
        "train_examples": len(parts.train),
        "dev_records": len(parts.dev),
        "dropped": parts.dropped,
        "cut": parts.cut,
        "model": config.model.model_dump(mode="json", exclude={"name", "trust_remote_code"}),
        "data": config.data.train,
        "data_hash": parts.data_hash,
        "start": config.prompt.start.model_dump(mode="json", exclude_none=True),
        "training": config.training.model_dump(mode="json"),
        "dtype": str(parts.prompted.backbone.dtype).removeprefix("torch."),
        "device": parts.prompted.backbone.device.type,
        "processor": platform.processor() or platform.machine(),
        "versions": {"ptune": __version__} | {name: version(name) for name in ("torch", "transformers", "accelerate")},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _without_step(entry: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in entry.items() if name != "step"}
