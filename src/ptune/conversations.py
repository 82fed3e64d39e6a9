"""A conversation as records hold it, ShareGPT's turns or OpenAI's messages -> exchanges of question and answer.

A conversation is one system message at most, and turns of user and assistant by turns, the user's first. One that ends
with a question has no answer to learn there; it is what a prediction answers. What an assistant says before anybody has
asked, a greeting, is left out. Everything else is refused: what a row of another order would teach is nothing that
generation ever asks.

Knows nothing of files, templates, tokenizers or models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptune.errors import DataError, did_you_mean

USERS = ("human", "user")
ASSISTANTS = ("gpt", "assistant")
SYSTEMS = ("system", "developer")


@dataclass(frozen=True)
class Exchange:
    """A question that was answered.

    Attributes:
        fields: of a template, with what was asked in them; the record's own hold for every other.
        answer: what was said to it.
    """

    fields: Mapping[str, Any]
    answer: str


@dataclass(frozen=True)
class Conversation:
    """What was said, in order.

    Attributes:
        system: the system message; empty where there is none.
        questions: the user's turns, one at least.
        answers: the assistant's, as many or one fewer.
    """

    system: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]


def read_conversation(turns: Any, column: str, location: str) -> Conversation | None:
    """Return the conversation in a record's column; None where the column holds no turns at all.

    Args:
        turns: what stands there: a list of objects with ``from`` and ``value``, or ``role`` and ``content``.
        column: its name, for messages.
        location: of the record, for messages.

    Raises:
        DataError: a turn is of an unknown role, without text or out of turn, or nobody asks or answers.
    """
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return None
    said = [(turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))) for turn in turns]
    if said and all(role is None for role, _ in said):
        return None  # objects, but no turns of a conversation
    greeting = next((number for number, (role, _) in enumerate(said) if role not in SYSTEMS), 0)
    if said and said[greeting][0] in ASSISTANTS:
        del said[greeting]
    _check_turns(said, column, location)
    system = said[0][1] if said and said[0][0] in SYSTEMS else None
    spoken = [text for _, text in (said if system is None else said[1:])]
    if len(spoken) < 2:
        found = ", ".join(role for role, _ in said) or "no turn"
        raise DataError(
            f"{location}: {column} has no answer: expected a user's turn and an assistant's behind it, and found "
            f"{found}; complete the record or remove it."
        )
    return Conversation(system or "", tuple(spoken[::2]), tuple(spoken[1::2]))


def _check_turns(said: Sequence[tuple[Any, Any]], column: str, location: str) -> None:
    expected, behind = USERS, "at the beginning"
    for number, (role, text) in enumerate(said, 1):
        place = f"{location}: {column}, turn {number}"
        known = [*USERS, *ASSISTANTS, *SYSTEMS]
        if role not in known:
            raise DataError(
                f"{place}: expected one of the roles {', '.join(known)} and found {role!r}; rename it, or remove the "
                f"record.{did_you_mean(str(role), known)}"
            )
        if not isinstance(text, str):
            raise DataError(
                f"{place}: expected text and found {type(text).__name__}; write what {role} says, or remove the record."
            )
        if role in SYSTEMS and number == 1:
            continue
        if role not in expected:
            mend = "join the two" if role in USERS else "move it to the front" if role in SYSTEMS else "remove it"
            raise DataError(
                f"{place}: expected a turn of {' or '.join(expected)} {behind} and found {role}; {mend}, or remove the "
                "record."
            )
        expected, behind = (ASSISTANTS, "behind a question") if role in USERS else (USERS, "behind an answer")
