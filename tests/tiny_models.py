"""Tiny random models of every family that ptune carries, and a tokenizer for them.

Weights are drawn wide, so that logits differ between contexts and a greedy answer is not one token for ever.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AlbertConfig,
    BartConfig,
    BertConfig,
    BloomConfig,
    DistilBertConfig,
    ElectraConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MT5Config,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    T5Config,
    XLMRobertaConfig,
)

from ptune.families import CAUSAL, MASKED, kind_of

VOCABULARY = 352
"""Rows of every tiny model's input matrix: more than the tokenizer has tokens, as real models do."""

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_SHORT = {"vocab_size": VOCABULARY, "n_layer": 2, "n_head": 4}
_GATED = _SHAPE | {"intermediate_size": 48, "max_position_embeddings": 256}
_GROUPED = _GATED | {"num_key_value_heads": 2}

_BART_HALF = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}
_BERT = _SHAPE | {"intermediate_size": 48, "max_position_embeddings": 128, "hidden_dropout_prob": 0.1}
_ROBERTA = _BERT | {"max_position_embeddings": 129}
_T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_T5 |= {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
_BART = {"vocab_size": VOCABULARY, "d_model": 32, "max_position_embeddings": 256, "scale_embedding": True}
_BART |= {f"{half}_{name}": value for half in ("encoder", "decoder") for name, value in _BART_HALF.items()}
_BART |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 2}

FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt2": lambda: GPT2Config(**_SHORT, n_embd=32, n_positions=256, bos_token_id=1, eos_token_id=2, pad_token_id=0),
    "bloom": lambda: BloomConfig(**_SHORT, hidden_size=32, bos_token_id=1, eos_token_id=2, pad_token_id=3),
    "opt": lambda: OPTConfig(**_SHAPE, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=256),
    "gpt_neox": lambda: GPTNeoXConfig(**_GATED),
    "llama": lambda: LlamaConfig(**_GROUPED),
    "mistral": lambda: MistralConfig(**_GROUPED),
    "qwen2": lambda: Qwen2Config(**_GROUPED),
    "qwen3": lambda: Qwen3Config(**_GROUPED, head_dim=8),
    "gemma": lambda: GemmaConfig(**_GROUPED, head_dim=8),
}
"""Causal families."""

MASKED_FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "bert": lambda: BertConfig(**_BERT),
    "roberta": lambda: RobertaConfig(**_ROBERTA),
    "xlm_roberta": lambda: XLMRobertaConfig(**_ROBERTA),
    "albert": lambda: AlbertConfig(**_BERT, embedding_size=16),
    "distilbert": lambda: DistilBertConfig(vocab_size=VOCABULARY, dim=32, hidden_dim=48, n_layers=2, n_heads=4),
    "electra": lambda: ElectraConfig(**_BERT, embedding_size=16),
}

ENCODER_DECODER_FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "t5": lambda: T5Config(**_T5),
    "mt5": lambda: MT5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "bart": lambda: BartConfig(**_BART),
}

ALL_FAMILIES = FAMILIES | MASKED_FAMILIES | ENCODER_DECODER_FAMILIES

_TEXT = [
    "The film was a quiet wonder, and the waiter brought the wrong soup twice.",
    "Human: Give three tips for staying healthy.\n\nAssistant: Sleep, walk, and eat greens.",
    "这家店的苹果很新鲜，送货也快。",
    "酒店的房间有点小，但是服务员很热情，下次还会再来。",
    "great terrible good bad wonderful awful 好 差 positive negative",
]


def tiny_tokenizer(family: str = "gpt2") -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of at most 340 tokens, which adds what the family's tokenizers add.

    Nothing for causal families; ``<s> ... </s>`` for BERT-like ones and BART, ``... </s>`` for T5.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<pad>", "<s>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    kind = kind_of(ALL_FAMILIES[family]())
    if kind is MASKED:
        names |= {"mask_token": "<unk>"}
    if kind is not CAUSAL:
        single = "$A </s>" if "t5" in family else "<s> $A </s>"
        special = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def tiny_model(
    family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 0.25
) -> PreTrainedModel:
    """Return a random model of a family, the same for the same seed; ``scale`` is the deviation of its weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = ALL_FAMILIES[family]()
        model = kind_of(config).auto_class.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=scale)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.tie_weights()
    return model.to(dtype).eval()
