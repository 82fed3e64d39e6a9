"""transformers' ``generate`` on ids that hold virtual tokens, as if they held none: every option counts text alone.

Virtual tokens have no column in the logits and no word, so whatever looks at ids while decoding (penalties on what was
said already, a caller's own processors, criteria and streamers) is shown the text without them.

Knows nothing of encoders, tables or Trainer. Shapes: B batch, T tokens of a row, P virtual tokens in
every row, V rows of the backbone's input matrix, t tokens while a text grows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from ptune.errors import ConfigError

# Options that cannot be had, with the value at which they do nothing.
_REFUSED = {
    "assistant_model": None,
    "custom_generate": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "inputs_embeds": None,
    "past_key_values": None,
    "prompt_lookup_num_tokens": None,
    "token_healing": False,
}


def generate_text(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, vocabulary_size: int, **options: Any
) -> Any:
    """Call ``model.generate`` and take the virtual tokens out of what it gives.

    Args:
        model: with the rows of its virtual tokens in place.
        input_ids: ``[B, T]`` int64 with the same number P of ids from V on in each row.
        attention_mask: ``[B, T]`` int64, 0 at pads, which stand on the left.
        vocabulary_size: V.
        options: keyword arguments of ``generate``; lengths count text tokens.

    Returns:
        What ``generate`` returns: ids ``[B, T - P + new]``, or an output whose ``sequences`` they are.

    Raises:
        ConfigError: an option that looks at the prompt in a way that virtual tokens do not allow.
    """
    given = options.pop("generation_config", None)
    sources = [options, *(vars(config) for config in (given, model.generation_config) if config is not None)]

    def setting(name: str) -> Any:
        return next((source[name] for source in sources if source.get(name) is not None), None)

    for name, neutral in _REFUSED.items():
        value = setting(name)
        if value is not None and (neutral is None or value != neutral):
            raise ConfigError(f"generate cannot take {name} together with virtual tokens; leave it out")

    def text_of(ids: Tensor) -> Tensor:
        return ids[ids < vocabulary_size].view(*ids.shape[:-1], -1)

    changes: dict[str, Any] = {}
    processors: list[LogitsProcessor] = []
    penalty, size = setting("repetition_penalty"), setting("no_repeat_ngram_size")
    if penalty is not None and penalty != 1.0:
        changes["repetition_penalty"] = 1.0
        pads = (attention_mask != 0).int().argmax(-1)  # [B]
        inner = RepetitionPenaltyLogitsProcessor(penalty)
        processors.append(_OnText(inner, lambda ids: _without_pads(text_of(ids), pads)))
    if size:
        changes["no_repeat_ngram_size"] = 0
        processors.append(_OnText(NoRepeatNGramLogitsProcessor(size), text_of))
    virtual = int((input_ids[0] >= vocabulary_size).sum())
    for length, instead in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        if setting(length) and setting(instead) is None:
            changes[length] = setting(length) + virtual
    _show_text(options, processors, text_of)
    options = {name: value for name, value in options.items() if name not in changes}
    if given is None:
        options |= changes
    else:
        options["generation_config"] = given = copy.deepcopy(given)
        for name, value in changes.items():
            setattr(given, name, value)
    output: Any = model.generate(input_ids, attention_mask=attention_mask, **options)  # type: ignore[operator]
    if isinstance(output, Tensor):
        return text_of(output)
    output.sequences = text_of(output.sequences)
    return output


def _show_text(options: dict[str, Any], processors: list[LogitsProcessor], text_of: Callable[[Tensor], Tensor]) -> None:
    """Let ours and the caller's own processors, criteria, functions and streamers in ``options`` see text alone."""
    if own := options.pop("logits_processor", None):
        processors.append(_OnText(LogitsProcessorList(own), text_of))
    if processors:
        options["logits_processor"] = LogitsProcessorList(processors)
    if criteria := options.get("stopping_criteria"):
        options["stopping_criteria"] = StoppingCriteriaList([_StoppedByText(StoppingCriteriaList(criteria), text_of)])
    if allowed := options.get("prefix_allowed_tokens_fn"):
        options["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(row, text_of(ids))
    if streamer := options.get("streamer"):
        options["streamer"] = _TextStreamer(streamer, text_of)


def _without_pads(ids: Tensor, pads: Tensor) -> Tensor:
    """Replace each row's leading pads by its first token of text: a pad was never said, so nothing punishes it.

    ``ids`` are ``[B * beams, t]``, ``pads`` ``[B]`` their number.
    """
    pads = pads.repeat_interleave(len(ids) // len(pads)).unsqueeze(-1)
    place = torch.arange(ids.shape[1], device=ids.device)
    return torch.where(place < pads, ids.gather(1, pads), ids)


class _OnText(LogitsProcessor):
    """A processor that is shown the text without virtual tokens."""

    def __init__(self, inner: Callable[..., Tensor], text_of: Callable[[Tensor], Tensor]) -> None:
        self._inner, self._text_of = inner, text_of

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self._inner(self._text_of(input_ids), scores)


class _StoppedByText(StoppingCriteria):
    """Criteria that are shown the text without virtual tokens."""

    def __init__(self, inner: StoppingCriteriaList, text_of: Callable[[Tensor], Tensor]) -> None:
        self._inner, self._text_of = inner, text_of

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return self._inner(self._text_of(input_ids), scores, **kwargs)


class _TextStreamer(BaseStreamer):
    """Hands a streamer the text without virtual tokens."""

    def __init__(self, inner: BaseStreamer, text_of: Callable[[Tensor], Tensor]) -> None:
        self._inner, self._text_of = inner, text_of

    def put(self, value: Tensor) -> None:
        self._inner.put(self._text_of(value))

    def end(self) -> None:
        self._inner.end()
