"""What the benchmarks of engine and server run on: a random Llama-shaped model, its tokenizer, soft prompts for it.

Only time and sameness are measured, so weights are random. A word of the tokenizer is ``w`` and its id.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from ptune.config.task import ClassificationConfig, GenerationConfig
from ptune.models.backbone import Backbone
from ptune.soft_prompts.soft_prompt import SoftPrompt

LABELS = {"first": " w5", "second": " w6", "third": " w7"}
MOST_NEW_TOKENS = 64


@dataclass(frozen=True)
class Size:
    """Of a model."""

    hidden: int
    layers: int
    vocabulary: int


SIZES = {"full": Size(512, 8, 46145), "tiny": Size(32, 2, 300)}


def model_of(size: Size) -> PreTrainedModel:
    """Return a random model; the same for the same size."""
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=4 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.08,  # so that answers differ from text to text
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def tokenizer_of(size: Size) -> PreTrainedTokenizerFast:
    """Return a tokenizer of one word an id."""
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(size.vocabulary)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1", unk_token="w2")


def soft_prompt(backbone: Backbone, virtual_tokens: int, seed: int, *, writes: bool = False) -> SoftPrompt:
    """Return a random soft prompt that stands in front of the text, as PEFT's do."""
    rows = torch.randn(virtual_tokens, backbone.hidden_size, generator=torch.Generator().manual_seed(seed)) * 0.08
    return SoftPrompt(
        rows=rows,
        template=f"[P*{virtual_tokens}]{{text}}{{answer}}",
        task=GenerationConfig(max_new_tokens=MOST_NEW_TOKENS) if writes else ClassificationConfig(verbalizer=LABELS),
        overlong="cut" if writes else "error",
        backbone_name=backbone.name,
        fingerprint=backbone.fingerprint(),
    )


def save_model(folder: Path, size: Size) -> None:
    """Write model and tokenizer as a folder that anybody loads."""
    model_of(size).save_pretrained(folder)
    tokenizer_of(size).save_pretrained(folder)


def text_of(size: Size, words: int, seed: int) -> str:
    """Return a text of so many words."""
    ids = torch.randint(10, size.vocabulary, (words,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{number}" for number in ids.tolist())
