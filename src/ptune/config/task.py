"""The settings of each task. Another task is another class here, and a member of `TaskConfig`.

Knows nothing of models, tensors or files' contents, and imports no torch, so that ``ptune --help`` stays quick.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, field_validator, model_validator

from ptune.config.settings import Settings, label_text
from ptune.errors import TemplateError
from ptune.template import Field as TemplateField
from ptune.template import Template

TAG = re.compile(r"O|[BIESMLU](-.+)?")
"""Tags of the schemes that are read alike: BIO, IOB1, BIOES, BMES, BILOU; without a type for word segmentation."""

_Value = TypeVar("_Value")


def _names_as_text(value: Any) -> Any:
    # YAML reads `yes`, `true` and `1` as booleans and numbers; data files write them as text or as such.
    if not isinstance(value, dict):
        return value
    _distinct(tuple(map(label_text, value)), "name")
    return {label_text(k): v for k, v in value.items()}


_Named = Annotated[dict[str, _Value], BeforeValidator(_names_as_text)]
"""A mapping by labels, or by what the data calls them."""

_FIT_TEMPERATURE = (
    "Fit one temperature on dev at the end of training, for probabilities that mean what they say; no label changes."
)


class ClassificationConfig(Settings):
    """A record belongs to one of several labels, each with words that stand for it."""

    type: Literal["classification"] = "classification"
    label_field: str = Field("label", description="The record's field that holds its label.")
    verbalizer: _Named[str] = Field(
        description="Label -> its words, blanks kept, as in {positive: ' great', negative: ' terrible'}."
    )
    calibration: Literal["none", "length", "prior"] = Field(
        "none", description="Divide a label's score by its tokens, or subtract its score under an empty record."
    )

    metric: Literal["accuracy", "macro_f1", "micro_f1"] = Field("accuracy", description="Chooses the best checkpoint.")
    negative_label: str | None = Field(
        None, description="Left out of micro F1, as relation extraction leaves out its class for no relation."
    )
    contained: dict[str, str] = Field(
        default_factory=dict,
        description="Field -> the field in whose text it must stand, as the two entities of a relation do.",
    )
    label_weights: _Named[float] = Field(
        default_factory=dict, description="How much a label's examples weigh in the loss; 1 where absent."
    )
    fit_temperature: bool = Field(True, description=_FIT_TEMPERATURE)

    @field_validator("verbalizer")
    @classmethod
    def _two_labels(cls, value: dict[str, str]) -> dict[str, str]:
        if len(value) < 2:
            raise ValueError("a classification needs at least two labels")
        empty = [label for label, words in value.items() if not words]
        if empty:
            raise ValueError(f"label {empty[0]!r} has no words")
        return value

    @model_validator(mode="after")
    def _labels_that_exist(self) -> ClassificationConfig:
        named = [*self.label_weights, *([] if self.negative_label is None else [self.negative_label])]
        _check_weights(self.label_weights)
        unknown = [label for label in named if label not in self.verbalizer]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is no label of the verbalizer, which has {', '.join(self.verbalizer)}")
        if self.metric == "micro_f1" and self.negative_label is None:
            raise ValueError("micro_f1 without a negative_label is the accuracy; name the label to leave out")
        return self


class ChoiceConfig(Settings):
    """A record's answer is one of several texts in the record itself."""

    type: Literal["choice"] = "choice"
    choices: tuple[str, ...] = Field(min_length=2, description="The record's fields that hold them.")
    label_field: str = Field(
        "label", description="The record's field that names the right one: by number from 0, by field or by text."
    )
    label_by: Literal["any", "number", "field", "text"] = Field(
        "any", description="Which of the three a label is, where one could be read as another choice's, too."
    )
    before: str = Field(" ", description="What stands between the template's end and a choice.")
    normalise: bool = Field(False, description="Score by the mean over a choice's tokens instead of their sum.")
    fit_temperature: bool = Field(True, description=_FIT_TEMPERATURE)

    @field_validator("choices")
    @classmethod
    def _different_choices(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return _distinct(value, "choice")


class GenerationConfig(Settings):
    """A record is answered by text."""

    type: Literal["generation"] = "generation"
    answer_field: str = Field("output", description="The record's field that holds its answer.")
    max_new_tokens: int = Field(128, gt=0, description="How long an answer may become.")
    metric: Literal["loss", "rouge_l", "bleu", "exact_match"] = Field(
        "loss", description="Chooses the best checkpoint."
    )


class LinearClassificationConfig(Settings):
    """A record belongs to one of several labels, or to several, by a trained linear head instead of by words."""

    type: Literal["linear_classification"] = "linear_classification"
    label_field: str = Field("label", description="The record's field that holds its label, or its labels.")
    labels: tuple[str, ...] = Field((), description="The labels; those of the training data, sorted, where absent.")
    multi_label: bool = Field(
        False, description="A record has any number of labels: a list of them, or one text with separators."
    )
    separator: str = Field(",", min_length=1, description="Between labels in a text, where multi_label is on.")
    label_weights: _Named[float] = Field(
        default_factory=dict, description="How much a label's examples weigh in the loss; 1 where absent."
    )
    fit_temperature: bool = Field(True, description=f"{_FIT_TEMPERATURE} Not with multi_label.")
    metric: Literal["accuracy", "macro_f1", "micro_f1", "exact_match"] | None = Field(
        None,
        validate_default=False,
        description="Chooses the best checkpoint: accuracy or macro_f1; with multi_label micro_f1, macro_f1 or "
        "exact_match; the first of them where absent.",
    )

    @field_validator("labels", mode="before")
    @classmethod
    def _labels_are_text(cls, value: Any) -> Any:
        return tuple(map(label_text, value)) if isinstance(value, list | tuple) else value

    @field_validator("labels")
    @classmethod
    def _different_labels(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return _distinct(value, "label")

    @model_validator(mode="after")
    def _what_goes_together(self) -> LinearClassificationConfig:
        known = ("micro_f1", "macro_f1", "exact_match") if self.multi_label else ("accuracy", "macro_f1")
        if self.metric is not None and self.metric not in known:
            raise ValueError(
                f"metric {self.metric} does not go with multi_label {str(self.multi_label).lower()}; "
                f"choose {', '.join(known[:-1])} or {known[-1]}"
            )
        if not self.multi_label and self.separator != ",":
            raise ValueError("separator stands between several labels, and multi_label is off; turn it on")
        _check_weights(self.label_weights)
        if len(self.labels) == 1 and not self.multi_label:
            raise ValueError("a classification needs at least two labels; list them, or none to take the data's")
        return self


class TaggingConfig(Settings):
    """Every word of a record has a tag, as for named entities, by a trained linear head."""

    type: Literal["tagging"] = "tagging"
    tokens_field: str = Field("tokens", description="The record's field that holds its words, a list.")
    tags_field: str = Field("tags", description="The record's field that holds their tags, a list as long.")
    tags: tuple[str, ...] = Field((), description="The tags; those of the training data, sorted, where absent.")
    tag_names: _Named[str] = Field(
        default_factory=dict, description="What the data calls a tag -> the tag, as in {0: O, 1: B-PER, 2: I-PER}."
    )
    metric: Literal["entity_f1", "token_accuracy"] = Field("entity_f1", description="Chooses the best checkpoint.")

    @field_validator("tags")
    @classmethod
    def _different_tags(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return _distinct(value, "tag")

    @model_validator(mode="after")
    def _tags_of_a_scheme(self) -> TaggingConfig:
        unknown = [tag for tag in (*self.tags, *self.tag_names.values()) if not TAG.fullmatch(tag)]
        if unknown:
            raise ValueError(scheme_mistake(unknown[0]))
        return self


def _check_weights(weights: dict[str, float]) -> None:
    weightless = [label for label, weight in weights.items() if weight <= 0]
    if weightless:
        raise ValueError(f"the weight of {weightless[0]!r} is not above 0; leave its records out instead")


def _distinct(values: tuple[str, ...], what: str) -> tuple[str, ...]:
    twice = [value for number, value in enumerate(values) if value in values[:number]]
    if twice:
        raise ValueError(f"the {what} {twice[0]!r} stands there twice; list each once")
    return values


def scheme_mistake(tag: str) -> str:
    """Return what is wrong with a tag of no scheme."""
    return (
        f"the tag {tag!r} is of no scheme that ptune reads; write O, or B-, I-, E-, M-, S-, L- or U- and a type "
        "(BIO, IOB1, BIOES, BMES, BILOU), as in B-PER"
    )


def head_outputs(task: Settings) -> tuple[str, ...] | None:
    """Return what the linear head of a task scores; None for a task that has no linear head."""
    if isinstance(task, LinearClassificationConfig):
        return task.labels
    return task.tags if isinstance(task, TaggingConfig) else None


def check_task_template(task: Settings, template: Template) -> None:
    """See that a template has what its task needs: a place for the answer, or for the words that are tagged.

    Raises:
        TemplateError: it has not.
    """
    if not isinstance(task, TaggingConfig):
        if not template.has_answer:
            raise TemplateError(
                f"a template has one {{answer}}, and there is none in {template.source!r}; put it at the end"
            )
        return
    field = task.tokens_field
    if template.has_answer:
        raise TemplateError(
            f"tags are read at the words themselves, so the template of a tagging has no {{answer}}; take it out of "
            f"{template.source!r}"
        )
    if template.pieces.count(TemplateField(field)) != 1:
        raise TemplateError(
            f"the template of a tagging names the field of its words once, outside optional pieces: put {{{field}}} "
            f"into {template.source!r}, or name another field as task.tokens_field"
        )


class ExtractionConfig(Settings):
    """A record's entities are written out as text, as in `person: John Smith; place: Paris`, and read back as spans.

    Records hold tokens and tags (BIO, BIOES and BMES read alike), or a text and spans of its characters.
    """

    type: Literal["extraction"] = "extraction"
    types: dict[str, str] = Field(
        min_length=1, description="Type -> the word that stands for it, as in {PER: person, LOC: place}."
    )
    tokens_field: str = Field("tokens", description="The record's field that holds its words, or its characters.")
    tags_field: str = Field("tags", description="The field that holds a tag for each of them.")
    text_field: str = Field("text", description="The field that holds its text, where it has no tokens.")
    spans_field: str = Field("spans", description="The field that holds a list of type, start and end in the text.")
    separator: str = Field("; ", description="Between two entities.")
    none: str = Field("none", min_length=1, description="What is written where there are none.")
    max_new_tokens: int = Field(128, gt=0, description="How long an answer may become.")
    metric: Literal["f1", "loss"] = Field(
        "f1", description="Chooses the best checkpoint: of entities, each with its type and both ends, or the loss."
    )

    @model_validator(mode="after")
    def _words_that_can_be_read_back(self) -> ExtractionConfig:
        words, mark = list(self.types.values()), self.separator.strip() or self.separator
        if not mark or mark == ":":
            raise ValueError("the separator is empty or the colon behind a type; choose another, as '; '")
        broken = [word for word in words if not word.strip() or word != word.strip() or ":" in word or mark in word]
        if broken:
            raise ValueError(
                f"the word {broken[0]!r} is empty, begins or ends with a blank, or holds a colon or the separator"
            )
        if len(set(words)) < len(words) or self.none in words:
            raise ValueError("two types have one word, or one has that of no entity; give each its own")
        return self


TASK_CONFIGS = (
    ClassificationConfig,
    LinearClassificationConfig,
    ChoiceConfig,
    TaggingConfig,
    GenerationConfig,
    ExtractionConfig,
)
TaskConfig = Annotated[
    ClassificationConfig
    | LinearClassificationConfig
    | ChoiceConfig
    | TaggingConfig
    | GenerationConfig
    | ExtractionConfig,
    Field(discriminator="type"),
]
