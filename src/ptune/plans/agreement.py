"""Processes that each have a part of a model's layers run as many forward passes for their batches.

Without gradient all of them read the same, so it is the batches of training that are agreed on. Knows nothing of how
a plan is chosen or carried out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ptune.plans.passes import PlanName, PlannedPass


class Agreement:
    """What this process and the others do alike; nothing, until `begin`."""

    def __init__(self) -> None:
        self._alike: Callable[[int], bool] | None = None

    def begin(self, alike: Callable[[int], bool]) -> None:
        """Agree from now on.

        Args:
            alike: takes how many passes this process would run for a batch, and tells whether all would run as many.
        """
        self._alike = alike

    @property
    def needed(self) -> bool:
        """Whether passes must be agreed on."""
        return self._alike is not None and torch.is_grad_enabled()

    def on(self, passes: int) -> bool:
        """Whether all processes would run so many passes for their batches, where they must run as many."""
        return not self.needed or self._alike is None or self._alike(passes)

    def plan(self, choice: PlannedPass, *, may_pack: bool) -> PlannedPass:
        """Return a plan of as many passes as all processes take: of one, where these differ.

        Args:
            choice: what this process would do alone.
            may_pack: whether rows can be packed, in all processes.
        """
        if self.needed and choice.context_tokens:
            why = "contexts that are not kept would take passes which other processes lack"
            choice = PlannedPass("reference", why, choice.tokens)
        several = choice.plan == "shared prefix"
        if self.on(sum(1 + bool(group.shared) for group in choice.groups) if several else 1) or not several:
            return choice
        plan: PlanName = "packed rows" if may_pack else "reference"
        return PlannedPass(plan, "another process has a batch of one pass", choice.tokens, groups=choice.groups)
