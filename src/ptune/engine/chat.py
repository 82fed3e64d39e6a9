"""A conversation with a soft prompt, or with the bare model: what was said is kept, and shown as in training.

Knows an engine; reads and prints nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ptune.engine.engine import Engine
from ptune.generation.generate import Generated, GenerationOptions
from ptune.records.conversations import Exchange
from ptune.records.record import Record


class Chat:
    """Turns of question and answer, rendered as `ptune.rendering.renderer` renders a record of a conversation.

    The oldest exchange that still fits carries the virtual tokens; later ones follow as the template says.
    """

    def __init__(self, engine: Engine, name: str, options: GenerationOptions, *, with_prompt: bool = True) -> None:
        """Begin an empty conversation with the soft prompt ``name`` of ``engine``, which stays there from now on."""
        self._engine, self._options = engine, options
        self._renderer = engine.hold(name).task.renderer
        if not with_prompt:
            self._renderer = self._renderer.without_virtual_tokens()
        self._said: tuple[Exchange, ...] = ()

    def say(self, record: Mapping[str, Any], on_text: Callable[[str], None] | None = None) -> Generated:
        """Answer one more question, given as the template's fields, with what was said before in view.

        Raises:
            BackboneError: the question alone leaves no room for an answer.
            DataError: it is not the first, and the model reads single questions.
        """
        asked = Record(record, "the question")
        asked.history = self._said
        context = self._renderer.question(asked, self._options.max_new_tokens)
        answer = self._engine.write(context, self._options, on_text=on_text)
        self._said = (*self._said, Exchange(dict(record), answer.text))
        return answer
