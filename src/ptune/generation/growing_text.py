"""A text while it is being written: its next token, what is told of it, and when it ends.

A token is chosen by the text's own options, from its own scores, looking at its own words alone: never at pads or
virtual tokens, and whatever its neighbours in a batch do. Knows nothing of passes, batches or caches. Shapes: V rows of
the backbone's input matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ptune.errors import BackboneError
from ptune.families import ENCODER_DECODER, cached_length
from ptune.generation.sampling import Generated, GenerationOptions, TokenLogprob, processors, token_logprob
from ptune.models.backbone import Backbone
from ptune.pretrained.encoder_decoder import decoder_start
from ptune.prompts.virtual_tokens import deep_prompts_of

_UNFINISHED = "\ufffd"  # what a tokenizer gives for bytes that do not make a character yet


@dataclass(frozen=True)
class Listener:
    """What somebody wants to hear and say while a text is written.

    Attributes:
        on_text: gets each piece of text as it comes, never half a character.
        on_done: gets the whole as soon as it has ended.
        go_on: asked after each token with how many there are; False ends the text there.
        on_logprobs: gets, before a piece of text or the end, those of the tokens told by then, where the options ask
            for them.
    """

    on_text: Callable[[str], Any] | None = None
    on_done: Callable[[Generated], Any] | None = None
    go_on: Callable[[int], bool] | None = None
    on_logprobs: Callable[[tuple[TokenLogprob, ...]], Any] | None = None


class GrowingText:
    """One text that is being written.

    Attributes:
        context: ids that it continues.
        room: most tokens it may have, by its options and the backbone's limit.
        deep: first id of the deep prompt that opens its context; None where none does.
        result: the whole, once it has ended well.
        error: what went wrong in choosing or telling it; it has ended then, and its neighbours go on.
    """

    def __init__(
        self,
        backbone: Backbone,
        context: Sequence[int],
        options: GenerationOptions | None = None,
        listener: Listener | None = None,
    ) -> None:
        """Begin a text.

        Args:
            backbone: that writes.
            context: ids, virtual ones among them, whose rows stand in the backbone's table.
            options: how to decode; greedy where absent.
            listener: of what is written.

        Raises:
            BackboneError: the model writes no text, or the context, its virtual tokens counted, leaves no room in the
                backbone's limit; or it opens with a deep prompt and has no text.
        """
        self.context, self._options, self._listener = (
            list(context),
            options or GenerationOptions(),
            listener or Listener(),
        )
        prompts = deep_prompts_of(backbone.model)
        self.deep = prompts.first_id(self.context)
        seen = None if self.deep is None else cached_length(backbone.model.config)
        self.room = _room(backbone, self.context, self._options, seen)
        if self.deep is not None and len(self.context) == len(prompts.get(self.deep).rows):
            raise BackboneError(
                "a deep prompt is keys and values in a cache, behind which a text is read: give each context a token "
                "of text"
            )
        self.result: Generated | None = None
        self.error: Exception | None = None
        self._tokenizer, self._end_ids = backbone.tokenizer, end_ids(backbone)
        apart = backbone.kind is ENCODER_DECODER  # what is read is no part of what is written
        said = [decoder_start(backbone.model.config)] if apart else self.context
        self._words = [token for token in said if token < backbone.vocabulary_size]
        self._processors = processors(self._options)
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._shown = 0  # characters handed out
        self._told = 0  # tokens whose log-probabilities were handed out

    @property
    def ended(self) -> bool:
        """Whether nothing more is written."""
        return self.result is not None or self.error is not None

    def grow(self, scores: Tensor, likeliest: int) -> int:
        """Choose the next token and return it; tell what may be told, and end the text where it ends.

        Args:
            scores: ``[V]``, the model's logits.
            likeliest: the token whose score is highest.
        """
        try:
            return self._grow(scores, likeliest)
        except Exception as error:
            self.error = error
            return likeliest

    def _grow(self, scores: Tensor, likeliest: int) -> int:
        token = likeliest
        if self._processors:
            words: Any = torch.tensor([self._words + self._ids], dtype=torch.long, device=scores.device)
            token = int(self._processors(words, scores[None].to(torch.float32, copy=True)).argmax())
        if token in self._end_ids:
            self._end("stop")
            return token
        self._ids.append(token)
        if self._options.logprobs:
            self._logprobs.append(token_logprob(scores, token, self._options.top_logprobs))
        if self._listener.on_text or self._listener.on_logprobs or self._options.stop:
            text, stopped = self._cut(self._spelt(self._ids))
            if not stopped:  # else the end shows it, without the tokens of the stop text
                self._show(self._ids, text)
        else:
            stopped = False
        if stopped or len(self._ids) == self.room or not self._goes_on():
            self._end("length")
        return token

    def _goes_on(self) -> bool:
        return self._listener.go_on is None or self._listener.go_on(len(self._ids))

    def _end(self, why: Literal["stop", "length"]) -> None:
        """Say what the whole is, and hand out what of its text was still held back."""
        ids = self._ids
        text, stopped = self._cut(self._spelt(ids))
        while stopped and ids and len(self._spelt(ids[:-1])) >= len(text):
            ids = ids[:-1]  # what was said is the text, and so are its ids
        self._show(ids, text, whole=True)
        told = tuple(self._logprobs[: len(ids)]) if self._options.logprobs else None
        self.result = Generated(tuple(ids), text, "stop" if stopped else why, told)
        if self._listener.on_done:
            self._listener.on_done(self.result)

    def _spelt(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _cut(self, text: str) -> tuple[str, bool]:
        places = [place for stop in self._options.stop if (place := text.find(stop)) >= 0]
        return (text[: min(places)], True) if places else (text, False)

    def _show(self, ids: list[int], text: str, *, whole: bool = False) -> None:
        """Hand out what is new of the text, and the log-probabilities of the tokens that say it."""
        if not whole:  # the end of it may yet become another character, or a stop text
            text = text.rstrip(_UNFINISHED)
            text = text[: max(0, len(text) - max(map(len, self._options.stop), default=1) + 1)]
        if self._options.logprobs and self._listener.on_logprobs:
            end = self._told
            while end < len(ids) and (
                whole or len(self._spelt(ids[:end])) < len(text) >= len(self._spelt(ids[: end + 1]))
            ):  # a token that adds nothing may yet be cut off with a stop text
                end += 1
            if end > self._told and (whole or len(text) > self._shown):
                self._listener.on_logprobs(tuple(self._logprobs[self._told : end]))
                self._told = end
        if self._listener.on_text and len(text) > self._shown:
            self._listener.on_text(text[self._shown :])
            self._shown = len(text)


def end_ids(backbone: Backbone) -> frozenset[int]:
    """Return the tokens that end a text, by the model's settings and its tokenizer."""
    configured = getattr(backbone.model.generation_config, "eos_token_id", None)
    configured = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (*configured, backbone.tokenizer.eos_token_id) if token is not None)


def _room(backbone: Backbone, context: Sequence[int], options: GenerationOptions, seen: int | None) -> int:
    """Return how many tokens an answer may have, by the options, the backbone's limit and how far its attention sees.

    A deep prompt stands in front of all, and must be seen to the end.
    """
    if not backbone.kind.generates:
        raise BackboneError(f'"{backbone.name}" is {backbone.kind.words}, which writes no text')
    if not len(context):
        raise BackboneError("there is nothing to continue: the text gives no tokens; write some")
    limit = min(filter(None, (backbone.context_limit, seen)), default=None)
    if limit is None:
        return options.max_new_tokens
    room = limit - (1 if backbone.kind is ENCODER_DECODER else len(context))
    if room < 1:
        raise BackboneError(
            f"the context has {len(context)} tokens, virtual ones counted, and {backbone.name} takes "
            f"{limit}: no room for an answer; shorten the text"
        )
    return min(options.max_new_tokens, room)
