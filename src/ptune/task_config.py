"""The settings of each task. Another task is another class here, and a member of `TaskConfig`.

Knows nothing of models, tensors or files' contents, and imports no torch, so that ``ptune --help`` stays quick.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ptune.settings import Settings, label_text

_FIT_TEMPERATURE = (
    "Fit one temperature on dev at the end of training, for probabilities that mean what they say; no label changes."
)


class ClassificationConfig(Settings):
    """A record belongs to one of several labels, each with words that stand for it."""

    type: Literal["classification"] = "classification"
    label_field: str = Field("label", description="The record's field that holds its label.")
    verbalizer: dict[str, str] = Field(
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
    label_weights: dict[str, float] = Field(
        default_factory=dict, description="How much a label's examples weigh in the loss; 1 where absent."
    )
    fit_temperature: bool = Field(True, description=_FIT_TEMPERATURE)

    @field_validator("verbalizer", mode="before")
    @classmethod
    def _labels_are_text(cls, value: Any) -> Any:
        # YAML reads `yes`, `true` and `1` as booleans and numbers; data files write them as text or as such.
        return {label_text(k): v for k, v in value.items()} if isinstance(value, dict) else value

    @field_validator("verbalizer")
    @classmethod
    def _two_labels(cls, value: dict[str, str]) -> dict[str, str]:
        if len(value) < 2:
            raise ValueError("a classification needs at least two labels")
        empty = [label for label, words in value.items() if not words]
        if empty:
            raise ValueError(f"label {empty[0]!r} has no words")
        return value

    @field_validator("label_weights", mode="before")
    @classmethod
    def _weights_of_text(cls, value: Any) -> Any:
        return {label_text(k): v for k, v in value.items()} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _labels_that_exist(self) -> ClassificationConfig:
        named = [*self.label_weights, *([] if self.negative_label is None else [self.negative_label])]
        weightless = [label for label, weight in self.label_weights.items() if weight <= 0]
        if weightless:
            raise ValueError(f"the weight of {weightless[0]!r} is not above 0; leave its records out instead")
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
    before: str = Field(" ", description="What stands between the template's end and a choice.")
    normalise: bool = Field(False, description="Score by the mean over a choice's tokens instead of their sum.")
    fit_temperature: bool = Field(True, description=_FIT_TEMPERATURE)


class GenerationConfig(Settings):
    """A record is answered by text."""

    type: Literal["generation"] = "generation"
    answer_field: str = Field("output", description="The record's field that holds its answer.")
    max_new_tokens: int = Field(128, gt=0, description="How long an answer may become.")
    metric: Literal["loss", "rouge_l", "bleu", "exact_match"] = Field(
        "loss", description="Chooses the best checkpoint."
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


TASK_CONFIGS = (ClassificationConfig, ChoiceConfig, GenerationConfig, ExtractionConfig)
TaskConfig = Annotated[
    ClassificationConfig | ChoiceConfig | GenerationConfig | ExtractionConfig, Field(discriminator="type")
]
