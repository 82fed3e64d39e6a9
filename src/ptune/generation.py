"""Generation on a backbone whose contexts hold virtual tokens: transformers' ``generate``, in batches of like length.

Virtual tokens have no column in the logits, so none is ever generated. Those that open a context are read as keys and
values, which are kept from call to call, where the family allows it. What is said so far is read along: stop texts,
streams, log-probabilities.

Knows nothing of tasks, templates or training. Shapes: B batch, T tokens, F virtual tokens that open the context with
the most of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from ptune.backbone import Backbone
from ptune.batch import IGNORED, Batch, Row, collate
from ptune.deep_prompts import DeepPrompt
from ptune.encoder_decoder import decoder_start
from ptune.errors import BackboneError
from ptune.families import ENCODER_DECODER
from ptune.kept_prefixes import opening_run
from ptune.keys_and_values import new_cache, padded
from ptune.sampling import Generated as Generated
from ptune.sampling import GenerationOptions as GenerationOptions
from ptune.sampling import Logprobs, TokenLogprob, processors
from ptune.virtual_tokens import deep_prompts_of

_UNFINISHED = "\ufffd"  # what a tokenizer gives for bytes that do not make a character yet


def generate(
    backbone: Backbone,
    contexts: Sequence[Sequence[int]],
    options: GenerationOptions | None = None,
    *,
    batch_size: int = 16,
    on_text: Callable[[int, str], None] | None = None,
    on_done: Callable[[int, Generated], None] | None = None,
    go_on: Callable[[int, int], bool] | None = None,
    on_logprobs: Callable[[int, tuple[TokenLogprob, ...]], None] | None = None,
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
        on_logprobs: gets a context's number and, before a piece of its text or its end, those of the tokens told by
            then; where the options ask for them.
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
    with torch.no_grad():
        for numbers in _batches(order, kinds, batch_size):
            batch = [list(contexts[number]) for number in numbers]
            listener = _Listener(numbers, on_text, on_done, go_on, on_logprobs)
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
    decodes_apart = backbone.kind is ENCODER_DECODER
    pad = backbone.tokenizer.pad_token_id
    room = min(_room(backbone, context, options) for context in contexts)
    opened, past = _past(backbone, contexts, room, use_cache, deep)
    # [B, T]; a decoder continues what it reads, so pads stand on the left, and an encoder counts its places from there
    text = _collated([context[n:] for context, n in zip(contexts, opened, strict=True)], pad, decodes_apart)
    ids, mask = text.input_ids, text.attention_mask
    starts = [0] * len(ids) if decodes_apart else (max(opened) + (mask == 0).sum(-1)).tolist()
    if past is not None:
        # [B, F]; nobody looks ids up that are past, but `generate` counts them
        opening = _collated([context[:n] for context, n in zip(contexts, opened, strict=True)], pad, False)
        ids = torch.cat([opening.input_ids, ids], dim=-1)
        mask = torch.cat([opening.attention_mask, mask], dim=-1)
    said = 1 if decodes_apart else ids.shape[1]  # what stands before the new tokens in what `generate` returns
    logprobs = Logprobs(len(ids), options.top_logprobs) if options.logprobs else None
    follower = _Follower(backbone, said, len(contexts), options.stop, listener, logprobs)
    seeds = None if options.seed is None else [_seed(options.seed + number) for number in listener.numbers]
    settings = transformers.GenerationConfig(
        max_new_tokens=room,
        use_cache=use_cache,
        pad_token_id=pad,
        eos_token_id=sorted(follower.end_ids),
        bos_token_id=backbone.tokenizer.bos_token_id,
        decoder_start_token_id=decoder_start(backbone.model.config) if decodes_apart else None,
        do_sample=False,  # a drawn token is the only one that `processors` leave
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
    )
    with backbone.head.on_dense_states():
        output = backbone.model.generate(
            ids.to(backbone.device),
            attention_mask=mask.to(backbone.device),
            generation_config=settings,
            logits_processor=LogitsProcessorList(
                [*([logprobs] if logprobs else []), *processors(options, starts, backbone.vocabulary_size, seeds)]
            ),
            stopping_criteria=StoppingCriteriaList([follower] if listener.listens or options.stop or logprobs else []),
            **({} if past is None else {"past_key_values": past}),
        )
    return [follower.result(number, row) for number, row in enumerate(output[:, said:].tolist())]


def _past(
    backbone: Backbone, contexts: list[list[int]], room: int, use_cache: bool, deep: DeepPrompt | None
) -> tuple[list[int], DynamicCache | None]:
    """Return how many ids open each context that are read as keys and values, and these, shorter ones padded in front.

    Raises:
        BackboneError: a deep prompt, which is nothing else, has no text behind it, or no cache may be kept.
    """
    nothing = [0] * len(contexts)
    if deep is not None:
        opened = len(deep.rows)
        if min(map(len, contexts)) == opened or not use_cache:
            raise BackboneError(
                "a deep prompt is keys and values in a cache, behind which a text is read: give each context a token "
                "of text, and leave the cache on"
            )
        return [opened] * len(contexts), deep.past(len(contexts), backbone.dtype)
    lengths = [opening_run(context, backbone.vocabulary_size) for context in contexts]
    columns = max(lengths) + max(len(context) - n for context, n in zip(contexts, lengths, strict=True))
    if not use_cache or not any(lengths) or backbone.hindrance(columns + room) is not None:
        return nothing, None
    pasts = backbone.plans.prefixes.of(contexts, lengths)
    if not pasts:
        return nothing, None
    lengths = [past.shape[2] for past in pasts]
    return lengths, new_cache(padded(pasts, max(lengths), backbone.dtype, backbone.device), len(contexts))


def _collated(rows: list[list[int]], pad: int, on_the_right: bool) -> Batch:
    return collate([Row(tuple(ids), (IGNORED,) * len(ids)) for ids in rows], pad, "right" if on_the_right else "left")


def _seed(seed: int) -> int:
    """Return a seed within what generators take."""
    return (seed + 2**63) % 2**64 - 2**63


@dataclass(frozen=True)
class _Listener:
    """What the caller wants to hear and say while rows grow, by the numbers of a batch's contexts."""

    numbers: list[int]
    on_text: Callable[[int, str], None] | None
    on_done: Callable[[int, Generated], None] | None
    go_on: Callable[[int, int], bool] | None
    on_logprobs: Callable[[int, tuple[TokenLogprob, ...]], None] | None

    @property
    def listens(self) -> bool:
        return bool(self.on_text or self.on_done or self.go_on or self.on_logprobs)

    def text(self, row: int, text: str) -> None:
        if self.on_text:
            self.on_text(self.numbers[row], text)

    def logprobs(self, row: int, logprobs: tuple[TokenLogprob, ...]) -> None:
        if self.on_logprobs and logprobs:
            self.on_logprobs(self.numbers[row], logprobs)

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
        logprobs: Logprobs | None,
    ) -> None:
        self._tokenizer = backbone.tokenizer
        self._context_length, self._stop, self._listener = context_length, stop, listener
        self._logprobs = logprobs
        self._told = [0] * count  # tokens whose log-probabilities were handed out
        configured = getattr(backbone.model.generation_config, "eos_token_id", None)
        configured = configured if isinstance(configured, list) else [configured]
        self.end_ids = {i for i in (*configured, backbone.tokenizer.eos_token_id) if i is not None}
        self._shown = [0] * count
        self._done: dict[int, Generated] = {}

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        if self._logprobs is not None:
            self._logprobs.chose(input_ids[:, -1])
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
            self._show(number, ids, text, whole=True)
            told = None if self._logprobs is None else self._logprobs.of(number, 0, len(ids))
            self._done[number] = Generated(tuple(ids), text, "stop" if ended or found else "length", told)
            self._listener.done(number, self._done[number])
        return self._done[number]

    def _ends(self, number: int, row: list[int]) -> bool:
        ids, ended = self._spoken(row)
        if not ended and (self._listener.on_text or self._listener.on_logprobs or self._stop):
            text, ended = self._cut(self._text(ids))
            if not ended:  # else `result` shows it, without the tokens of the stop text
                self._show(number, ids, text)
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

    def _show(self, number: int, ids: list[int], text: str, *, whole: bool = False) -> None:
        """Hand out what is new of a row's text, and the log-probabilities of the tokens that say it."""
        if not whole:  # the end of it may yet become another character, or a stop text
            text = text.rstrip(_UNFINISHED)
            text = text[: len(text) - max(map(len, self._stop), default=1) + 1]
        if self._logprobs is not None and self._listener.on_logprobs:
            told = end = self._told[number]
            while end < len(ids) and (
                whole or len(self._text(ids[:end])) < len(text) >= len(self._text(ids[: end + 1]))
            ):  # a token that adds nothing may yet be cut off with a stop text
                end += 1
            if whole or len(text) > self._shown[number]:
                self._listener.logprobs(number, self._logprobs.of(number, told, end))
                self._told[number] = end
        if self._listener.on_text is not None and len(text) > self._shown[number]:
            self._listener.text(number, text[self._shown[number] :])
            self._shown[number] = len(text)
