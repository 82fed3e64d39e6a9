"""Choice among texts that stand in the record itself: which sentence follows, which of two causes, which fact is true.

Each choice is set where the answer stands and scored by the log-probability of its tokens, summed, or a token's mean
where ``normalise`` says so, for longer texts are less likely whatever they say.

Shapes: E examples, C choices, N places read, one for each token of all choices, V rows of the backbone's input matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ptune.config.settings import label_text
from ptune.config.task import ChoiceConfig
from ptune.errors import DataError, TemplateError
from ptune.families import MASKED
from ptune.pretrained.losses import at_least_float32
from ptune.rendering.batch import IGNORED, Row
from ptune.rendering.filling import field_text, lacking, location
from ptune.rendering.renderer import Renderer
from ptune.tasks.scoring import ScoringTask


class Choice(ScoringTask):
    """A record's answer is one of several of its own fields."""

    metric = "accuracy"
    config: ChoiceConfig

    def __init__(self, config: ChoiceConfig, renderer: Renderer) -> None:
        super().__init__(config, renderer)
        self.rows_each = len(config.choices)

    def names(self, record: Mapping[str, Any]) -> Sequence[str]:
        """Return the choices' fields: two records may hold the same text."""
        return self.config.choices

    def answer(self, record: Mapping[str, Any]) -> str:
        """Return the text of the right choice, as it is set behind the context."""
        return self._text(record, self.config.choices[self.target(record)])

    def target(self, record: Mapping[str, Any]) -> int:
        """Return the number of the right choice: the record names it by number from 0, by field or by text.

        Raises:
            DataError: it names none, several, or something that is no choice.
        """
        field, choices = self.config.label_field, self.config.choices
        if field not in record:
            said = f'does not say which choice is right: it lacks the field "{field}"'
            raise lacking(record, field, said, "name the right one as task.label_field")
        label = label_text(record[field])
        named = {
            "number": [str(number) for number in range(len(choices))],
            "field": list(choices),
            "text": [field_text(record, name).strip() for name in choices],
        }
        found = {
            (kind, number)
            for kind, names in named.items()
            if self.config.label_by in ("any", kind)
            for number, name in enumerate(names)
            if name == label
        }
        if len(right := {number for _, number in found}) == 1:
            return right.pop()
        if right:
            meant = " and ".join(f'"{choices[number]}" by its {kind}' for kind, number in sorted(found))
            raise DataError(
                f'{location(record)}: "{label}" in the field "{field}" is the choice {meant}; say which it is as '
                "task.label_by, which is number, field or text, or mend the record"
            )
        raise DataError(
            f'{location(record)}: "{label}" in the field "{field}" is no choice; write its number from 0 to '
            f"{len(choices) - 1}, its field ({', '.join(choices)}) or its text"
        )

    def rows(self, record: Mapping[str, Any]) -> tuple[Row, ...]:
        """Return a row for each choice, its tokens supervised.

        Raises:
            DataError: the record lacks a choice or a field.
            TemplateError: the longest choice has no room.
        """
        answers = [self.renderer.answer_ids(self._text(record, name), end=False) for name in self.config.choices]
        longest = max(map(len, answers))  # every choice gets the same context, cut alike
        try:
            if self.renderer.kind is MASKED:
                rows = (self.renderer.masked_row(record, len(ids), reserve=longest) for ids in answers)
                return tuple(map(_masked, rows, answers))
            context = self.renderer.context_row(record, reserve=longest)
        except TemplateError as error:
            name = self.config.choices[list(map(len, answers)).index(longest)]
            raise TemplateError(f'{error}, or shorten the choice "{name}", which is the longest') from error
        return tuple(_behind(context, ids) for ids in answers)

    def scores_of(self, read: Tensor, examples: Sequence[Sequence[Row]]) -> Tensor:
        """Return the choices' scores ``[E, C]`` from what is read, logits ``[N, V]``."""
        rows = [row for example in examples for row in example]
        tokens = torch.tensor([label for row in rows for label in row.labels if label != IGNORED])  # [N]
        row_of = torch.tensor([number for number, row in enumerate(rows) for _ in row.read_at])  # [N]
        log_probabilities = torch.log_softmax(at_least_float32(read), -1)
        chosen = log_probabilities.gather(-1, tokens.to(read.device)[:, None]).squeeze(-1)  # [N]
        scores = chosen.new_zeros(len(rows)).index_add(0, row_of.to(read.device), chosen)
        if self.config.normalise:
            scores = scores / torch.tensor([len(row.read_at) for row in rows]).to(scores)
        return scores.view(len(examples), -1)

    def _text(self, record: Mapping[str, Any], name: str) -> str:
        if name not in record:
            raise lacking(record, name, f'lacks the choice "{name}"')
        text = field_text(record, name).strip()
        if not text:
            raise DataError(f'{location(record)}: the choice "{name}" is empty; write its text or leave the record out')
        return self.config.before + text


def _behind(context: Row, tokens: Sequence[int]) -> Row:
    """Return a row whose last tokens are supervised, each read at the place before it."""
    ids, before = (*context.ids, *tokens), len(context.ids)
    return replace(context, ids=ids, labels=(*[IGNORED] * before, *tokens), read_at=range(before - 1, len(ids) - 1))


def _masked(row: Row, tokens: Sequence[int]) -> Row:
    """Return a row whose masks are supervised."""
    labels = list(row.labels)
    for place, token in zip(row.read_at, tokens, strict=True):
        labels[place] = token
    return replace(row, labels=tuple(labels))
