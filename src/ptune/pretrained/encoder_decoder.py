"""One sequence of context and answer, cut in two for a model that reads with one half and writes with the other.

Tasks render a row as context and answer end to end, as for every kind of model. Where the answer begins is where the
first position stands that predicts something: the context goes into the encoder, the answer behind the start token
into the decoder. Knows nothing of tasks or templates. Shapes: B batch, T tokens, d tokens of the longest answer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ptune.errors import BackboneError


def split_rows(
    input_ids: Tensor, attention_mask: Tensor, positions: Tensor, start_id: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Cut rows behind their first chosen position.

    Args:
        input_ids: ``[B, T]`` int64, context and answer, pads on either side.
        attention_mask: ``[B, T]`` int64.
        positions: ``[B, T]`` bool, after which tokens to predict; at least one in every row, the first of them the
            context's last token.
        start_id: what the decoder reads first.

    Returns:
        The keyword arguments of the model's forward, and ``[B, d]`` bool: the same positions in the decoder's own.

    Raises:
        BackboneError: a row has no position, so that there is no telling context from answer.
    """
    if not bool(positions.any(-1).all()):
        raise BackboneError("an encoder-decoder model needs to know where each row's answer begins: choose positions")
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    first = positions.int().argmax(-1, keepdim=True)  # [B, 1], the context's last token
    last = (positions * columns).amax(-1, keepdim=True)
    context = (columns <= first) & attention_mask.bool()
    width = int(first.max()) + 1
    steps = torch.arange(int((last - first).max()) + 1, device=input_ids.device)  # [d]
    places = first + steps  # [B, d]
    within = places <= last
    places = places.clamp(max=input_ids.shape[1] - 1)
    decoder_ids = input_ids.gather(-1, places)
    decoder_ids[:, 0] = start_id  # in place of the context's last token, which it follows
    arguments = {
        "input_ids": input_ids[:, :width],
        "attention_mask": context[:, :width].to(attention_mask.dtype),
        "decoder_input_ids": decoder_ids,
        "decoder_attention_mask": within.to(attention_mask.dtype),
    }
    return arguments, positions.gather(-1, places) & within


def decoder_start(config: PreTrainedConfig) -> int:
    """Return the id that the decoder reads first.

    Raises:
        BackboneError: the config names none.
    """
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        raise BackboneError("the model's config names no decoder_start_token_id; set it as the family's models do")
    return int(start)
