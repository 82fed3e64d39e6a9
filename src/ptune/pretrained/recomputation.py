"""Layers that keep no activations and compute them again in the backward pass, in a model that stays in eval mode.

Knows transformers' layers, and nothing of backbones, plans or tasks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ptune.errors import BackboneError


def recompute_layers(model: PreTrainedModel, settings: Mapping[str, Any]) -> list[GradientCheckpointingLayer]:
    """Make a model's layers recompute while `recomputing` says so, and return them.

    Args:
        model: whose layers.
        settings: keyword arguments of `torch.utils.checkpoint.checkpoint`.

    Raises:
        BackboneError: the family's layers cannot do it.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        family = type(model).__name__
        raise BackboneError(f"{family} has no layers that can be recomputed; turn gradient checkpointing off")
    for layer in layers:
        layer.gradient_checkpointing = True
        recompute = functools.partial(_checkpoint, layer, settings)
        layer._gradient_checkpointing_func = recompute  # type: ignore[assignment]
    return layers


@contextmanager
def recomputing(layers: list[GradientCheckpointingLayer]) -> Iterator[None]:
    """Let a forward pass with gradient recompute ``layers``, which look at their own ``training`` flag for that.

    Generation must find it off, for a layer that recomputes drops its cache.
    """
    if not torch.is_grad_enabled():
        yield
        return
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


def _checkpoint(layer: nn.Module, settings: Mapping[str, Any], function: Callable[..., Any], *arguments: Any) -> Any:
    layer.training = False  # it has asked for the recomputation; inside, the same flag would switch OPT's dropout on
    return checkpoint(function, *arguments, **settings)
