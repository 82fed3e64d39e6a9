"""The bodies of requests and answers: OpenAI's shapes, and those of administration. Knows no engine.

A member is honoured or refused, and never dropped: an unknown one is an error, and so is any value but the one that
changes nothing (as n: 1) of a member that is known and not offered.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_serializer, model_validator


def _only(neutral: object, reason: str) -> AfterValidator:
    def check(value: object) -> object:
        if value is not None and value != neutral:
            raise ValueError(f"{reason}; leave it out")
        return value

    return AfterValidator(check)


_Penalty = Annotated[float | None, _only(0, "is not offered here: repetition_penalty is")]
_StopText = Annotated[str, Field(min_length=1, max_length=200)]
Name = Annotated[str, Field(min_length=1, max_length=256)]


class Body(BaseModel):
    """Base of all requests: numbers are numbers, unknown members refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _text_that_can_be_written(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            raise ValueError("it is no JSON object; send one, under Content-Type: application/json")
        try:
            json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a text holds half of a surrogate pair, which is no character; send it whole") from None
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        return values


class StreamOptions(Body):
    """How to stream."""

    include_usage: bool = False


class Sampling(Body):
    """What completions and chats have in common. Greedy unless temperature, top_p, top_k or min_p is given."""

    model: Name
    fields: dict[Name, str] = Field(default_factory=dict, description="The template's fields beside the first.")
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1, le=1_000_000)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    no_repeat_ngram_size: int | None = Field(None, ge=0, le=1000)
    stop: _StopText | Annotated[list[_StopText], Field(max_length=16)] | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    n: Annotated[int | None, _only(1, "is 1 here: one answer to a text")] = None
    frequency_penalty: _Penalty = None
    presence_penalty: _Penalty = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=256, description="Changes nothing, as with OpenAI.")

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options go with stream: true; set it or leave them out")
        return self

    def options(self) -> dict[str, Any]:
        """Return settings of `ptune.generation.sampling.GenerationOptions`, but for the length.

        Requests that ask for the same come out equal, so that they can share a batch.
        """
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        drawn = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
        }
        drawn = {name: value for name, value in drawn.items() if value is not None}
        options: dict[str, Any] = {"stop": tuple(stop)}
        if drawn and self.temperature != 0:
            options |= {"do_sample": True, "seed": self.seed, **drawn}
        for name in ("repetition_penalty", "no_repeat_ngram_size"):
            if getattr(self, name) is not None:
                options[name] = getattr(self, name)
        return options


class CompletionRequest(Sampling):
    """Body of ``/v1/completions``."""

    prompt: str | Annotated[list[str], Field(min_length=1)]
    best_of: Annotated[int | None, _only(1, "is 1 here: one answer to a text")] = None
    echo: Annotated[bool | None, _only(False, "is not offered here")] = None
    logprobs: int | None = Field(None, ge=0, le=20, description="Log-probabilities of so many tokens at each place.")
    suffix: Annotated[str | None, _only(None, "is not offered here")] = None

    def options(self) -> dict[str, Any]:
        """Return settings of `ptune.generation.sampling.GenerationOptions`, but for the length."""
        told = {} if self.logprobs is None else {"logprobs": True, "top_logprobs": self.logprobs}
        return super().options() | told


class TextPart(Body):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]

    @property
    def text(self) -> str:
        """Its text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Sampling):
    """Body of ``/v1/chat/completions``."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=256)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = Field(None, description="Tell the log-probability of each token.")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="And of so many likeliest ones in its place.")

    @model_validator(mode="after")
    def _one_length(self) -> ChatRequest:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens is the old name of max_completion_tokens, and the two differ; give one")
        return self

    @model_validator(mode="after")
    def _top_of_what_is_told(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs go with logprobs: true; set it or leave them out")
        return self

    def options(self) -> dict[str, Any]:
        """Return settings of `ptune.generation.sampling.GenerationOptions`, but for the length."""
        told = {"logprobs": True, "top_logprobs": self.top_logprobs or 0} if self.logprobs else {}
        return super().options() | told


class Upload(Body):
    """Body of ``PUT /v1/prompts/NAME``: the two files of a soft prompt."""

    description: str = Field(description="The text of ptune.json.")
    tensors: str = Field(description="soft_prompt.safetensors in base64.")


class Removed(BaseModel):
    """Answer of ``DELETE /v1/prompts/NAME``."""

    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True


class Usage(BaseModel):
    """Tokens that the model read, virtual ones among them, and wrote."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    """Log-probabilities as completions have them, a member a token in each list."""

    text_offset: list[int]
    token_logprobs: list[float]
    tokens: list[str]
    top_logprobs: list[dict[str, float]]


class TokenAlternative(BaseModel):
    """A token and its log-probability; no bytes where it is part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenEntry(TokenAlternative):
    """A token that was written, and the likeliest in its place."""

    top_logprobs: list[TokenAlternative]


class ChatLogprobs(BaseModel):
    """Log-probabilities as chats have them."""

    content: list[TokenEntry]
    refusal: None = None


class CompletionChoice(BaseModel):
    """The continuation of one text."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"] | None
    logprobs: CompletionLogprobs | None = None


class Completion(BaseModel):
    """Answer of ``/v1/completions``, and each event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class AnswerMessage(BaseModel):
    """What the assistant says."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    """The answer to a conversation."""

    index: int
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    logprobs: ChatLogprobs | None = None


class ChatCompletion(BaseModel):
    """Answer of ``/v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    """What came since."""

    role: Literal["assistant"] | None = None
    content: str | None = None

    @model_serializer
    def _what_there_is(self) -> dict[str, str]:
        return {name: value for name, value in vars(self).items() if value is not None}


class ChatDelta(BaseModel):
    """A piece of the answer to a conversation."""

    index: int
    delta: Delta
    finish_reason: Literal["stop", "length"] | None = None
    logprobs: ChatLogprobs | None = None


class ChatCompletionChunk(BaseModel):
    """An event of a streamed chat."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatDelta]
    usage: Usage | None = None


class Model(BaseModel):
    """A soft prompt, or the bare backbone."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["ptune"] = "ptune"
    task: str | None = Field(description="As in its settings, classification say; null for the bare backbone.")


class ModelList(BaseModel):
    """Answer of ``/v1/models``."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorEntry(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every error's body."""

    error: ErrorEntry


class Health(BaseModel):
    """Answer of ``/healthz`` and ``/readyz``."""

    status: Literal["ok", "ready", "not ready"]
