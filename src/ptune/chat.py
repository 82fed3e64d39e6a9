"""A conversation with a soft prompt, or with the bare model: history is kept, and cut at the context limit.

Knows an engine; reads and prints nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ptune.engine import Engine
from ptune.generation import Generated, GenerationOptions, generate

_BETWEEN_TURNS = "\n\n"


class Chat:
    """Turns of question and answer, each rendered by the prompt's template.

    The oldest turn that still fits carries the virtual tokens; later ones follow as plain text, as in the template.
    """

    def __init__(self, engine: Engine, name: str, options: GenerationOptions, *, with_prompt: bool = True) -> None:
        """Begin an empty conversation with the soft prompt ``name`` of ``engine``."""
        self._engine, self._options, self._with_prompt = engine, options, with_prompt
        self._renderer = engine.prompts[name].task.renderer
        if not with_prompt:
            self._renderer = self._renderer.without_virtual_tokens()
        self._turns: list[
            tuple[list[int], list[int]]
        ] = []  # ids of each question with its surroundings, and of its answer

    def say(self, record: Mapping[str, Any], on_text: Callable[[str], None] | None = None) -> Generated:
        """Answer one more question, given as the template's fields, with what was said before in view.

        Raises:
            BackboneError: the question alone leaves no room for an answer.
        """
        backbone = self._engine.backbone
        question = self._renderer.question(record, self._options.max_new_tokens)
        while True:
            context = self._history() + (self._without_virtual(question) if self._turns else question)
            room = (
                backbone.context_limit or len(context) + self._options.max_new_tokens
            ) - self._options.max_new_tokens
            if len(context) <= room or not self._turns:
                break
            self._turns.pop(0)
        listener = (lambda _index, text: on_text(text)) if on_text else None
        answer = generate(backbone, [context], self._options, on_text=listener)[0]
        self._turns.append((question, list(answer.ids)))
        return answer

    def _history(self) -> list[int]:
        tokenizer = self._engine.backbone.tokenizer
        between = tokenizer(_BETWEEN_TURNS, add_special_tokens=False)["input_ids"]
        ids: list[int] = []
        for number, (question, answer) in enumerate(self._turns):
            ids += (self._without_virtual(question) if number else question) + answer + between
        return ids

    def _without_virtual(self, ids: list[int]) -> list[int]:
        tokenizer = self._engine.backbone.tokenizer
        return [i for i in ids if i < self._engine.backbone.vocabulary_size and i != tokenizer.bos_token_id]
