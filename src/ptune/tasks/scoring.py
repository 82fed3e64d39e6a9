"""What tasks share that score each of a record's possible answers and take the likeliest.

The loss is the cross-entropy over the scores; probabilities are their softmax, once they are divided by the soft
prompt's temperature (`calibration`), which changes no label. Which answers there are, and how each is scored, a task of
its own says: `classification` by a verbalizer, `choice` by texts in the record.

Shapes: E examples, C answers, N places read, V rows of the backbone's input matrix, H width of hidden states.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ptune.models.backbone import Backbone
from ptune.pretrained.losses import at_least_float32
from ptune.rendering.batch import Row
from ptune.tasks.calibration import calibration_error, reliability
from ptune.tasks.metrics import confusion, macro_f1, micro_f1, prediction_share
from ptune.tasks.reading import ReadingTask, in_batches
from ptune.tasks.task import Asked, Assessment, Example, Forward


class ScoringTask(ReadingTask):
    """Takes the likeliest of C answers.

    Attributes:
        rows_each: rows of one example.
        negative: number of the answer that micro F1 leaves out.
        weights: ``[C]`` float32, of each answer in the loss; None for equal ones.
        temperature: that scores are divided by before they become probabilities; None for scores as they are.
        columns: ``[C]`` int64, the answers' tokens, where their logits alone are scores; None where all are needed.
    """

    answer_key = "label"
    right_metric = "accuracy"
    rows_each: int
    negative: int | None = None
    weights: Tensor | None = None
    temperature: float | None = None
    columns: Tensor | None = None

    @abstractmethod
    def names(self, record: Mapping[str, Any]) -> Sequence[str]:
        """Return what the C answers are called."""

    @abstractmethod
    def target(self, record: Mapping[str, Any]) -> int:
        """Return the number of the right answer.

        Raises:
            DataError: the record has none, or one that is not among the answers.
        """

    @abstractmethod
    def scores_of(self, read: Tensor, examples: Sequence[Sequence[Row]]) -> Tensor:
        """Return the scores ``[E, C]``, log-probabilities but for a constant in each row.

        Args:
            read: logits ``[N, V]``, or hidden states ``[N, H]``, of all places that the rows read, in their order.
            examples: the rows of each.
        """

    def scores(self, forward: Forward, examples: Sequence[Sequence[Row]], pad_id: int) -> Tensor:
        """Return the scores ``[E, C]`` of examples by one forward pass."""
        return self._scores(self._asked(examples, pad_id).of(forward), examples)

    def _asked(self, examples: Sequence[Sequence[Row]], pad_id: int) -> Asked:
        return self.asked([row for rows in examples for row in rows], pad_id, self.columns)

    def _scores(self, read: Tensor, examples: Sequence[Sequence[Row]]) -> Tensor:
        # of single tokens the logits will do, for their normaliser is one for all
        return at_least_float32(read) if self.columns is not None else self.scores_of(read, examples)

    def corrected(self, scores: Tensor, backbone: Backbone) -> Tensor:
        """Return scores ``[E, C]`` as they count for predictions; themselves unless a task says otherwise."""
        return scores

    def example(self, record: Mapping[str, Any]) -> Example:
        """Return a record's rows with the number of its answer."""
        return Example(self.rows(record), self.target(record), weight=1)

    def asks(self, examples: Sequence[Example], pad_id: int) -> Asked:
        """Return the examples' rows with the places where answers are read."""
        return self._asked([example.rows for example in examples], pad_id)

    def loss_of(self, answer: Tensor, examples: Sequence[Example]) -> Tensor:
        """Return the cross-entropy over the answers, summed over examples: a scalar of logits ``[N, V]``."""
        scores = self._scores(answer, [example.rows for example in examples])
        return self._summed_loss(scores, torch.tensor([example.target for example in examples], device=scores.device))

    def _summed_loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        weights = None if self.weights is None else self.weights.to(scores)
        return functional.cross_entropy(scores, targets, weights, reduction="sum")

    def predict(
        self, backbone: Backbone, records: Sequence[Mapping[str, Any]], *, batch_size: int = 32
    ) -> list[dict[str, Any]]:
        """Return for each record its ``label``, its ``probability`` and the ``probabilities`` of all answers."""
        if not records:
            return []
        scores = self.all_scores(backbone, records, batch_size)
        return [self.answer_from(record, row) for record, row in zip(records, scores, strict=True)]

    def answer_read(
        self, record: Mapping[str, Any], rows: Sequence[Row], read: Tensor, backbone: Backbone
    ) -> dict[str, Any]:
        """Return what `predict` says of a record, from logits ``[N, V]`` or hidden states ``[N, H]``."""
        return self.answers_from([record], [self.scores_read(rows, read)], backbone)[0]

    def scores_read(self, rows: Sequence[Row], read: Tensor) -> Tensor:
        """Return a record's scores ``[C]``, not corrected yet, from logits ``[N, V]`` or hidden states ``[N, H]``."""
        return self.scores_of(read, [rows]).float().cpu()[0]

    def answers_from(
        self, records: Sequence[Mapping[str, Any]], scores: Sequence[Tensor], backbone: Backbone
    ) -> list[dict[str, Any]]:
        """Return what `predict` says of records, at least one, by the scores ``[C]`` of each, of `scores_read`.

        They are corrected here, all at once: what that reads of the model it reads once.
        """
        corrected = self.corrected(torch.stack(list(scores)), backbone)
        return [self.answer_from(record, row) for record, row in zip(records, corrected, strict=True)]

    def answer_from(self, record: Mapping[str, Any], scores: Tensor) -> dict[str, Any]:
        """Return what `predict` says of a record with these scores, ``[C]``, corrected already."""
        probabilities, names = self.probabilities(scores).tolist(), self.names(record)
        best = int(scores.argmax())  # of the scores: rounding may make two probabilities equal
        return {
            "label": names[best],
            "probability": probabilities[best],
            "probabilities": dict(zip(names, probabilities, strict=True)),
        }

    def with_temperature(self, temperature: float | None) -> ScoringTask:
        """Return the same task with its probabilities at another temperature."""
        other = copy.copy(self)
        other.temperature = temperature
        return other

    def probabilities(self, scores: Tensor) -> Tensor:
        """Return the probabilities ``[..., C]`` float64 of scores, corrected already, by the temperature."""
        return (scores.double() / (self.temperature or 1.0)).softmax(-1)

    def evaluate(
        self, backbone: Backbone, records: Sequence[Mapping[str, Any]], *, batch_size: int = 32
    ) -> dict[str, float]:
        """Return the metrics of `assess`."""
        return self.assess(backbone, records, batch_size=batch_size).metrics

    def assess(self, backbone: Backbone, records: Sequence[Mapping[str, Any]], *, batch_size: int = 32) -> Assessment:
        """Return accuracy, macro F1, micro F1 where an answer is left out of it, calibration error and loss.

        All are of the scores that `predict` answers by, `corrected`: of a classification that is calibrated by its
        prior, less the scores of an empty record. ``calibration_error`` is that of the probabilities as `predict` gives
        them; with a temperature ``calibration_error_before`` is that without it. ``loss`` is the mean cross-entropy of
        those scores with the labels' weights and without the temperature: what training minimises, but for the prior,
        which training knows nothing of.
        ``prediction_share`` is how many predictions are the most frequent one.
        """
        return self.assessment(self.all_scores(backbone, records, batch_size), records)

    def assessment(self, scores: Tensor, records: Sequence[Mapping[str, Any]]) -> Assessment:
        """Return what `assess` does, of the records' scores ``[E, C]``."""
        labels = tuple(self.names(records[0]))
        targets = [self.target(record) for record in records]
        right = torch.tensor(targets)  # [E]
        predicted = scores.argmax(-1).tolist()
        before = reliability(scores.double().softmax(-1), right)
        after = before if self.temperature is None else reliability(self.probabilities(scores), right)
        metrics = {
            "accuracy": sum(one == other for one, other in zip(targets, predicted, strict=True)) / len(targets),
            "macro_f1": macro_f1(targets, predicted),
        }
        if self.negative is not None:
            metrics["micro_f1"] = micro_f1(targets, predicted, self.negative)
        if self.temperature is not None:
            metrics["calibration_error_before"] = calibration_error(before)
        metrics |= {
            "calibration_error": calibration_error(after),
            "loss": float(self._summed_loss(scores, right)) / len(targets),
            "prediction_share": prediction_share(predicted),
        }
        table = tuple(tuple(row) for row in confusion(targets, predicted, len(labels)))
        return Assessment(metrics, labels, table, self.temperature, tuple(before), tuple(after))

    def all_scores(self, backbone: Backbone, records: Sequence[Mapping[str, Any]], batch_size: int) -> Tensor:
        """Return the scores ``[E, C]`` float32 of any number of records, in their order.

        They are read in batches of similar length.
        """
        rows = [self.rows(record) for record in records]
        order, chunks = [], []
        with torch.no_grad():
            for together in in_batches(rows, batch_size, self.max_tokens):
                chunk = [rows[index] for index in together]
                chunks.append(self.scores(backbone, chunk, backbone.tokenizer.pad_token_id).float().cpu())
                order += together
            scores = torch.empty_like(torch.cat(chunks))
            scores[order] = torch.cat(chunks)
            return self.corrected(scores, backbone)
