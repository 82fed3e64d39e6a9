"""Which soft prompts stand in memory, within a budget of bytes: those unused for longest go first.

Knows names and sizes only, and nothing of soft prompts, tables or files.
"""

from __future__ import annotations

from collections import Counter, OrderedDict


class PromptMemory:
    """Keeps count of what is there and who uses it.

    Attributes:
        budget: bytes; what is in use stays even where it comes to more.
        bytes: of all that is there.
    """

    def __init__(self, budget: int) -> None:
        """Begin with nothing there.

        Args:
            budget: bytes that may stay when nobody uses them.
        """
        self.budget = budget
        self.bytes = 0
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._users: Counter[str] = Counter()

    def add(self, name: str, size: int) -> None:
        """Note that a soft prompt of so many bytes is there now."""
        self.remove(name)
        self._sizes[name] = size
        self.bytes += size

    def remove(self, name: str) -> None:
        """Note that it is there no longer, if it was; who still uses it is not counted here any more."""
        self.bytes -= self._sizes.pop(name, 0)
        self._users.pop(name, None)

    def hold(self, name: str) -> None:
        """Begin a use."""
        self._sizes.move_to_end(name)
        self._users[name] += 1

    def let_go(self, name: str) -> None:
        """End a use."""
        self._users[name] -= 1
        if self._users[name] <= 0:
            del self._users[name]

    def held(self, name: str) -> bool:
        """Whether somebody uses it."""
        return name in self._users

    def leaving(self) -> list[str]:
        """Return which to forget to come within the budget: of those that nobody uses, the ones unused for longest."""
        over, names = self.bytes - self.budget, []
        for name, size in self._sizes.items():
            if over <= 0:
                break
            if not self.held(name):
                names.append(name)
                over -= size
        return names

    def __contains__(self, name: str) -> bool:
        return name in self._sizes
