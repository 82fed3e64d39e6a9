"""Generation on a backbone whose contexts hold virtual tokens.

Virtual tokens have no column in the logits, so none is ever generated. Where attention reads a plain cache, texts are
written together a token a pass (`ptune.generation.decoding`); other models write by transformers' ``generate``, in
batches of like length.

Knows nothing of tasks, templates or training. Shapes: B batch, T tokens, V rows of the backbone's input matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from ptune.errors import BackboneError
from ptune.families import ENCODER_DECODER
from ptune.generation.decoding import Decoding
from ptune.generation.growing_text import GrowingText, Listener, end_ids
from ptune.generation.sampling import Generated as Generated
from ptune.generation.sampling import GenerationOptions as GenerationOptions
from ptune.generation.sampling import TokenLogprob
from ptune.models.backbone import Backbone
from ptune.pretrained.encoder_decoder import decoder_start
from ptune.prompts.virtual_tokens import deep_prompts_of
from ptune.rendering.batch import IGNORED, Row, check_batch_size, collate


def generate(
    backbone: Backbone,
    contexts: Sequence[Sequence[int]],
    options: GenerationOptions | Sequence[GenerationOptions] | None = None,
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
        options: how to decode, for all, where a seed is the first one's and goes up by one for each; or for each of
            them. Greedy where absent.
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
        ConfigError: no context may be decoded at once.
        BackboneError: the model writes no text, or a context, its virtual tokens counted, leaves no room in the
            backbone's limit; or it opens with a deep prompt and has no text, or no cache may be kept for it.
    """
    check_batch_size(batch_size)
    if options is None or isinstance(options, GenerationOptions):
        options = [_of_number(options or GenerationOptions(), number) for number in range(len(contexts))]

    def of(number: int, what: Callable[..., Any] | None) -> Callable[..., Any] | None:
        return what and functools.partial(what, number)

    listeners = [
        Listener(*(of(number, what) for what in (on_text, on_done, go_on, on_logprobs)))
        for number in range(len(contexts))
    ]
    answers = [GrowingText(backbone, *one) for one in zip(contexts, options, listeners, strict=True)]
    waiting = sorted(answers, key=lambda answer: (answer.deep or 0, -len(answer.context)))
    writer = Writer(backbone, use_cache=use_cache)
    while waiting or len(writer):
        if (free := batch_size - len(writer)) and waiting:
            writer.join(waiting[:free])
            waiting = waiting[free:]
        writer.step()
        for answer in answers:
            if answer.error is not None:
                raise answer.error
    return [answer.result for answer in answers if answer.result is not None]


class Writer:
    """Writes texts together; others may join at any time."""

    def __init__(self, backbone: Backbone, *, use_cache: bool = True) -> None:
        """Begin with none.

        Args:
            backbone: that writes.
            use_cache: keep keys and values.
        """
        self._backbone, self._use_cache = backbone, use_cache
        self._decoding = Decoding(backbone)

    def __len__(self) -> int:
        """How many texts are being written."""
        return len(self._decoding)

    @torch.no_grad()
    def join(self, answers: Sequence[GrowingText]) -> None:
        """Begin texts, each with its first token; those that cannot grow in company of others are written whole.

        Raises:
            BackboneError: a deep prompt stands in a cache, and none may be kept.
        """
        growing: list[GrowingText] = []
        whole: list[GrowingText] = []
        for answer in answers:
            (growing if self._use_cache and self._decoding.takes(answer) else whole).append(answer)
        for batch in _alike(whole):  # first: where that fails, none has begun to grow
            _write_whole(self._backbone, batch, self._use_cache)
        if growing:
            self._decoding.join(growing)

    def step(self) -> None:
        """Write one more token of each text."""
        self._decoding.step()


def _of_number(options: GenerationOptions, number: int) -> GenerationOptions:
    """Return options with the seed of the text of a number, within what generators take."""
    if options.seed is None:
        return options
    return options.model_copy(update={"seed": (options.seed + number + 2**63) % 2**64 - 2**63})


def _alike(answers: Sequence[GrowingText]) -> list[list[GrowingText]]:
    """Return which texts ``generate`` may write at once.

    Those have the same room, so that none shortens its neighbour's, and the same deep prompt in front, or none.
    """
    kinds: dict[tuple[int, int | None], list[GrowingText]] = {}
    for answer in answers:
        kinds.setdefault((answer.room, answer.deep), []).append(answer)
    return list(kinds.values())


def _write_whole(backbone: Backbone, answers: Sequence[GrowingText], use_cache: bool) -> None:
    """Write texts of one room to their ends by transformers' ``generate``.

    Raises:
        BackboneError: a deep prompt stands before them, and no cache may be kept.
    """
    decodes_apart, past, opened = backbone.kind is ENCODER_DECODER, None, 0
    if answers[0].deep is not None:
        if not use_cache:
            raise BackboneError("a deep prompt is keys and values in a cache; leave the cache on")
        deep = deep_prompts_of(backbone.model).get(answers[0].deep)
        past, opened = deep.past(len(answers), backbone.dtype), len(deep.rows)
    pad = backbone.tokenizer.pad_token_id
    # [B, T]; a decoder continues what it reads, so pads stand on the left, and an encoder counts its places from there
    rows = [Row(tuple(answer.context[opened:]), (IGNORED,) * (len(answer.context) - opened)) for answer in answers]
    text = collate(rows, pad, "right" if decodes_apart else "left")
    before = torch.ones(len(answers), opened, dtype=torch.long)  # nobody looks up ids that are past
    settings = transformers.GenerationConfig(
        max_new_tokens=answers[0].room,
        use_cache=use_cache,
        pad_token_id=pad,
        eos_token_id=sorted(end_ids(backbone)),
        bos_token_id=backbone.tokenizer.bos_token_id,
        decoder_start_token_id=decoder_start(backbone.model.config) if decodes_apart else None,
        do_sample=False,  # a drawn token is the only one that is left
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
    )
    with backbone.head.on_dense_states():
        backbone.model.generate(
            torch.cat([before, text.input_ids], dim=-1).to(backbone.device),
            attention_mask=torch.cat([before, text.attention_mask], dim=-1).to(backbone.device),
            generation_config=settings,
            logits_processor=LogitsProcessorList([_Choice(answers)]),
            stopping_criteria=StoppingCriteriaList([_Ended(answers)]),
            **({} if past is None else {"past_key_values": past}),
        )


class _Choice(LogitsProcessor):
    """Leaves of each row's tokens the one that its text chooses."""

    def __init__(self, answers: Sequence[GrowingText]) -> None:
        self._answers = answers

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores ``[B, V]``, minus infinity but for one token of each text that still grows."""
        chosen = scores.argmax(-1)
        for row, answer in enumerate(self._answers):
            if not answer.ended:
                chosen[row] = answer.grow(scores[row], int(chosen[row]))
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen[:, None], 0.0)


class _Ended(StoppingCriteria):
    """Tells which rows' texts have ended."""

    def __init__(self, answers: Sequence[GrowingText]) -> None:
        self._answers = answers

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """Return ``[B]`` bool."""
        return torch.tensor([answer.ended for answer in self._answers], device=input_ids.device)
