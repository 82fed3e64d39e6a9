"""Entities written out as text, and read back: ``person: John Smith; place: Paris``, or ``none``.

What is read back is looked for in the record's text from left to right: each mention behind the one before it, else at
the first place that no other mention holds. Knows no records, tokenizers or models.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ptune.rendering.filling import joined
from ptune.tasks.spans import Span

_BEHIND_TYPE = ":"


@dataclass(frozen=True)
class Passage:
    """A text in which mentions may begin and end at some places only: those of its tokens, or anywhere.

    Attributes:
        text: the whole.
        starts: places at which a mention may begin.
        ends: places at which it may end, one for each start.
    """

    text: str
    starts: Sequence[int]
    ends: Sequence[int]

    @classmethod
    def of_tokens(cls, tokens: Sequence[str]) -> Passage:
        """Return tokens as a template shows them, one text."""
        text, starts, ends = "", [], []
        for token in tokens:
            text = joined([text, token]) if text else token
            starts.append(len(text) - len(token))
            ends.append(len(text))
        return cls(text, starts, ends)

    @classmethod
    def of_text(cls, text: str) -> Passage:
        """Return a text whose units are its characters."""
        return cls(text, range(len(text)), range(1, len(text) + 1))

    def mention(self, span: Span) -> str:
        """Return the text of a span of units."""
        return self.text[self.starts[span.start] : self.ends[span.end - 1]]

    def find(self, mention: str, begin: int) -> tuple[int, int] | None:
        """Return the units of a mention's first occurrence from unit ``begin`` on, start and end."""
        place = self.text.find(mention, self.starts[begin]) if begin < len(self.starts) else -1
        while place >= 0:
            start = bisect_left(self.starts, place)
            last = bisect_left(self.ends, place + len(mention))
            exact = start < len(self.starts) and last < len(self.ends) and self.starts[start] == place
            if exact and self.ends[last] == place + len(mention):
                return start, last + 1
            place = self.text.find(mention, place + 1)
        return None


@dataclass(frozen=True)
class ParsedEntities:
    """What was read out of an answer.

    Attributes:
        spans: of known types, found in the record, in order.
        unknown_types: mentions of a type that the task does not have.
        not_found: mentions that do not stand in the record.
        parses: whether the answer says ``none``, or mentions of known types and nothing else.
    """

    spans: tuple[Span, ...]
    unknown_types: int
    not_found: int
    parses: bool


@dataclass(frozen=True)
class EntityText:
    """How entities are written.

    Attributes:
        types: type -> the word that stands for it.
        separator: between two entities.
        none: where there are none.
    """

    types: Mapping[str, str]
    separator: str
    none: str

    def write(self, passage: Passage, spans: Sequence[Span]) -> str:
        """Return the canonical text of a record's spans, in their order."""
        entities = [f"{self.types[span.type]}{_BEHIND_TYPE} {passage.mention(span)}" for span in sorted(spans)]
        return self.separator.join(entities) or self.none

    def read(self, passage: Passage, text: str) -> ParsedEntities:
        """Return the spans that a text mentions."""
        if text.strip() == self.none:
            return ParsedEntities((), 0, 0, parses=True)
        mentions = self._mentions(passage, text)
        types = {word: kind for kind, word in self.types.items()}
        found: list[Span] = []
        unknown = missing = 0
        for word, mention in mentions:
            if word not in types:
                unknown += 1
                continue
            units = _place(passage, mention, found)
            if units is None:
                missing += 1
            else:
                found.append(Span(*units, types[word]))
        parses = bool(mentions) and not unknown and all(mention for _, mention in mentions)
        return ParsedEntities(tuple(sorted(set(found))), unknown, missing, parses)

    def _mentions(self, passage: Passage, text: str) -> list[tuple[str, str]]:
        """Return word and mention of each entity; one that holds the separator in the record too is not cut there."""
        mentions: list[tuple[str, str]] = []
        mark = self.separator.strip() or self.separator
        for piece in text.strip().split(mark):
            word, _, mention = (part.strip() for part in piece.partition(_BEHIND_TYPE))
            longer = f"{mentions[-1][1]}{mark}{piece.rstrip()}" if mentions else ""
            if word not in self.types.values() and longer and longer in passage.text:
                mentions[-1] = (mentions[-1][0], longer)
            elif piece.strip():
                mentions.append((word, mention))
        return mentions


def _place(passage: Passage, mention: str, found: Sequence[Span]) -> tuple[int, int] | None:
    """Return where a mention stands: behind the last one found, else where none is, else anywhere."""
    if not mention:
        return None
    units = passage.find(mention, found[-1].end if found else 0)
    begin = 0
    while units is None:
        other = passage.find(mention, begin)
        if other is None:
            return passage.find(mention, 0)
        if all(other[1] <= span.start or span.end <= other[0] for span in found):
            units = other
        begin = other[0] + 1
    return units
