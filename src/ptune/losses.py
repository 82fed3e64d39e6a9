"""The loss of supervised tokens, and the one place where labels are shifted to what comes next.

Shapes: B batch, T tokens, N chosen positions, V rows of the backbone's input matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ptune.batch import IGNORED


def next_token_labels(labels: Tensor) -> Tensor:
    """Return at each position the label of what follows it, ``[B, T] -> [B, T]``: the one place of the shift."""
    return functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of logits ``[N, V]`` for labels ``[N]``, summed, in float32 or float64."""
    return functional.cross_entropy(at_least_float32(logits), labels, reduction="sum")


def at_least_float32(logits: Tensor) -> Tensor:
    """Return logits (any shape) in float32, or float64 where they are: half precision is too coarse for a loss."""
    return logits if logits.dtype == torch.float64 else logits.float()
