"""One forward pass: what carries it out, and how it is to be carried out.

Knows nothing of how a plan is chosen. Shapes: B batch, T tokens, N chosen positions, H width, V rows of the backbone's
input matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor
from transformers import Cache, DynamicCache

from ptune.plans.openings import Group
from ptune.plans.packed_attention import Packing
from ptune.pretrained.output_head import Wanted

PlanName = Literal["reference", "shared prefix", "packed rows", "kept prefix", "frozen context"]


class Run(Protocol):
    """One forward pass of the model, its head at the chosen positions alone, or not at all."""

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        positions: Tensor,
        past: Cache | None = None,
        *,
        keep: bool = False,
        wanted: Wanted = "logits",
        packing: Packing | None = None,
    ) -> tuple[Tensor, DynamicCache | None]:
        """Return logits ``[N, V]``, or hidden states ``[N, H]``, and, if they are to be kept, keys and values.

        Args:
            input_ids: ``[B, T]`` int64.
            attention_mask: ``[B, past + T]`` int64.
            positions: ``[B, T]`` bool.
            past: keys and values of what stands before.
            keep: whether keys and values are wanted.
            wanted: what to return: logits ``[N, V]``, or one of two kinds of hidden states ``[N, H]`` (see `Wanted`).
            packing: where rows begin that stand one behind another in one; None where each has its own.
        """


@dataclass(frozen=True)
class PlannedPass:
    """How a forward pass is to be carried out.

    Attributes:
        plan: its name.
        why: what it is chosen for, in a few words.
        tokens: how many the layers compute, padding included.
        context_tokens: those of them that belong to contexts which are not kept.
        groups: of rows that share what they open with, for shared prefix and packed rows.
        lengths: of the contexts, ``[B]`` int64, for frozen context.
    """

    plan: PlanName
    why: str
    tokens: int
    context_tokens: int = 0
    groups: tuple[Group, ...] = ()
    lengths: Tensor | None = None
