"""Keys and values of the attention layers, in and out of transformers' cache: the one place that knows its classes.

Shapes: B batch, T tokens, P virtual tokens, L layers, K key-value heads, D width of a head, W = 2 L K D.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

LayerKeysAndValues = tuple[Tensor, Tensor]
"""Keys and values of one layer, each ``[B, K, T, D]``."""


@dataclass(frozen=True)
class KeyValueShape:
    """How a token's keys and values at all layers lie in one row of W numbers.

    Layer by layer, the keys before the values, head by head: PEFT's order as well.

    Attributes:
        layers: L.
        heads: K, key-value heads, which grouped-query attention has fewer of than heads.
        head_width: D.
    """

    layers: int
    heads: int
    head_width: int

    @property
    def row_width(self) -> int:
        """W: how many numbers one token has."""
        return 2 * self.layers * self.heads * self.head_width


def read_cache(cache: DynamicCache | None) -> list[LayerKeysAndValues]:
    """Return what a forward pass left in its cache, a pair ``[B, K, T, D]`` for each layer."""
    assert cache is not None
    pairs = []
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer)
        assert layer.keys is not None
        assert layer.values is not None
        pairs.append((layer.keys, layer.values))
    return pairs


def new_cache(layers: Sequence[LayerKeysAndValues], batch: int) -> DynamicCache:
    """Return a cache that holds keys and values as its past.

    Args:
        layers: a pair for each layer, ``[B, K, T, D]``, or ``[1, K, T, D]`` for a past that all rows share.
        batch: B. Rows that share a past share its gradient: it sums over them.
    """
    cache = DynamicCache()
    for number, (keys, values) in enumerate(layers):
        cache.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), number)
    return cache


def stacked(layers: Sequence[LayerKeysAndValues], row: int, start: int, end: int) -> Tensor:
    """Return one row's keys and values at places ``start`` to ``end`` as one tensor of its own, ``[2 L, K, T, D]``."""
    return torch.stack([half[row, :, start:end] for pair in layers for half in pair])


def padded(rows: Sequence[Tensor], length: int, dtype: torch.dtype, device: torch.device) -> list[LayerKeysAndValues]:
    """Return rows of differing T as one past ``[B, K, length, D]`` for each layer, with zeros in front.

    Args:
        rows: B of them, each ``[2 L, K, T, D]`` as `stacked` gives them.
        length: of the longest.
        dtype: of the result.
        device: of the result.
    """
    halves, heads, _, width = rows[0].shape
    past = torch.zeros(halves, len(rows), heads, length, width, dtype=dtype, device=device)
    for number, row in enumerate(rows):
        past[:, number, :, length - row.shape[2] :] = row
    return [(past[2 * layer], past[2 * layer + 1]) for layer in range(halves // 2)]


def rows_of(layers: Sequence[LayerKeysAndValues]) -> tuple[Tensor, KeyValueShape]:
    """Return the keys and values of a batch of one, a pair ``[1, K, P, D]`` for each layer, as rows ``[P, W]``."""
    past = stacked(layers, 0, 0, layers[0][0].shape[2])  # [2 L, K, P, D]
    halves, heads, count, width = past.shape
    return past.permute(2, 0, 1, 3).reshape(count, -1), KeyValueShape(halves // 2, heads, width)


def layers_of(rows: Tensor, shape: KeyValueShape) -> list[LayerKeysAndValues]:
    """Return rows ``[P, W]`` as a pair ``[1, K, P, D]`` for each layer, with their gradient."""
    past = rows.view(len(rows), 2 * shape.layers, shape.heads, shape.head_width)
    halves = past.permute(1, 2, 0, 3).unsqueeze(1)  # [2 L, 1, K, P, D]
    return [(halves[2 * layer], halves[2 * layer + 1]) for layer in range(shape.layers)]
