"""The last layer of a model, computed where its output is read and nowhere else.

What follows attention in a layer takes each position by itself: the projection of what attention read, and the MLP,
together four fifths of a layer's products. Nothing reads the last layer's output but the head, and the head reads few
positions: those that are supervised, or one a row. So these parts are given the rows of those positions alone. Keys
and values come from what enters the layer and are whole as ever.

Knows nothing of plans, tasks or virtual tokens. Shapes: B batch, T tokens, N chosen positions.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

_BY_POSITION = (
    *("mlp", "fc1", "fc2"),
    *("self_attn.o_proj", "self_attn.out_proj", "attn.c_proj", "attention.dense", "self_attention.dense"),
)
"""Parts of a layer that follow attention and take each position by itself, as the families name them."""


class LastLayer:
    """The last layer of one model."""

    def __init__(self, model: PreTrainedModel) -> None:
        layers = [module for module in model.base_model.modules() if isinstance(module, GradientCheckpointingLayer)]
        parts = dict(layers[-1].named_modules()) if layers else {}
        self._parts = [parts[name] for name in _BY_POSITION if name in parts]

    @contextmanager
    def at(self, positions: Tensor) -> Iterator[None]:
        """Compute the last layer at some positions only, while the block runs one forward pass.

        What stands elsewhere in its output means nothing then.

        Args:
            positions: ``[B, T]`` bool.
        """
        chosen = positions.flatten().nonzero()[:, 0]  # [N]
        if len(chosen) == positions.numel():
            yield
            return
        if not len(chosen):
            chosen = chosen.new_zeros(1)  # not every kernel multiplies a matrix of no rows
        shape: list[torch.Size] = []
        thread = threading.get_ident()  # another may run the model meanwhile, as it pleases

        def narrow(_module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if threading.get_ident() != thread:
                return None
            shape.append(arguments[0].shape[:-1])
            at = chosen.to(arguments[0].device)
            return tuple(argument.flatten(0, -2)[at][None] for argument in arguments)  # [B, T, .] -> [1, N, .]

        def widen(_module: nn.Module, _arguments: Any, output: Tensor) -> Tensor | None:
            if threading.get_ident() != thread:
                return None
            whole = output.new_zeros(positions.numel(), output.shape[-1])
            return whole.index_copy(0, chosen.to(output.device), output[0]).view(*shape.pop(), -1)  # [B, T, .]

        hooks = [part.register_forward_pre_hook(narrow) for part in self._parts]
        hooks += [part.register_forward_hook(widen) for part in self._parts]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
