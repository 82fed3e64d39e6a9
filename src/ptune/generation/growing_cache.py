"""The cache of texts that are being written: rows of any lengths that grow by a token a pass, join, and leave.

Each row's tokens stand from the first column on, whatever its neighbours' lengths, and the mask says where they end; so
a row that joins or leaves moves no other. transformers' own dynamic cache has one length for all rows, and copies all
keys and values at each token; here a token is written into its place.

Knows nothing of models. Shapes: B rows, K key-value heads, T tokens of a row, w columns in use, D width of a head,
L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

_COLUMNS = 64
"""By how many columns the room for rows grows, so that they are copied once in so many tokens."""


class GrowingCache:
    """Keys and values of rows that grow, each at its own end.

    Attributes:
        past: what a forward pass over one more token of each row takes; it adds that token.
        lengths: tokens of each row.
    """

    def __init__(self) -> None:
        self.past = Cache(layers=[])
        self.lengths: list[int] = []
        self._halves: Tensor | None = None  # [2 L, rows, K, columns, D], with room to spare
        self._places: tuple[Tensor, Tensor] | None = None  # each row's number and the column of its next token, [B]

    @property
    def width(self) -> int:
        """w, the token of the next pass counted."""
        return max(self.lengths) + 1

    def join(self, rows: Sequence[Sequence[Tensor]]) -> None:
        """Take more rows, behind those that are there.

        Args:
            rows: parts of each, ``[2 L, K, T, D]``, one behind another.
        """
        lengths = [sum(part.shape[2] for part in parts) for parts in rows]
        self._make_room(rows[0][0], len(self.lengths) + len(rows), max([*self.lengths, *lengths]) + 1)
        assert self._halves is not None
        for row, parts in enumerate(rows, len(self.lengths)):
            start = 0
            for part in parts:
                self._halves[:, row, :, start : start + part.shape[2]] = part
                start += part.shape[2]
        self.lengths += lengths

    def leave(self, row: int) -> None:
        """Let a row go; the last one takes its number."""
        length = self.lengths.pop()
        if row < len(self.lengths):
            assert self._halves is not None
            self._halves[:, row, :, :length] = self._halves[:, len(self.lengths), :, :length]
            self.lengths[row] = length
        if not self.lengths:
            self._halves = None

    def next_mask(self) -> Tensor:
        """Make room for a token of each row, and return what these then see, ``[B, w]`` int64."""
        assert self._halves is not None
        self._make_room(self._halves[:, 0], len(self.lengths), self.width)
        ends = torch.tensor(self.lengths, device=self._halves.device)
        self._places = torch.arange(len(ends), device=ends.device), ends
        return (torch.arange(self.width, device=ends.device) <= ends[:, None]).long()

    def grew(self) -> None:
        """Count the token that a pass has added to each row."""
        self.lengths = [length + 1 for length in self.lengths]

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write the next token of each row ``[B, K, 1, D]``, and return all of a layer, ``[B, K, w, D]``."""
        assert self._halves is not None
        assert self._places is not None
        rows, columns = self._places
        whole = [half[: len(rows), :, : self.width] for half in self._halves[2 * layer : 2 * layer + 2]]
        for half, new in zip(whole, (keys, values), strict=True):
            half[rows, :, columns] = new[:, :, 0]
        return whole[0], whole[1]

    def _make_room(self, like: Tensor, rows: int, columns: int) -> None:
        """Have room for so many rows and columns, for keys and values like ``[2 L, K, T, D]``."""
        old = self._halves
        if old is not None and rows <= old.shape[1] and columns <= old.shape[3]:
            return
        halves, heads, _, width = like.shape
        # Zeros, for what is hidden is multiplied by nought, and that must not be a stray infinity.
        new = like.new_zeros(halves, rows, heads, -(-columns // _COLUMNS) * _COLUMNS, width)
        if old is not None:
            count, used = len(self.lengths), max(self.lengths)
            new[:, :count, :, :used] = old[:, :count, :, :used]
        self._halves = new
        self.past = Cache(layers=[_Layer(self, layer) for layer in range(halves // 2)])


class _Layer(CacheLayerMixin):
    """One layer of a growing cache, as transformers asks for it."""

    is_sliding = False

    def __init__(self, cache: GrowingCache, layer: int) -> None:
        super().__init__()
        self._cache, self._layer = cache, layer
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: it holds keys and values from the first."""

    def update(self, key_states: Tensor, value_states: Tensor, *_unread: Any, **_named: Any) -> tuple[Tensor, Tensor]:
        """Write the next token of each row, and return all."""
        return self._cache.write(self._layer, key_states, value_states)

    def get_mask_sizes(self, _queries: Any) -> tuple[int, int]:
        """Return how many columns are seen, and the first of them."""
        return self._cache.width, 0

    def get_seq_length(self) -> int:
        """Return in which column the next token of the longest row stands."""
        return self._cache.width - 1

    def get_max_length(self) -> int:
        """Return that there is no limit."""
        return -1

    get_max_cache_shape = get_max_length  # as transformers called it before
