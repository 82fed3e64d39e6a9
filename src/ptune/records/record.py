"""What a record is: the user's own mapping, where it stands, and what was said before it. Knows no files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ptune.records.conversations import Exchange


class Record(dict[str, Any]):
    """One example of the user's data, a mapping of field names to values.

    Attributes:
        location: where it stands, as in ``train.jsonl, line 12``; part of every error about it.
        history: of a conversation, what was said before the question that stands in the fields.
        open_question: whether the conversation ends with that question, and has no answer to it.
    """

    def __init__(self, values: Mapping[str, Any] | Iterable[tuple[str, Any]] = (), location: str = "a record") -> None:
        super().__init__(values)
        self.location = location
        self.history: tuple[Exchange, ...] = ()
        self.open_question = False
