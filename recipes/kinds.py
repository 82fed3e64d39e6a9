"""The two models that `pretrain_mini.py` makes: the shape of each, what of it grows, its loss and its tokenizer.

    causal    a Llama that predicts every next token
    masked    a BERT that predicts the tokens that were hidden from it, three of ten

Every layer begins as one that adds nothing, for its output projections are zero: layers may join a training that has
begun. Knows nothing of optimizers, files and steps.

Shapes: R rows, T tokens of a row, K hidden tokens of a row, H width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from corpus import BOS, EOS, PAD, VOCABULARY_SIZE, as_transformers, mask_id, with_mask
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

HIDDEN_SHARE = 0.3  # of a row's tokens; BERT hid half as many, and read a thousand times more text
# Compiled, plain attention is faster here than the fused kernel of the processor.
ATTENTION = "eager"
_SHAPE = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 320,
    "num_attention_heads": 5,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "attn_implementation": ATTENTION,
}


class Learner(ABC):
    """A model in float32 that learns from rows of tokens.

    Attributes:
        model: as transformers saves it.
        layers: all of them, those that have not joined yet too.
        first_layers: how many of them begin alone.
    """

    first_layers: int

    def __init__(self, model: PreTrainedModel, holder: nn.Module, name: str, endings: tuple[str, ...]) -> None:
        """Take a new model, whose layers shall add nothing.

        Args:
            model: with random weights.
            holder: the module of it that has the layers.
            name: under which it has them.
            endings: of the names of the layers' output projections.
        """
        self.model, self._holder, self._name = model, holder, name
        self.layers: list[nn.Module] = list(getattr(holder, name))
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith(endings):
                    parameter.zero_()

    @property
    def trunk(self) -> nn.Module:
        """What makes hidden states, the model without its head; the part worth compiling."""
        return self.model.base_model

    def use_layers(self, count: int) -> None:
        """Read with the first `count` layers."""
        setattr(self._holder, self._name, nn.ModuleList(self.layers[:count]))
        self.model.config.num_hidden_layers = count

    @abstractmethod
    def loss(self, trunk: Callable, ids: Tensor, rng: np.random.Generator) -> Tensor:
        """The mean loss of a token over rows [R, T]; `trunk` is the compiled one."""

    @abstractmethod
    def tokenizer(self, trained: Tokenizer) -> PreTrainedTokenizerFast:
        """The corpus's tokenizer as this kind of model wants it."""

    def trim(self, length: int) -> None:  # noqa: B027
        """Leave out what rows of `length` tokens never trained; nothing unless a kind says otherwise."""


class Causal(Learner):
    """The Llama that ptune ships."""

    first_layers = 4

    def __init__(self) -> None:
        own = {"num_key_value_heads": 5, "head_dim": 64, "rms_norm_eps": 1e-6}
        model = LlamaForCausalLM(LlamaConfig(**_SHAPE, **own, intermediate_size=864, num_hidden_layers=7))
        super().__init__(model, model.model, "layers", ("o_proj.weight", "down_proj.weight"))

    def loss(self, trunk: Callable, ids: Tensor, rng: np.random.Generator) -> Tensor:
        """Every token of `ids` [R, T] but the first is predicted from those before it."""
        with torch.autocast("cpu", torch.bfloat16):
            hidden = trunk(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
            logits = linear(hidden, self.model.lm_head.weight)
        return cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    def tokenizer(self, trained: Tokenizer) -> PreTrainedTokenizerFast:
        """With `<s>` before a text."""
        return as_transformers(trained)


class Masked(Learner):
    """A BERT with the same tokens; `<s>` and `</s>` are its [CLS] and [SEP]."""

    first_layers = 3

    def __init__(self, trained: Tokenizer) -> None:
        self._mask_id = mask_id(trained)
        own = {"type_vocab_size": 1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = BertForMaskedLM(BertConfig(**_SHAPE, **own, intermediate_size=1280, num_hidden_layers=6))
        super().__init__(model, model.bert.encoder, "layer", (".output.dense.weight",))

    def loss(self, trunk: Callable, ids: Tensor, rng: np.random.Generator) -> Tensor:
        """Some tokens of `ids` [R, T], drawn by `rng`, are predicted from all that is not hidden.

        Each row begins with `<s>`, as every text that the model will be asked about does.
        """
        rows, length = ids.shape
        ids[:, 0] = BOS
        every = np.tile(np.arange(1, length), (rows, 1))
        hidden = torch.from_numpy(rng.permuted(every, axis=1)[:, : round(HIDDEN_SHARE * length)])  # [R, K]
        targets = ids.gather(1, hidden)
        with torch.autocast("cpu", torch.bfloat16):
            states = trunk(input_ids=ids.scatter(1, hidden, self._mask_id)).last_hidden_state  # [R, T, H]
            logits = self.model.cls(states[torch.arange(rows)[:, None], hidden])
        return cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def trim(self, length: int) -> None:
        """Leave out the positions behind `length`, which are noise: a longer text is refused instead."""
        embeddings = self.model.bert.embeddings
        learnt = embeddings.position_embeddings.weight[:length].detach().clone()
        embeddings.position_embeddings = nn.Embedding.from_pretrained(learnt)
        self.model.config.max_position_embeddings = length

    def tokenizer(self, trained: Tokenizer) -> PreTrainedTokenizerFast:
        """With `<s>` before a text, `</s>` behind it, and `<mask>`."""
        return with_mask(trained)


def learner(kind: str, trained: Tokenizer) -> Learner:
    """A new model of a kind: `causal` or `masked`."""
    return Causal() if kind == "causal" else Masked(trained)
