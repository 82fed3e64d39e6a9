"""A linear head: scores of C outputs from the last layer's hidden states, trained beside the virtual tokens.

Where a model has a transform before its own output head (BERT's), the linear head reads what comes before it.

The weight is trained in units of the hidden states' size, as the virtual tokens are in units of the embeddings', so
that one learning rate does for every backbone. The unit is a power of two, which loses no bit.

Knows nothing of backbones, tasks or files. Shapes: N places read, C outputs, H width of the hidden states.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from ptune.prompts.encoder import power_of_two_near_rms

_WEIGHT, _BIAS = "head.weight", "head.bias"


class LinearHead(nn.Module):
    """Gives scores ``[N, C]`` for hidden states ``[N, H]``.

    Attributes:
        weight: ``[C, H]`` float32, in units of ``scale``.
        bias: ``[C]`` float32.
        scale: by what hidden states are divided, a scalar that is saved but not trained.
    """

    scale: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, scale: float = 1.0) -> None:
        """Make a head of a weight ``[C, H]`` and a bias ``[C]``, which are copied, in float32.

        Args:
            weight: what hidden states are multiplied by.
            bias: what is added.
            scale: the unit in which the weight is trained; a power of two keeps it to the last bit.
        """
        super().__init__()
        self.weight = nn.Parameter(weight.detach().to(torch.float32, copy=True) * scale)
        self.bias = nn.Parameter(bias.detach().to(torch.float32, copy=True))
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))

    @classmethod
    def new(cls, outputs: int, states: Tensor, seed: int) -> LinearHead:
        """Return an untrained head of C = ``outputs``, the same for the same seed.

        Args:
            outputs: C.
            states: ``[N, H]``, some of the hidden states that it will read.
            seed: of the weight, which is small but not zero: through a zero no gradient would reach the prompt.
        """
        width, scale = states.shape[-1], power_of_two_near_rms(states)
        generator = torch.Generator().manual_seed(seed)
        bound = 1 / (math.sqrt(width) * scale)
        weight = torch.empty(outputs, width).uniform_(-bound, bound, generator=generator)
        return cls(weight, torch.zeros(outputs), scale)

    def forward(self, states: Tensor) -> Tensor:
        """Return scores, ``[N, H] -> [N, C]``, float32 unless the module was cast."""
        return functional.linear(states.to(self.weight.dtype), self.weight / self.scale, self.bias)

    def rescaled(self, states: Tensor) -> LinearHead:
        """Return a copy to train on, its unit that of hidden states ``[N, H]``."""
        return LinearHead(self.weight / self.scale, self.bias, power_of_two_near_rms(states))


def head_tensors(head: LinearHead | None) -> dict[str, Tensor]:
    """Return a head as files have it: weight ``[C, H]``, scale folded in, and bias ``[C]``, on the CPU; {} for None."""
    if head is None:
        return {}
    weight = head.weight / head.scale
    return {_WEIGHT: weight.detach().cpu().clone(), _BIAS: head.bias.detach().cpu().clone()}


def head_from(tensors: Mapping[str, Tensor], device: torch.device | str = "cpu") -> LinearHead | None:
    """Return the head of `head_tensors`, frozen, which gives the same scores to the last bit; None for no such tensors.

    Args:
        tensors: a weight of shape [C, H] and a bias of shape [C], among others.
        device: where it goes.
    """
    if _WEIGHT not in tensors:
        return None
    return LinearHead(tensors[_WEIGHT], tensors[_BIAS]).requires_grad_(False).to(device)
