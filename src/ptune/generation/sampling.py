"""Which token comes next: the options of decoding, what they do to a token's scores, and the draw.

All of it is done here, in transformers' order: penalties, temperature, top_k, top_p, min_p. Every text that is given a
seed draws from a generator of its own, so neither its neighbours in a batch nor other threads change what it says.

Knows nothing of models or tokenizers. Shapes: V rows of the backbone's input matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ptune.config.settings import Settings

_COLDEST = 1e-6
"""Temperatures below leave the likeliest token alone, and divided by them scores would overflow."""
_OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p")


class GenerationOptions(Settings):
    """How to decode. The names and meanings are those of transformers."""

    max_new_tokens: int = Field(128, gt=0)
    do_sample: bool = False
    temperature: float = Field(1.0, ge=0, description="0 is greedy.")
    top_k: int = Field(0, ge=0, description="0 keeps all tokens.")
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0)
    no_repeat_ngram_size: int = Field(0, ge=0)
    stop: tuple[str, ...] = ()
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="The first text draws by it, the next by seed+1.")
    logprobs: bool = Field(False, description="Tell the log-probability of each token, by the model's own logits.")
    top_logprobs: int = Field(0, ge=0, le=20, description="And of so many likeliest tokens in its place.")

    @model_validator(mode="after")
    def _sampling_only_where_sampled(self) -> GenerationOptions:
        given = [name for name in _OF_SAMPLING if getattr(self, name) != type(self).model_fields[name].default]
        if given and not self.do_sample:
            raise ValueError(f"{', '.join(given)} only count when sampling, and do_sample is off; set do_sample=True")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs go with logprobs, which are off; set logprobs=True")
        return self

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "" in value:
            raise ValueError("an empty stop text would stop at once; leave it out")
        return value

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn, and not the likeliest taken."""
        return self.do_sample and self.temperature >= _COLDEST


@dataclass(frozen=True)
class TokenLogprob:
    """How likely the model held a token where it stands, before penalties, temperature and cuts.

    Attributes:
        id: the token.
        logprob: its log-probability.
        top: the likeliest tokens there with theirs, the likeliest first.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Generated:
    """One continuation.

    Attributes:
        ids: of the new tokens, without the end token.
        text: what they say, up to a stop text.
        finish_reason: ``stop`` at the end token or a stop text, ``length`` at the limit.
        logprobs: of each of the ids, where they were asked for.
    """

    ids: tuple[int, ...]
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: tuple[TokenLogprob, ...] | None = None


def token_logprob(scores: Tensor, token: int, top: int) -> TokenLogprob:
    """Return how likely scores ``[V]`` hold a token, and so many likeliest ones."""
    logprobs = torch.log_softmax(scores.float(), -1)
    best = logprobs.topk(top)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return TokenLogprob(token, float(logprobs[token]), tuple(pairs))


class Draw(LogitsProcessor):
    """Draws a token of one text and leaves no other, so that the likeliest is the drawn one."""

    def __init__(self, seed: int | None) -> None:
        """Take a seed; None draws from torch's own generator."""
        self._seed = seed
        self._generator: torch.Generator | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores ``[1, V]``, minus infinity but for one token."""
        if self._seed is not None and self._generator is None:
            self._generator = torch.Generator(scores.device).manual_seed(self._seed)
        probabilities = scores.softmax(-1)
        if not bool(probabilities.isfinite().all()):  # a penalty may push scores over the edge
            probabilities = torch.zeros_like(scores).scatter(-1, scores.nan_to_num(-torch.inf).argmax(-1, True), 1.0)
        drawn = torch.multinomial(probabilities, 1, generator=self._generator)
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn, 0.0)


def processors(options: GenerationOptions) -> LogitsProcessorList:
    """Return what the options do to the scores of one text's next token, in order; nothing where they are greedy."""
    own = LogitsProcessorList()
    if options.repetition_penalty != 1.0:
        own.append(RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    if options.no_repeat_ngram_size:
        own.append(NoRepeatNGramLogitsProcessor(options.no_repeat_ngram_size))
    if not options.draws:
        return own
    if options.temperature != 1.0:
        own.append(TemperatureLogitsWarper(options.temperature))
    if options.top_k:
        own.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1.0:
        own.append(TopPLogitsWarper(options.top_p))
    if options.min_p:
        own.append(MinPLogitsWarper(options.min_p))
    own.append(Draw(options.seed))
    return own
