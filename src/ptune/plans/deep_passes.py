"""Forward passes behind a deep prompt, whose keys and values stand before the text at every layer.

Knows nothing of encoders or templates. Shapes: B batch, T tokens of a row, P virtual tokens that open it, t tokens
behind these, N chosen positions, V rows of the backbone's input matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptune.errors import BackboneError
from ptune.plans.passes import Run
from ptune.prompts.deep_prompts import DeepPrompt


def logits_behind(
    prompt: DeepPrompt,
    run: Run,
    input_ids: Tensor,
    attention_mask: Tensor,
    positions: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return the logits ``[N, V]`` at the chosen positions of rows that a deep prompt opens.

    Args:
        prompt: that opens them.
        run: one forward pass of the model.
        input_ids: ``[B, T]`` int64, the prompt's ids among them.
        attention_mask: ``[B, T]`` int64.
        positions: ``[B, T]`` bool.
        dtype: the backbone's.

    Raises:
        BackboneError: a position stands among the prompt's own ids, or all are asked for.
    """
    count = len(prompt.rows)
    if positions is None or bool(positions[:, :count].any()):
        raise BackboneError(
            "a deep prompt is keys and values alone, which predict nothing: before the first token that is learnt or "
            "asked for, a row needs a token of text, so put words between its virtual tokens and the answer"
        )
    past = prompt.past(len(input_ids), dtype)
    return run(input_ids[:, count:], attention_mask, positions[:, count:], past)[0]


def mask_from_both_sides(attention_mask: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """Return the mask of a masked model's attention behind a past: ``[B, 1, t, P + t]``, added to the scores.

    Its own forward makes masks for its own t tokens only, and takes one of four dimensions as it is.

    Args:
        attention_mask: ``[B, P + t]`` int64.
        tokens: t.
        dtype: the backbone's.
    """
    hidden = torch.zeros(attention_mask.shape, dtype=dtype, device=attention_mask.device)
    hidden = hidden.masked_fill(attention_mask == 0, torch.finfo(dtype).min)
    return hidden[:, None, None].expand(-1, 1, tokens, -1)
