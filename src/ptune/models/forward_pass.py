"""How a model of each kind is called by ids: what its forward takes, where its head looks, what stands before.

Knows nothing of plans' choices, templates or tasks. Shapes: B batch, T tokens, virtual ones included, N chosen
positions, H width, V rows of the backbone's input matrix.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from ptune.families import ENCODER_DECODER, MASKED, Kind
from ptune.plans.deep_passes import mask_from_both_sides
from ptune.plans.packed_attention import Packing, packed_attention
from ptune.pretrained.encoder_decoder import decoder_start, split_rows
from ptune.pretrained.last_layer import LastLayer
from ptune.pretrained.loading import first_position
from ptune.pretrained.output_head import OutputHead, Wanted


class ForwardPass:
    """Calls one frozen model.

    Attributes:
        model: the transformers model.
        kind: causal, masked or encoder-decoder.
        head: its output head.
        first_position: of the first token.
    """

    def __init__(self, model: PreTrainedModel, kind: Kind, head: OutputHead) -> None:
        self.model, self.kind, self.head = model, kind, head
        self.first_position = first_position(model)
        self._last_layer = LastLayer(model)
        self._takes_position_ids = "position_ids" in inspect.signature(model.forward).parameters

    def inputs(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
        """Return the keyword arguments of a forward pass for ids and mask, both ``[B, T]`` int64.

        Position ids come from the mask wherever the family takes them, so that padding on either side moves nothing
        (GPT-2's own forward counts pads as positions).
        """
        arguments = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self._takes_position_ids:
            arguments["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0) + self.first_position
        return arguments

    def arguments(
        self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor | None
    ) -> tuple[dict[str, Any], Tensor | None]:
        """Return a whole forward's keyword arguments, and where its head looks: in the decoder, where there is one.

        Args:
            input_ids: ``[B, T]`` int64.
            attention_mask: ``[B, T]`` int64.
            positions: ``[B, T]`` bool; None for all.

        Raises:
            BackboneError: an encoder-decoder is asked for all positions.
        """
        if self.kind is MASKED:
            return self.inputs(input_ids, attention_mask), positions
        if self.kind is not ENCODER_DECODER:
            return self.inputs(input_ids, attention_mask) | {"use_cache": False}, positions
        if positions is None:
            positions = torch.zeros_like(attention_mask, dtype=torch.bool)  # refused with its reason
        arguments, positions = split_rows(input_ids, attention_mask, positions, decoder_start(self.model.config))
        return arguments | {"use_cache": False}, positions

    def run(
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
        """Run the model on what follows ``past``, and return ``[N, V]`` or ``[N, H]``: what `Plans` are made of.

        Arguments and results are those of `ptune.plans.passes.Run`.
        """
        arguments = self.inputs(input_ids, attention_mask)
        if packing is not None:
            arguments |= {"position_ids": packing.places + self.first_position, "packing": packing}
        elif "position_ids" in arguments:
            arguments["position_ids"] = arguments["position_ids"][:, -input_ids.shape[1] :]
        if past is not None and self.kind is MASKED:
            arguments["attention_mask"] = mask_from_both_sides(attention_mask, input_ids.shape[1], self.model.dtype)
        attention = nullcontext() if packing is None else packed_attention(self.model.config)
        with attention, self._last_layer.at(positions), self.head.at(positions, wanted) as taken:
            output = self.model(**arguments, past_key_values=past, use_cache=keep)
        return output.logits if wanted == "logits" else taken[0], output.past_key_values if keep else None
