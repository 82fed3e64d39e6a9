"""The loss of supervised tokens, and the one place where labels are shifted to what comes next.

Shapes: B batch, T tokens, N chosen positions, H width, V rows of the output matrix, c positions of a
chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ptune.rendering.batch import IGNORED

_LOGITS_AT_ONCE = 2**22
"""Logits that are held at any time while a loss is computed in chunks, 16 MB of float32."""


def next_token_labels(labels: Tensor) -> Tensor:
    """Return at each position the label of what follows it, ``[B, T] -> [B, T]``: the one place of the shift."""
    return functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of logits ``[N, V]`` for labels ``[N]``, summed, in float32 or float64."""
    return functional.cross_entropy(at_least_float32(logits), labels, reduction="sum")


def summed_linear_loss(states: Tensor, matrix: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """Return the loss that `summed_loss` gives for ``states @ matrix.T + bias``, without ever holding those logits.

    The gradient for the states is known as soon as a chunk's logits are: softmax less one-hot, times the matrix. So it
    is computed on the spot, and all that is kept for the backward pass is as large as the states.

    Args:
        states: ``[N, H]``.
        matrix: ``[V, H]``, frozen.
        bias: ``[V]``, frozen; None for none.
        labels: ``[N]`` int64.

    Returns:
        A scalar in float32, or float64 where the states are.
    """
    loss: Tensor = _SummedLinearLoss.apply(
        states, matrix, bias, labels, states.requires_grad and torch.is_grad_enabled()
    )
    return loss


class _SummedLinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, states: Tensor, matrix: Tensor, bias: Tensor | None, labels: Tensor, learns: bool
    ) -> Tensor:
        loss = at_least_float32(states.new_zeros(()))
        gradient = torch.empty_like(states) if learns else None
        at_once = max(1, _LOGITS_AT_ONCE // len(matrix))
        for start in range(0, len(states), at_once):
            chunk = slice(start, start + at_once)
            right = labels[chunk, None]  # [c, 1]
            logits = functional.linear(states[chunk], matrix, bias)
            log_probabilities = torch.log_softmax(at_least_float32(logits), -1)  # [c, V]
            loss -= log_probabilities.gather(-1, right).sum()
            if gradient is not None:
                wrong = log_probabilities.exp_()
                wrong.scatter_add_(-1, right, wrong.new_full(right.shape, -1))  # softmax less one-hot
                gradient[chunk] = wrong.to(logits.dtype) @ matrix
        if gradient is not None:
            context.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(context: Any, outer: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = context.saved_tensors
        return gradient * outer, None, None, None, None


def at_least_float32(logits: Tensor) -> Tensor:
    """Return logits (any shape) in float32, or float64 where they are: half precision is too coarse for a loss."""
    return logits if logits.dtype == torch.float64 else logits.float()
