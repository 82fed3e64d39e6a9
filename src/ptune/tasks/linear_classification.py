"""Classification by a linear head: a trained weight reads the last hidden state where the answer stands.

For many labels, whose words would be long or hard to tell apart, for labels that no words stand for, and for records
with several labels. A masked model reads at a mask, others at the last token of the context.

Shapes: E examples, C labels, N places read, H width of hidden states.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ptune.config.settings import label_text
from ptune.config.task import LinearClassificationConfig
from ptune.errors import ConfigError, DataError, did_you_mean
from ptune.families import MASKED
from ptune.rendering.batch import IGNORED, Row
from ptune.rendering.filling import location
from ptune.rendering.renderer import Renderer
from ptune.tasks.metrics import average_f1s, prediction_share
from ptune.tasks.scoring import ScoringTask
from ptune.tasks.task import Assessment, Example, answer_value

_THRESHOLD = 0.5
_SHOWN_LABELS = 10


class LinearClassification(ScoringTask):
    """A record belongs to one of the labels that a linear head scores."""

    config: LinearClassificationConfig
    reads_states = True
    rows_each = 1

    def __init__(self, config: LinearClassificationConfig, renderer: Renderer) -> None:
        """Bind the task to its labels.

        Raises:
            ConfigError: there are too few labels, or a weight is of none of them.
        """
        super().__init__(config, renderer)
        self.metric = config.metric or "accuracy"
        self.labels = list(config.labels)
        self.numbers = {label: number for number, label in enumerate(self.labels)}
        least = 1 if config.multi_label else 2
        if len(self.labels) < least:
            raise ConfigError(
                f"a linear classification needs at least {least} labels, and has {', '.join(self.labels) or 'none'}; "
                "list them as task.labels, or check the training data's"
            )
        unknown = [label for label in config.label_weights if label not in self.numbers]
        if unknown:
            raise ConfigError(f"task.label_weights: {_not_among(unknown[0], self.labels)}; take it out")
        if config.label_weights:
            self.weights = torch.tensor([config.label_weights.get(label, 1.0) for label in self.labels])

    def names(self, record: Mapping[str, Any]) -> Sequence[str]:
        """Return the labels."""
        return self.labels

    def answer(self, record: Mapping[str, Any]) -> str:
        """Return the record's label, or its labels with the separator between them."""
        return self.config.separator.join(self._known_labels(record))

    def shown(self, record: Mapping[str, Any]) -> Row:
        """Return the row that is read."""
        return self.rows(record)[0]

    def target(self, record: Mapping[str, Any]) -> int:
        """Return the number of the record's label."""
        return self.numbers[self._known_labels(record)[0]]

    def rows(self, record: Mapping[str, Any]) -> tuple[Row, ...]:
        """Return the one row, read at the answer's place."""
        if self.renderer.kind is MASKED:
            return (self.renderer.masked_row(record, 1),)
        row = self.renderer.context_row(record)
        return (replace(row, labels=(IGNORED,) * len(row.ids), read_at=(len(row.ids) - 1,)),)

    def scores_of(self, read: Tensor, examples: Sequence[Sequence[Row]]) -> Tensor:
        """Return the labels' scores ``[E, C]`` from what is read, hidden states ``[E, H]``."""
        return self.head_scores(read)

    def _known_labels(self, record: Mapping[str, Any]) -> list[str]:
        labels = labels_of(record, self.config)
        for label in labels:
            if label not in self.numbers:
                raise DataError(
                    f"{location(record)}: {_not_among(label, self.labels)}; add it to task.labels or mend the record."
                    f"{did_you_mean(label, self.labels)}"
                )
        return labels


class MultiLabelClassification(LinearClassification):
    """A record has any number of labels, each with a probability of its own."""

    answer_key = "labels"
    right_metric = "exact_match"

    def __init__(self, config: LinearClassificationConfig, renderer: Renderer) -> None:
        super().__init__(config, renderer)
        self.metric = config.metric or "micro_f1"

    def example(self, record: Mapping[str, Any]) -> Example:
        """Return a record's row with the numbers of its labels."""
        return Example(self.rows(record), self._targets(record), weight=1)

    def loss_of(self, answer: Tensor, examples: Sequence[Example]) -> Tensor:
        """Return the binary cross-entropy, a mean over labels, summed over examples, of hidden states ``[N, H]``."""
        scores = self.scores_of(answer, [example.rows for example in examples])  # [E, C]
        return self._loss(scores, [example.target for example in examples])

    def answer_from(self, record: Mapping[str, Any], scores: Tensor) -> dict[str, Any]:
        """Return the ``labels`` whose probability is at least 0.5, and the ``probabilities`` of all, from ``[C]``."""
        probabilities = dict(zip(self.labels, scores.sigmoid().tolist(), strict=True))
        chosen = [label for label, probability in probabilities.items() if probability >= _THRESHOLD]
        return {"labels": chosen, "probabilities": probabilities}

    def assessment(self, scores: Tensor, records: Sequence[Mapping[str, Any]]) -> Assessment:
        """Return micro F1, macro F1, the share of records whose labels are exactly right, and loss, of ``[E, C]``.

        ``prediction_share`` is how many records are given the most frequent set of labels.
        """
        targets = [self._targets(record) for record in records]
        wanted, given = self._table(targets), scores.sigmoid() >= _THRESHOLD
        micro, macro = average_f1s(wanted, given)
        exact = float((wanted == given).all(-1).float().mean())
        loss = float(self._loss(scores, targets)) / len(records)
        share = prediction_share([tuple(row) for row in given.tolist()])
        metrics = {"micro_f1": micro, "macro_f1": macro, "exact_match": exact, "loss": loss, "prediction_share": share}
        return Assessment(metrics)

    def _targets(self, record: Mapping[str, Any]) -> tuple[int, ...]:
        return tuple(self.numbers[label] for label in self._known_labels(record))

    def _table(self, targets: Sequence[Sequence[int]]) -> Tensor:
        """Return which labels each example has, ``[E, C]`` bool."""
        table = torch.zeros(len(targets), len(self.labels), dtype=torch.bool)
        for number, labels in enumerate(targets):
            table[number, list(labels)] = True
        return table

    def _loss(self, scores: Tensor, targets: Sequence[Sequence[int]]) -> Tensor:
        wanted = self._table(targets).to(scores)
        weights = None if self.weights is None else self.weights.to(scores)
        return functional.binary_cross_entropy_with_logits(scores, wanted, weights, reduction="sum") / len(self.labels)


def linear_classification(config: LinearClassificationConfig, renderer: Renderer) -> LinearClassification:
    """Return the task of one label or of several, as the settings say.

    Raises:
        ConfigError: as the task.
    """
    return (MultiLabelClassification if config.multi_label else LinearClassification)(config, renderer)


def labels_of(record: Mapping[str, Any], config: LinearClassificationConfig) -> list[str]:
    """Return a record's labels, one where the task is not of several.

    Raises:
        DataError: the record lacks them, or holds several where one should be, or something that is no label.
    """
    value = answer_value(record, config.label_field, "task.label_field", "label")
    if not config.multi_label:
        blank = value is None or not label_text(value).strip()
        if isinstance(value, list | dict) or blank:
            found = "is empty" if blank else f"holds {type(value).__name__}"
            raise DataError(
                f'{location(record)}: its label in the field "{config.label_field}" {found}, and should be one label; '
                "write it there, or set task.multi_label for several"
            )
        return [label_text(value)]
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    odd = [one for one in values if one is None or isinstance(one, list | dict)]
    if odd:
        raise DataError(
            f'{location(record)}: a label in the field "{config.label_field}" is {json.dumps(odd[0], default=str)}, '
            "and should be a text, a number or true or false; write its labels there as a list of these"
        )
    if not isinstance(value, list):
        values = label_text(value).split(config.separator)
    return list(dict.fromkeys(text for one in values if (text := label_text(one).strip())))


def learnt_labels(config: LinearClassificationConfig, records: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the labels of training records, sorted.

    Raises:
        DataError: as `labels_of`.
    """
    return tuple(sorted({label for record in records for label in labels_of(record, config)}))


def _not_among(label: str, labels: Sequence[str]) -> str:
    more = f" and {len(labels) - _SHOWN_LABELS} more" if len(labels) > _SHOWN_LABELS else ""
    return f'the label "{label}" is not among {", ".join(labels[:_SHOWN_LABELS])}{more}'
