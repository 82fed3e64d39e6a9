"""Many candidates trained at once on one loaded backbone, the better half going on alone from time to time.

In each step every candidate learns from the batch that a run of it alone would learn from. The rows of all stand in one
batch, each with the virtual tokens of its own candidate, and one forward pass carries them; losses stay apart, and the
backward pass of their sum gives each candidate's encoder its own gradient, since no row sees another. Optimizer, rate,
clipping, dropout's random state and the best rows are each candidate's own. So a candidate ends as `ptune.train`
would have ended it, to rounding.

Nothing is resumed: a search that is stopped leaves its best candidate as a stopped run, which `ptune train` goes on
with. Knows nothing of the command line.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ptune.config.candidates import SearchConfig, candidates_of
from ptune.config.run import RunConfig
from ptune.errors import ConfigError, Stopped, TrainingError
from ptune.files import write_json
from ptune.models.backbone import Backbone
from ptune.records.record import Record
from ptune.soft_prompts.soft_prompt import SoftPrompt
from ptune.tasks.side_by_side import answer_side_by_side, one_forward_each
from ptune.tasks.task import Asked
from ptune.training.assembly import assemble, train_and_dev_records
from ptune.training.checkpoint import random_state, save_checkpoint, set_random_state
from ptune.training.contender import Contender
from ptune.training.ending import save_best, tell_the_end
from ptune.training.kept_contexts import keep_contexts
from ptune.training.learner import Learner
from ptune.training.rehearsal import rehearse
from ptune.training.reporting import SearchReporter
from ptune.training.run_folder import CANDIDATES, SETTINGS, RunFolder
from ptune.training.stopping import stop_signal


def search(
    config: RunConfig,
    settings: SearchConfig,
    *,
    backbone: Backbone | None = None,
    records: tuple[Sequence[Record], Sequence[Record]] | None = None,
    reporter: SearchReporter | None = None,
    overwrite: bool = False,
) -> SoftPrompt:
    """Train candidates at once, and save the best as a soft prompt in ``config.output``.

    Args:
        config: what all candidates have in common.
        settings: in what they differ.
        backbone: a loaded model, to save loading it; it is left as it was.
        records: training and dev records already at hand; read as ``config.data`` says where absent.
        reporter: what to show while it runs; nothing where absent.
        overwrite: begin anew in a folder that holds another run.

    Returns:
        The best soft prompt, as saved; ``run/search.json`` holds the table of all candidates.

    Raises:
        PtuneError: settings, data, model or folder cannot be used; nothing was written.
        TrainingError: no candidate is left, for the loss of each was not a number.
        Stopped: by Ctrl-C or SIGTERM, after the step in hand; it says what is kept.
    """
    candidates = candidates_of(config, settings)
    check_searchable(config)
    reporter = reporter or SearchReporter()
    before = random_state()
    with ExitStack() as stack:
        folder = stack.enter_context(RunFolder(config, resume=False, overwrite=overwrite))
        if records is None:
            first = candidates[0].config  # all say alike where records come from and how dev is drawn
            records = train_and_dev_records(first)
        if backbone is None:
            backbone = Backbone.load(config.model)
        stack.callback(set_random_state, before)
        stack.enter_context(backbone.left_as_it_was())
        contenders = []
        for candidate in candidates:
            parts = assemble(candidate.config, backbone, records)
            stack.enter_context(parts.prompted)
            contenders.append(Contender(candidate, Learner(candidate.config, parts), reporter))
        steps = {contender.learner.schedule.total_steps for contender in contenders}
        if len(steps) > 1:
            raise ConfigError(
                f"candidates differ in how many steps they take ({', '.join(map(str, sorted(steps)))}), for some leave "
                "out records as too long; give training.max_steps, or raise prompt.max_length"
            )
        for contender in contenders:
            rehearse(contender.learner.parts)
        folder.begin()
        return _Search(config, settings, contenders, backbone, folder, reporter).finish()


def check_searchable(config: RunConfig) -> None:
    """See that candidates can be trained together.

    Raises:
        ConfigError: the prompt is deep, or a setting asks for what a search does not do.
    """
    if config.prompt.deep:
        raise ConfigError(
            "prompt.deep cannot be searched: rows of several deep prompts do not stand in one batch; "
            "train them one after another with `ptune train`"
        )
    if config.training.mixed_precision != "no":
        raise ConfigError("a search has no training.mixed_precision; set model.dtype to bfloat16 instead")
    if config.training.trackers:
        raise ConfigError("a search has no training.trackers; leave them out, run/search.json holds every evaluation")
    if config.training.shard_backbone:
        raise ConfigError("a search runs in one process, so training.shard_backbone shares nothing out; leave it out")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("a search runs in one process; start it without torchrun or accelerate launch")


class _Search:
    """A search from its first step to the saved soft prompt."""

    def __init__(
        self,
        config: RunConfig,
        settings: SearchConfig,
        contenders: list[Contender],
        backbone: Backbone,
        folder: RunFolder,
        reporter: SearchReporter,
    ) -> None:
        self.config, self.contenders, self.backbone = config, contenders, backbone
        self.folder, self.reporter = folder, reporter
        self.schedule = contenders[0].learner.schedule
        self.metric = contenders[0].learner.task.metric
        self.rungs = rungs(self.schedule.total_steps, self.schedule.evaluation_steps, settings.halvings)
        self.halvings = settings.halvings
        self.plans_told: set[str] = set()
        backbone.plan = config.training.plan

    def finish(self) -> SoftPrompt:
        """Train all, and save the best."""
        first = self.contenders[0].learner
        self.reporter.search_started([c.candidate for c in self.contenders], first.parts, self.schedule.total_steps)
        for note in first.parts.notes:
            self.reporter.warned(note)
        if len(self.rungs) < self.halvings:
            self.reporter.warned(
                f"of {self.halvings} halvings only {len(self.rungs)} find an evaluation to go by before the last step; "
                "raise training.evaluations"
            )
        with stop_signal() as stop:
            keep_contexts([contender.learner for contender in self.contenders], self.reporter)
            self._evaluate(self.contenders)
            self._steps(stop)
        best = self._best()
        self._save_state(best)
        self._write_table(best)
        if stop.is_set():
            raise Stopped(self._what_is_kept(best))
        prompt = save_best(best.learner, self.folder, self.reporter)
        tell_the_end(best.learner.parts, prompt, best.learner.progress, self.folder, self.reporter)
        self.reporter.ranked(self.table(best))
        return prompt

    def _steps(self, stop: threading.Event) -> None:
        for step in range(self.schedule.total_steps):
            running = [contender for contender in self.contenders if contender.ended is None]
            if stop.is_set() or not running:
                return
            begun = time.monotonic()
            losses = self._step(step, running)
            share = (time.monotonic() - begun) / len(running)
            for contender, loss in zip(running, losses, strict=True):
                contender.learner.progress.seconds += share
                try:
                    contender.step(loss)
                except TrainingError as error:  # of one candidate, which the others need not suffer for
                    contender.ended, contender.dropped_at = str(error), step
                    self.reporter.warned(f"candidate {contender.candidate.number} is given up: {error}")
                    if all(each.dropped_at is not None for each in self.contenders):
                        raise TrainingError(f"no candidate is left after step {step}; the last one: {error}") from error
            running = [contender for contender in running if contender.ended is None]
            self.reporter.went_on(step + 1, len(running))
            if step + 1 in self.schedule.evaluation_steps:
                self._evaluate(running)
            if step + 1 in self.rungs:
                self._halve(step + 1)

    def _step(self, step: int, running: Sequence[Contender]) -> list[float]:
        """Give every encoder its gradient of one step, and return the mean losses."""
        weights, forwards = [], []
        for contender in running:
            learner = contender.learner
            learner.prompted.train()
            learner.set_rate(step)
            window = learner.schedule.window(step)
            weights.append(learner.weight(window))
            forwards.append(learner.forwards(window))
        sums = [0.0] * len(running)
        for number in range(max(map(len, forwards))):
            here = [place for place, own in enumerate(forwards) if number < len(own)]
            asked = [running[place].asks(forwards[place][number]) for place in here]
            for together in one_forward_each(asked, self.backbone, self.config.training.max_tokens_per_batch):
                places = [here[which] for which in together]
                answers = self._answers([running[place] for place in places], [asked[which] for which in together])
                losses = [
                    running[place].learner.task.loss_of(answer, forwards[place][number])
                    for place, answer in zip(places, answers, strict=True)
                ]
                torch.stack(losses).sum().backward()
                for place, loss in zip(places, losses, strict=True):
                    sums[place] += float(loss.detach())
        for contender, weight in zip(running, weights, strict=True):
            contender.learner.scale_gradients(1 / weight)
        return [total / weight for total, weight in zip(sums, weights, strict=True)]

    def _answers(self, contenders: Sequence[Contender], asked: Sequence[Asked]) -> list[Tensor]:
        """Return what each candidate's loss asks for, with fresh virtual tokens of each, by one forward pass."""
        for contender in contenders:
            contender.show_rows()
        answers = answer_side_by_side(self.backbone, asked)
        for contender in contenders:
            contender.forget_graph()
        if self.backbone.plans.last not in self.plans_told:
            self.plans_told.add(self.backbone.plans.last)
            self.reporter.planned(self.backbone.plans.last, self.backbone.plans.why)
        return answers

    def _evaluate(self, contenders: Sequence[Contender]) -> None:
        values = {}
        for contender in contenders:
            begun = time.monotonic()
            values[contender.candidate.number] = contender.evaluate()
            contender.learner.progress.seconds += time.monotonic() - begun
        if values:
            self.reporter.scored(contenders[0].learner.progress.step, self.metric, values)

    def _halve(self, step: int) -> None:
        """Drop the worse half of the candidates that are still in it, whether or not they take more steps."""
        ranked = self._ranked()
        kept, dropped = ranked[: math.ceil(len(ranked) / 2)], ranked[math.ceil(len(ranked) / 2) :]
        for contender in dropped:
            contender.dropped_at = step
            contender.ended = contender.ended or "not among the better half"
        self.reporter.halved(
            step, [c.candidate.number for c in kept], [contender.candidate.number for contender in dropped]
        )

    def _ranked(self) -> list[Contender]:
        return sorted((c for c in self.contenders if c.dropped_at is None), key=lambda contender: contender.rank)

    def _best(self) -> Contender:
        return self._ranked()[0]

    def _save_state(self, best: Contender) -> None:
        """Leave the folder as a run of the best candidate alone would have it."""
        learner = best.learner
        self.folder.hand_over(best.candidate.config, best.log)
        save_checkpoint(
            self.folder.checkpoint,
            trained=learner.prompted,
            optimizer=learner.optimizer,
            progress=learner.progress,
            best=learner.best,
            random_state=learner.random_state,
            origin=learner.parts.origin(),
        )

    def table(self, best: Contender) -> dict[str, Any]:
        """Return the table of all candidates, the best first: JSON values only."""
        in_it = {contender.candidate.number: place for place, contender in enumerate(self._ranked())}
        order = sorted(
            self.contenders,
            key=lambda c: (in_it.get(c.candidate.number, len(in_it)), -(c.dropped_at or 0), c.rank),
        )
        return {
            "metric": self.metric,
            "greater_is_better": best.learner.task.greater_is_better,
            "best": best.candidate.number,
            "rungs": sorted(self.rungs),
            "total_steps": self.schedule.total_steps,
            "candidates": [contender.row() for contender in order],
        }

    def _write_table(self, best: Contender) -> None:
        write_json(self.folder.run / CANDIDATES, self.table(best))

    def _what_is_kept(self, best: Contender) -> str:
        run = self.folder.run
        return (
            f"stopped after step {best.learner.progress.step}; a search is not resumed, but its best candidate so far, "
            f'number {best.candidate.number}, is kept as a stopped run: "ptune train {run / SETTINGS} --resume" '
            f"trains it on alone; {run / CANDIDATES} holds the table of all"
        )


def rungs(total_steps: int, evaluation_steps: set[int], halvings: int) -> set[int]:
    """Return the steps after which half of the candidates are dropped.

    The last rung is at half of the steps, the one before it at a quarter, and so on, each put off to the next
    evaluation. The last step is never a rung, for there the search ends.
    """
    found = set()
    for number in range(1, halvings + 1):
        later = [step for step in evaluation_steps if total_steps / 2**number <= step < total_steps]
        if later:
            found.add(min(later))
    return found
