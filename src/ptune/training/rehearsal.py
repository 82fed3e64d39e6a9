"""Tries, before a run claims its folder, what can still fail once model and data are loaded.

Knows the parts of a run, and nothing of its loop.
"""

from __future__ import annotations

import torch

from ptune.training.assembly import Parts
from ptune.training.kept_contexts import check_store


@torch.no_grad()
def rehearse(parts: Parts) -> None:
    """Turn on gradient checkpointing where the settings ask for it, and score one dev record.

    Raises:
        PtuneError: the family cannot checkpoint, contexts cannot be kept on disk, the metric needs an extra that is
            not installed, or the record cannot be scored.
    """
    prompted, settings = parts.prompted, parts.config.training
    if settings.gradient_checkpointing:
        prompted.backbone.enable_gradient_checkpointing()
    check_store(prompted.backbone, settings)
    prompted.eval()
    prompted.use()
    one = next(record for record in parts.dev if parts.task.example(record) is not None)
    parts.task.evaluate(prompted.backbone, [one], batch_size=1)
