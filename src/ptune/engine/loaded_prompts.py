"""The soft prompts that stand in a backbone's table, each at ids of its own; those of a folder come on first use.

Knows nothing of what they are asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ptune.engine.prompt_memory import PromptMemory
from ptune.models.backbone import Backbone
from ptune.prompts.virtual_tokens import VirtualTokens
from ptune.soft_prompts.library import Library
from ptune.soft_prompts.soft_prompt import SoftPrompt
from ptune.tasks import Task, task_for
from ptune.template import Template


@dataclass(frozen=True)
class LoadedPrompt:
    """A soft prompt in the engine's table: what it is, its first id, and the task bound to that id."""

    prompt: SoftPrompt
    first_virtual_id: int
    task: Task


class LoadedPrompts:
    """Soft prompts by name, under the table's lock.

    Attributes:
        by_name: those that stand in the table now.
        memory: which of the library's do, and who uses them.
        library: where others lie.
    """

    def __init__(self, backbone: Backbone, tokens: VirtualTokens, library: Library, memory: PromptMemory) -> None:
        """Begin with none.

        Args:
            backbone: that they belong to.
            tokens: its table.
            library: where they are looked for.
            memory: with room for those of the library.
        """
        self._backbone, self._tokens = backbone, tokens
        self.library, self.memory = library, memory
        self.by_name: dict[str, LoadedPrompt] = {}

    def add(self, name: str, prompt: SoftPrompt) -> None:
        """Give a soft prompt its place in the table. One of the same name is replaced, at ids of its own.

        Raises:
            SoftPromptError: it belongs to another backbone.
        """
        with self._tokens.lock:
            prompt.check(self._backbone)
            first = self._tokens.allocate(len(prompt.rows))
            self._tokens.set_rows(first, prompt.rows.to(self._backbone.device), prompt.deep)
            task = task_for(
                self._backbone,
                prompt.task,
                Template.parse(prompt.template),
                first_virtual_id=first,
                max_length=prompt.max_length,
                overlong=prompt.overlong,
                deep=prompt.deep is not None,
                head=prompt.head,
                temperature=prompt.temperature,
            )
            self.remove(name)
            self.by_name[name] = LoadedPrompt(prompt, first, task)

    def remove(self, name: str) -> None:
        """Forget a soft prompt, if it is there; its ids are never given again."""
        with self._tokens.lock:
            loaded = self.by_name.pop(name, None)
            self.memory.remove(name)
            if loaded is not None:
                self._tokens.release(loaded.first_virtual_id)

    def hold(self, name: str) -> LoadedPrompt:
        """Return a soft prompt, loaded where need be; it stays until it is let go as often as it was held.

        Raises:
            SoftPromptError: there is none of that name, or its folder does not hold it any more.
        """
        with self._tokens.lock:
            if name not in self.by_name:
                prompt = SoftPrompt.load(self.library.find(name, self.by_name))
                self.add(name, prompt)
                self.memory.add(name, 2 * prompt.rows.nbytes)  # the table is a copy of what each soft prompt keeps
            if name in self.memory:
                self.memory.hold(name)
            return self.by_name[name]

    def let_go(self, name: str) -> None:
        """End one use of a soft prompt, and forget those over the budget that nobody uses."""
        with self._tokens.lock:
            self.memory.let_go(name)
            for unused in self.memory.leaving():
                self.remove(unused)

    @contextmanager
    def using(self, *names: str) -> Iterator[list[LoadedPrompt]]:
        """Hold soft prompts, and the backbone, while the block runs.

        Raises:
            SoftPromptError: there is none of a name.
        """
        with self._tokens.lock:
            held: list[str] = []
            try:
                loaded = []
                for name in names:
                    loaded.append(self.hold(name))
                    held.append(name)
                yield loaded
            finally:
                for name in held:
                    self.let_go(name)
