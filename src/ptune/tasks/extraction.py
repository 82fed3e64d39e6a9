"""Named entities by generation: a record's entities are written out as text, and parsed back to spans.

So a model that only writes can do them. Records hold tokens and their tags, or a text and spans of its characters.
Metrics are F1, precision and recall over all entities, each right only with its type and both its ends, and how many
answers parse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ptune.config.task import ExtractionConfig
from ptune.errors import DataError, did_you_mean
from ptune.generation.generate import Generated
from ptune.models.backbone import Backbone
from ptune.rendering.filling import lacking, location
from ptune.rendering.renderer import Renderer
from ptune.tasks.entity_text import EntityText, ParsedEntities, Passage
from ptune.tasks.generation import Generation
from ptune.tasks.metrics import prediction_share
from ptune.tasks.spans import Span, scheme_of, spans_of


class Extraction(Generation):
    """A record's entities are written out."""

    config: ExtractionConfig

    def __init__(self, config: ExtractionConfig, renderer: Renderer) -> None:
        """Bind the task.

        Raises:
            ConfigError: the model writes no text.
        """
        super().__init__(config, renderer)
        self._words = EntityText(config.types, config.separator, config.none)

    def answer(self, record: Mapping[str, Any]) -> str:
        """Return the record's entities as text.

        Raises:
            DataError: its tags or spans are missing, do not fit its text, or are of an unknown type.
        """
        return self._words.write(self.passage(record), self.spans(record))

    def passage(self, record: Mapping[str, Any]) -> Passage:
        """Return the text in which a record's entities stand.

        Raises:
            DataError: it has neither tokens nor text.
        """
        tokens, text = (record.get(name) for name in (self.config.tokens_field, self.config.text_field))
        if isinstance(tokens, list) and all(isinstance(token, str) and token for token in tokens):
            return Passage.of_tokens(tokens)
        if isinstance(tokens, str):  # said in words, as a text to predict is
            return Passage.of_text(tokens)
        if isinstance(text, str) and self.config.tokens_field not in record:
            return Passage.of_text(text)
        words, text = self.config.tokens_field, self.config.text_field
        said = f'lacks a list of words in the field "{words}", or text in "{text}",'
        raise lacking(record, words, said, "name the right one as task.tokens_field or task.text_field")

    def spans(self, record: Mapping[str, Any]) -> list[Span]:
        """Return the right spans, of tokens or of characters, in order.

        Raises:
            DataError: as `answer`.
        """
        of_tokens = self.config.tokens_field in record
        field = self.config.tags_field if of_tokens else self.config.spans_field
        if not isinstance(record.get(field), list):
            mend = f"name the right one as task.{'tags' if of_tokens else 'spans'}_field"
            raise lacking(record, field, f'has no entities: it lacks a list in the field "{field}"', mend)
        spans = self._of_tags(record) if of_tokens else self._of_text(record)
        for span in spans:
            if span.type not in self.config.types:
                known = list(self.config.types)
                raise DataError(
                    f'{location(record)}: the type "{span.type}" is none of task.types, which has {", ".join(known)}; '
                    f"add it there.{did_you_mean(span.type, known)}"
                )
        return sorted(spans)

    def answer_from(self, record: Mapping[str, Any], generated: Generated) -> dict[str, Any]:
        """Return ``text``, ``finish_reason``, the ``spans`` in it, and how many mentions were ``dropped``."""
        passage = self.passage(record)
        reading = self._words.read(passage, generated.text)
        spans = [
            {"type": span.type, "start": span.start, "end": span.end, "text": passage.mention(span)}
            for span in reading.spans
        ]
        dropped = reading.unknown_types + reading.not_found
        return super().answer_from(record, generated) | {"spans": spans, "dropped": dropped}

    def scores(self, backbone: Backbone, records: Sequence[Mapping[str, Any]], *, batch_size: int) -> dict[str, float]:
        """Return the scores of `extraction_scores`, and how many answers are the most frequent text."""
        answers = self.written(backbone, records, batch_size=batch_size)
        readings = [
            self._words.read(self.passage(record), answer.text) for record, answer in zip(records, answers, strict=True)
        ]
        scores = extraction_scores(readings, [self.spans(record) for record in records])
        return scores | {"prediction_share": prediction_share([answer.text for answer in answers])}

    def _of_tags(self, record: Mapping[str, Any]) -> list[Span]:
        tokens, tags = record[self.config.tokens_field], record[self.config.tags_field]
        if len(tokens) != len(tags):
            raise DataError(
                f"{location(record)}: expected as many tags as tokens, and found {len(tags)} for {len(tokens)}; give "
                "each token its tag"
            )
        try:
            scheme_of(map(str, tags))
            return spans_of([str(tag) for tag in tags])
        except ValueError as error:
            raise DataError(f"{location(record)}: {error}; rewrite the tags of this record") from error

    def _of_text(self, record: Mapping[str, Any]) -> list[Span]:
        text, spans = record[self.config.text_field], []
        for number, given in enumerate(record[self.config.spans_field], 1):
            place = f"{location(record)}: span {number}"
            span = given if isinstance(given, Mapping) else {}
            kind, start, end = span.get("type", span.get("label")), span.get("start"), span.get("end")
            if not (isinstance(kind, str) and type(start) is int and type(end) is int):
                raise DataError(f"{place}: expected type, start and end, and found {given!r}; give it all three")
            if not 0 <= start < end <= len(text):
                raise DataError(
                    f"{place}: {start} to {end} does not lie in the text of {len(text)} characters; count from 0 to "
                    "behind the last character"
                )
            said = span.get("text", text[start:end])
            if said != text[start:end]:
                raise DataError(
                    f"{place}: its text is {said!r}, and from {start} to {end} stands {text[start:end]!r}; correct the "
                    "numbers, which count characters from 0 to behind the last"
                )
            spans.append(Span(start, end, kind))
        return spans


def extraction_scores(readings: Sequence[ParsedEntities], targets: Sequence[Sequence[Span]]) -> dict[str, float]:
    """Return micro F1, precision and recall of spans, the share of answers that parse, and counts of what was dropped.

    ``exact_match`` is how many records are given all of their entities and no other. Of nothing said, the precision is
    0, and so is the recall of nothing to say.
    """
    pairs = list(zip(readings, targets, strict=True))
    right = sum(len(set(reading.spans) & set(target)) for reading, target in pairs)
    said, wanted = sum(len(reading.spans) for reading in readings), sum(len(set(target)) for target in targets)
    return {
        "f1": 2 * right / (said + wanted) if said + wanted else 0.0,
        "precision": right / said if said else 0.0,
        "recall": right / wanted if wanted else 0.0,
        "exact_match": sum(set(one.spans) == set(target) for one, target in pairs) / len(pairs),
        "parsed": sum(reading.parses for reading in readings) / len(readings),
        "unknown_types": float(sum(reading.unknown_types for reading in readings)),
        "not_found": float(sum(reading.not_found for reading in readings)),
    }
