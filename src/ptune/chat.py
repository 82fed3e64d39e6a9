"""A conversation with a soft prompt, or with the bare model: history is kept, and cut at the context limit.

Knows an engine; reads and prints nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from ptune.backbone import Backbone
from ptune.engine import Engine
from ptune.generation import Generated, GenerationOptions, generate

Turn: TypeAlias = tuple[Sequence[int], Sequence[int]]
"""Ids of a question with its surroundings, and of its answer."""

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
        self._turns: list[Turn] = []

    def say(self, record: Mapping[str, Any], on_text: Callable[[str], None] | None = None) -> Generated:
        """Answer one more question, given as the template's fields, with what was said before in view.

        Raises:
            BackboneError: the question alone leaves no room for an answer.
        """
        backbone = self._engine.backbone
        question = self._renderer.question(record, self._options.max_new_tokens)
        context, forgotten = conversation(backbone, self._turns, question, self._options.max_new_tokens)
        del self._turns[:forgotten]
        listener = (lambda _index, text: on_text(text)) if on_text else None
        answer = generate(backbone, [context], self._options, on_text=listener)[0]
        self._turns.append((question, list(answer.ids)))
        return answer


def conversation(
    backbone: Backbone, turns: Sequence[Turn], question: Sequence[int], new_tokens: int
) -> tuple[list[int], int]:
    """Return the ids of a conversation and of how many turns, the oldest, there was no room.

    Args:
        backbone: whose context limit counts.
        turns: what was said before, oldest first.
        question: ids of the new question with its surroundings.
        new_tokens: room to leave for its answer.
    """
    between = backbone.tokenizer(_BETWEEN_TURNS, add_special_tokens=False)["input_ids"]
    for forgotten in range(len(turns) + 1):
        context: list[int] = []
        for asked, answered in turns[forgotten:]:
            context += [*_behind(backbone, asked, context), *answered, *between]
        context += _behind(backbone, question, context)
        if backbone.context_limit is None or len(context) + new_tokens <= backbone.context_limit:
            break
    return context, forgotten


def _behind(backbone: Backbone, ids: Sequence[int], context: Sequence[int]) -> list[int]:
    """Return a question's ids as they stand behind others: without virtual tokens and bos."""
    if not context:
        return list(ids)
    return [i for i in ids if i < backbone.vocabulary_size and i != backbone.tokenizer.bos_token_id]
