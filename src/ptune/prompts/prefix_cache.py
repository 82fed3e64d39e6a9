"""Keys and values of the virtual tokens that open a row, kept from call to call.

What stands in front of everything sees nothing else, so its keys and values are the same whatever text follows. They
are found by ids, which are never given twice, and are good only for the rows that the ids meant when they were made.

Knows nothing of models or tables. Shapes: L layers, K key-value heads, P virtual tokens, D width of a head.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable

from torch import Tensor

DEFAULT_BUDGET = 1_000_000_000
"""Bytes that are kept unless somebody says otherwise."""


class PrefixCache:
    """Keeps what fits into a budget; what was unused for longest goes first.

    Attributes:
        bytes: that are kept now.
    """

    def __init__(self, budget: int = DEFAULT_BUDGET) -> None:
        """Make an empty cache.

        Args:
            budget: bytes that may be kept; 0 keeps nothing.
        """
        self._budget = budget
        self._kept: OrderedDict[tuple[int, ...], tuple[Hashable, Tensor]] = OrderedDict()
        self._lock = threading.Lock()
        self.bytes = 0

    @property
    def budget(self) -> int:
        """Bytes that may be kept."""
        return self._budget

    @budget.setter
    def budget(self, value: int) -> None:
        with self._lock:
            self._budget = value
            self._shrink()

    def get(self, ids: tuple[int, ...], meaning: Hashable) -> Tensor | None:
        """Return the keys and values of ids, ``[2 L, K, P, D]``; None unless they were made of this very meaning."""
        with self._lock:
            found = self._kept.get(ids)
            if found is None or found[0] != meaning:
                return None
            self._kept.move_to_end(ids)
            return found[1]

    def put(self, ids: tuple[int, ...], meaning: Hashable, past: Tensor) -> None:
        """Keep keys and values ``[2 L, K, P, D]`` of what ids mean, in place of what they meant before."""
        with self._lock:
            self._drop(ids)
            self._kept[ids] = (meaning, past)
            self.bytes += past.nbytes
            self._shrink()

    def forget(self, first: int, end: int) -> None:
        """Free what opens with an id from ``first`` to below ``end``: it will not be asked for again."""
        with self._lock:
            for ids in [ids for ids in self._kept if first <= ids[0] < end]:
                self._drop(ids)

    def __len__(self) -> int:
        return len(self._kept)

    def _drop(self, ids: tuple[int, ...]) -> None:
        if ids in self._kept:
            self.bytes -= self._kept.pop(ids)[1].nbytes

    def _shrink(self) -> None:
        while self.bytes > self._budget:
            self._drop(next(iter(self._kept)))
