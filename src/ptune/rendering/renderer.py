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
``overlong``: ``cut`` (its end goes, and with it the end token), ``drop`` (no row) or ``error``. A template whose own
words leave no room for any answer is an error under all three.

**Conversations.** A record may have a ``history``, exchanges that were said before. The first exchange is rendered by
the template, virtual tokens and all, and every further one by what `Further` says, so that the ids before each answer
are those at which it is generated. Answers to learn are supervised. What is too long loses its oldest exchanges first;
a system message stays, being a field; and where nothing but the last question fits, it is a record like any other.

**Training and generation.** Generation does not know how long the answer will be, so `Renderer.context` takes how many
tokens to reserve. For every row, ``row.ids == context(record, reserve=n) + answer``, where n is how many tokens of the
answer the row holds; while nothing needs cutting every reserve gives the same context, the default of none included.

Knows no models and no training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ptune.config.run import Overlong
from ptune.errors import DataError, TemplateError
from ptune.families import CAUSAL, ENCODER_DECODER, MASKED, Kind
from ptune.records.conversations import Exchange
from ptune.rendering.batch import IGNORED, Row
from ptune.rendering.filling import field_text, filled, lacking, location
from ptune.rendering.further import Further, conversation_row
from ptune.rendering.tokenised import tokenised_lists
from ptune.template import Answer, Bos, Field, Optional, Piece, Template, Text, Virtual


@dataclass(frozen=True)
class _Words:
    """Words and fields that become one string and are tokenised together."""

    pieces: tuple[Text | Field | Optional, ...]


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
        kind: of the model that will read: where its tokenizer's own tokens stand, and where an answer may.
        deep: virtual tokens that open the template stand before the tokenizer's own first token, whatever the kind.
        pieces: the template's, with [bos] where the tokenizer's own first tokens stand.
        opening: their ids.
        further: how a conversation goes on behind an answer.

    Raises:
        TemplateError: the template names [bos] and the tokenizer has no such token, or more follows the answer and
            the model reads from left to right.
    """

    template: Template
    tokenizer: PreTrainedTokenizerBase
    vocabulary_size: int
    first_virtual_id: int | None = None
    max_length: int | None = None
    context_limit: int | None = None
    overlong: Overlong = "error"
    kind: Kind = CAUSAL
    deep: bool = False
    pieces: tuple[Piece, ...] = dataclasses.field(init=False, repr=False)
    opening: tuple[int, ...] = dataclasses.field(init=False, repr=False)
    further: Further = dataclasses.field(init=False, repr=False)
    _stretches: tuple[tuple[int, ...] | _Words | Answer, ...] = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.template.has_answer and not (self.kind.answers_anywhere or self.template.ends_with_answer):
            raise TemplateError(
                f"{{answer}} ends a template, for {self.kind.words} reads from left to right, and more follows in "
                f"{self.template.source!r}"
            )
        plain = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        special = self.tokenizer("a")["input_ids"]
        start = next((n for n in range(len(special)) if special[n : n + len(plain)] == plain), 0)
        opening = tuple(special[:start])  # what the tokenizer itself puts first: bos, [CLS]
        closing = tuple(special[start + len(plain) :]) if self.kind.closes else ()  # and last: [SEP], T5's </s>
        pieces = list(self.template.pieces)
        if Bos() in pieces:
            if not opening and self.tokenizer.bos_token_id is None:
                raise TemplateError("the template names [bos], and this tokenizer has no such token; leave it out")
            opening = opening or (self.tokenizer.bos_token_id,)
        elif opening:
            behind = 0
            while (self.deep or not self.kind.bos_first) and isinstance(pieces[behind], Virtual):
                behind += 1
            pieces.insert(behind, Bos())
        object.__setattr__(self, "pieces", tuple(pieces))
        object.__setattr__(self, "opening", opening)
        object.__setattr__(self, "further", Further.of(self.template, self.tokenizer))
        object.__setattr__(self, "_stretches", tuple(self._compiled(pieces, opening, closing)))

    @property
    def virtual_ids(self) -> range:
        """The ids of the template's virtual tokens."""
        first = self.vocabulary_size if self.first_virtual_id is None else self.first_virtual_id
        return range(first, first + self.template.num_virtual_tokens)

    def _compiled(
        self, pieces: Sequence[Piece], opening: tuple[int, ...], closing: tuple[int, ...]
    ) -> Iterator[tuple[int, ...] | _Words | Answer]:
        """Turn what no record changes into ids, once and for all records."""
        virtual = self.virtual_ids.start
        words: list[Text | Field | Optional] = []
        for piece in [*pieces, None]:
            if isinstance(piece, Text | Field | Optional):
                words.append(piece)
                continue
            if all(isinstance(word, Text) for word in words):
                yield tuple(self._tokens(filled(words, {})))
            else:
                yield _Words(tuple(words))
            words = []
            if isinstance(piece, Virtual):
                yield tuple(range(virtual, virtual + piece.count))
                virtual += piece.count
            elif isinstance(piece, Bos):
                yield opening
            elif isinstance(piece, Answer):
                if self.template.ends_with_answer and self.kind is not MASKED:
                    yield closing  # the encoder's, whose text ends here
                yield piece
        if self.kind is MASKED:
            yield closing

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
        """Return the context: all ids before the answer, virtual tokens among them, with what fits of a conversation.

        Args:
            record: the fields that the template names; optional ones may be absent.
            reserve: tokens of the limit to keep free for the answer.

        Raises:
            DataError: the record lacks a field, or holds something in it that is no text; or it is a conversation,
                and the model reads single questions.
            TemplateError: the template's own words leave no room.
        """
        return list(self.context_row(record, reserve=reserve).ids)

    def context_row(self, record: Mapping[str, Any], *, reserve: int = 0) -> Row:
        """Return what `context` does, and raise what it does: as a row, which says how much was left out."""
        if (row := self.conversation(record, reserve=reserve)) is not None:
            return row
        values, cut = self._fit(self._values(record), reserve, record)
        return dataclasses.replace(self._row(values, (), cut=cut), left_out=len(getattr(record, "history", ())))

    def conversation(self, record: Mapping[str, Any], answer: Sequence[int] = (), *, reserve: int = 0) -> Row | None:
        """Return a record behind as much as fits of what was said before it; None where nothing before it does.

        Args:
            record: with a ``history``; without one nothing stands before it.
            answer: ids of its answer, whole.
            reserve: tokens of the limit to keep free.

        Raises:
            DataError: as `context`.
        """
        history: Sequence[Exchange] = getattr(record, "history", ())
        values = self._values(record)
        asked = [values | {name: field_text(said.fields, name) for name in said.fields} for said in history] + [values]
        end = self._tokens(self.further.end)
        answers = [*(self._tokens(said.answer) + end for said in history), answer]
        learnt = [*(said.learnt for said in history), True]
        further = [self._tokens(filled(self.further.words, each)) for each in asked[1:]]
        for start in range(len(history)):
            contexts = [self._ids(asked[start]), *further[start:]]
            row = conversation_row(contexts, answers[start:], learnt[start:], left_out=start)
            if self.limit is None or self._text_length(row.ids) + reserve <= self.limit:
                return row
        return None

    def question(self, record: Mapping[str, Any], max_new_tokens: int) -> list[int]:
        """Return the ids before an answer that is still to be written.

        ``max_length`` limits the text as in training. The backbone's own limit keeps room for ``max_new_tokens``, up to
        half of itself, so that a long record is cut rather than refused; an encoder-decoder's answer needs no room.

        Raises:
            DataError, TemplateError: as `context`.
        """
        return self.context(record, reserve=self.reserve_for(max_new_tokens))

    def reserve_for(self, max_new_tokens: int) -> int:
        """Return how many tokens of the limit `question` keeps free."""
        if self.context_limit is None or self.limit is None or self.kind is ENCODER_DECODER:
            return 0
        whole = self.context_limit - self.template.num_virtual_tokens
        room = min(max_new_tokens, (whole + 1) // 2)
        return max(0, self.limit - (whole - room))

    def answer_ids(self, answer: str, *, end: bool = True) -> list[int]:
        """Return the ids of an answer, blanks kept, with all that ends the last one unless ``end`` is False.

        Raises:
            TemplateError: an end token is asked for, and the tokenizer has none.
        """
        ids = self._tokens(answer)
        if self.kind is ENCODER_DECODER:
            ids = [*self.opening, *ids]  # BART's decoder writes <s> first, as its tokenizer has it
        if not end:
            return ids
        if self.tokenizer.eos_token_id is None:
            raise TemplateError(
                "an answer ends with the tokenizer's end token, and this tokenizer has none; "
                "set its eos_token, or choose a backbone that generates text"
            )
        ids += self._tokens(self.further.end)
        return ids if ids[-1:] == [self.tokenizer.eos_token_id] else [*ids, self.tokenizer.eos_token_id]

    def row(self, record: Mapping[str, Any], answer: str, *, end: bool = True) -> Row | None:
        """Return context and answer as one row, all answers in it supervised; None where `overlong` drops it.

        Raises:
            DataError, TemplateError: as `context`; or the answer is too long and `overlong` is ``error``.
        """
        answer_ids = self.answer_ids(answer, end=end)
        row = self.conversation(record, answer_ids)
        if row is None and (row := self.row_of_ids(record, answer_ids)) is not None:
            return dataclasses.replace(row, left_out=len(getattr(record, "history", ())))
        return row

    def row_of_ids(self, record: Mapping[str, Any], answer_ids: Sequence[int]) -> Row | None:
        """Return a record, without what was said before, and an answer that is ids already as one row.

        Raises:
            DataError, TemplateError: as `row`.
        """
        values = self._values(record)
        whole = self._ids(values)
        limit = self.limit
        if limit is None or self._text_length(whole) + len(answer_ids) <= limit:
            return self._row(values, answer_ids, cut=0)
        words = self._text_length(self._ids(dict.fromkeys(values, "")))  # the template's own, which cannot be cut
        room = max(min((limit + 1) // 2, limit - words), limit - self._text_length(whole))
        if room < 1:
            raise self._too_many_words(record, words, reserve=1)
        kept = answer_ids
        if len(answer_ids) > room:
            if self.overlong == "drop":
                return None
            if self.overlong == "error":
                raise self._too_long_answer(record, len(answer_ids), room)
            kept = answer_ids[:room]
        fitted, cut = self._fit(values, len(kept), record)
        return self._row(fitted, kept, cut=cut + len(answer_ids) - len(kept))

    def masked_row(self, record: Mapping[str, Any], count: int, *, reserve: int = 0) -> Row:
        """Return a record with ``count`` masks where the answer stands, `Row.read_at` telling where.

        Args:
            record: the fields that the template names; optional ones may be absent.
            count: masks, one for each token of the answer.
            reserve: tokens of the limit to keep free, ``count`` or more, so that records are cut alike for every count.

        Raises:
            DataError, TemplateError: as `context`.
        """
        values, cut = self._fit(self._values(record), max(reserve, count), record)
        row = self._row(values, [self.tokenizer.mask_token_id] * count, cut=cut)
        start = next(place for place, label in enumerate(row.labels) if label != IGNORED)
        return Row(row.ids, (IGNORED,) * len(row.ids), cut, read_at=range(start, start + count))

    def tokenised_row(self, record: Mapping[str, Any]) -> Row | None:
        """Return a row for a record that is tokenised already: virtual tokens in front of ``input_ids`` and ``labels``.

        No bos is added, for ``input_ids`` have their own. Too many of them follow `overlong` as an answer does.

        Raises:
            TemplateError: the template is not virtual tokens followed by the answer.
            DataError: as `tokenised_lists`, or there are too many ids.
        """
        if not all(isinstance(piece, Virtual | Answer) for piece in self.template.pieces):
            raise TemplateError("records that are tokenised already go with the template [P*10]{answer} and no other")
        ids, labels = tokenised_lists(record, self.vocabulary_size)
        room = len(ids) if self.limit is None else self.limit
        if len(ids) > room:
            if room < 1:
                raise self._too_many_words(record, 0, reserve=1)
            if self.overlong == "drop":
                return None
            if self.overlong == "error":
                raise self._too_long_answer(record, len(ids), room)
        labels_kept = (*[IGNORED] * len(self.virtual_ids), *labels[:room])
        return Row((*self.virtual_ids, *ids[:room]), labels_kept, cut=max(0, len(ids) - room))

    def _values(self, record: Mapping[str, Any]) -> dict[str, str]:
        history = getattr(record, "history", ())
        if history and self.kind is not CAUSAL:
            raise DataError(
                f"{location(record)} is a conversation of {len(history) + 1} questions, and {self.kind.words} answers "
                "single ones; keep one question and answer, or choose a model that reads from left to right"
            )
        values = {}
        optional = self.template.optional_fields
        for name in self.template.fields:
            if name not in record and name not in optional:
                raise lacking(record, name, f'lacks the field "{name}" that the template names')
            values[name] = field_text(record, name)
        return values

    def _ids(self, values: Mapping[str, str]) -> list[int]:
        return list(self._row(values, (), cut=0).ids)

    def _row(self, values: Mapping[str, str], answer: Sequence[int], *, cut: int) -> Row:
        ids: list[int] = []
        labels: list[int] = []
        for stretch in self._stretches:
            if isinstance(stretch, Answer):
                ids += answer
                labels += answer
                continue
            ids += self._tokens(filled(stretch.pieces, values)) if isinstance(stretch, _Words) else stretch
            labels += [IGNORED] * (len(ids) - len(labels))
        return Row(tuple(ids), tuple(labels), cut)

    def _tokens(self, text: str) -> list[int]:
        # Not verbose: the tokenizer would warn of a text too long for the model, which is cut right after.
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []

    def _text_length(self, ids: Sequence[int]) -> int:
        return len(ids) - self.template.num_virtual_tokens

    def _fit(self, values: Mapping[str, str], reserve: int, record: Mapping[str, Any]) -> tuple[Mapping[str, str], int]:
        """Return the fields' texts, the longest cut until all leave ``reserve`` tokens of the limit, and tokens cut."""
        whole = length = 0 if self.limit is None else self._text_length(self._ids(values))
        if self.limit is None or whole <= self.limit - reserve:
            return values, 0
        shortened, room = dict(values), self.limit - reserve
        for name in sorted(values, key=lambda name: -len(self._tokens(values[name]))):
            low, high = 0, len(values[name])  # the most characters of this field that fit
            while low < high:
                middle = (low + high + 1) // 2
                shortened[name] = values[name][:middle].rstrip()
                low, high = (middle, high) if self._text_length(self._ids(shortened)) <= room else (low, middle - 1)
            shortened[name] = values[name][:low].rstrip()
            if (length := self._text_length(self._ids(shortened))) <= room:
                return shortened, whole - length
        raise self._too_many_words(record, length, reserve)

    def _too_long_answer(self, record: Mapping[str, Any], length: int, room: int) -> DataError:
        limit, mend = self._limit_in_words()
        return DataError(
            f"{location(record)}: its answer has {length} tokens, and of {limit} only {room} are left for it; "
            f"shorten it, {mend}, or set overlong to cut or drop"
        )

    def _too_many_words(self, record: Mapping[str, Any], words: int, reserve: int) -> TemplateError:
        answer = f", the answer needs {reserve}," if reserve else ""
        limit, mend = self._limit_in_words()
        return TemplateError(
            f"{location(record)}: the template's own words take {words} tokens{answer} and the limit is {limit}; "
            f"shorten the template or {mend}"
        )

    def _limit_in_words(self) -> tuple[str, str]:
        """Return the limit that binds and how to widen it."""
        if self.max_length is not None and self.max_length == self.limit:
            return f"max_length {self.max_length}", "raise max_length"
        virtual = self.template.num_virtual_tokens
        return f"the backbone's {self.context_limit} less {virtual} virtual tokens", "use fewer virtual tokens"
