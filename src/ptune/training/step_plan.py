"""Which examples each step of a run learns from, and at which rate: all of it follows from settings and seed.

Knows the settings of training, and nothing of models, records or the loop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ptune.config.run import TrainingConfig
from ptune.rendering.batch import length_grouped_batches


class StepPlan:
    """Which examples each step learns from, at which rate, and when dev is evaluated: all from settings and seed."""

    def __init__(self, lengths: Sequence[int], settings: TrainingConfig, processes: int = 1) -> None:
        self._lengths, self._settings = lengths, settings
        self._window = settings.gradient_accumulation_steps * processes
        batches = math.ceil(len(lengths) / settings.batch_size)
        self.steps_per_epoch = math.ceil(batches / self._window)
        self.total_steps = settings.max_steps or max(1, math.ceil(settings.epochs * self.steps_per_epoch))
        count = min(settings.evaluations, self.total_steps)
        self.evaluation_steps = {round(self.total_steps * k / count) for k in range(1, count + 1)}
        self._epoch: int | None = None
        self._batches: list[list[int]] = []

    def window(self, step: int) -> list[list[int]]:
        """Return the batches of one optimizer step, over all processes, as indices of examples."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._settings.seed * 1_000_003 + epoch)
            self._batches = length_grouped_batches(self._lengths, self._settings.batch_size, generator)
            self._epoch = epoch
        return self._batches[place * self._window : (place + 1) * self._window]

    def rate(self, step: int) -> float:
        """Return the share of the learning rate at a step: warm-up, then linear, cosine or constant."""
        warmup = math.ceil(self._settings.warmup_ratio * self.total_steps)
        if step < warmup:
            return (step + 1) / warmup
        rest = (step - warmup) / max(1, self.total_steps - warmup)
        if self._settings.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * rest))
        return 1.0 if self._settings.schedule == "constant" else 1 - rest
