"""A candidate of a search while it is trained: its learner, its log, when it was given up, its line of the table.

Knows learners, and nothing of the candidates beside it. Shapes: P virtual tokens, H width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ptune.config.candidates import Candidate
from ptune.tasks.task import Asked, Example
from ptune.training.checkpoint import random_state, set_random_state
from ptune.training.learner import Learner
from ptune.training.reporting import Reporter


class Contender:
    """A candidate while it is trained.

    Attributes:
        candidate: what it is.
        learner: its prompt in training.
        log: lines as `ptune train` would have logged them.
        ended: why it takes no more steps; None while it does.
        dropped_at: the step after which it was given up; None where it was not.
    """

    def __init__(self, candidate: Candidate, learner: Learner, reporter: Reporter) -> None:
        self.candidate, self.learner = candidate, learner
        self.log: list[dict[str, Any]] = []
        self.ended: str | None = None
        self.dropped_at: int | None = None
        self._rows: Tensor | None = None
        self._warner = _Warner(candidate.number, reporter)

    @property
    def value(self) -> float:
        """Its best value of the task's metric so far."""
        best = self.learner.progress.best_metric
        return math.nan if best is None else best

    @property
    def rank(self) -> tuple[float, float, int]:
        """Smaller is better: the best metric so far, the loss there, its number."""
        sign = -1 if self.learner.task.greater_is_better else 1
        value = math.inf if math.isnan(self.value) else sign * self.value
        return value, self.learner.progress.best_loss, self.candidate.number

    def evaluate(self) -> float:
        """Score dev; return the value of the task's metric."""
        metrics = self.learner.evaluate(self._warner)
        self.log.append({"step": self.learner.progress.step, **metrics})
        if self.learner.out_of_patience:
            self.ended = f"no better for {self.learner.settings.patience} evaluations"
        return metrics[self.learner.task.metric]

    def asks(self, examples: Sequence[Example]) -> Asked:
        """Return what the loss of some examples asks of the backbone."""
        return self.learner.task.asks(examples, self.learner.prompted.backbone.tokenizer.pad_token_id)

    def show_rows(self) -> None:
        """Set its virtual tokens, fresh from the encoder, in the backbone; dropout draws from its own random state."""
        set_random_state(self.learner.random_state)
        self._rows = self.learner.prompted.rows()
        self.learner.prompted.use(self._rows)
        self.learner.random_state = random_state()

    def forget_graph(self) -> None:
        """Set the virtual tokens without their graph, which later passes of others would meet when it is freed."""
        if self._rows is not None:
            self.learner.prompted.use(self._rows.detach())

    def step(self, loss: float) -> None:
        """Take the optimizer's step.

        Raises:
            TrainingError: as `Learner.finish_step`.
        """
        learner = self.learner
        learner.finish_step(loss, torch.nn.utils.clip_grad_norm_)
        learner.progress.step += 1
        if learner.progress.step % learner.settings.logging_steps == 0:
            self.log.append({"step": learner.progress.step, "train_loss": loss})

    def row(self) -> dict[str, Any]:
        """Return its line of the table: JSON values only."""
        progress = self.learner.progress
        history = [{k: v if math.isfinite(v) else None for k, v in entry.items()} for entry in progress.history]
        return {
            "candidate": self.candidate.number,
            "settings": self.candidate.varied,
            "best": None if math.isnan(self.value) else self.value,
            "best_step": progress.best_step,
            "steps": progress.step,
            "dropped_at": self.dropped_at,
            "ended": self.ended,
            "seconds": round(progress.seconds, 2),
            "evaluations": history,
        }


class _Warner(Reporter):
    """Passes a candidate's warnings on with its number."""

    def __init__(self, number: int, reporter: Reporter) -> None:
        self._number, self._reporter = number, reporter

    def warned(self, sentence: str) -> None:
        self._reporter.warned(f"candidate {self._number}: {sentence}")
