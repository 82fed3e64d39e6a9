"""Tiny backbones on disk for tests of merging, and soft prompts for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_models import FAMILIES, tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from ptune.config.task import ClassificationConfig, GenerationConfig
from ptune.models.backbone import Backbone
from ptune.soft_prompts.soft_prompt import SoftPrompt

TOKENS = len(tiny_tokenizer())
"""Of the tokenizer: a matrix may be exactly as long, or longer."""


def model(family: str, *, tied: bool, rows: int = TOKENS) -> PreTrainedModel:
    """Return a random model whose final states lie to one side of the origin, as those of trained models do.

    Rows that no token has are zero, as a trained model leaves them: none of them is ever the likeliest.
    """
    config = FAMILIES[family]()
    config.vocab_size, config.tie_word_embeddings = rows, tied
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        made = AutoModelForCausalLM.from_config(config)
        for name, parameter in made.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
            elif "bias" in name:
                parameter.normal_(0.2, std=0.1)
        made.tie_weights()
        for module in (made.get_input_embeddings(), made.get_output_embeddings()):
            module.weight[TOKENS:] = 0
        for name, parameter in made.named_parameters():  # a channel that no layer writes to
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter[0] = 0
        made.get_input_embeddings().weight[:TOKENS, 0] = 4.0 if family == "gemma" else 2.0
    return made.eval()


def on_disk(folder: Path, family: str = "gpt2", *, tied: bool = True, rows: int = TOKENS, **saving: Any) -> Backbone:
    """Write a model and its tokenizer to ``folder`` and return them loaded as a backbone."""
    model(family, tied=tied, rows=rows).save_pretrained(folder, **saving)
    tiny_tokenizer().save_pretrained(folder)
    return Backbone.load(str(folder))


def soft_prompt(backbone: Backbone, template: str, count: int, *, seed: int = 0, labels: bool = False) -> SoftPrompt:
    """Return a soft prompt of random rows, as long as those of the vocabulary."""
    rows = torch.randn(count, backbone.hidden_size, generator=torch.Generator().manual_seed(seed))
    length = backbone.embeddings(torch.arange(10, 40)).norm(dim=-1).mean()
    task: Any = GenerationConfig(max_new_tokens=8)
    if labels:
        task = ClassificationConfig(verbalizer={"positive": " good", "negative": " bad"})
    return SoftPrompt(
        rows=rows / rows.norm(dim=-1, keepdim=True) * length,
        template=template,
        task=task,
        overlong="cut",
        backbone_name=backbone.name,
        fingerprint=backbone.fingerprint(),
    )
