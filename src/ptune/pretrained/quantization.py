"""Frozen weights in eight or four bits: less memory, the gradient through them exact for the rounded weights.

`quantize` rounds the linear layers of a loaded model on a processor by torchao. Weights are multiplied as the dtype of
the hidden states, one layer at a time: what is kept for the backward pass is the rounded weight, never its product with
the scale, so a step takes no more memory than in half precision. Embeddings, norms and the output head stay as they
are, and with them the fingerprint.

Knows nothing of tasks, virtual tokens or training. Shapes: n outputs of a layer, k inputs, g of them with one scale.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from ptune.errors import BackboneError, MissingExtraError

Bits = Literal["int8", "int4"]
_INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]
_GROUP = 32
"""g of int4; a layer whose k is no multiple of it stays as it is."""


class Rounded(Protocol):
    """A weight of few bits."""

    def dequantize(self) -> Tensor:
        """Return the weight ``[n, k]`` as the layers multiply it."""


class Int4Weight:
    """A weight ``[n, k]`` of four bits, two numbers a byte; torchao's own tensor for processors takes a byte for each.

    Attributes:
        packed: ``[n, k / 2]`` uint8.
        scale: ``[n, k / g]``, of the hidden states' dtype.
        zero: ``[n, k / g]`` int8, the number that means zero.
    """

    def __init__(self, numbers: Tensor, scale: Tensor, zero: Tensor) -> None:
        """Pack ``numbers``, ``[n, k]`` int8 from -8 to 7."""
        shifted = (numbers + 8).to(torch.uint8)
        self.packed = shifted[:, ::2] | (shifted[:, 1::2] << 4)
        self.scale, self.zero = scale, zero

    def dequantize(self) -> Tensor:
        """Return the weight ``[n, k]`` in the dtype of its scale."""
        pairs = torch.stack([self.packed & 15, self.packed >> 4], dim=-1)  # [n, k / 2, 2]
        numbers = pairs.view(len(pairs), -1, _GROUP).to(self.scale.dtype) - 8  # [n, k / g, g]
        zero = self.zero.to(self.scale.dtype)[..., None]
        return ((numbers - zero) * self.scale[..., None]).view(len(pairs), -1)


class _Product(torch.autograd.Function):
    """``states [..., k] x weight [n, k] -> [..., n]``; the weight in full is made anew in the backward pass."""

    @staticmethod
    def forward(context: Any, states: Tensor, weight: Rounded, bias: Tensor | None) -> Tensor:
        context.weight = weight
        return functional.linear(states, weight.dequantize(), bias)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ context.weight.dequantize(), None, None


def quantize(model: PreTrainedModel, bits: Bits, name: str) -> int:
    """Round the linear layers of a model on a processor, all but its output head; return how many.

    Args:
        model: loaded and frozen, in the dtype of its hidden states.
        bits: of its weights.
        name: what the user called it.

    Raises:
        MissingExtraError: torchao is not installed.
        BackboneError: it has no linear layer that can be rounded, as GPT-2, whose layers are of a class of its own.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerGroup
        from torchao.quantization.quant_primitives import MappingType
    except ImportError as error:
        raise MissingExtraError("model.quantization needs torchao: pip install ptune[quantization]") from error
    config: Any = Int8WeightOnlyConfig()
    if bits == "int4":
        grouped, mapping = PerGroup(_GROUP), MappingType.ASYMMETRIC
        config = IntxWeightOnlyConfig(weight_dtype=_INT4, granularity=grouped, mapping_type=mapping)
    head = model.get_output_embeddings()
    chosen = [
        module
        for module in model.modules()
        if type(module) is nn.Linear and module is not head and (bits == "int8" or module.in_features % _GROUP == 0)
    ]
    if not chosen:
        raise BackboneError(
            f'"{name}" has no linear layers that model.quantization {bits} could round: those of GPT-2 are of another '
            "kind, and int4 wants a width that is a multiple of 32; leave it out"
        )
    for module in chosen:
        quantize_(module, config)
        weight: Any = module.weight
        if bits == "int4":
            weight = Int4Weight(weight.qdata, weight.scale, weight.zero_point)
            module.register_parameter("weight", None)
        # the module stays in its place, as everywhere in a backbone
        module.forward = functools.partial(_linear, weight, module.bias)  # type: ignore[method-assign]
    model.is_quantized = True  # type: ignore[assignment]  # as transformers marks those that it loads so
    return len(chosen)


def _linear(weight: Rounded, bias: Tensor | None, states: Tensor) -> Tensor:
    product: Tensor = _Product.apply(states, weight, bias)
    return product
