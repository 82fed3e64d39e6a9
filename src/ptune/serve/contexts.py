"""How a request becomes the ids that the model reads: a text or a conversation, by a soft prompt's template or bare.

A text, and a conversation's last message, stand in the template's first field, that of a system message apart; other
fields come by name. Earlier turns stand before it as `ptune.rendering.renderer` has it in training. Knows no HTTP but
refusals.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from ptune.errors import DataError
from ptune.records.conversations import Exchange
from ptune.records.record import Record
from ptune.rendering.filling import check_field, check_fields
from ptune.rendering.renderer import Renderer
from ptune.serve.refusals import RefusedError
from ptune.template import SYSTEM

Message = tuple[str, str]
"""Role and text."""


class Reads(Protocol):
    """What is known of a backbone here, whether it is loaded or not."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""

    @property
    def context_limit(self) -> int | None:
        """Positions that it has; None for no limit."""


def record_of(renderer: Renderer, text: str, fields: Mapping[str, str]) -> dict[str, str]:
    """Return a record whose text is the template's first field, that of a system message apart.

    Raises:
        RefusedError: 400, a field that the template lacks, or the first one by name as well, or it has none for a text.
    """
    return {question_of(renderer.template.fields, fields): text, **fields}


def question_of(fields: Sequence[str], others: Collection[str]) -> str:
    """Return which of a template's fields a text stands for, when others are given by name.

    Raises:
        RefusedError: 400, as `check_fields` has it.
    """
    with _at_fault("fields" if others else "model"):
        return check_fields(fields, others)


def check_named(fields: Sequence[str], name: str) -> None:
    """See that a template has a field.

    Raises:
        RefusedError: 400, it has not; names those that it has.
    """
    with _at_fault("fields"):
        check_field(fields, name)


def with_system(fields: Sequence[str], given: Mapping[str, str], message: str | None) -> dict[str, str]:
    """Return the fields that a conversation gives by name, its system message among them.

    Args:
        fields: of the template.
        given: those that the request names.
        message: the system message; None where there is none.

    Raises:
        RefusedError: 400, the template has no place for a system message, or the request names its field as well.
    """
    if message is None:
        return dict(given)
    if SYSTEM not in fields:
        raise RefusedError(
            400,
            "the template of this soft prompt has no field system for a system message; write it into the user's",
            param="messages",
        )
    if SYSTEM in given:
        raise RefusedError(
            400, "the field system is the system message, which is given beside it; give one of the two", param="fields"
        )
    return {**given, SYSTEM: message}


@contextlib.contextmanager
def _at_fault(param: str) -> Iterator[None]:
    """Refuse a mistake in a request by the member of its body that is at fault."""
    try:
        yield
    except DataError as error:
        raise RefusedError(400, str(error), param=param) from error


def context_of(renderer: Renderer, record: Mapping[str, Any]) -> list[int]:
    """Return a record's ids before the answer, cut as the soft prompt's own ``max_length`` says.

    Raises:
        RefusedError: 400, the whole is beyond the backbone's limit, at which nothing is cut.
        DataError: the record lacks a field.
    """
    whole = dataclasses.replace(renderer, max_length=None, context_limit=None).context(record)
    check_length(whole, renderer.context_limit)
    words = len(whole) - renderer.template.num_virtual_tokens
    return whole if renderer.max_length is None or words <= renderer.max_length else renderer.context(record)


def check_length(context: Sequence[int], limit: int | None) -> None:
    """See that a context leaves room for an answer.

    Raises:
        RefusedError: 400, it does not.
    """
    if limit is not None and len(context) >= limit:
        raise RefusedError(
            400,
            f"the text has {len(context)} tokens with its surroundings, and this model takes {limit}, the answer's "
            "among them; shorten it",
            code="context_length_exceeded",
        )


def completion_context(backbone: Reads, renderer: Renderer | None, text: str, fields: Mapping[str, str]) -> list[int]:
    """Return the ids of a text to continue, by a soft prompt's rendering or, where there is none, by the bare model.

    Raises:
        RefusedError: 400, it is too long or, for the bare model, empty; or fields that are not the template's.
        DataError: a field of the template is missing.
    """
    if renderer is not None:
        return context_of(renderer, record_of(renderer, text, fields))
    if fields:
        raise RefusedError(400, "the bare model has no template, so no fields; leave them out", param="fields")
    context = list(backbone.tokenizer(text, verbose=False)["input_ids"])
    if not context:
        raise RefusedError(400, "the bare model continues a text, and this one is empty", param="prompt")
    check_length(context, backbone.context_limit)
    return context


def chat_context(
    backbone: Reads,
    renderer: Renderer | None,
    messages: Sequence[Message],
    fields: Mapping[str, str],
    new_tokens: int,
) -> list[int]:
    """Return the ids of a conversation, the oldest turns left out where there is no room.

    Raises:
        RefusedError: 400, the roles are not in turn, or the last message alone is too long, or the bare model has no
            chat template.
        DataError: a field of the template is missing.
    """
    if renderer is None:
        return _bare_chat(backbone, messages, fields)
    instructions, turns = _in_turn(messages)
    fields = with_system(renderer.template.fields, fields, instructions)
    asked = [record_of(renderer, text, fields) for text in turns[::2]]
    record = Record(asked[-1], "this conversation")
    record.history = tuple(Exchange(*pair) for pair in zip(asked, turns[1::2], strict=False))
    row = renderer.conversation(record, reserve=renderer.reserve_for(new_tokens))
    return context_of(renderer, asked[-1]) if row is None else list(row.ids)


def _in_turn(messages: Sequence[Message]) -> tuple[str | None, list[str]]:
    """Return the system message, and the texts of user and assistant in turn, the user's first and last."""
    system = messages[0][1] if messages[0][0] in ("system", "developer") else None
    turns = messages if system is None else messages[1:]
    expected = ["user", "assistant"] * len(turns)
    if len(turns) % 2 == 0 or any(role != wanted for (role, _), wanted in zip(turns, expected, strict=False)):
        found = ", ".join(role for role, _ in messages[:8])
        raise RefusedError(
            400,
            "messages are those of user and assistant in turn, the user's first and last, behind one system message "
            f"at most, and found {found}{', ...' if len(messages) > 8 else ''}",
            param="messages",
        )
    return system, [text for _, text in turns]


def _bare_chat(backbone: Reads, messages: Sequence[Message], fields: Mapping[str, str]) -> list[int]:
    if fields:
        raise RefusedError(400, "the bare model has no template, so no fields; leave them out", param="fields")
    tokenizer = backbone.tokenizer
    if not tokenizer.chat_template:
        raise RefusedError(
            400,
            "the bare model has no chat template, so it takes no messages; choose a soft prompt, or continue a text by "
            "/v1/completions",
            param="model",
        )
    given = [{"role": role, "content": text} for role, text in messages]
    try:
        text = str(tokenizer.apply_chat_template(given, add_generation_prompt=True, tokenize=False))
    except Exception as error:  # jinja's, or what the template itself raises for an order that it does not take
        raise RefusedError(
            400, "the model's chat template does not take these messages in this order", param="messages"
        ) from error
    context = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    check_length(context, backbone.context_limit)
    return context
