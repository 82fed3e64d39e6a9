"""A conversation as records hold it, ShareGPT's turns or OpenAI's messages -> exchanges of question and answer.

Alpaca's ``history`` holds them as pairs already.

A conversation is one system message at most, and turns of user and assistant by turns, the user's first. One that ends
with a question has no answer to learn there; it is what a prediction answers. What an assistant says before anybody has
asked, a greeting, is left out. An answer of ``weight`` 0 is context for what follows and is not learnt, so behind the
last that is learnt nothing is kept. Everything else is refused: what a row of another order would teach is nothing that
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
TURNS = ("conversations", "messages")
"""Columns that hold a conversation."""


@dataclass(frozen=True)
class Exchange:
    """A question that was answered.

    Attributes:
        fields: of a template, with what was asked in them; the record's own hold for every other.
        answer: what was said to it.
        learnt: whether the answer is, or is context alone.
    """

    fields: Mapping[str, Any]
    answer: str
    learnt: bool = True


@dataclass(frozen=True)
class Conversation:
    """What was said, in order.

    Attributes:
        system: the system message; empty where there is none.
        questions: the user's turns, one at least.
        answers: the assistant's, as many or one fewer.
        learnt: whether each answer is.
    """

    system: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    learnt: tuple[bool, ...]


def read_conversation(turns: Any, column: str, location: str) -> Conversation | None:
    """Return the conversation in a record's column; None where the column holds no turns at all.

    Args:
        turns: what stands there: a list of objects with ``from`` and ``value``, or ``role`` and ``content``; an
            assistant's may have a ``weight`` of 0 or 1.
        column: its name, for messages.
        location: of the record, for messages.

    Raises:
        DataError: a turn is of an unknown role or weight, without text or out of turn, or nobody asks or answers, or
            no answer is learnt.
    """
    if not is_said(turns):
        return None
    said = [(turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))) for turn in turns]
    weights = [turn.get("weight") for turn in turns]
    greeting = next((number for number, (role, _) in enumerate(said) if role not in SYSTEMS), 0)
    if said and said[greeting][0] in ASSISTANTS:
        del said[greeting], weights[greeting]
    _check_turns(said, column, location)
    _check_weights(said, weights, column, location)
    system = said[0][1] if said and said[0][0] in SYSTEMS else None
    spoken = [text for _, text in (said if system is None else said[1:])]
    if len(spoken) < 2:
        found = ", ".join(role for role, _ in said) or "no turn"
        raise DataError(
            f"{location}: {column} has no answer: expected a user's turn and an assistant's behind it, and found "
            f"{found}; complete the record or remove it."
        )
    learnt = [weight != 0 for weight in weights[len(said) - len(spoken) :]][1::2]
    if len(spoken) % 2 == 0:
        if not any(learnt):
            raise DataError(
                f"{location}: {column} has nothing to learn: expected an assistant's turn of weight 1 and found 0 at "
                "each; give one a weight of 1, or remove the record."
            )
        while not learnt[-1]:
            del learnt[-1], spoken[-2:]
    return Conversation(system or "", tuple(spoken[::2]), tuple(spoken[1::2]), tuple(learnt))


def is_said(turns: Any) -> bool:
    """Whether a value is a list of turns, an empty one among them, and not of other objects."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return False
    return not turns or any(turn.get("from", turn.get("role")) is not None for turn in turns)


def read_history(pairs: Any, column: str, location: str) -> tuple[Exchange, ...]:
    """Return what was asked and answered before, from a list of questions with their answers.

    Args:
        pairs: what stands there: ``[question, answer]`` each; nothing, or a text, which is a field as any other, is
            none.
        column: its name, for messages.
        location: of the record, for messages.

    Raises:
        DataError: it is a list, and one of it is no such pair.
    """
    if not isinstance(pairs, list):
        return ()
    for number, pair in enumerate(pairs, 1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            found = f"{len(pair)} of them" if isinstance(pair, list) and len(pair) != 2 else _kinds(pair)
            raise DataError(
                f"{location}: {column}, item {number}: expected a question and its answer, two texts, and found "
                f"{found}; correct it, or rename the column if it is no conversation."
            )
    return tuple(Exchange({"instruction": question, "input": ""}, answer) for question, answer in pairs)


def _kinds(value: Any) -> str:
    return " and ".join(type(each).__name__ for each in value) if isinstance(value, list) else type(value).__name__


def _check_weights(said: Sequence[tuple[Any, Any]], weights: Sequence[Any], column: str, location: str) -> None:
    for number, ((role, _), weight) in enumerate(zip(said, weights, strict=True), 1):
        place = f"{location}: {column}, turn {number}"
        if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
            raise DataError(f"{place}: expected a weight of 0 or 1 and found {weight!r}; write one of them, or none.")
        if weight == 1 and role not in ASSISTANTS:
            raise DataError(
                f"{place}: expected a weight of 1 at an assistant's turn and found it at one of {role}, which is never "
                "learnt; remove it."
            )


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
