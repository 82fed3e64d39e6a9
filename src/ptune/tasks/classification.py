"""Classification by a verbalizer: each label has words, and the label whose words are likeliest is the answer.

A label's score is the summed log-probability of its tokens; the loss is the cross-entropy over the labels' scores
(Schick and Schütze 2021, section 3; for single tokens the model's own normaliser cancels out). Which rows a record
needs for that, and where each token is read, `label_reading` says for each kind of model.

Shapes: E examples, C labels, N places read, V rows of the backbone's input matrix, s places read in one
example, j tokens of the longest label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ptune.config.settings import label_text
from ptune.config.task import ClassificationConfig
from ptune.errors import ConfigError, DataError, did_you_mean
from ptune.families import MASKED
from ptune.models.backbone import Backbone
from ptune.pretrained.losses import at_least_float32
from ptune.rendering.batch import Row
from ptune.rendering.filling import field_text, lacking, location
from ptune.rendering.renderer import Renderer
from ptune.tasks.label_reading import masked_reading, trie_reading
from ptune.tasks.scoring import ScoringTask
from ptune.tasks.task import answer_value


class Classification(ScoringTask):
    """A record belongs to one label of a verbalizer."""

    config: ClassificationConfig

    def __init__(self, config: ClassificationConfig, renderer: Renderer) -> None:
        """Tokenise the verbalizer.

        Raises:
            ConfigError: a label's words tokenise to nothing, or two labels' words are equal, or one's begin another's.
        """
        super().__init__(config, renderer)
        self.metric = config.metric
        self.labels = list(config.verbalizer)
        if config.negative_label is not None:
            self.negative = self.labels.index(config.negative_label)
        if config.label_weights:
            self.weights = torch.tensor([config.label_weights.get(label, 1.0) for label in self.labels])
        tokens = [tuple(renderer.answer_ids(words, end=False)) for words in config.verbalizer.values()]
        _check_verbalizer(config.verbalizer, tokens, masked=renderer.kind is MASKED)
        self._names_contained = [*config.contained, *config.contained.values()]
        self._reading = masked_reading(tokens) if renderer.kind is MASKED else trie_reading(tokens)
        self.rows_each = self._reading.rows_each
        if self._reading.single:
            self.columns = self._reading.token[:, 0]

    def names(self, record: Mapping[str, Any]) -> Sequence[str]:
        """Return the labels."""
        return self.labels

    def answer(self, record: Mapping[str, Any]) -> str:
        """Return the words of the record's label."""
        return self.config.verbalizer[self.label(record)]

    def label(self, record: Mapping[str, Any]) -> str:
        """Return a record's label.

        Raises:
            DataError: it has none, or one outside the verbalizer.
        """
        label = label_text(answer_value(record, self.config.label_field, "task.label_field", "label"))
        if label not in self.config.verbalizer:
            raise DataError(
                f'{location(record)}: the label "{label}" is not in the verbalizer, which knows '
                f"{', '.join(self.labels)}; add it there or mend the record.{did_you_mean(label, self.labels)}"
            )
        return label

    def target(self, record: Mapping[str, Any]) -> int:
        """Return the number of the record's label."""
        return self.labels.index(self.label(record))

    def rows(self, record: Mapping[str, Any]) -> tuple[Row, ...]:
        """Return the rows that `label_reading` asks for.

        Raises:
            DataError: a field does not stand in the text that should contain it.
        """
        for part, whole in self.config.contained.items():
            self._check_contained(record, part, whole)
        return self._reading.rows(self.renderer, record)

    def _check_contained(self, record: Mapping[str, Any], part: str, whole: str) -> None:
        for name in (part, whole):
            if name not in record:
                raise lacking(record, name, f'lacks the field "{name}" that task.contained names')
        if (text := field_text(record, part).strip()) not in field_text(record, whole):
            raise DataError(
                f'{location(record)}: the {part} "{text}" does not stand in its {whole}; mend the record, or leave '
                f"{part} out of task.contained"
            )

    def corrected(self, scores: Tensor, backbone: Backbone) -> Tensor:
        """Return scores ``[E, C]``, less those of an empty record where the calibration is by a prior."""
        if self.config.calibration != "prior":
            return scores
        return scores - self.scores(backbone, [self.empty_rows()], backbone.tokenizer.pad_token_id).float().cpu()

    def empty_rows(self) -> tuple[Row, ...]:
        """Return the rows of an empty record, whose scores are the prior."""
        return self.rows(dict.fromkeys((*self.renderer.template.fields, *self._names_contained), ""))

    def scores_of(self, read: Tensor, examples: Sequence[Sequence[Row]]) -> Tensor:
        """Return the labels' scores ``[E, C]`` from what is read, logits ``[N, V]``."""
        log_probabilities = torch.log_softmax(at_least_float32(read), -1)
        log_probabilities = log_probabilities.view(len(examples), -1, read.shape[-1])  # [E, s, V]
        reading = self._reading
        chosen = log_probabilities[:, reading.place, reading.token] * reading.mask.to(log_probabilities)  # [E, C, j]
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
