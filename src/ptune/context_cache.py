"""Keys and values of contexts, kept by content: what is in it is right for the model that it was made with.

Knows nothing of how they are made or used. Shapes: L layers, K key-value heads, F tokens of a context, D width of a
head.
"""

from __future__ import annotations

from torch import Tensor


class ContextCache:
    """Keeps what fits into a budget, first come first kept.

    A run reads every context once an epoch, in another order each time. Throwing out the oldest for the newest would
    then throw out each context shortly before it is read again; what came first may as well stay.
    """

    def __init__(self, budget: int) -> None:
        """Make an empty cache.

        Args:
            budget: bytes that may be kept.
        """
        self._budget = budget
        self._kept: dict[tuple[int, ...], Tensor] = {}
        self.bytes = 0
        self.full = budget <= 0

    def put(self, ids: tuple[int, ...], past: Tensor) -> None:
        """Keep a context's keys and values, ``[2 L, K, F, D]``, unless the budget is spent."""
        size = past.numel() * past.element_size()
        if self.full or self.bytes + size > self._budget:
            self.full = True
            return
        self._kept[ids] = past
        self.bytes += size

    def __contains__(self, ids: tuple[int, ...]) -> bool:
        return ids in self._kept

    def __getitem__(self, ids: tuple[int, ...]) -> Tensor:
        return self._kept[ids]

    def __len__(self) -> int:
        return len(self._kept)
