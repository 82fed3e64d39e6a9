"""What a run tells while it goes on. The base class shows warnings only; the command line's draws a progress bar.

Knows what can happen in a run, and nothing of how it is shown.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ptune.config.candidates import Candidate
from ptune.config.run import RunConfig
from ptune.soft_prompts.soft_prompt import SoftPrompt
from ptune.tasks.task import Assessment
from ptune.training.assembly import Parts
from ptune.training.checkpoint import Progress
from ptune.training.comparison import Comparison


class Reporter:
    """Hears of every event of a run, and shows warnings only. Override what you want to show."""

    def started(self, config: RunConfig, parts: Parts, total_steps: int, step: int) -> None:
        """Training begins, or goes on after ``step``."""

    def kept_contexts(self, count: int, size: int, *, full: bool) -> None:
        """Keys and values of ``count`` contexts are kept, ``size`` bytes in memory; ``full`` where more did not fit."""

    def planned(self, plan: str, why: str) -> None:
        """A pass was carried out by a plan of `ptune.plans.plans` that no earlier pass of the run had."""

    def stepped(self, step: int, loss: float, learning_rate: float) -> None:
        """An optimizer step is done; ``loss`` is its mean over what is supervised."""

    def evaluated(self, step: int, metrics: Mapping[str, float], *, best: bool) -> None:
        """Dev was scored."""

    def sampled(self, records: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]]) -> None:
        """Some dev records were answered by the very path that serves."""

    def warned(self, sentence: str) -> None:
        """Something looks wrong, but the run goes on. Logged by ptune's logger unless a reporter shows it."""
        logging.getLogger("ptune").warning(sentence)

    def stopped_early(self, step: int, patience: int) -> None:
        """The metric did not get better for ``patience`` evaluations."""

    def assessed(self, assessment: Assessment, sentence: str) -> None:
        """Dev was scored for the last time; ``sentence`` says at which temperature probabilities are given, and why."""

    def finished(self, prompt: SoftPrompt, progress: Progress, comparison: Comparison | None) -> None:
        """The soft prompt is saved, and was compared with the bare model; None for records without fields."""


class SearchReporter(Reporter):
    """Hears also what a search does with its candidates, and shows none of it.

    Of a run's events a search tells `kept_contexts`, `planned` and `warned`, and of its best candidate `assessed` and
    `finished`. `search_started`, `went_on` and `scored` stand for `started`, `stepped` and `evaluated`; no candidate is
    sampled, or said to have stopped early.
    """

    def search_started(self, candidates: Sequence[Candidate], parts: Parts, total_steps: int) -> None:
        """All candidates are ready; ``parts`` are those of the first."""

    def went_on(self, step: int, running: int) -> None:
        """A step is done, by so many candidates."""

    def scored(self, step: int, metric: str, values: Mapping[int, float]) -> None:
        """Candidates were scored on dev: number -> value of the task's metric."""

    def halved(self, step: int, kept: Sequence[int], dropped: Sequence[int]) -> None:
        """The better candidates go on; numbers of both, the best first."""

    def ranked(self, table: Mapping[str, Any]) -> None:
        """The search is over; what ``run/search.json`` holds."""
