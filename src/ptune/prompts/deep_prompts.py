"""Deep prompts (Liu et al. 2022, P-tuning v2): virtual tokens that are keys and values at every layer.

Their ids are virtual as any other's, so templates, batches and tasks know nothing of them. But no embedding is looked
up for such an id: a row that opens with a deep prompt's ids is run without them, behind a past of the prompt's keys
and values. So a deep prompt stands in front of everything, whole, and predicts nothing itself.

Knows nothing of encoders, models or tasks. Shapes: B batch, T tokens, P virtual tokens, L layers, K key-value heads,
D width of a head, W = 2 L K D.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from ptune.errors import BackboneError, TemplateError
from ptune.prompts.keys_and_values import KeyValueShape, layers_of, new_cache, stacked
from ptune.template import Template, Virtual


@dataclass(frozen=True, eq=False)
class DeepPrompt:
    """One deep prompt in a table.

    Attributes:
        rows: ``[P, W]``, with or without gradient.
        shape: how keys and values lie in a row.
    """

    rows: Tensor
    shape: KeyValueShape

    def check(self, tokens: int, window: int | None, recomputed: bool) -> None:
        """See that rows can be run behind it.

        Args:
            tokens: T of the rows, its own among them.
            window: in how many tokens attention reads a past; None or 0 for no limit.
            recomputed: whether layers compute their activations again in the backward pass.

        Raises:
            BackboneError: they cannot.
        """
        if recomputed and torch.is_grad_enabled():
            raise BackboneError(
                "a layer that recomputes its activations drops the cache in which a deep prompt stands; turn gradient "
                "checkpointing off"
            )
        if window and tokens > window:
            raise BackboneError(
                f"the model's attention reads back {window} tokens, and a row of {tokens}, virtual ones counted, would "
                "lose sight of its deep prompt; shorten it by prompt.max_length"
            )

    def past(self, batch: int, dtype: torch.dtype) -> DynamicCache:
        """Return the cache of B = ``batch`` rows behind it, in the backbone's dtype."""
        return new_cache(layers_of(self.rows.to(dtype), self.shape), batch)

    def keys_and_values(self, dtype: torch.dtype) -> Tensor:
        """Return what stands before one row, ``[2 L, K, P, D]``, in the backbone's dtype."""
        return stacked(layers_of(self.rows.to(dtype), self.shape), 0, 0, len(self.rows))


class DeepPrompts:
    """Deep prompts of one model by their first ids."""

    def __init__(self) -> None:
        self._prompts: dict[int, DeepPrompt] = {}

    def set(self, first_id: int, rows: Tensor, shape: KeyValueShape) -> None:
        """Let ids ``first_id ..`` mean the keys and values in ``rows`` ``[P, W]``."""
        self._prompts[first_id] = DeepPrompt(rows, shape)

    def release(self, first_id: int) -> None:
        """Forget the prompt whose ids start at ``first_id``, if there is one."""
        self._prompts.pop(first_id, None)

    def first_id(self, ids: Sequence[int]) -> int | None:
        """Return the first id of the deep prompt that a row of ids opens with; None where it opens with none."""
        return ids[0] if ids and ids[0] in self._prompts else None

    def get(self, first_id: int) -> DeepPrompt:
        """Return the prompt whose ids start at ``first_id``."""
        return self._prompts[first_id]

    def opening(self, input_ids: Tensor) -> DeepPrompt | None:
        """Return the deep prompt that all rows of a batch open with; None where there is none in them.

        Args:
            input_ids: ``[B, T]`` int64.

        Raises:
            BackboneError: it stands elsewhere than in front, not whole, or in some rows only.
        """
        if not self._prompts:
            return None
        firsts = sorted(self._prompts)
        starts = torch.tensor(firsts, device=input_ids.device)
        ends = starts + torch.tensor([len(self._prompts[first].rows) for first in firsts], device=starts.device)
        range_of = torch.searchsorted(starts, input_ids.contiguous(), right=True) - 1  # [B, T], -1 below all ranges
        within = (range_of >= 0) & (input_ids < ends[range_of])
        if not bool(within.any()):
            return None
        first = int(input_ids[0, 0])
        if (prompt := self._prompts.get(first)) is not None:
            own = torch.arange(first, first + len(prompt.rows), device=starts.device)
            in_front = bool((input_ids[:, : len(own)] == own).all()) if len(own) <= input_ids.shape[1] else False
            if in_front and int(within.sum()) == len(own) * len(input_ids):
                return prompt
        raise BackboneError(
            "a deep prompt's virtual tokens stand once, whole and in front of everything, pads included, and in every "
            "row of a batch alike; some rows of this batch have them elsewhere or not at all, so pad on the right, and "
            "give rows of other prompts in batches of their own"
        )


def check_deep_template(template: Template) -> None:
    """See that a template's virtual tokens stand in front of everything, as keys and values must.

    Raises:
        TemplateError: some stand elsewhere.
    """
    runs = [place for place, piece in enumerate(template.pieces) if isinstance(piece, Virtual)]
    if runs != list(range(len(runs))):
        raise TemplateError(
            "the virtual tokens of a deep prompt are keys and values in front of everything, and in "
            f"{template.source!r} something stands before some of them; put all of them first, as in "
            "[P*10]{text}{answer}, or set prompt.deep to false"
        )
