"""What kinds of language model there are, and what each can do: the one table that the rest of ptune asks.

    causal            reads from left to right and continues: GPT-2, BLOOM, Llama, Qwen, ...
    masked            fills places that are masked, from both sides: BERT, RoBERTa, ALBERT, DistilBERT, ELECTRA, XLM-R
    encoder_decoder   reads with one half and writes with the other: T5, mT5, BART

Knows transformers' classes, and nothing of weights, templates or tasks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

KindName = Literal["causal", "masked", "encoder_decoder"]


@dataclass(frozen=True)
class Kind:
    """What a kind of model can do.

    Attributes:
        name: as it is written in files.
        words: as it is called in messages.
        auto_class: what loads it.
        generates: it writes text of its own.
        answers_anywhere: the template's answer may stand in the middle, for the model reads from both sides.
        closes: the tokens that the tokenizer puts behind a text ([SEP], T5's </s>) belong behind the context.
        bos_first: the tokenizer's first token stands before virtual tokens that open a template; else behind them, as
            in PEFT.
    """

    name: KindName
    words: str
    auto_class: Any
    generates: bool
    answers_anywhere: bool
    closes: bool
    bos_first: bool


CAUSAL = Kind(
    "causal",
    "a causal language model",
    AutoModelForCausalLM,
    generates=True,
    answers_anywhere=False,
    closes=False,
    bos_first=False,
)
MASKED = Kind(
    "masked",
    "a masked language model",
    AutoModelForMaskedLM,
    generates=False,
    answers_anywhere=True,
    closes=True,
    bos_first=True,
)
ENCODER_DECODER = Kind(
    "encoder_decoder",
    "an encoder-decoder model",
    AutoModelForSeq2SeqLM,
    generates=True,
    answers_anywhere=False,
    closes=True,
    bos_first=False,
)


# Families whose attention reads all keys that a plain cache holds, at positions that ptune gives (tested one by one).
_PLAIN_CACHE = {"gpt2", "bloom", "opt", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma"}


def cached_length(config: PreTrainedConfig) -> int | None:
    """Return up to how many tokens keys and values of a part may stand for the part itself; 0 for not at all.

    None is no limit. Beyond its window a sliding attention no longer reads all that a plain cache holds.
    """
    config = config.get_text_config()
    if config.model_type not in _PLAIN_CACHE:
        return 0
    window: int | None = getattr(config, "sliding_window", None)
    return window if getattr(config, "use_sliding_window", True) else None


# Those whose attention layers all ask transformers' interface for their function, at positions that ptune gives. BLOOM
# computes its own attention, for its distances come from the mask.
_PACKED = _PLAIN_CACHE - {"bloom"}


def may_pack(config: PreTrainedConfig) -> bool:
    """Whether a model can read rows that stand one behind another in one sequence."""
    return config.model_type in _PACKED


# Masked families whose attention takes keys and values that were not computed from its own input.
_MASKED_WITH_PAST = {"bert", "roberta", "xlm-roberta", "electra"}


def takes_deep_prompts(config: PreTrainedConfig, kind: Kind) -> bool:
    """Whether keys and values can be set in front of the text at every layer."""
    if kind is MASKED:
        return config.model_type in _MASKED_WITH_PAST
    return kind is CAUSAL and cached_length(config) != 0


def kind_of(config: PreTrainedConfig, architecture: str | None = None) -> Kind:
    """Return the kind of a model.

    A family may come in several kinds (BERT is also a decoder in some folders), so what the folder says of its own
    architecture goes first, and the family decides where it says nothing.

    Args:
        config: the model's.
        architecture: class name of the model; the first that ``config`` names where absent.
    """
    if config.is_encoder_decoder:
        return ENCODER_DECODER
    named = architecture or next(iter(config.architectures or ()), "")
    if named in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
        return MASKED
    if named in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return CAUSAL
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    return MASKED if masked else CAUSAL
