"""Attention over rows that stand one behind another in one sequence, without padding.

    prompt, row 1, row 2, ...

Each row sees the prompt and itself, as if it stood alone; or a past of its own and itself, where there is no prompt.
Rows of several prompts stand in groups, one group behind
another, and none sees another group. The function is registered with transformers'
`AttentionInterface`; where rows begin comes to it as a keyword argument of the forward pass, never by a global, and the
model's setting is as before when the block ends.

Knows nothing of plans, virtual tokens or tasks. Shapes: P virtual tokens of a prompt, F tokens of a row's past, T of
the row itself, R tokens of all, L layers, K key-value heads, G query heads, D width of a head.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedConfig

_NAME = "ptune_packed_rows"


class PackedGroup(NamedTuple):
    """Rows behind one prompt.

    Attributes:
        prompt: P, tokens in front that every row of the group sees; 0 for none.
        lengths: of each row, at least 1.
    """

    prompt: int
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Packing:
    """Where prompts and rows begin and end in a packed sequence.

    Attributes:
        groups: one behind another.
        device: of the sequence.
        pasts: keys and values of what each row has behind it, ``[2 L, K, F, D]``; none where all see their prompts.
    """

    groups: tuple[PackedGroup, ...]
    device: torch.device
    pasts: tuple[Tensor, ...] = ()

    @functools.cached_property
    def lengths(self) -> tuple[int, ...]:
        """Of the rows of all groups."""
        return tuple(length for group in self.groups for length in group.lengths)

    @functools.cached_property
    def before(self) -> tuple[int, ...]:
        """How many tokens each row sees before itself."""
        prompts = tuple(group.prompt for group in self.groups for _ in group.lengths)
        return tuple(past.shape[2] for past in self.pasts) or prompts

    @functools.cached_property
    def places(self) -> Tensor:
        """At which place each token would stand if its row were alone behind what it sees, ``[1, R]`` int64."""
        rows = iter(zip(self.before, self.lengths, strict=True))
        counts: list[range] = []
        for prompt, lengths in self.groups:
            counts.append(range(prompt))
            counts += [range(before, before + length) for before, length in itertools.islice(rows, len(lengths))]
        return torch.tensor([[place for count in counts for place in count]], device=self.device)

    def mask(self, row: int) -> Tensor:
        """What a row of F tokens before and T of its own sees of them, ``[T, F + T]`` bool."""
        before, length = self.before[row], self.lengths[row]
        return self._mask[:length, self._most_before - before : self._most_before + length]

    @functools.cached_property
    def _most_before(self) -> int:
        return max(self.before)

    @functools.cached_property
    def _mask(self) -> Tensor:
        longest, before = max(self.lengths), self._most_before
        return torch.ones(longest, before + longest, dtype=torch.bool, device=self.device).tril(before)


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
    """Return what each token reads, ``[1, R, G, D]``; transformers calls it in every attention layer.

    Rows are attended to one by one: they need no padding, and nothing as large as ``R x R`` is ever made. On a
    processor this was the fastest of the ways tried (docs/measured.md).

    Args:
        module: the layer.
        query: ``[1, G, R, D]``.
        key: ``[1, K, R, D]``.
        value: ``[1, K, R, D]``.
        attention_mask: None, for the packing says all.
        packing: where rows begin.
        scaling: of the scores; ``D ** -0.5`` where absent.
        dropout: none, for a frozen model's is off.
    """
    if attention_mask is not None:
        raise TypeError("packed rows have no mask, and this family's layers ask for one")
    groups = query.shape[1] // key.shape[1]

    def whole(keys_or_values: Tensor) -> Tensor:  # [1, K, ., D] -> [1, G, ., D]
        return keys_or_values.repeat_interleave(groups, 1) if groups > 1 else keys_or_values

    key, value = whole(key), whole(value)
    attend = functools.partial(scaled_dot_product_attention, dropout_p=dropout, scale=scaling)
    sizes = [size for group in packing.groups for size in (group.prompt, *group.lengths)]
    pieces = zip(*(part.split(sizes, dim=2) for part in (query, key, value)), strict=True)
    numbers, read = itertools.count(), []
    for prompt, lengths in packing.groups:
        prompt_query, prompt_key, prompt_value = next(pieces)
        if prompt:
            read.append(attend(prompt_query, prompt_key, prompt_value, is_causal=True))
        for number in itertools.islice(numbers, len(lengths)):
            row_query, row_key, row_value = next(pieces)
            if not packing.before[number]:
                read.append(attend(row_query, row_key, row_value, is_causal=True))
                continue
            before_key, before_value = prompt_key, prompt_value
            if packing.pasts:
                layer = 2 * cast(int, module.layer_idx)
                before_key, before_value = (whole(half[None]) for half in packing.pasts[number][layer : layer + 2])
            seen_keys, seen_values = torch.cat([before_key, row_key], 2), torch.cat([before_value, row_value], 2)
            read.append(attend(row_query, seen_keys, seen_values, attn_mask=packing.mask(number)))
    return torch.cat([one.transpose(1, 2) for one in read], dim=1), None
