"""Forward passes over rows that stand one behind another in one sequence, and whether a model reads them right.

Knows nothing of how a plan is chosen. Shapes: B batch, T tokens, R tokens of packed rows, L layers, K key-value heads,
F tokens of a row's past, D width of a head, N chosen positions, H width, V rows of the backbone's input matrix.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ptune.plans.context_reading import read_packed
from ptune.plans.openings import Group
from ptune.plans.packed_attention import PackedGroup, Packing
from ptune.plans.passes import Run


def packed_rows(
    run: Run, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, groups: Sequence[Group]
) -> Tensor:
    """Run what the rows of each group open with, and behind it what follows in each row, as one sequence.

    Args:
        run: one forward pass of the model.
        input_ids: ``[B, T]`` int64.
        attention_mask: ``[B, T]`` int64.
        positions: ``[B, T]`` bool.
        groups: of the rows.

    Returns:
        Logits ``[N, V]`` or hidden states ``[N, H]``, as ``run`` gives them.
    """
    ids, chosen, packed = [], [], []
    for start, end, shared in groups:
        behind = torch.arange(input_ids.shape[1], device=input_ids.device) >= shared
        kept = attention_mask[start:end].bool() & behind  # [B, T]
        ids += [input_ids[start, :shared], input_ids[start:end][kept]]
        chosen += [torch.zeros_like(positions[start, :shared]), positions[start:end][kept]]
        packed.append(PackedGroup(shared, tuple(kept.sum(-1).tolist())))
    sequence = torch.cat(ids)[None]  # [1, R], prefixes included
    packing = Packing(tuple(packed), sequence.device)
    return run(sequence, torch.ones_like(sequence), torch.cat(chosen)[None], packing=packing)[0]


def packed_behind(
    run: Run, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, lengths: Tensor, pasts: Sequence[Tensor]
) -> Tensor:
    """Run what follows the first tokens of each row as one sequence, given their keys and values.

    Args:
        run: one forward pass of the model.
        input_ids: ``[B, T]`` int64.
        attention_mask: ``[B, T]`` int64.
        positions: ``[B, T]`` bool.
        lengths: ``[B]`` int64, how many of each row are not run again.
        pasts: keys and values of those, each ``[2 L, K, F, D]``.

    Returns:
        Logits ``[N, V]`` or hidden states ``[N, H]``, as ``run`` gives them.
    """
    kept = attention_mask.bool() & (torch.arange(input_ids.shape[1], device=lengths.device) >= lengths[:, None])
    ids = input_ids[kept][None]  # [1, R]
    packing = Packing((PackedGroup(0, tuple(kept.sum(-1).tolist())),), ids.device, tuple(pasts))
    return run(ids, torch.ones_like(ids), positions[kept][None], packing=packing)[0]


@torch.no_grad()
def reads_packed_rows(run: Run, vocabulary_size: int, device: torch.device) -> bool:
    """Whether packed rows give the model's own numbers, tried on a few tokens.

    Args:
        run: one forward pass of the model.
        vocabulary_size: V.
        device: of the model.
    """
    if device.type != "cpu":  # elsewhere a padded batch may well be cheaper than many rows one by one
        return False
    words = torch.arange(12, device=device).remainder(vocabulary_size)
    ids = torch.stack([words, words.roll(3)])
    ids[1, :4] = words[:4]
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    positions = mask.bool()
    positions[:, :4] = False
    with contextlib.suppress(TypeError):  # of layers that do not hand on where rows begin
        plain = run(ids, mask, positions)[0]
        packed = packed_rows(run, ids, mask, positions, (Group(0, 2, 4),))
        _, pasts = read_packed(run, ids[:, :4].tolist(), (), ids.device, predict=False)
        behind = packed_behind(run, ids, mask, positions, torch.full_like(ids[:, 0], 4), pasts)
        limit = (1e-3 if plain.dtype.itemsize >= 4 else 5e-2) * float(plain.abs().max())
        return all(float((one - plain).abs().max()) <= limit for one in (packed, behind))
    return False
