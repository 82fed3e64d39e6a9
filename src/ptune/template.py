r"""The grammar of templates: where virtual tokens, a record's fields and the answer stand.

    [P*10]        ten virtual tokens; [P] is one. Any number of runs, anywhere
    {field}       the field's text, stripped of surrounding blanks
    [?...{f}...]  a piece that disappears when its fields are empty
    {answer}      what is learnt: at the end, or for a masked model anywhere; a task that reads its words has none
    [bos]         the tokenizer's first token, where the template wants it elsewhere than is usual
    [next]        behind the answer: how a conversation goes on, from one answer to the next; see `Template.further`
    [[ ]] {{ }}   the brackets themselves
    \n \t \\      a new line, a tab and a backslash, so that a template fits on one line of YAML

As in ``[P*10]Human: {instruction}[?\n{input}]\n\nAssistant: {answer}``. Knows no tokenizer and no model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias
from unicodedata import east_asian_width

from ptune.errors import TemplateError

ANSWER = "answer"
SYSTEM = "system"
"""The field of a system message, which a conversation has once."""

_BETWEEN_EXCHANGES = "\n\n"

_TOKEN = re.compile(
    r"""
      (?P<escape>\[\[|\]\]|\{\{|\}\}|\\n|\\t|\\\\)
    | \[P(?:\*(?P<count>\d+))?\](?P<virtual>)
    | (?P<bos>\[bos\])
    | (?P<next>\[next\])
    | (?P<optional>\[\?)
    | \{(?P<field>[^{}\[\]\n]*)\}
    | (?P<close>\])
    | (?P<stray>[\[{}])
    | (?P<text>[^\[\]{}\\]+|\\)
    """,
    re.VERBOSE,
)
_ESCAPED = {"[[": "[", "]]": "]", "{{": "{", "}}": "}", r"\n": "\n", r"\t": "\t", "\\\\": "\\"}


@dataclass(frozen=True)
class Text:
    """Words that stand in the template themselves."""

    text: str


@dataclass(frozen=True)
class Field:
    """The place of a record's field."""

    name: str


@dataclass(frozen=True)
class Virtual:
    """A run of virtual tokens."""

    count: int


@dataclass(frozen=True)
class Optional:
    """Words and fields that disappear when the fields are empty."""

    pieces: tuple[Text | Field, ...]


@dataclass(frozen=True)
class Bos:
    """The tokenizer's first token."""


@dataclass(frozen=True)
class Answer:
    """The place of the answer."""


@dataclass(frozen=True)
class Next:
    """Where the form of all further exchanges of a conversation begins."""


Piece: TypeAlias = Text | Field | Virtual | Optional | Bos | Answer | Next


@dataclass(frozen=True)
class Template:
    """A parsed template; make it by `parse`.

    Attributes:
        source: as it was written.
        pieces: what it is made of, in order.
        following: what [next] says of further exchanges; nothing where the template does not.
    """

    source: str
    pieces: tuple[Piece, ...]
    following: tuple[Text | Field | Optional, ...] = ()

    @classmethod
    def parse(cls, source: str) -> Template:
        """Parse a template.

        Raises:
            TemplateError: something cannot be read, the answer is there twice, or [next] does not go on from it; names
                the place.
        """
        pieces = _Parser(source).pieces()
        following: list[Piece] | None = None
        if Next() in pieces:
            place = pieces.index(Next())
            pieces, following = pieces[:place], pieces[place + 1 :]
        answers = sum(isinstance(piece, Answer) for piece in pieces)
        if answers > 1:
            raise TemplateError(
                f"a template has one {{answer}}, and there are {answers} of them in {source!r}; put it at the end"
            )
        if sum(isinstance(piece, Bos) for piece in pieces) > 1:
            raise TemplateError(f"[bos] stands once in a template, and twice in {source!r}; leave one out")
        template = cls(source, tuple(pieces))
        return template if following is None else replace(template, following=template._checked(following))

    @property
    def num_virtual_tokens(self) -> int:
        """P, over all runs."""
        return sum(piece.count for piece in self.pieces if isinstance(piece, Virtual))

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields in their order, each once, without the answer."""
        return tuple(dict.fromkeys(field.name for field in self._all_fields(self.pieces)))

    @property
    def optional_fields(self) -> tuple[str, ...]:
        """Names of the fields that stand in optional pieces alone: a record may lack them."""
        needed = {piece.name for piece in self.pieces if isinstance(piece, Field)}
        return tuple(name for name in self.fields if name not in needed)

    @property
    def has_answer(self) -> bool:
        """Whether the answer has a place."""
        return Answer() in self.pieces

    @property
    def ends_with_answer(self) -> bool:
        """Whether nothing follows the answer: what a model that reads from left to right needs."""
        return bool(self.pieces) and isinstance(self.pieces[-1], Answer)

    def with_answer_for(self, field: str) -> Template:
        """Return the template whose answer stands where a field stood."""
        return Template(self.source, tuple(Answer() if piece == Field(field) else piece for piece in self.pieces))

    @property
    def question_field(self) -> str | None:
        """The field of what a user says: the first, that of a system message apart."""
        return next((name for name in self.fields if name != SYSTEM), None)

    @property
    def further(self) -> tuple[Text | Field | Optional, ...]:
        """What stands between an answer and the next one in a conversation.

        It is what [next] says; else an empty line and the template's own words again, without virtual tokens, and
        without what stands as far as its field ``system``, for both belong to the beginning of a conversation.
        """
        if self.following:
            return self.following
        words = [piece for piece in self.pieces if isinstance(piece, Text | Field | Optional)]
        for place in range(len(words) - 1, -1, -1):
            if any(field.name == SYSTEM for field in self._all_fields([words[place]])):
                words = words[place + 1 :]
                if words and isinstance(words[0], Text):
                    words[0] = Text(words[0].text.lstrip())
                break
        return (Text(_BETWEEN_EXCHANGES), *words)

    def without_virtual_tokens(self) -> Template:
        """Return the same words without virtual tokens: how the bare model would be asked."""
        words = "".join(written(p) for p in self.pieces if not isinstance(p, Virtual))
        further = "".join(map(written, (Next(), *self.following, Answer()))) if self.following else ""
        return Template.parse(words + further)

    def _checked(self, following: Sequence[Piece]) -> tuple[Text | Field | Optional, ...]:
        """Return the pieces behind [next], without the answer at their end.

        Raises:
            TemplateError: other than words and fields of the first exchange stand there, or the answer is not last.
        """
        words = tuple(piece for piece in following[:-1] if isinstance(piece, Text | Field | Optional))
        whole = bool(words) and len(words) == len(following) - 1 and isinstance(following[-1], Answer)
        if not (whole and self.ends_with_answer):
            raise TemplateError(
                "[next] stands right behind {answer}, and behind it words, fields and one more {answer}, no virtual "
                f"tokens; put them so in {self.source!r}"
            )
        unknown = [field.name for field in self._all_fields(words) if field.name not in self.fields]
        if unknown:
            raise TemplateError(
                f"behind [next] stands the field {unknown[0]}, which the first exchange does not have; name it there, "
                f"too, or leave it out of {self.source!r}"
            )
        return words

    @staticmethod
    def _all_fields(pieces: Sequence[Piece]) -> list[Field]:
        fields: list[Field] = []
        for piece in pieces:
            if isinstance(piece, Field):
                fields.append(piece)
            elif isinstance(piece, Optional):
                fields += [inner for inner in piece.pieces if isinstance(inner, Field)]
        return fields


def escape(text: str) -> str:
    """Return a template that renders to ``text`` itself."""
    return re.sub(r"[\[\]{}\\]", lambda match: match[0] * 2, text)


def written(piece: Piece) -> str:
    """Return a piece as a template has it: parsed again it is the same."""
    if isinstance(piece, Text):
        return escape(piece.text)
    if isinstance(piece, Field):
        return f"{{{piece.name}}}"
    if isinstance(piece, Optional):
        return f"[?{''.join(map(written, piece.pieces))}]"
    if isinstance(piece, Virtual):
        return f"[P*{piece.count}]"
    if isinstance(piece, Next):
        return "[next]"
    return "[bos]" if isinstance(piece, Bos) else f"{{{ANSWER}}}"


class _Parser:
    def __init__(self, source: str) -> None:
        self._source = source
        self._optional: list[Text | Field] | None = None
        self._optional_start = 0
        self._pieces: list[Piece] = []

    def pieces(self) -> list[Piece]:
        for match in _TOKEN.finditer(self._source):
            self._take(match)
        if self._optional is not None:
            self._fail(self._optional_start, "this [? is never closed; put ] where the optional piece ends")
        return self._pieces

    def _take(self, match: re.Match[str]) -> None:
        start, kind = match.start(), match.lastgroup
        if kind in ("text", "escape"):
            self._add_text(_ESCAPED.get(match[0], match[0]))
        elif kind == "field":
            self._add_field(start, match["field"].strip())
        elif kind == "close":
            self._close(start)
        elif kind == "stray":
            known = "[P*10], [bos], [next] or [?...{field}]" if match[0] == "[" else "a {field}"
            self._fail(start, f"this {match[0]} is no part of {known}; write {match[0] * 2} for the bracket itself")
        elif self._optional is not None:
            self._fail(start, f"{match[0]} cannot stand in an optional piece; only words and fields can")
        elif kind == "optional":
            self._optional, self._optional_start = [], start
        elif kind in ("bos", "next"):
            self._pieces.append(Bos() if kind == "bos" else Next())
        else:
            count = int(match["count"] or 1)
            if count == 0:
                self._fail(start, "a run of virtual tokens has at least one; write [P*1] or leave it out")
            self._pieces.append(Virtual(count))

    def _add_text(self, text: str) -> None:
        pieces: list[Piece] | list[Text | Field] = self._pieces if self._optional is None else self._optional
        if pieces and isinstance(pieces[-1], Text):
            text = pieces.pop().text + text  # type: ignore[union-attr]
        pieces.append(Text(text))

    def _add_field(self, start: int, name: str) -> None:
        if not name:
            self._fail(start, "this field has no name; write the record's field between the braces")
        if name != ANSWER:
            (self._pieces if self._optional is None else self._optional).append(Field(name))
        elif self._optional is None:
            self._pieces.append(Answer())
        else:
            self._fail(start, "{answer} cannot stand in an optional piece")

    def _close(self, start: int) -> None:
        if self._optional is None:
            self._fail(start, "a lone ] closes nothing; write ]] for the bracket itself")
        elif not any(isinstance(piece, Field) for piece in self._optional):
            self._fail(self._optional_start, "an optional piece needs a field, whose emptiness makes it disappear")
        else:
            self._pieces.append(Optional(tuple(self._optional)))
            self._optional = None

    def _fail(self, place: int, what: str) -> None:
        line = self._source.replace("\n", "↵").replace("\t", " ")
        before = sum(2 if east_asian_width(character) in "WF" else 1 for character in line[:place])  # terminal columns
        raise TemplateError(f"template, character {place + 1}: {what}\n  {line}\n  {' ' * before}^")
