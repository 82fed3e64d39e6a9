"""A record to ids and labels, as a template says: the one rendering of training, evaluation, generation and serving.

Text between two runs of virtual tokens is filled in first and tokenised as one string; the answer is tokenised apart,
so that training's ids are always generation's ids plus the answer's. Virtual token k has the id
``first_virtual_id + k``.

**Blanks.** What a record puts in at one place, neighbouring fields and optional pieces taken together, loses the blanks
at its two ends; those between its fields stay, as in the well-known tutorial, and so do the template's own and those of
label words.

**Cutting.** ``max_length`` counts text tokens, the answer's among them; virtual tokens come on top, and the backbone's
own limit counts all. What is too long loses the end of its longest field first, then of the next. Room for an answer is
made in the same way, up to half of the limit; an answer longer than that and than what the context leaves follows
``overlong``: ``cut`` (its end goes, and with it the end token), ``drop`` (no row) or ``error``.

Knows no models and no training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from ptune.batch import IGNORED, Row
from ptune.config import label_text
from ptune.errors import DataError, TemplateError, did_you_mean
from ptune.template import Bos, Field, Optional, Piece, Template, Text, Virtual

Overlong = Literal["cut", "drop", "error"]
Kind = Literal["virtual", "special", "text", "answer"]


@dataclass(frozen=True)
class Segment:
    """A stretch of a rendered row for people to read."""

    kind: Kind
    text: str


@dataclass(frozen=True)
class Renderer:
    """A template bound to a tokenizer and to the ids of its virtual tokens.

    Attributes:
        template: where everything stands.
        tokenizer: the backbone's.
        vocabulary_size: V; ids from here on are virtual.
        first_virtual_id: of the template's first virtual token; V where absent.
        max_length: text tokens of a row, the answer's included; None for no limit.
        context_limit: positions of the backbone, virtual tokens included; None for no limit.
        overlong: what happens to an answer that is itself too long.
    """

    template: Template
    tokenizer: PreTrainedTokenizerBase
    vocabulary_size: int
    first_virtual_id: int = -1
    max_length: int | None = None
    context_limit: int | None = None
    overlong: Overlong = "error"
    _opening: tuple[int, ...] = dataclasses.field(init=False, repr=False)
    _pieces: tuple[Piece, ...] = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.first_virtual_id < 0:
            object.__setattr__(self, "first_virtual_id", self.vocabulary_size)
        plain = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        special = self.tokenizer("a")["input_ids"]
        start = next((n for n in range(len(special)) if special[n : n + len(plain)] == plain), 0)
        opening = tuple(special[:start])  # what the tokenizer itself puts first
        pieces = list(self.template.pieces)
        if Bos() in pieces:
            if self.tokenizer.bos_token_id is None:
                raise TemplateError("the template names [bos], and this tokenizer has no such token; leave it out")
            opening = (self.tokenizer.bos_token_id,)
        elif opening:
            pieces.insert(1 if self.template.opens_with_virtual_tokens else 0, Bos())
        object.__setattr__(self, "_opening", opening)
        object.__setattr__(self, "_pieces", tuple(pieces))

    def with_first_virtual_id(self, first_virtual_id: int) -> Renderer:
        """Return the same renderer with its virtual tokens at other ids."""
        return dataclasses.replace(self, first_virtual_id=first_virtual_id)

    def without_virtual_tokens(self) -> Renderer:
        """Return the renderer of the same words without virtual tokens: how the bare model is asked."""
        return dataclasses.replace(self, template=self.template.without_virtual_tokens())

    @property
    def limit(self) -> int | None:
        """Most text tokens that a row may have, by ``max_length`` and the backbone; None for no limit."""
        limits = [] if self.max_length is None else [self.max_length]
        if self.context_limit is not None:
            limits.append(self.context_limit - self.template.num_virtual_tokens)
        return min(limits, default=None)

    def context(self, record: Mapping[str, Any], *, reserve: int = 0) -> list[int]:
        """Return the ids before the answer.

        Args:
            record: the fields that the template names; optional ones may be absent.
            reserve: tokens of the limit to keep free for the answer.

        Raises:
            DataError: the record lacks a field, or holds something in it that is no text.
            TemplateError: the template's own words leave no room.
        """
        return self._fit(self._values(record), reserve, record)

    def answer_ids(self, answer: str, *, end: bool = True) -> list[int]:
        """Return the ids of an answer, blanks kept, with the end token unless ``end`` is False."""
        ids: list[int] = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        return [*ids, self.tokenizer.eos_token_id] if end else list(ids)

    def row(self, record: Mapping[str, Any], answer: str, *, end: bool = True) -> Row | None:
        """Return context and answer as one row, the answer supervised; None where `overlong` drops it.

        Raises:
            DataError: as `context`; or the answer is too long and `overlong` is ``error``.
            TemplateError: as `context`.
        """
        values = self._values(record)
        answer_ids = self.answer_ids(answer, end=end)
        whole = self._ids(values)
        limit = self.limit
        if limit is None or self._text_length(whole) + len(answer_ids) <= limit:
            return _row(whole, answer_ids, cut=0)
        words = self._text_length(self._ids(dict.fromkeys(values, "")))  # the template's own, which cannot be cut
        room = max(min(limit // 2, limit - words), limit - self._text_length(whole))
        kept = answer_ids
        if len(answer_ids) > room:
            if self.overlong == "drop":
                return None
            if self.overlong == "error":
                raise DataError(
                    f"{_location(record)}: its answer has {len(answer_ids)} tokens, and of max_length {limit} only "
                    f"{room} are left for it; raise max_length, or set overlong to cut or drop"
                )
            kept = answer_ids[:room]
        context = self._fit(values, len(kept), record)
        return _row(context, kept, cut=len(whole) + len(answer_ids) - len(context) - len(kept))

    def tokenised_row(self, record: Mapping[str, Any]) -> Row:
        """Return a row for a record that is tokenised already: virtual tokens in front of ``input_ids`` and ``labels``.

        Raises:
            TemplateError: the template is not virtual tokens followed by the answer.
            DataError: ``labels`` are missing or of another length.
        """
        if self.template.fields or not self.template.opens_with_virtual_tokens:
            raise TemplateError("records that are tokenised already go with the template [P*10]{answer} and no other")
        ids, labels = list(record["input_ids"]), record.get("labels")
        if labels is None or len(labels) != len(ids):
            raise DataError(f"{_location(record)}: input_ids and labels should be lists of one length")
        context = self._ids({})
        return Row((*context, *ids), (*[IGNORED] * len(context), *labels))

    def preview(self, record: Mapping[str, Any], answer: str) -> list[Segment]:
        """Return a record as it will be read by the model, decoded back, for people to look at.

        Raises:
            DataError, TemplateError: as `row`.
        """
        row = self.row(record, answer)
        if row is None:
            return []
        pairs = groupby(zip(row.ids, row.labels, strict=True), key=lambda pair: self._kind(*pair))
        return [Segment(kind, self._decode(kind, [token for token, _ in run])) for kind, run in pairs]

    def _kind(self, token: int, label: int) -> Kind:
        if token >= self.vocabulary_size:
            return "virtual"
        if token in self.tokenizer.all_special_ids:
            return "special"
        return "text" if label == IGNORED else "answer"

    def _decode(self, kind: Kind, ids: list[int]) -> str:
        if kind == "virtual":
            return "".join(f"[P{token - self.first_virtual_id}]" for token in ids)
        return str(self.tokenizer.decode(ids))

    def _values(self, record: Mapping[str, Any]) -> dict[str, str]:
        values = {}
        optional = self.template.optional_fields
        for name in self.template.fields:
            if name not in record and name not in optional:
                known = [str(key) for key in record]
                raise DataError(
                    f'{_location(record)} lacks the field "{name}" that the template names; it has {", ".join(known)}.'
                    f"{did_you_mean(name, known)}"
                )
            values[name] = _text(record, name)
        return values

    def _ids(self, values: Mapping[str, str]) -> list[int]:
        ids: list[int] = []
        text = ""
        virtual = self.first_virtual_id
        for from_record, group in groupby(self._pieces, key=lambda piece: isinstance(piece, Field | Optional)):
            if from_record:
                text += _filled(group, values)
                continue
            for piece in group:
                if isinstance(piece, Text):
                    text += piece.text
                    continue
                ids += self._tokens(text)
                text = ""
                if isinstance(piece, Virtual):
                    ids += range(virtual, virtual + piece.count)
                    virtual += piece.count
                elif isinstance(piece, Bos):
                    ids += self._opening
        return ids

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _text_length(self, ids: Sequence[int]) -> int:
        return len(ids) - self.template.num_virtual_tokens

    def _fit(self, values: Mapping[str, str], reserve: int, record: Mapping[str, Any]) -> list[int]:
        """Return the context's ids, with the longest fields cut until they leave ``reserve`` tokens of the limit."""
        ids = self._ids(values)
        if self.limit is None:
            return ids
        room = self.limit - reserve
        if self._text_length(ids) <= room:
            return ids
        shortened = dict(values)
        for name in sorted(values, key=lambda name: -len(self._tokens(values[name]))):
            low, high = 0, len(values[name])  # the most characters of this field that fit
            while low < high:
                middle = (low + high + 1) // 2
                shortened[name] = values[name][:middle].rstrip()
                low, high = (middle, high) if self._text_length(self._ids(shortened)) <= room else (low, middle - 1)
            shortened[name] = values[name][:low].rstrip()
            ids = self._ids(shortened)
            if self._text_length(ids) <= room:
                return ids
        raise TemplateError(
            f"{_location(record)}: the template's own words take {self._text_length(ids)} tokens, "
            f"and max_length leaves {max(room, 0)}; raise max_length or shorten the template"
        )


def _filled(pieces: Iterable[Piece], values: Mapping[str, str]) -> str:
    """Return what a record puts in at one place: neighbouring fields, and optional pieces whose fields are filled."""
    parts: list[Text | Field] = []
    for piece in pieces:
        if isinstance(piece, Field):
            parts.append(piece)
        elif isinstance(piece, Optional) and any(values[f.name].strip() for f in piece.pieces if isinstance(f, Field)):
            parts += piece.pieces
    texts = [part.text if isinstance(part, Text) else values[part.name] for part in parts]
    if parts and isinstance(parts[0], Field):
        texts[0] = texts[0].lstrip()
    if parts and isinstance(parts[-1], Field):
        texts[-1] = texts[-1].rstrip()
    return "".join(texts)


def _row(context: Sequence[int], answer: Sequence[int], *, cut: int) -> Row:
    return Row((*context, *answer), (*[IGNORED] * len(context), *answer), cut)


def _text(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if value is None:
        return ""
    if isinstance(value, (str, bool, int, float)):
        return label_text(value)
    raise DataError(
        f'{_location(record)}: the field "{name}" holds {type(value).__name__}, and a template takes text; '
        "name a field of text, or write the text into one"
    )


def _location(record: Mapping[str, Any]) -> str:
    return getattr(record, "location", "a record")
