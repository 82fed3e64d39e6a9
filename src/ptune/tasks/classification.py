"""Classification by a verbalizer: each label has words, and the label whose words are likeliest is the answer.

A label's score is the summed log-probability of its tokens; the loss is the cross-entropy over the labels' scores
(Schick and Schütze 2021, section 3; for single tokens the model's own normaliser cancels out). Which rows a record
needs for that, and where each token is read, `label_reading` says for each kind of model.

Shapes: E examples, S places read in one example, C labels, J tokens of the longest label, V rows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ptune.backbone import Backbone
from ptune.batch import Row, collate
from ptune.config import ClassificationConfig, label_text
from ptune.errors import ConfigError, DataError, did_you_mean
from ptune.families import MASKED
from ptune.losses import at_least_float32
from ptune.rendering import Renderer
from ptune.tasks.label_reading import masked_reading, trie_reading
from ptune.tasks.task import Example, Forward, Task


class Classification(Task):
    """A record belongs to one label of a verbalizer."""

    metric = "accuracy"
    config: ClassificationConfig

    def __init__(self, config: ClassificationConfig, renderer: Renderer) -> None:
        """Tokenise the verbalizer.

        Raises:
            ConfigError: a label's words tokenise to nothing, or two labels' words are equal, or one's begin another's.
        """
        super().__init__(config, renderer)
        self.labels = list(config.verbalizer)
        tokens = [tuple(renderer.answer_ids(words, end=False)) for words in config.verbalizer.values()]
        _check_verbalizer(config.verbalizer, tokens, masked=renderer.kind is MASKED)
        self._reading = masked_reading(tokens) if renderer.kind is MASKED else trie_reading(tokens)

    def answer(self, record: Mapping[str, Any]) -> str:
        """Return the words of the record's label."""
        return self.config.verbalizer[self.label(record)]

    def label(self, record: Mapping[str, Any]) -> str:
        """Return a record's label.

        Raises:
            DataError: it has none, or one outside the verbalizer.
        """
        field, location = self.config.label_field, getattr(record, "location", "a record")
        if field not in record:
            known = [str(key) for key in record]
            raise DataError(
                f'{location} has no label: it lacks the field "{field}" and has {", ".join(known)}; '
                f"name the right one as task.label_field.{did_you_mean(field, known)}"
            )
        label = label_text(record[field])
        if label not in self.config.verbalizer:
            raise DataError(
                f'{location}: the label "{label}" is not in the verbalizer, which knows {", ".join(self.labels)}; '
                f"add it there or mend the record.{did_you_mean(label, self.labels)}"
            )
        return label

    def example(self, record: Mapping[str, Any]) -> Example:
        """Return a record as its context followed by each prefix of the trie, with the number of its label."""
        return Example(self._rows(record), self.labels.index(self.label(record)), weight=1)

    def loss(self, forward: Forward, examples: Sequence[Example], pad_id: int) -> Tensor:
        """Return the cross-entropy over the labels, summed over examples; a prior plays no part in it."""
        scores = self._scores(forward, [example.rows for example in examples], pad_id)  # [E, C]
        targets = torch.tensor([example.target for example in examples], device=scores.device)
        return functional.cross_entropy(scores, targets, reduction="sum")

    def predict(
        self, backbone: Backbone, records: Sequence[Mapping[str, Any]], *, batch_size: int = 32
    ) -> list[dict[str, Any]]:
        """Return for each record its ``label``, its ``probability`` and the ``probabilities`` of all labels."""
        probabilities = self._all_scores(backbone, records, batch_size).softmax(-1)
        answers = []
        for row in probabilities.tolist():
            best = max(range(len(row)), key=row.__getitem__)
            answers.append(
                {
                    "label": self.labels[best],
                    "probability": row[best],
                    "probabilities": dict(zip(self.labels, row, strict=True)),
                }
            )
        return answers

    def evaluate(
        self, backbone: Backbone, records: Sequence[Mapping[str, Any]], *, batch_size: int = 32
    ) -> dict[str, float]:
        """Return accuracy, macro F1, loss, and ``prediction_share``: how many predictions are the most frequent one.

        Macro F1 is the mean over the labels that occur among the records or the predictions.
        """
        targets = torch.tensor([self.labels.index(self.label(record)) for record in records])
        scores = self._all_scores(backbone, records, batch_size)
        predicted = scores.argmax(-1)
        pairs = list(zip(targets.tolist(), predicted.tolist(), strict=True))
        return {
            "accuracy": float((predicted == targets).double().mean()),
            "macro_f1": _macro_f1(pairs),
            "loss": float(functional.cross_entropy(scores, targets)),
            "prediction_share": max(Counter(predicted.tolist()).values()) / len(records),
        }

    def _rows(self, record: Mapping[str, Any]) -> tuple[Row, ...]:
        return self._reading.rows(self.renderer, record)

    def _all_scores(self, backbone: Backbone, records: Sequence[Mapping[str, Any]], batch_size: int) -> Tensor:
        """Return the scores ``[number of records, C]``, by batches of similar length, in the records' order."""
        rows = [self._rows(record) for record in records]
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index][0].ids))
        at_once = max(1, batch_size // self._reading.rows_each)
        scores = torch.empty(len(rows), len(self.labels))
        pad_id = backbone.tokenizer.pad_token_id
        with torch.no_grad():
            for start in range(0, len(order), at_once):
                chunk = order[start : start + at_once]
                scores[chunk] = self._scores(backbone, [rows[index] for index in chunk], pad_id).float().cpu()
            if self.config.calibration == "prior":
                empty = dict.fromkeys(self.renderer.template.fields, "")
                scores -= self._scores(backbone, [self._rows(empty)], pad_id).float().cpu()
        return scores

    def _scores(self, forward: Forward, examples: Sequence[Sequence[Row]], pad_id: int) -> Tensor:
        """Return the labels' scores ``[E, C]``."""
        rows = [row for example in examples for row in example]  # those of an example together
        batch = collate(rows, pad_id)
        positions = torch.zeros_like(batch.input_ids, dtype=torch.bool)
        for number, row in enumerate(rows):
            positions[number, row.read_at] = True
        logits = forward(batch.input_ids, batch.attention_mask, positions=positions)  # [E * S, V]
        log_probabilities = torch.log_softmax(at_least_float32(logits), -1)
        log_probabilities = log_probabilities.view(len(examples), -1, logits.shape[-1])  # [E, S, V]
        reading = self._reading
        chosen = log_probabilities[:, reading.place, reading.token] * reading.mask.to(log_probabilities)  # [E, C, J]
        scores = chosen.sum(-1)
        return scores / reading.mask.sum(-1).to(scores) if self.config.calibration == "length" else scores


def _check_verbalizer(verbalizer: Mapping[str, str], tokens: Sequence[tuple[int, ...]], *, masked: bool) -> None:
    words = list(verbalizer.items())
    for number, (label, text) in enumerate(words):
        if not tokens[number]:
            raise ConfigError(f'label "{label}": its words {text!r} tokenise to nothing; choose others')
        for other, (other_label, other_text) in enumerate(words):
            begins = tokens[other][: len(tokens[number])] == tokens[number]
            if masked:  # labels of other lengths are read at other masks
                begins = tokens[other] == tokens[number]
            if other != number and begins:
                how = "are equal" if tokens[other] == tokens[number] else "the first begins the second"
                raise ConfigError(
                    f'the words of labels "{label}" ({text!r}) and "{other_label}" ({other_text!r}) cannot be told '
                    f"apart: as tokens {how}; choose others"
                )


def _macro_f1(pairs: Sequence[tuple[int, int]]) -> float:
    scores = []
    for label in {label for pair in pairs for label in pair}:
        hits = sum(target == label == predicted for target, predicted in pairs)
        either = sum((target == label) + (predicted == label) for target, predicted in pairs)
        scores.append(2 * hits / either)
    return math.fsum(scores) / len(scores)
