"""A frozen model's layers shared out over processes, by PyTorch's FSDP2: each keeps its part of every layer's weights.

A layer is gathered for as long as it computes, forwards and backwards, so its weights are whole once in a process and
not once a layer. They are frozen, so there is no gradient of theirs to add up; what is trained stands outside. The
input matrix, the head and what else is in no layer stay whole in every process, since virtual tokens and losses read
their rows directly.

Gathering is something that all processes do together: they must run as many passes as each other (`alike`).

Knows transformers' layers and torch.distributed, nothing of plans or tasks. Shapes: B batch, K key-value heads, P
virtual tokens, D width of a head, N chosen positions, V rows of the backbone's input matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ptune.errors import ConfigError


def shard_layers(model: PreTrainedModel, device: torch.device, name: str) -> None:
    """Leave of each layer's weights this process's part on a device, and put all else there whole.

    Layers go there one by one, so that a model which no device could hold may be loaded into memory and shared out.

    Args:
        model: loaded and frozen, alike in all processes.
        device: of this process.
        name: what the user called it.

    Raises:
        ConfigError: its layers are of a kind that is not known, or its weights are quantised.
    """
    if getattr(model, "is_quantized", False):
        raise ConfigError(
            f'training.shard_backbone cannot cut the quantised weights of "{name}" in parts; leave one of the two out'
        )
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    outside = {parameter for parameter in model.parameters() if id(parameter) not in inside}
    if not inside:
        raise ConfigError(
            f'training.shard_backbone does not know the layers of {type(model).__name__}, which "{name}" is; leave it '
            "out"
        )
    from torch.distributed.device_mesh import init_device_mesh  # a torch that was built for one process lacks both
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for layer in reversed(layers):  # what stands in another one before it
        fully_shard(layer, mesh=mesh)
    # The whole model too, with no weight of its own: so the next layer is gathered while one computes.
    fully_shard(model, mesh=mesh, ignored_params=outside)
    nn.Module.to(model, device)


def alike(number: int, device: torch.device) -> bool:
    """Whether all processes have the same number; all of them must ask.

    Args:
        number: of this process.
        device: that its process group sends from.
    """
    both = torch.tensor([number, -number], device=device)
    distributed.all_reduce(both, distributed.ReduceOp.MAX)
    largest, smallest = both.tolist()
    return bool(largest == -smallest)


def held_to(output: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return a layer's keys and values, whose gradient will find the layer gathered.

    FSDP gathers a layer when a gradient reaches its output. Where only the keys and values of the last one are used,
    none would.

    Args:
        output: of the model, ``[N, V]``, which depends on the layer's output; its gradient is zero.
        keys: ``[B, K, P, D]``.
        values: ``[B, K, P, D]``.
    """
    held: tuple[Tensor, Tensor] = _Held.apply(output, keys, values)
    return held


class _Held(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, output: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        context.save_for_backward(output)
        return keys.view_as(keys), values.view_as(values)

    @staticmethod
    def backward(context: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (output,) = context.saved_tensors
        return torch.zeros_like(output), keys, values


def numbers_held(model: nn.Module) -> int:
    """Return how many numbers of a model's weights this process holds."""
    return sum(getattr(each, "to_local", lambda each=each: each)().numel() for each in model.parameters())
