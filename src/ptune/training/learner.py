"""One prompt while it is trained: encoder, optimizer and rate, how well it did on dev, and what is saved of it.

What a run of one prompt and a search over many have in common. Knows neither loops nor folders.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ptune.config.run import RunConfig
from ptune.errors import TrainingError
from ptune.prompts.linear_head import head_from, head_tensors
from ptune.rendering.batch import within_budget
from ptune.soft_prompts.soft_prompt import SoftPrompt
from ptune.tasks.task import Example
from ptune.training.assembly import Parts
from ptune.training.checkpoint import Progress, random_state
from ptune.training.reporting import Reporter
from ptune.training.signs import new_signs
from ptune.training.step_plan import StepPlan
from ptune.training.summary import summary


class Learner:
    """One prompt in training.

    Attributes:
        config: the settings of its run.
        parts: what the run is made of.
        optimizer: over the parameters of the encoder, and of a linear head where there is one.
        schedule: which examples each step learns from.
        progress: how far it has come.
        best: what the best evaluation's soft prompt holds, ``rows`` of shape [P, H] and a head's tensors; empty before
            the first.
        random_state: of the generators, as they stood after its latest step.
    """

    def __init__(self, config: RunConfig, parts: Parts, processes: int = 1) -> None:
        """Set the generators to the run's seed, and everything to its start."""
        self.config, self.settings, self.parts = config, config.training, parts
        self.prompted, self.task = parts.prompted, parts.task
        torch.manual_seed(self.settings.seed)
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            self.prompted.parameters(),
            lr=self.settings.learning_rate,
            weight_decay=self.settings.weight_decay,
            fused=True,
        )
        lengths = [max(len(row.ids) for row in example.rows) for example in parts.train]
        self._tokens = [length * len(example.rows) for length, example in zip(lengths, parts.train, strict=True)]
        self.schedule = StepPlan(lengths, self.settings, processes)
        self.progress = Progress()
        self.best: dict[str, Tensor] = {}
        self.random_state = random_state()

    def set_rate(self, step: int) -> None:
        """Give the optimizer the learning rate of a step."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * self.schedule.rate(step)

    def weight(self, window: Sequence[Sequence[int]]) -> int:
        """Return what the summed loss of a step is divided by."""
        return sum(self.parts.train[index].weight for batch in window for index in batch)

    def forwards(self, batches: Sequence[Sequence[int]]) -> list[list[Example]]:
        """Return the examples of each forward of some batches, cut where a budget of tokens says so."""
        limit = self.settings.max_tokens_per_batch
        cut = [part for batch in batches for part in ([batch] if limit is None else self._within(batch, limit))]
        return [[self.parts.train[index] for index in part] for part in cut]

    def _within(self, batch: Sequence[int], limit: int) -> list[list[int]]:
        return within_budget(batch, self._tokens, limit)

    def scale_gradients(self, factor: float) -> None:
        """Multiply the gradients of all that is trained.

        A step's sum is divided by its weight here, in the encoder's float32, and not before the backward pass, where
        the gradients of a loss over many tokens could become too small for a float16 model.
        """
        for parameter in self.prompted.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    def finish_step(self, loss: float, clip: Callable[[Iterable[nn.Parameter], float], Any]) -> None:
        """Clip the gradients, see that they may be followed, and follow them.

        Args:
            loss: the step's mean.
            clip: scales gradients to a greatest norm, and returns theirs: torch's function, or accelerate's.

        Raises:
            TrainingError: the loss or its gradient is not a number, or no gradient reaches the prompt.
        """
        reached = self.progress.step > 0 or self._gradient_reaches_prompt()
        norm = float(clip(self.prompted.parameters(), self.settings.max_grad_norm))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"at step {self.progress.step + 1} the loss is {loss} and its gradient {norm}: lower "
                f"training.learning_rate (now {self.settings.learning_rate:g}), or use model.dtype float32 or bfloat16 "
                "if it is float16"
            )
        if not reached:
            raise TrainingError(
                "no gradient reaches the virtual tokens at the first step; the loss does not depend on them"
            )
        self._take_step()

    def _take_step(self) -> None:
        """Let the optimizer change what is trained, and drop its gradients.

        A fused optimizer leaves the parameters' version counters as they were, by which others notice a change; so they
        are increased here.
        """
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch.autograd.graph.increment_version(list(self.prompted.parameters()))

    def _gradient_reaches_prompt(self) -> bool:
        """Whether the backward pass gave the encoder a gradient."""
        return any(bool(p.grad.any()) for p in self.prompted.encoder.parameters() if p.grad is not None)

    @property
    def out_of_patience(self) -> bool:
        """Whether the metric has not got better for as many evaluations as the settings allow."""
        patience = self.settings.patience
        return patience is not None and self.progress.evaluations_without_gain >= patience

    @torch.no_grad()
    def evaluate(self, reporter: Reporter) -> dict[str, float]:
        """Score dev on the very path that serves, keep the best rows, tell the reporter; return the metrics.

        Where the metric is equal, the evaluation of less loss is the better one; for early stopping it is no gain.
        """
        self.prompted.eval()
        self.prompted.use()
        metrics = self.task.evaluate(self.prompted.backbone, self.parts.dev, batch_size=2 * self.settings.batch_size)
        value, sign = metrics[self.task.metric], 1 if self.task.greater_is_better else -1
        progress = self.progress
        gained = progress.best_metric is None or _greater(sign * value, sign * progress.best_metric)
        progress.evaluations_without_gain = 0 if gained else progress.evaluations_without_gain + 1
        if gained or (value == progress.best_metric and _greater(-metrics["loss"], -progress.best_loss)):
            progress.best_metric, progress.best_step = value, progress.step
            self.best = {"rows": self.prompted.rows().cpu().clone()} | head_tensors(self.prompted.head)
        progress.history.append({"step": progress.step, **metrics})
        reporter.evaluated(progress.step, metrics, best=progress.best_step == progress.step)
        for warning in new_signs(progress.history, self.task.right_metric):
            reporter.warned(warning)
        return metrics

    @torch.no_grad()
    def answer_samples(self, reporter: Reporter) -> None:
        """Answer some dev records by the rows of the latest evaluation, and tell."""
        if self.settings.samples and self.progress.step and self.task.renderer.template.fields:
            some = self.parts.dev[: self.settings.samples]
            answers = self.task.predict(self.prompted.backbone, some, batch_size=len(some))
            reporter.sampled(some, answers)

    def use_best(self) -> None:
        """Let backbone and task know the best evaluation's rows and head; there must have been one."""
        self.prompted.use(self.best["rows"])
        self.task.head = head_from(self.best, self.prompted.backbone.device)

    def soft_prompt(self, temperature: float | None = None) -> SoftPrompt:
        """Return the best evaluation's rows as a soft prompt; there must have been one.

        Args:
            temperature: of its labels' probabilities; None for none.
        """
        return SoftPrompt(
            rows=self.best["rows"],
            head=head_from(self.best),
            deep=self.prompted.deep,
            temperature=temperature,
            template=self.task.renderer.template.source,
            task=self.parts.config.task,
            max_length=self.config.prompt.max_length,
            overlong=self.task.renderer.overlong,
            encoder=self.config.prompt.encoder,
            backbone_name=self.config.model.name,
            fingerprint=self.prompted.backbone.fingerprint(),
            summary=summary(self.config, self.parts, self.progress, self.task),
        )


def _greater(value: float, other: float) -> bool:
    """Whether a value is above another; any number is above none."""
    return value > other or (math.isnan(other) and not math.isnan(value))
