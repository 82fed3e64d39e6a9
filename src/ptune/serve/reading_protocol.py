"""The bodies of requests and answers of ``/v1/classify`` and ``/v1/tag``. Knows no engine."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from ptune.serve.protocol import Body, Name, Usage

_Words = Annotated[list[str], Field(min_length=1)]


class ClassifyRequest(Body):
    """Body of ``/v1/classify``."""

    model: Name
    input: str | Annotated[list[str | dict[Name, str]], Field(min_length=1)] = Field(
        description="A text, or several; a record of all the template's fields in place of one."
    )


class TagRequest(Body):
    """Body of ``/v1/tag``."""

    model: Name
    input: str | Annotated[list[str | _Words | dict[Name, str | _Words]], Field(min_length=1)] = Field(
        description="A text, or several; a list of words, or a record of all the template's fields, in place of one."
    )


class Label(BaseModel):
    """The likeliest answer to one text, and the probabilities of all."""

    index: int
    label: str
    probability: float
    probabilities: dict[str, float]


class Labels(BaseModel):
    """The labels of one text, any number of them, and the probability of each that there is."""

    index: int
    labels: list[str]
    probabilities: dict[str, float]


class ClassifyResponse(BaseModel):
    """Answer of ``/v1/classify``."""

    object: Literal["list"] = "list"
    model: str
    data: list[Label | Labels]
    usage: Usage


class Span(BaseModel):
    """An entity: of words, or of characters where a text was given to be read as one.

    A trained head's has a probability, and one that was written out has none.
    """

    type: str
    start: int
    end: int = Field(description="Behind its last.")
    text: str
    probability: float | None = None


class Tags(BaseModel):
    """The tags of one text's words, and the entities that they mean."""

    index: int
    tokens: list[str]
    tags: list[str]
    spans: list[Span]
    unread_words: int | None = Field(None, description="Words that were cut away, where there are any.")


class Entities(BaseModel):
    """The entities of one text as the model wrote them, and read back."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    spans: list[Span]
    dropped: int


class TagResponse(BaseModel):
    """Answer of ``/v1/tag``."""

    object: Literal["list"] = "list"
    model: str
    data: list[Tags | Entities]
    usage: Usage
