"""Attention over rows that stand one behind another in one sequence, without padding.

    prompt, row 1, row 2, ...

Each row sees the prompt and itself, as if it stood alone. The function is registered with transformers'
`AttentionInterface`; where rows begin comes to it as a keyword argument of the forward pass, never by a global, and the
model's setting is as before when the block ends.

Knows nothing of plans, virtual tokens or tasks. Shapes: B rows, P tokens of the prompt, T tokens of all, K key-value
heads of G query heads, D width of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedConfig

_NAME = "ptune_packed_rows"


@dataclass(frozen=True)
class Packing:
    """Where rows begin and end in a packed sequence.

    Attributes:
        prompt: P, tokens in front that every row sees; 0 for none.
        lengths: of each row, at least 1.
        device: of the sequence.
    """

    prompt: int
    lengths: tuple[int, ...]
    device: torch.device

    @functools.cached_property
    def places(self) -> Tensor:
        """At which place each token would stand if its row were alone behind the prompt, ``[1, T]`` int64."""
        counts = (range(self.prompt), *(range(self.prompt, self.prompt + length) for length in self.lengths))
        return torch.tensor([[place for count in counts for place in count]], device=self.device)

    @functools.cached_property
    def mask(self) -> Tensor:
        """What the longest row sees of the prompt and itself, ``[longest, P + longest]`` bool."""
        longest = max(self.lengths)
        return torch.ones(longest, self.prompt + longest, dtype=torch.bool, device=self.device).tril(self.prompt)


@contextmanager
def packed_attention(config: PreTrainedConfig) -> Iterator[None]:
    """Let a model's attention layers read packed rows while the block runs.

    Args:
        config: the one that the layers look at.
    """
    AttentionInterface.register(_NAME, _attend)
    before = config._attn_implementation
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_unread: Any,
) -> tuple[Tensor, None]:
    """Return what each token reads, ``[1, T, G, D]``; transformers calls it in every attention layer.

    Rows are attended to one by one: they need no padding, and nothing as large as ``T x T`` is ever made. On a
    processor this was the fastest of the ways tried (docs/performance.md).

    Args:
        module: the layer.
        query: ``[1, G, T, D]``.
        key: ``[1, K, T, D]``.
        value: ``[1, K, T, D]``.
        attention_mask: None, for the packing says all.
        packing: where rows begin.
        scaling: of the scores; ``D ** -0.5`` where absent.
        dropout: none, for a frozen model's is off.
    """
    assert attention_mask is None
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    attend = functools.partial(scaled_dot_product_attention, dropout_p=dropout, scale=scaling)
    sizes = [packing.prompt, *packing.lengths]
    (prompt_query, *queries), (prompt_key, *keys), (prompt_value, *values) = (
        part.split(sizes, dim=2) for part in (query, key, value)
    )
    read = [attend(prompt_query, prompt_key, prompt_value, is_causal=True)] if packing.prompt else []
    for row_query, row_key, row_value in zip(queries, keys, values, strict=True):
        if not packing.prompt:
            read.append(attend(row_query, row_key, row_value, is_causal=True))
            continue
        length = row_query.shape[2]
        seen_keys, seen_values = torch.cat([prompt_key, row_key], 2), torch.cat([prompt_value, row_value], 2)
        seen = packing.mask[:length, : packing.prompt + length]
        read.append(attend(row_query, seen_keys, seen_values, attn_mask=seen))
    return torch.cat([one.transpose(1, 2) for one in read], dim=1), None
