"""Keys and values of contexts, kept by content: what is in it is right for the model that it was made with.

In memory first; where there is a store on disk, every context is written there too, and what memory has no room for is
read from there.

A context is the text before a row's first virtual token, not all ids before the answer, as it is in rendering.

Knows nothing of how they are made or used. Shapes: L layers, K key-value heads, F tokens of a context, D width of a
head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptune.plans.context_store import ContextStore


class ContextCache:
    """Keeps what fits into a budget, first come first kept.

    A run reads every context once an epoch, in another order each time. Throwing out the oldest for the newest would
    then throw out each context shortly before it is read again; what came first may as well stay.

    Attributes:
        bytes: that are kept in memory.
        full: whether no more is taken.
        wanted: how many contexts a run has, kept or not.
        wanted_tokens: in all of them.
        kept_tokens: in those that are kept.
    """

    def __init__(self, budget: int, store: ContextStore | None = None, dtype: torch.dtype | None = None) -> None:
        """Make an empty cache.

        Args:
            budget: bytes that may be kept in memory.
            store: the contexts on disk; None for none.
            dtype: in which keys and values are kept; None for their own.
        """
        self._budget, self._store, self._dtype = budget, store, dtype
        self._kept: dict[tuple[int, ...], Tensor] = {}
        self._stored: set[tuple[int, ...]] = set()
        self._memory_full = budget <= 0
        self.bytes = 0
        self.wanted = self.wanted_tokens = self.kept_tokens = 0

    @property
    def full(self) -> bool:
        """Whether neither memory nor disk takes more."""
        return self._memory_full and (self._store is None or self._store.full)

    def find(self, ids: tuple[int, ...]) -> bool:
        """Look on disk for a context that is not in memory, take it there if there is room; return whether it is kept.

        Args:
            ids: of the context.
        """
        if ids in self._kept:
            return True
        past = None if self._store is None else self._store.get(ids)
        if past is None:
            return False
        self._stored.add(ids)
        self._remember(ids, past)
        self.kept_tokens += len(ids)
        return True

    def put(self, ids: tuple[int, ...], past: Tensor) -> None:
        """Keep a context's keys and values, ``[2 L, K, F, D]``, unless the room is spent."""
        past = past if self._dtype is None else past.to(self._dtype)
        if self._store is not None and self._store.put(ids, past):
            self._stored.add(ids)
        self._remember(ids, past)
        self.kept_tokens += len(ids) if ids in self else 0

    def _remember(self, ids: tuple[int, ...], past: Tensor) -> None:
        size = past.numel() * past.element_size()
        if self._memory_full or self.bytes + size > self._budget:
            self._memory_full = True
            return
        self._kept[ids] = past
        self.bytes += size

    def get(self, ids: tuple[int, ...]) -> Tensor | None:
        """Return a context's keys and values, ``[2 L, K, F, D]``; None where they are not kept, or no longer."""
        past = self._kept.get(ids)
        if past is None and ids in self._stored and self._store is not None:
            past = self._store.get(ids)
            if past is None:  # another process has cleared the cache
                self._stored.discard(ids)
        return past

    def __contains__(self, ids: tuple[int, ...]) -> bool:
        return ids in self._kept or ids in self._stored

    def __len__(self) -> int:
        return len(self._kept.keys() | self._stored)
