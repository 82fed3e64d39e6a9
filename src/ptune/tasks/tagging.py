"""Tagging: every word has a tag, read by a linear head at the word's first token; entities are runs of tags.

Deep prompts with such a head are P-tuning v2 for named entities (Liu et al. 2022). The words are given as a list, and
the template has a field for it; see `ptune.rendering.words` for how they become tokens. A word that is cut away, or
tokenises to nothing, counts as O, and is counted.

Shapes: N words read, C tags, H width of hidden states.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ptune.config.settings import label_text
from ptune.config.task import TAG, TaggingConfig, scheme_mistake
from ptune.errors import ConfigError, DataError, MissingExtraError, TemplateError, did_you_mean
from ptune.families import ENCODER_DECODER, MASKED
from ptune.models.backbone import Backbone
from ptune.rendering.batch import IGNORED, Row
from ptune.rendering.filling import location
from ptune.rendering.renderer import Renderer
from ptune.rendering.words import spelled_out, split_text, tokenised_words
from ptune.tasks.metrics import prediction_share
from ptune.tasks.reading import ReadingTask, in_batches
from ptune.tasks.spans import plain_tag, spans_of
from ptune.tasks.task import Asked, Example, answer_value
from ptune.template import Field, Virtual

_OUTSIDE = "O"


class Tagging(ReadingTask):
    """Every word of a record has a tag."""

    config: TaggingConfig
    reads_states = True
    answer_key = "tags"
    right_metric = "token_accuracy"

    def __init__(self, config: TaggingConfig, renderer: Renderer) -> None:
        """Bind the task to its tags.

        Raises:
            ConfigError: there are too few tags, or the model reads no words with the half that answers.
            TemplateError: a model that reads from left to right would not see what stands behind the words.
        """
        super().__init__(config, renderer)
        self.metric = config.metric
        self.numbers = {tag: number for number, tag in enumerate(config.tags)}
        if len(self.numbers) < 2:
            raise ConfigError(
                f"a tagging needs at least two tags, and has {', '.join(config.tags) or 'none'}; list them as "
                "task.tags, or check the training data's"
            )
        if renderer.kind is ENCODER_DECODER:
            raise ConfigError(
                f"{renderer.kind.words} reads words with one half and answers with the other, so it cannot tag them; "
                "choose a masked or a causal model"
            )
        pieces, words = renderer.template.pieces, Field(config.tokens_field)
        behind = pieces[pieces.index(words) + 1 :]
        if renderer.kind is not MASKED and behind:
            what = "virtual tokens" if any(isinstance(piece, Virtual) for piece in behind) else "text"
            raise TemplateError(
                f"{renderer.kind.words} reads from left to right, so {what} behind the words would change no tag; put "
                f"{{{config.tokens_field}}} at the end of {renderer.template.source!r}"
            )
        # The words stand where an answer would, so they are tokenised apart and cut last.
        template = renderer.template.with_answer_for(config.tokens_field)
        self._learner = dataclasses.replace(renderer, template=template)
        cut = "cut" if renderer.overlong == "drop" else renderer.overlong  # a record that is asked for is answered
        self._reader = dataclasses.replace(self._learner, overlong=cut)

    def answer(self, record: Mapping[str, Any]) -> str:
        """Return the record's tags with blanks between them."""
        return " ".join(self._right_tags(record))

    def shown(self, record: Mapping[str, Any]) -> Row | None:
        """Return the row that is learnt from, its words supervised."""
        return self._row(self._learner, record)[0]

    def example(self, record: Mapping[str, Any]) -> Example | None:
        """Return a record's row with the numbers of its words' tags."""
        tags = self._right_tags(record)
        row, places = self._row(self._learner, record)
        if row is None or not row.read_at:
            return None
        targets = [self.numbers[tag] for tag, place in zip(tags, places, strict=True) if place is not None]
        return Example((row,), targets, weight=len(targets))

    def rows(self, record: Mapping[str, Any]) -> tuple[Row, ...]:
        """Return the one row, read at every word's first token."""
        row, _ = self._row(self._reader, record)
        assert row is not None, "nothing is dropped where a record is asked for"
        return (row,)

    def asks(self, examples: Sequence[Example], pad_id: int) -> Asked:
        """Return the examples' rows with the places where words are read."""
        return self.asked([row for example in examples for row in example.rows], pad_id)

    def loss_of(self, answer: Tensor, examples: Sequence[Example]) -> Tensor:
        """Return the cross-entropy over tags, summed over words, of hidden states ``[N, H]``."""
        scores = self.head_scores(answer)  # [N, C]
        targets = torch.tensor(list(chain.from_iterable(example.target for example in examples)), device=scores.device)
        return functional.cross_entropy(scores, targets, reduction="sum")

    def predict(
        self, backbone: Backbone, records: Sequence[Mapping[str, Any]], *, batch_size: int = 32
    ) -> list[dict[str, Any]]:
        """Return for each record its ``tokens``, their ``tags`` and the ``spans`` of entities.

        A span has its type, its first word and the one behind its last, its text, and as its probability the product
        of its tags'. ``unread_words`` counts those that were cut away or tokenise to nothing, if there are any.
        """
        read = self._all_scores(backbone, records, batch_size)
        return [self._answer(record, *own) for record, own in zip(records, read, strict=True)]

    def answer_read(
        self, record: Mapping[str, Any], rows: Sequence[Row], read: Tensor, backbone: Backbone
    ) -> dict[str, Any]:
        """Return what `predict` says of a record, from hidden states ``[N, H]``."""
        _, places = self._row(self._reader, record)
        return self._answer(record, places, self.head_scores(read).float().cpu())

    def evaluate(
        self, backbone: Backbone, records: Sequence[Mapping[str, Any]], *, batch_size: int = 32
    ) -> dict[str, float]:
        """Return F1, precision and recall of entities as seqeval counts them, token accuracy, and loss.

        ``prediction_share`` is how many records are given the most frequent list of entities, mostly that of none.
        ``unread_words``, which count as O, is there where there are any.

        Raises:
            MissingExtraError: seqeval is not installed.
        """
        try:
            from seqeval.metrics import f1_score, precision_score, recall_score
        except ImportError as error:
            raise MissingExtraError("the metrics of a tagging need seqeval: pip install ptune[metrics]") from error
        right = [self._right_tags(record) for record in records]
        read = self._all_scores(backbone, records, batch_size)
        answers = [self._answer(record, *own) for record, own in zip(records, read, strict=True)]
        given = [answer["tags"] for answer in answers]
        loss, unread = 0.0, 0
        for tags, (places, own) in zip(right, read, strict=True):
            targets = [self.numbers[tag] for tag, place in zip(tags, places, strict=True) if place is not None]
            loss += float(functional.cross_entropy(own, torch.tensor(targets, dtype=torch.long), reduction="sum"))
            unread += places.count(None)
        count = sum(map(len, right))
        equal = sum(one == other for pair in zip(right, given, strict=True) for one, other in zip(*pair, strict=True))
        plain = [[list(map(plain_tag, tags)) for tags in all_tags] for all_tags in (right, given)]
        metrics = {
            "entity_f1": float(f1_score(*plain, zero_division=0)),
            "entity_precision": float(precision_score(*plain, zero_division=0)),
            "entity_recall": float(recall_score(*plain, zero_division=0)),
            "token_accuracy": equal / count,
            "loss": loss / max(1, count - unread),
            "prediction_share": prediction_share(
                [tuple((span["type"], span["text"]) for span in answer["spans"]) for answer in answers]
            ),
        }
        return metrics | ({"unread_words": float(unread)} if unread else {})

    def _all_scores(
        self, backbone: Backbone, records: Sequence[Mapping[str, Any]], batch_size: int
    ) -> list[tuple[list[int | None], Tensor]]:
        """Return where words are read and their tags' scores ``[N, C]`` float32, of each record.

        They are read in batches of similar length.
        """
        found = [self._row(self._reader, record) for record in records]
        rows = [(row,) for row, _ in found if row is not None]
        scores: dict[int, Tensor] = {}
        with torch.no_grad():
            for together in in_batches(rows, batch_size, self.max_tokens):
                read = self.read(backbone, [rows[n][0] for n in together], backbone.tokenizer.pad_token_id)
                counts = [len(rows[n][0].read_at) for n in together]
                scores |= zip(together, self.head_scores(read).float().cpu().split(counts), strict=True)
        return [(places, scores[number]) for number, (_, places) in enumerate(found)]

    def _answer(self, record: Mapping[str, Any], places: Sequence[int | None], scores: Tensor) -> dict[str, Any]:
        words = self._words(record)
        likeliest = scores.softmax(-1).max(-1)  # [N]
        read = iter(zip(likeliest.values.tolist(), likeliest.indices.tolist(), strict=True))
        given = [(1.0, None) if place is None else next(read) for place in places]
        tags = [_OUTSIDE if number is None else self.config.tags[number] for _, number in given]
        text, starts = spelled_out(words)
        spans = [
            {
                "type": span.type,
                "start": span.start,
                "end": span.end,
                "text": text[starts[span.start] : starts[span.end - 1] + len(words[span.end - 1])],
                "probability": math.prod(probability for probability, _ in given[span.start : span.end]),
            }
            for span in spans_of(tags)
        ]
        unread = {"unread_words": places.count(None)} if None in places else {}
        return {"tokens": words, "tags": tags, "spans": spans} | unread

    def _row(self, renderer: Renderer, record: Mapping[str, Any]) -> tuple[Row | None, list[int | None]]:
        """Return a record's row, and where each word is read in it; a row of None where it is dropped."""
        ids, places = tokenised_words(renderer.tokenizer, self._words(record))
        row = renderer.row_of_ids(record, ids)
        if row is None:
            return None, places
        labels = [place for place, label in enumerate(row.labels) if label != IGNORED]
        within = [labels[place] if place is not None and place < len(labels) else None for place in places]
        return dataclasses.replace(row, read_at=tuple(place for place in within if place is not None)), within

    def _words(self, record: Mapping[str, Any]) -> list[str]:
        field = self.config.tokens_field
        words = answer_value(record, field, "task.tokens_field", "words")
        if isinstance(words, str):
            words = split_text(words)
        if not isinstance(words, list) or not all(isinstance(word, str) and word.strip() for word in words):
            raise DataError(f'{location(record)}: the field "{field}" should hold a list of words, none of them empty')
        if not words:
            raise DataError(f'{location(record)}: the field "{field}" holds no words; leave the record out')
        return [word.strip() for word in words]

    def _right_tags(self, record: Mapping[str, Any]) -> list[str]:
        tags, count = tags_of(record, self.config), len(self._words(record))
        if isinstance(record[self.config.tokens_field], str):
            field = self.config.tokens_field
            raise DataError(
                f'{location(record)}: the field "{field}" holds one text; write its words as a list, one for each tag'
            )
        if len(tags) != count:
            raise DataError(
                f"{location(record)} has {len(tags)} tags for {count} words; write both as lists of one length"
            )
        for tag in tags:
            if tag not in self.numbers:
                raise DataError(
                    f'{location(record)}: the tag "{tag}" is not among {", ".join(self.config.tags)}; add it to '
                    f"task.tags or mend the record.{did_you_mean(tag, list(self.numbers))}"
                )
        return tags


def tags_of(record: Mapping[str, Any], config: TaggingConfig) -> list[str]:
    """Return a record's tags by their names.

    Raises:
        DataError: the record lacks them, or holds something else, or tags of no scheme.
    """
    tags = answer_value(record, config.tags_field, "task.tags_field", "tags")
    if not isinstance(tags, list):
        raise DataError(
            f'{location(record)}: the field "{config.tags_field}" holds {type(tags).__name__}, and should hold a list '
            "of tags, one for each word"
        )
    named = [config.tag_names.get(label_text(tag), label_text(tag)) for tag in tags]
    for tag in named:
        if not TAG.fullmatch(tag):
            raise DataError(
                f"{location(record)}: {scheme_mistake(tag)}, or say by task.tag_names what the data means, as in "
                "{0: O, 1: B-PER}"
            )
    return named


def learnt_tags(config: TaggingConfig, records: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the tags of training records, sorted.

    Raises:
        DataError: as `tags_of`.
    """
    return tuple(sorted({tag for record in records for tag in tags_of(record, config)}))
