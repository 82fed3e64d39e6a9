"""Contexts read without gradient, each as if it stood alone: their keys and values, and the logits of what comes next.

Contexts of any lengths are read in one pass, packed or padded, behind keys and values of what stands before each.

Knows nothing of plans or tasks. Shapes: B contexts, T tokens of one, F tokens before it, R tokens of packed contexts,
L layers, K key-value heads, D width of a head, V rows of the backbone's input matrix.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ptune.plans.packed_attention import PackedGroup, Packing
from ptune.plans.passes import Run
from ptune.prompts.keys_and_values import new_cache, padded, read_cache, stacked


def read_packed(
    run: Run, contexts: Sequence[Sequence[int]], pasts: Sequence[Tensor], device: torch.device, *, predict: bool
) -> tuple[Tensor, list[Tensor]]:
    """Read contexts as one sequence.

    Args:
        run: one forward pass of the model.
        contexts: ids of each, at least one.
        pasts: keys and values of what stands before each, ``[2 L, K, F, D]``; none where nothing does.
        device: of the model.
        predict: whether logits are wanted.

    Returns:
        The logits behind each, ``[B, V]``, or ``[0, V]``; and its keys and values, ``[2 L, K, T, D]``.
    """
    lengths = tuple(map(len, contexts))
    ends = list(itertools.accumulate(lengths))
    ids = torch.tensor([[token for context in contexts for token in context]], device=device)  # [1, R]
    positions = torch.zeros_like(ids, dtype=torch.bool)
    positions[0, [end - 1 for end in ends]] = predict
    packing = Packing((PackedGroup(0, lengths),), device, tuple(pasts))
    with torch.no_grad():
        logits, cache = run(ids, torch.ones_like(ids), positions, keep=True, packing=packing)
    layers = read_cache(cache)
    return logits, [stacked(layers, 0, end - length, end) for length, end in zip(lengths, ends, strict=True)]


def read_padded(
    run: Run, contexts: Sequence[Sequence[int]], pasts: Sequence[Tensor], device: torch.device, *, predict: bool
) -> tuple[Tensor, list[Tensor]]:
    """Do as `read_packed` does, by a padded batch ``[B, T]``."""
    lengths = torch.tensor([len(context) for context in contexts])
    behind = torch.arange(int(lengths.max())) < lengths[:, None]  # [B, T]
    ids = torch.zeros_like(behind, dtype=torch.long)
    ids[behind] = torch.tensor([token for context in contexts for token in context])
    ids, mask = ids.to(device), behind.long().to(device)
    positions = torch.zeros_like(ids, dtype=torch.bool)
    positions[torch.arange(len(ids)), lengths - 1] = predict
    longest, past = 0, None
    if pasts:
        before = torch.tensor([part.shape[2] for part in pasts], device=device)
        longest = int(before.max())
        past = new_cache(padded(pasts, longest, pasts[0].dtype, device), len(ids))
        heard = torch.arange(longest, device=device) >= longest - before[:, None]  # [B, F], zeros stand in front
        mask = torch.cat([heard.long(), mask], dim=-1)
    with torch.no_grad():
        logits, cache = run(ids, mask, positions, past, keep=True)
    layers = read_cache(cache)
    return logits, [stacked(layers, row, longest, longest + len(context)) for row, context in enumerate(contexts)]
