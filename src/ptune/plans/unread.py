"""Tokens that nothing reads: those behind the last chosen position of a row, which a causal model never looks ahead to.

The label of a text is one of them, and the end token of an answer: they are predicted, and predict nothing.

Knows ids, masks and positions, and nothing of models or plans. Shapes: B batch, T tokens, t of them that are kept.
"""

from __future__ import annotations

from torch import Tensor


def without_unread(input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the three of a causal model, each ``[B, t]``, with pads in place of what nothing reads.

    A row of which nothing is chosen stays whole, and so does a batch in which pads are chosen.

    Args:
        input_ids: ``[B, T]`` int64.
        attention_mask: ``[B, T]`` int64.
        positions: ``[B, T]`` bool.
    """
    if bool((positions & ~attention_mask.bool()).any()):
        return input_ids, attention_mask, positions
    read = positions.flip(-1).cummax(-1).values.flip(-1) | ~positions.any(-1, keepdim=True)
    mask = attention_mask * read
    end = int(mask.any(0).nonzero().max()) + 1 if bool(mask.any()) else mask.shape[1]
    return input_ids[:, :end], mask[:, :end], positions[:, :end]
