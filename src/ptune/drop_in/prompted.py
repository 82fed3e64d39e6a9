"""`ptune.prompted(model)`: what a script calls in place of PEFT's ``get_peft_model``, and is otherwise left as it is.

Knows nothing of templates, tasks or Trainer. Shapes: P virtual tokens.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ptune.config.run import EncoderConfig, StartConfig
from ptune.drop_in.prefixed_model import PrefixedModel
from ptune.errors import BackboneError, ConfigError, did_you_mean
from ptune.families import CAUSAL, kind_of
from ptune.models.backbone import Backbone
from ptune.models.prompted_model import PromptedModel
from ptune.prompts.encoder import build_encoder
from ptune.prompts.initial_rows import COMMON_WORDS, initial_rows
from ptune.soft_prompts.soft_prompt import SoftPrompt


def prompted(
    model: PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    num_virtual_tokens: int = 10,
    encoder: str | EncoderConfig = "mlp",
    start: StartConfig | None = None,
    seed: int = 0,
) -> PrefixedModel:
    """Give a model virtual tokens that `transformers.Trainer` can train; the model itself is frozen, for good.

    >>> model = ptune.prompted(model, tokenizer=tokenizer, num_virtual_tokens=10)              # doctest: +SKIP
    >>> Trainer(model=model, args=args, train_dataset=rows, data_collator=collator).train()    # doctest: +SKIP

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer, which tells words from pieces. Without it common ids are taken for words.
        num_virtual_tokens: P, how many stand in front of each row's text.
        encoder: ``embedding``, ``mlp`` or ``lstm``, or all of the encoder's settings.
        start: what the virtual tokens are before the first step; sampled words where absent.
        seed: of the encoder's weights and of what is sampled.

    Raises:
        ConfigError: a setting that cannot be used.
        BackboneError: the model cannot carry virtual tokens, or ``start`` needs a tokenizer.
        SoftPromptError: the soft prompt to start from cannot be read, or is of another backbone.
    """
    if not isinstance(model, PreTrainedModel):
        raise BackboneError(
            f"prompted() expected a causal language model of transformers and found {type(model).__name__}; "
            "give it the model as from_pretrained returned it"
        )
    if num_virtual_tokens < 1:
        raise ConfigError(f"num_virtual_tokens is at least 1, and found {num_virtual_tokens}; give a positive number")
    settings = _encoder_config(encoder)
    if kind_of(model.config, type(model).__name__) is not CAUSAL:
        raise BackboneError(
            f"prompted() expected a causal language model and found {type(model).__name__}; masked models and "
            "encoder-decoders are trained by `ptune train`"
        )
    backbone = Backbone(model, tokenizer, model.name_or_path or type(model).__name__)
    if tokenizer is None and start is None:
        rows = backbone.embeddings(_common_ids(model, num_virtual_tokens, seed))
    else:
        rows = initial_rows(
            start or StartConfig(),
            num_virtual_tokens,
            embeddings=backbone.embeddings,
            tokenizer=backbone.tokenizer,
            vocabulary_size=backbone.vocabulary_size,
            prompt_rows=functools.partial(_rows_of_soft_prompt, backbone=backbone, count=num_virtual_tokens),
            seed=seed,
        )
    return PrefixedModel(PromptedModel(backbone, build_encoder(settings, rows, seed)))


def _encoder_config(encoder: str | EncoderConfig) -> EncoderConfig:
    if isinstance(encoder, EncoderConfig):
        return encoder
    kinds = ("embedding", "mlp", "lstm")
    if encoder not in kinds:
        raise ConfigError(f'encoder is embedding, mlp or lstm, and found "{encoder}".{did_you_mean(encoder, kinds)}')
    return EncoderConfig(type=encoder)


def _common_ids(model: PreTrainedModel, count: int, seed: int) -> Tensor:
    """Sample ids that are likely words: vocabularies number tokens by how common they are (as `initial_rows` does)."""
    config = model.config.get_text_config()
    special = {getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    order = torch.randperm(min(COMMON_WORDS, config.vocab_size), generator=torch.Generator().manual_seed(seed))
    ids = [token for token in order.tolist() if token not in special]
    return torch.tensor([ids[k % len(ids)] for k in range(count)])


def _rows_of_soft_prompt(folder: str, backbone: Backbone, count: int) -> Tensor:
    prompt = SoftPrompt.load(folder)
    prompt.check(backbone)
    if len(prompt.input_rows) != count:
        raise ConfigError(
            f'the soft prompt "{folder}" to start from has {len(prompt.input_rows)} virtual tokens, and '
            f"num_virtual_tokens is {count}; give the same number"
        )
    return prompt.input_rows
