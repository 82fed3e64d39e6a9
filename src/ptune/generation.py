"""Generation on a backbone whose contexts hold virtual tokens: transformers' ``generate``, in batches of like length.

Virtual tokens have no column in the logits, so none is ever generated. What looks at the ids said so far (penalties on
repeating) is shown the text alone, for a virtual token has no word either.

Knows nothing of tasks, templates or training. Shapes: B batch, T tokens, V rows of the backbone's input matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ptune.backbone import Backbone
from ptune.batch import IGNORED, Row, collate
from ptune.deep_prompts import DeepPrompt
from ptune.encoder_decoder import decoder_start
from ptune.errors import BackboneError
from ptune.families import ENCODER_DECODER
from ptune.settings import Settings
from ptune.virtual_tokens import deep_prompts_of

_OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
_UNFINISHED = "�"  # what a tokenizer gives for bytes that do not make a character yet


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
    seed: int | None = None

    @model_validator(mode="after")
    def _sampling_only_where_sampled(self) -> GenerationOptions:
        given = [name for name in _OF_SAMPLING if getattr(self, name) != type(self).model_fields[name].default]
        if given and not self.do_sample:
            raise ValueError(f"{', '.join(given)} only count when sampling, and do_sample is off; set do_sample=True")
        return self

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "" in value:
            raise ValueError("an empty stop text would stop at once; leave it out")
        return value


@dataclass(frozen=True)
class Generated:
    """One continuation.

    Attributes:
        ids: of the new tokens, without the end token.
        text: what they say, up to a stop text.
        finished: ``stop`` at the end token or a stop text, ``length`` at the limit.
    """

    ids: tuple[int, ...]
    text: str
    finished: Literal["stop", "length"]


def generate(
    backbone: Backbone,
    contexts: Sequence[Sequence[int]],
    options: GenerationOptions | None = None,
    *,
    batch_size: int = 16,
    on_text: Callable[[int, str], None] | None = None,
    on_done: Callable[[int, Generated], None] | None = None,
    go_on: Callable[[int, int], bool] | None = None,
    use_cache: bool = True,
) -> list[Generated]:
    """Continue contexts of ids, virtual ones among them, whose rows stand in the backbone's table.

    Args:
        backbone: the frozen model.
        contexts: ids of each; any mix of lengths and of soft prompts.
        options: how to decode; greedy where absent.
        batch_size: contexts decoded at once.
        on_text: gets a context's number and each piece of its text as it comes, never half a character.
        on_done: gets a context's number and its continuation as soon as it has ended, while others still grow.
        go_on: asked after each token with a context's number and how many tokens it has; False ends it there.
        use_cache: keep keys and values; without it the same answers come more slowly.

    Returns:
        One continuation a context, in their order.

    Raises:
        BackboneError: the model writes no text, or a context, its virtual tokens counted, leaves no room in the
            backbone's limit; or it opens with a deep prompt and has no text, or no cache may be kept for it.
    """
    if not backbone.kind.generates:
        raise BackboneError(f'"{backbone.name}" is {backbone.kind.words}, which writes no text')
    options = options or GenerationOptions()
    prompts = deep_prompts_of(backbone.model)
    deep = [prompts.first_id(context) for context in contexts]
    order = sorted(range(len(contexts)), key=lambda number: (deep[number] or 0, -len(contexts[number])))
    kinds = [(_room(backbone, context, options), first) for context, first in zip(contexts, deep, strict=True)]
    results: dict[int, Generated] = {}
    seeded = torch.random.fork_rng() if options.seed is not None else nullcontext()
    with seeded:
        if options.seed is not None:
            torch.manual_seed(options.seed)
        for numbers in _batches(order, kinds, batch_size):
            batch = [list(contexts[number]) for number in numbers]
            listener = _Listener(numbers, on_text, on_done, go_on)
            first = deep[numbers[0]]
            prompt = None if first is None else prompts.get(first)
            answers = _generate_batch(backbone, batch, options, listener, use_cache, prompt)
            results |= zip(numbers, answers, strict=True)
    return [results[number] for number in range(len(contexts))]


def _room(backbone: Backbone, context: Sequence[int], options: GenerationOptions) -> int:
    """Return how many tokens an answer may have, by the options and the backbone's limit."""
    if not len(context):
        raise BackboneError("there is nothing to continue: the text gives no tokens; write some")
    limit = backbone.context_limit
    if limit is None:
        return options.max_new_tokens
    room = limit - (1 if backbone.kind is ENCODER_DECODER else len(context))
    if room < 1:
        raise BackboneError(
            f"the context has {len(context)} tokens, virtual ones counted, and {backbone.name} takes "
            f"{limit}: no room for an answer; shorten the text"
        )
    return min(options.max_new_tokens, room)


def _batches(order: Sequence[int], kinds: Sequence[tuple[int, int | None]], batch_size: int) -> list[list[int]]:
    """Return what is decoded at once: contexts of one kind, which stand together in ``order``.

    Those have the same room, so that none shortens its neighbour's answer, and the same deep prompt in front, or none.
    """
    batches: list[list[int]] = []
    for number in order:
        if not batches or len(batches[-1]) == batch_size or kinds[batches[-1][0]] != kinds[number]:
            batches.append([])
        batches[-1].append(number)
    return batches


def _generate_batch(
    backbone: Backbone,
    contexts: list[list[int]],
    options: GenerationOptions,
    listener: _Listener,
    use_cache: bool,
    deep: DeepPrompt | None,
) -> list[Generated]:
    longest = max(map(len, contexts))
    decodes_apart = backbone.kind is ENCODER_DECODER
    pad = backbone.tokenizer.pad_token_id
    # [B, T]; a decoder continues what it reads, so pads stand on the left, and an encoder counts its places from there
    opened = 0 if deep is None else len(deep.rows)  # pads stand behind a deep prompt, which is the past of all rows
    rows = [Row(tuple(context[opened:]), (IGNORED,) * (len(context) - opened)) for context in contexts]
    batch = collate(rows, pad, "right" if decodes_apart else "left")
    ids, mask = batch.input_ids, batch.attention_mask
    pads = [0] * len(rows) if decodes_apart else (mask == 0).sum(-1).tolist()
    past: dict[str, Any] = {}
    if deep is not None:
        if min(len(row.ids) for row in rows) == 0 or not use_cache:
            raise BackboneError(
                "a deep prompt is keys and values in a cache, behind which a text is read: give each context a token "
                "of text, and leave the cache on"
            )
        ids = torch.cat([torch.tensor([contexts[0][:opened]] * len(rows)), ids], dim=-1)
        mask = torch.cat([mask.new_ones(len(rows), opened), mask], dim=-1)
        past["past_key_values"] = deep.past(len(rows), backbone.dtype)
    said = 1 if decodes_apart else longest  # what stands before the new tokens in what `generate` returns
    follower = _Follower(backbone, said, len(contexts), options.stop, listener)
    processors, warpers = _processors(options, [opened + count for count in pads], backbone.vocabulary_size)
    settings = transformers.GenerationConfig(
        max_new_tokens=min(_room(backbone, context, options) for context in contexts),
        use_cache=use_cache,
        pad_token_id=pad,
        eos_token_id=sorted(follower.end_ids),
        bos_token_id=backbone.tokenizer.bos_token_id,
        decoder_start_token_id=decoder_start(backbone.model.config) if decodes_apart else None,
        do_sample=options.do_sample and options.temperature > 0,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        **warpers,
    )
    with torch.no_grad():
        output = backbone.model.generate(
            ids.to(backbone.device),
            attention_mask=mask.to(backbone.device),
            generation_config=settings,
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList([follower] if listener.listens or options.stop else []),
            **past,
        )
    return [follower.result(number, row) for number, row in enumerate(output[:, said:].tolist())]


def _processors(
    options: GenerationOptions, pads: list[int], vocabulary_size: int
) -> tuple[LogitsProcessorList, dict[str, Any]]:
    """Return processors of ours, and the settings that are left to transformers.

    transformers runs processors of the caller behind its own temperature and cuts. Where a penalty is ours, those
    become ours as well, so that their order stays: penalties, temperature, top_k, top_p, min_p.
    """
    own = LogitsProcessorList()
    if options.repetition_penalty != 1.0:
        own.append(_OnText(RepetitionPenaltyLogitsProcessor(options.repetition_penalty), vocabulary_size, pads))
    if options.no_repeat_ngram_size:
        own.append(_OnText(NoRepeatNGramLogitsProcessor(options.no_repeat_ngram_size), vocabulary_size, pads))
    if not (options.do_sample and options.temperature > 0):
        return own, {}
    if not own:
        return own, {
            "temperature": options.temperature,
            "top_k": options.top_k,
            "top_p": options.top_p,
            "min_p": options.min_p or None,
        }
    if options.temperature != 1.0:
        own.append(TemperatureLogitsWarper(options.temperature))
    if options.top_k:
        own.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1.0:
        own.append(TopPLogitsWarper(options.top_p))
    if options.min_p:
        own.append(MinPLogitsWarper(options.min_p))
    return own, {"temperature": 1.0, "top_k": 0, "top_p": 1.0}


class _OnText(LogitsProcessor):
    """A processor that is shown each row's text alone: neither its pads nor its virtual tokens."""

    def __init__(self, inner: LogitsProcessor, vocabulary_size: int, pads: list[int]) -> None:
        self._inner, self._vocabulary_size, self._pads = inner, vocabulary_size, pads

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = []
        for ids, row, pads in zip(input_ids, scores, self._pads, strict=True):
            text = ids[pads:]
            rows.append(self._inner(text[text < self._vocabulary_size][None], row[None]))
        return torch.cat(rows)


@dataclass(frozen=True)
class _Listener:
    """What the caller wants to hear and say while rows grow, by the numbers of a batch's contexts."""

    numbers: list[int]
    on_text: Callable[[int, str], None] | None
    on_done: Callable[[int, Generated], None] | None
    go_on: Callable[[int, int], bool] | None

    @property
    def listens(self) -> bool:
        return bool(self.on_text or self.on_done or self.go_on)

    def text(self, row: int, text: str) -> None:
        if self.on_text:
            self.on_text(self.numbers[row], text)

    def done(self, row: int, generated: Generated) -> None:
        if self.on_done:
            self.on_done(self.numbers[row], generated)

    def goes_on(self, row: int, length: int) -> bool:
        return self.go_on is None or self.go_on(self.numbers[row], length)


class _Follower(StoppingCriteria):
    """Reads along while rows grow: hands out finished text, and stops a row at a stop text or when asked to."""

    def __init__(
        self,
        backbone: Backbone,
        context_length: int,
        count: int,
        stop: tuple[str, ...],
        listener: _Listener,
    ) -> None:
        self._tokenizer = backbone.tokenizer
        self._context_length, self._stop, self._listener = context_length, stop, listener
        configured = getattr(backbone.model.generation_config, "eos_token_id", None)
        configured = configured if isinstance(configured, list) else [configured]
        self.end_ids = {i for i in (*configured, backbone.tokenizer.eos_token_id) if i is not None}
        self._shown = [0] * count
        self._done: dict[int, Generated] = {}

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        rows = input_ids[:, self._context_length :].tolist()
        stopped = [number in self._done or self._ends(number, row) for number, row in enumerate(rows)]
        return torch.tensor(stopped, device=input_ids.device)

    def result(self, number: int, row: list[int]) -> Generated:
        """Return a finished row's continuation, and hand out what of its text was still held back."""
        if number not in self._done:
            ids, ended = self._spoken(row)
            text, found = self._cut(self._text(ids))
            while found and ids and len(self._text(ids[:-1])) >= len(text):
                ids = ids[:-1]  # what was said is the text, and so are its ids
            self._show(number, text, whole=True)
            self._done[number] = Generated(tuple(ids), text, "stop" if ended or found else "length")
            self._listener.done(number, self._done[number])
        return self._done[number]

    def _ends(self, number: int, row: list[int]) -> bool:
        ids, ended = self._spoken(row)
        if not ended and (self._listener.on_text or self._stop):
            text, ended = self._cut(self._text(ids))
            self._show(number, text, whole=ended)
        if ended or not self._listener.goes_on(number, len(row)):
            self.result(number, row)
        return number in self._done

    def _spoken(self, row: list[int]) -> tuple[list[int], bool]:
        for place, token in enumerate(row):
            if token in self.end_ids:
                return row[:place], True
        return row, False

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _cut(self, text: str) -> tuple[str, bool]:
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        return (text[: min(places)], True) if places else (text, False)

    def _show(self, number: int, text: str, *, whole: bool) -> None:
        if self._listener.on_text is None:
            return
        if not whole:  # the end of it may yet become another character, or a stop text
            text = text.rstrip(_UNFINISHED)
            text = text[: len(text) - max(map(len, self._stop), default=1) + 1]
        if len(text) > self._shown[number]:
            self._listener.text(number, text[self._shown[number] :])
            self._shown[number] = len(text)
