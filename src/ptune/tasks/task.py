"""What a task is: how a record becomes an example, what is lost on it, how it is answered and scored.

Another task is another file beside this one and a line in the registry. Knows nothing of the training loop.
Shapes: B batch, T tokens, N chosen positions, V rows of the backbone's input matrix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch import Tensor

from ptune.config.settings import Settings
from ptune.models.backbone import Backbone
from ptune.prompts.linear_head import LinearHead
from ptune.rendering.batch import Row
from ptune.rendering.filling import lacking
from ptune.rendering.renderer import Renderer
from ptune.tasks.calibration import Bin


class Forward(Protocol):
    """The one call that a task makes on a model: `Backbone.__call__` and `PromptedModel.forward`."""

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        labels: Tensor | None = None,
        positions: Tensor | None = None,
        columns: Tensor | None = None,
        states: bool = False,
    ) -> Tensor:
        """Return the summed loss for labels, or logits ``[N, V]`` after positions, ``[N, C]`` of some tokens alone.

        Or, for ``states``, the last layer's hidden states at positions, ``[N, H]``.
        """


@dataclass(frozen=True)
class Asked:
    """What a loss asks of a model: the arguments of one `Forward`.

    Attributes:
        input_ids: ``[B, T]`` int64.
        attention_mask: ``[B, T]`` int64.
        labels: ``[B, T]`` int64, where a summed loss is wanted.
        positions: ``[B, T]`` bool, where logits are.
        columns: ``[C]`` int64, with positions: the tokens whose logits are wanted; None for all.
        states: whether hidden states are wanted at positions.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor | None = None
    positions: Tensor | None = None
    columns: Tensor | None = None
    states: bool = False

    def of(self, forward: Forward) -> Tensor:
        """Return what a model answers: a scalar, ``[N, V]``, ``[N, C]`` or ``[N, H]``, as `Forward` has it."""
        return forward(
            self.input_ids,
            self.attention_mask,
            labels=self.labels,
            positions=self.positions,
            columns=self.columns,
            states=self.states,
        )


@dataclass(frozen=True)
class Example:
    """A record made ready to learn from.

    Attributes:
        rows: the sequences that the model reads for it.
        target: what is right, as the task keeps it.
        weight: what its summed loss is divided by, with that of all others of an optimizer step.
    """

    rows: tuple[Row, ...]
    target: Any
    weight: int


@dataclass(frozen=True)
class Assessment:
    """How well records with their answers were answered.

    Attributes:
        metrics: ``loss`` and the task's metrics.
        labels: the possible answers, where a task has them.
        confusion: how often each label (row) was taken for each (column).
        temperature: that scores are divided by; None where there is none.
        before: how right predictions of each confidence are, by the scores as they are.
        after: by the scores divided by the temperature, as probabilities are given.
    """

    metrics: dict[str, float]
    labels: tuple[str, ...] = ()
    confusion: tuple[tuple[int, ...], ...] = ()
    temperature: float | None = None
    before: tuple[Bin, ...] = ()
    after: tuple[Bin, ...] = ()

    def values(self) -> dict[str, Any]:
        """Return it as JSON values; of free text the metrics alone."""
        if not self.labels:
            return {"metrics": self.metrics}
        bins = {"before": [asdict(one) for one in self.before], "after": [asdict(one) for one in self.after]}
        return {
            "metrics": self.metrics,
            "labels": list(self.labels),
            "confusion": [list(row) for row in self.confusion],
            "calibration": {"temperature": self.temperature, **bins},
        }


class Task(ABC):
    """A task bound to a template, a tokenizer and the ids of its virtual tokens.

    Attributes:
        head: the trained linear head of a task that asks for one (`ptune.config.task.head_outputs`), set by whoever
            has it; None for others.
        max_tokens: most tokens of a pass in which records are answered or scored, padding included, set by whoever has
            a limit; None for none. A record that alone has more is a pass of its own. Answers are the same.
    """

    metric: str
    """Name of the metric that chooses the best checkpoint."""
    greater_is_better: bool = True
    right_metric: str = "exact_match"
    """Name of the metric that says how many answers are wholly right: 1 where all are."""
    answer_key: str
    """Under which name the answer itself stands in what `predict` returns."""

    def __init__(self, config: Settings, renderer: Renderer) -> None:
        self.config = config
        self.renderer = renderer
        self.head: LinearHead | None = None
        self.max_tokens: int | None = None

    def with_renderer(self, renderer: Renderer) -> Task:
        """Return the same task on another renderer."""
        task = type(self)(self.config, renderer)
        task.head, task.max_tokens = self.head, self.max_tokens
        return task

    @abstractmethod
    def answer(self, record: Mapping[str, Any]) -> str:
        """Return the text that would be right for a record.

        Raises:
            DataError: the record has no answer, or one that the task does not know.
        """

    def shown(self, record: Mapping[str, Any]) -> Row | None:
        """Return the row of a record with its answer, for people to look at; None where ``overlong`` drops it.

        Raises:
            DataError: as `answer`.
        """
        return self.renderer.row(record, self.answer(record), end=False)

    @abstractmethod
    def example(self, record: Mapping[str, Any]) -> Example | None:
        """Return a record as an example, or None where ``overlong`` drops it.

        Raises:
            DataError: the record lacks a field or its answer.
        """

    @abstractmethod
    def asks(self, examples: Sequence[Example], pad_id: int) -> Asked:
        """Return what the loss of some examples asks of a model."""

    @abstractmethod
    def loss_of(self, answer: Tensor, examples: Sequence[Example]) -> Tensor:
        """Return the loss summed over examples, a scalar.

        Args:
            answer: what the model gave for `asks`: a summed loss, logits ``[N, V]`` or ``[N, C]``, or hidden states
                ``[N, H]``.
            examples: those that were asked about.
        """

    def loss(self, forward: Forward, examples: Sequence[Example], pad_id: int) -> Tensor:
        """Return the loss summed over examples, a scalar; divide it by the sum of their weights."""
        return self.loss_of(self.asks(examples, pad_id).of(forward), examples)

    @abstractmethod
    def predict(
        self, backbone: Backbone, records: Sequence[Mapping[str, Any]], *, batch_size: int
    ) -> list[dict[str, Any]]:
        """Answer records, in order. The backbone's table must hold the virtual tokens."""

    @abstractmethod
    def evaluate(
        self, backbone: Backbone, records: Sequence[Mapping[str, Any]], *, batch_size: int
    ) -> dict[str, float]:
        """Score answers against records that hold the right ones: ``loss`` and the task's metrics.

        Where answers are given for that, `right_metric` is among them, and ``prediction_share``: how many answers are
        the most frequent one.
        """

    def assess(self, backbone: Backbone, records: Sequence[Mapping[str, Any]], *, batch_size: int) -> Assessment:
        """Score answers as `evaluate` does, and say what else there is to know of them."""
        return Assessment(self.evaluate(backbone, records, batch_size=batch_size))


def answer_value(record: Mapping[str, Any], field: str, setting: str, what: str) -> Any:
    """Return what a record holds as its answer.

    Args:
        record: with its answer.
        field: where it should be.
        setting: that names the field.
        what: the answer, as messages call it.

    Raises:
        DataError: the record lacks the field.
    """
    if field not in record:
        raise lacking(record, field, f'has no {what}: it lacks the field "{field}"', f"name the right one as {setting}")
    return record[field]
