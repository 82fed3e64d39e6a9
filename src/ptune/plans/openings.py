"""What the rows of a batch open with: virtual tokens that several share, text before the first virtual token, pads.

Knows ids and masks, and nothing of models or plans. Shapes: B batch, T tokens, V rows of the backbone's input matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Group(NamedTuple):
    """Consecutive rows of a batch, and how many tokens they open with run once for all of them.

    Attributes:
        start: the first row.
        end: the row behind the last.
        shared: tokens that are run once; 0 for none.
    """

    start: int
    end: int
    shared: int


def context_of(ids: Sequence[int], vocabulary_size: int) -> tuple[int, ...]:
    """Return a row's context as the frozen context plan has it: the text before its first virtual token.

    Not all ids before the answer, which rendering calls the context. Nothing where a row has no virtual token or opens
    with one.
    """
    first = next((place for place, token in enumerate(ids) if token >= vocabulary_size), 0)
    return tuple(ids[:first])


def shared_prefix_length(input_ids: Tensor, attention_mask: Tensor, vocabulary_size: int) -> int:
    """Return how many virtual tokens open every row alike, 0 where rows differ or begin with pads.

    Args:
        input_ids: ``[B, T]`` int64.
        attention_mask: ``[B, T]`` int64.
        vocabulary_size: V.
    """
    alike = (input_ids == input_ids[:1]).all(0) & (input_ids[0] >= vocabulary_size) & attention_mask.bool().all(0)
    return int(alike.int().cumprod(0).sum())


def prefix_groups(input_ids: Tensor, attention_mask: Tensor, positions: Tensor, vocabulary_size: int) -> list[Group]:
    """Return the batch as groups of consecutive rows that open with the same virtual token, or with none.

    The last of the virtual tokens that rows open with is not shared: it stays with its row, to predict text.

    Args:
        input_ids: ``[B, T]`` int64.
        attention_mask: ``[B, T]`` int64.
        positions: ``[B, T]`` bool, where logits are wanted; what stands there is not shared.
        vocabulary_size: V.
    """
    virtual = (input_ids[:, 0] >= vocabulary_size) & attention_mask[:, 0].bool()
    counts: list[int] = input_ids[:, 0].where(virtual, -1).unique_consecutive(return_counts=True)[1].tolist()
    groups, start = [], 0
    for count in counts:
        rows = slice(start, start + count)
        prefix = shared_prefix_length(input_ids[rows], attention_mask[rows], vocabulary_size)
        shares = count > 1 and prefix > 1 and not bool(positions[rows, : prefix - 1].any())
        groups.append(Group(start, start + count, prefix - 1 if shares else 0))
        start += count
    return groups


def contexts_in(input_ids: Tensor, lengths: Tensor) -> list[tuple[int, ...]]:
    """Return the first tokens of each row.

    Args:
        input_ids: ``[B, T]`` int64.
        lengths: ``[B]`` int64, how many of each.
    """
    return [tuple(row[:length]) for row, length in zip(input_ids.tolist(), lengths.tolist(), strict=True)]


def length_groups(lengths: Sequence[int], cost_of_a_pass: int) -> list[list[int]]:
    """Return the numbers of rows in groups of similar length, so that padding and passes together cost least.

    Args:
        lengths: of each row.
        cost_of_a_pass: in tokens, of each group.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    best: list[tuple[int, int]] = [(0, 0)]  # of the first k rows in order: least cost, where its last group begins
    for end in range(1, len(order) + 1):
        best.append(
            min(
                (best[start][0] + cost_of_a_pass + (end - start) * lengths[order[start]], start) for start in range(end)
            )
        )
    groups, end = [], len(order)
    while end:
        start = best[end][1]
        groups.append(sorted(order[start:end]))
        end = start
    return groups


def padding_share(attention_mask: Tensor) -> float:
    """Return which share of a mask ``[B, T]`` is padding; 0 where a row has no token at all."""
    lengths = attention_mask.bool().sum(-1)
    return 0.0 if int(lengths.min()) == 0 else 1 - float(lengths.float().mean()) / attention_mask.shape[1]


def context_lengths(input_ids: Tensor, attention_mask: Tensor, vocabulary_size: int) -> Tensor | None:
    """Return how many tokens stand before each row's first virtual token, ``[B]`` int64.

    None where a row has no virtual token, or begins with pads.

    Args:
        input_ids: ``[B, T]`` int64.
        attention_mask: ``[B, T]`` int64.
        vocabulary_size: V.
    """
    virtual = (input_ids >= vocabulary_size) & attention_mask.bool()
    if not bool(virtual.any(-1).all()) or not bool(attention_mask[:, 0].all()):
        return None
    return virtual.int().argmax(-1)
