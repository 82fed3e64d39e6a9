"""The soft prompts that stand in a backbone's table, each at ids of its own; those of a folder come on first use.

Knows nothing of what they are asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ptune.engine.prompt_memory import PromptMemory
from ptune.errors import SoftPromptError
from ptune.models.backbone import Backbone
from ptune.prompts.virtual_tokens import VirtualTokens
from ptune.soft_prompts.library import Library
from ptune.soft_prompts.soft_prompt import SoftPrompt
from ptune.tasks.registry import task_for
from ptune.tasks.task import Task
from ptune.template import Template


@dataclass(frozen=True, eq=False)
class LoadedPrompt:
    """A soft prompt in the engine's table: its name, what it is, its first id, and the task bound to that id."""

    name: str
    prompt: SoftPrompt
    first_virtual_id: int
    task: Task


class LoadedPrompts:
    """Soft prompts by name, under the table's lock.

    Attributes:
        by_name: prompts that requests can reach; one that was removed stays in the table while somebody uses it.
        memory: which loaded prompts came from the library, their bytes and their users.
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
        self._users: Counter[int] = Counter()  # how often one is held, by its first id

    def add(self, name: str, prompt: SoftPrompt) -> None:
        """Give a soft prompt its place in the table. One of the same name is replaced, at ids of its own.

        Raises:
            SoftPromptError: it belongs to another backbone.
            ConfigError, TemplateError: its task cannot be built.
        """
        with self._tokens.lock:
            prompt.check(self._backbone)
            first = self._tokens.allocate(len(prompt.rows))
            task = task_of_prompt(prompt, self._backbone, first)
            self._tokens.set_rows(first, prompt.rows.to(self._backbone.device), prompt.deep)
            self.remove(name)
            self.by_name[name] = LoadedPrompt(name, prompt, first, task)

    def remove(self, name: str) -> None:
        """Forget a soft prompt, if it is there; its rows go when nobody holds it, and its ids are never given again."""
        with self._tokens.lock:
            loaded = self.by_name.pop(name, None)
            self.memory.remove(name)
            if loaded is not None and loaded.first_virtual_id not in self._users:
                self._tokens.release(loaded.first_virtual_id)

    def clear(self) -> None:
        """Forget all of them, those that are held as well."""
        with self._tokens.lock:
            for first in self._users:
                self._tokens.release(first)
            self._users.clear()
            for name in list(self.by_name):
                self.remove(name)

    def hold(self, name: str) -> LoadedPrompt:
        """Return a soft prompt, loaded if it is not yet; its rows stay until each `hold` has had its `let_go`.

        Raises:
            SoftPromptError: there is none of that name, or its folder does not hold it any more; or None is asked for.
            ConfigError, TemplateError: its task cannot be built.
        """
        if name is None:  # as generate() calls the bare model
            raise SoftPromptError(
                "the bare model has no task to answer with; give the name of a soft prompt, or let the bare model "
                "continue a text by generate(None, text)"
            )
        with self._tokens.lock:
            if name not in self.by_name:
                prompt = SoftPrompt.load(self.library.find(name, self.by_name))
                self.add(name, prompt)
                self.memory.add(name, 2 * prompt.rows.nbytes)  # the table is a copy of what each soft prompt keeps
            if name in self.memory:
                self.memory.hold(name)
            loaded = self.by_name[name]
            self._users[loaded.first_virtual_id] += 1
            return loaded

    def let_go(self, loaded: LoadedPrompt) -> None:
        """End one use of a soft prompt, and forget those over the budget that nobody uses."""
        with self._tokens.lock:
            first = loaded.first_virtual_id
            self._users[first] -= 1
            if self._users[first] <= 0:
                del self._users[first]
            if self.by_name.get(loaded.name) is loaded:
                self.memory.let_go(loaded.name)
            elif first not in self._users:  # it was removed or replaced meanwhile
                self._tokens.release(first)
            for unused in self.memory.leaving():
                self.remove(unused)

    @contextmanager
    def using(self, *names: str) -> Iterator[list[LoadedPrompt]]:
        """Hold soft prompts, and the backbone, while the block runs.

        Raises:
            SoftPromptError: there is none of a name.
        """
        with self._tokens.lock:
            held: list[LoadedPrompt] = []
            try:
                for name in names:
                    held.append(self.hold(name))
                yield held
            finally:
                for loaded in held:
                    self.let_go(loaded)


def task_of_prompt(prompt: SoftPrompt, backbone: Backbone, first_virtual_id: int | None = None) -> Task:
    """Return the task of a soft prompt, bound to its template at an id.

    Args:
        prompt: a sound one of the backbone.
        backbone: that answers.
        first_virtual_id: where its virtual tokens stand in the table; V where absent.

    Raises:
        ConfigError, TemplateError: the task cannot be built, as of labels that the tokenizer makes equal.
    """
    return task_for(
        backbone,
        prompt.task,
        Template.parse(prompt.template),
        first_virtual_id=first_virtual_id,
        max_length=prompt.max_length,
        overlong=prompt.overlong,
        deep=prompt.deep is not None,
        head=prompt.head,
        temperature=prompt.temperature,
    )
