"""The backbone: a frozen pretrained model with its tokenizer. Loads it, keeps it frozen, tells what it is and can do.

Knows nothing of templates, tasks, encoders or training. Shapes: B batch, T tokens of a row, virtual ones
among them, N chosen positions, C chosen tokens of the vocabulary, H width, V rows of the input matrix, n ids.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from ptune.config.run import ModelConfig
from ptune.errors import BackboneError
from ptune.families import CAUSAL, ENCODER_DECODER, MASKED, Kind, cached_length, kind_of, may_pack
from ptune.models.forward_pass import ForwardPass
from ptune.plans.context_cache import ContextCache
from ptune.plans.deep_passes import logits_behind
from ptune.plans.openings import context_of
from ptune.plans.passes import PlannedPass
from ptune.plans.plans import Plans
from ptune.pretrained.fingerprint import fingerprint, same_backbone, sampled_ids
from ptune.pretrained.loading import check_tokenizer, find_device, load_model
from ptune.pretrained.losses import next_token_labels, summed_loss
from ptune.pretrained.output_head import OutputHead, Wanted
from ptune.pretrained.recomputation import recompute_layers, recomputing
from ptune.pretrained.sharding import alike, shard_layers
from ptune.prompts.virtual_tokens import (
    VirtualTokens,
    deep_prompts_of,
    input_embedding,
    input_matrix,
    virtual_tokens_of,
)
from ptune.rendering.batch import IGNORED

_DEEP = "a deep prompt stands before the text at every layer"


class Backbone:
    """A frozen language model and its tokenizer.

    Attributes:
        model: the transformers model, every parameter frozen, in eval mode.
        kind: causal, masked or encoder-decoder, with what it can do.
        name: what the user called it: ``mini``, a folder or a Hub name.
        vocabulary_size: V, rows of the input matrix; never the tokenizer's length, which may be smaller.
        hidden_size: H, width of the input matrix.
        context_limit: most positions the model takes, virtual tokens included; None where it sets none (BLOOM).
        head: its output head.
        forward_pass: how it is called.
        plans: how its forward passes are carried out.
        plan: ``auto`` for the cheapest that gives the same numbers, ``reference`` for the plain one.
        quantization: as ``model.quantization`` asked when it was loaded; None for weights in full.
        sharded: whether its layers are shared out over processes.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, name: str) -> None:
        """Freeze ``model`` and check that it can carry virtual tokens.

        A tokenizer may be absent where the caller works on ids alone; what needs one then says so.

        Raises:
            BackboneError: the tokenizer has no end token or more tokens than the matrix has rows, or the family
                reads ids elsewhere than in its input embedding.
        """
        self.model = model.requires_grad_(False).eval()
        self._family = type(model).__name__  # FSDP gives the model another class
        self.kind: Kind = kind_of(model.config, self._family)
        self._tokenizer = tokenizer
        self.name = name
        self.vocabulary_size, self.hidden_size = input_matrix(model).shape
        self._recomputed: list[GradientCheckpointingLayer] = []
        if tokenizer is not None:
            check_tokenizer(tokenizer, self.vocabulary_size, self.kind, name)
        self._cached_length = cached_length(model.config) if self.kind is CAUSAL else 0
        packs = self.kind is CAUSAL and may_pack(model.config)
        tokens, where = functools.partial(virtual_tokens_of, model), (lambda: self.device, lambda: self.dtype)
        self.head = OutputHead(model)
        self.forward_pass = ForwardPass(model, self.kind, self.head)
        self.plans = Plans(self.forward_pass.run, self.vocabulary_size, *where, may_pack=packs, virtual_tokens=tokens)
        limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.context_limit = None if limit is None else limit - self.forward_pass.first_position
        self.plan: Literal["auto", "reference"] = "auto"
        self.quantization: str | dict[str, Any] | None = None
        self.sharded = False
        self._fingerprint: dict[str, Any] = {}
        _self_test(self)

    @classmethod
    def load(cls, config: ModelConfig | str, *, shard: bool = False) -> Backbone:
        """Load a backbone by its settings, or by name alone.

        Args:
            config: the settings, or the name.
            shard: share its layers out over the processes of the default group, all of which do alike from then on.

        Raises:
            ConfigError: it cannot be shared out.
            BackboneError: neither a model folder nor reachable on the Hub, or not a language model that carries
                virtual tokens.
            MissingExtraError: what quantises it is not installed.
        """
        config = ModelConfig(name=config) if isinstance(config, str) else config
        backbone = cls(*load_model(config, on_processor=shard), config.name)
        backbone.quantization = config.quantization
        if shard:
            backbone._shard(find_device(config.device))
        return backbone

    def _shard(self, device: torch.device) -> None:
        self.plans.run_together(functools.partial(alike, device=device), device)
        shard_layers(self.model, device, self.name)
        self.sharded = True
        _self_test(self)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer, with a pad token.

        Raises:
            BackboneError: the model was given without one.
        """
        if self._tokenizer is None:
            raise BackboneError(f'"{self.name}" was given without its tokenizer, which is needed here; give both')
        return self._tokenizer

    @property
    def device(self) -> torch.device:
        """Where input ids go."""
        return input_matrix(self.model).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states."""
        return self.model.dtype

    def attach(self) -> VirtualTokens:
        """Return the model's table of virtual tokens; ``detach()`` it when done."""
        return VirtualTokens.attach(self.model)

    def embeddings(self, ids: Tensor) -> Tensor:
        """Return what the input embedding gives for ids below V: ``[n] int64 -> [n, H] float32``.

        Families that scale inside the embedding module (Gemma) have scaled already.
        """
        with torch.no_grad():
            return input_embedding(self.model)(ids.to(self.device)).float()

    def inputs(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
        """Return a forward pass's keyword arguments for ids and mask, ``[B, T]`` int64: `ForwardPass.inputs`."""
        return self.forward_pass.inputs(input_ids, attention_mask)

    def logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        positions: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> Tensor:
        """Return the logits of the next token; a masked model's are those of the place itself.

        Args:
            input_ids: ``[B, T]`` int64, ids from V on being virtual tokens.
            attention_mask: ``[B, T]`` int64.
            positions: ``[B, T]`` bool, after which tokens to predict (at which, for a masked model); None for all. An
                encoder-decoder reads each row up to its first position and writes from there.
            columns: ``[C]`` int64, the tokens whose logits are wanted; None for all.

        Returns:
            ``[N, V]`` for the N chosen positions in row order, ``[B, T, V]`` for all, with C in place of V where there
            are columns; the backbone's dtype.

        Raises:
            BackboneError: an encoder-decoder is asked for all positions.
        """
        if columns is None:
            return self.outputs(input_ids, attention_mask, positions)
        if positions is not None and self.may_withhold:
            return self.head.logits(self.outputs(input_ids, attention_mask, positions, "head inputs"), columns)
        logits = self.outputs(input_ids, attention_mask, positions)
        return logits[..., columns.to(logits.device)]

    @property
    def may_withhold(self) -> bool:
        """Whether hidden states will do in place of logits."""
        return self.plan != "reference" and self.head.plain

    def outputs(
        self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor | None, wanted: Wanted = "logits"
    ) -> Tensor:
        """Return logits as `logits` does, or hidden states ``[N, H]``."""
        if self.model.training:
            self.model.eval()  # whatever called train() on it: a frozen model's dropout stays off
        input_ids, attention_mask = input_ids.to(self.device), attention_mask.to(self.device)
        positions = None if positions is None else positions.to(self.device)
        if (deep := deep_prompts_of(self.model).opening(input_ids)) is not None:
            deep.check(input_ids.shape[1], self._cached_length, bool(self._recomputed))
            run = functools.partial(self.forward_pass.run, wanted=wanted)
            self.plans.note("reference", _DEEP)
            return logits_behind(deep, run, input_ids, attention_mask, positions, self.dtype)
        hindrance = "logits of all positions are wanted" if positions is None else self.hindrance(input_ids.shape[1])
        if positions is not None and hindrance is None:
            return self.plans.outputs(input_ids, attention_mask, positions, wanted)
        self.plans.note("reference", str(hindrance))
        self.plans.agree(1)
        arguments, positions = self.forward_pass.arguments(input_ids, attention_mask, positions)
        with self.head.at(positions, wanted) as taken, recomputing(self._recomputed):
            logits: Tensor = self.model(**arguments).logits
        return logits if wanted == "logits" else taken[0]

    def choose(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> PlannedPass:
        """Return how a forward pass would be carried out.

        Args:
            input_ids: ``[B, T]`` int64.
            attention_mask: ``[B, T]`` int64.
            positions: ``[B, T]`` bool, as in `logits`.
        """
        deep = deep_prompts_of(self.model).opening(input_ids.to(self.device)) is not None
        if (hindrance := _DEEP if deep else self.hindrance(input_ids.shape[1])) is not None:
            return PlannedPass("reference", hindrance, input_ids.numel())
        return self.plans.choose(input_ids, attention_mask, positions)

    def keep_contexts(self, rows: Iterable[Sequence[int]], kept: ContextCache) -> None:
        """Run what stands before the first virtual token of rows once, where a plan will read it again and again.

        Args:
            rows: ids of each.
            kept: where they are kept, in place of those before: nothing where only the reference plan will do.
        """
        planned = [ids for ids in rows if self.hindrance(len(ids)) is None and not self._recomputed]
        contexts = (context_of(ids, self.vocabulary_size) for ids in planned)
        self.plans.prepare([ids for ids in contexts if ids], kept)

    def hindrance(self, tokens: int) -> str | None:
        """Return what forbids other plans than the reference for rows of so many tokens; None where nothing does."""
        if self.plan == "reference":
            return "training.plan says so"
        if self._recomputed and torch.is_grad_enabled():
            return "layers that recompute their activations drop their cache"
        if self._cached_length == 0:
            return f"no other is known to give the same numbers for {self._family}"
        if self._cached_length is not None and tokens > self._cached_length:
            return f"rows are longer than the {self._cached_length} tokens that attention sees"
        return None

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        labels: Tensor | None = None,
        positions: Tensor | None = None,
        columns: Tensor | None = None,
        states: bool = False,
    ) -> Tensor:
        """Return the summed loss for ``labels``, or else logits or states: what a task asks of a model, trained or not.

        Args:
            input_ids: ``[B, T]`` int64, ids from V on being virtual tokens.
            attention_mask: ``[B, T]`` int64, 0 at pads, which may stand on either side.
            labels: ``[B, T]`` int64, the id itself at supervised positions, `IGNORED` elsewhere.
            positions: ``[B, T]`` bool, as in `logits`; without labels only.
            columns: ``[C]`` int64, as in `logits`; without labels only.
            states: return the last layer's hidden states at the positions, ``[N, H]``, for a linear head.

        Returns:
            With labels, the cross-entropy summed over supervised tokens, a scalar in float32 (float64 where the
            backbone is): divide it by their number, or by that of a whole accumulation window. Else `logits`.
        """
        if states:
            return self.outputs(input_ids, attention_mask, positions, "final states")
        if labels is None:
            return self.logits(input_ids, attention_mask, positions, columns)
        targets = labels if self.kind is MASKED else next_token_labels(labels)
        supervised = targets != IGNORED
        if self.may_withhold:
            inputs = self.outputs(input_ids, attention_mask, supervised, "head inputs")  # [N, H]
            return self.head.loss(inputs, targets[supervised])
        logits = self.logits(input_ids, attention_mask, supervised)  # [N, V]
        return summed_loss(logits, targets[supervised].to(logits.device))

    def enable_gradient_checkpointing(self, **settings: Any) -> None:
        """Keep no activations inside the layers, and compute them again in the backward pass.

        Args:
            settings: keyword arguments of `torch.utils.checkpoint.checkpoint`; ``use_reentrant`` is False unless given.

        Raises:
            BackboneError: the family's layers cannot do it.
        """
        self._recomputed = recompute_layers(self.model, {"use_reentrant": False} | settings)

    @contextmanager
    def left_as_it_was(self) -> Iterator[None]:
        """Undo, when the block ends, what it sets: the plan, kept contexts, gradient checkpointing."""
        plan, contexts, recomputed = self.plan, self.plans.contexts, self._recomputed
        try:
            yield
        finally:
            self.plan, self.plans.contexts = plan, contexts
            for layer in self._recomputed if not recomputed else []:
                layer.gradient_checkpointing = False
            self._recomputed = recomputed

    def fingerprint(self) -> dict[str, Any]:
        """Return what tells this backbone from others, as `ptune.pretrained.fingerprint` has it; it is read once."""
        if not self._fingerprint:
            ids = sampled_ids(self.vocabulary_size)
            rows, config = input_matrix(self.model)[ids.to(self.device)], self.model.config.get_text_config()
            self._fingerprint = fingerprint(self.kind.name, config, rows, self.embeddings(ids))
        return copy.deepcopy(self._fingerprint)

    def matches(self, other: dict[str, Any]) -> bool:
        """Whether a fingerprint is this backbone's, to the rounding of half precision."""
        return same_backbone(self.fingerprint(), other)

    def identity(self) -> str:
        """Return a short hexadecimal name of the fingerprint, for keys and messages."""
        return hashlib.sha256(json.dumps(self.fingerprint(), sort_keys=True).encode()).hexdigest()[:16]


def _self_test(backbone: Backbone) -> None:
    """Hold ids against ``inputs_embeds`` on a few tokens, and send one gradient back.

    Raises:
        BackboneError: the two differ, or no gradient arrives: this family reads its input elsewhere.
    """
    model, device, family = backbone.model, backbone.device, type(backbone.model).__name__
    tokens = backbone.attach()
    try:
        first = tokens.allocate(2)
        words = torch.arange(3, device=device).remainder(backbone.vocabulary_size)
        rows = backbone.embeddings(words[:2]).flip(0).requires_grad_()
        tokens.set_rows(first, rows)
        ids = torch.cat([words[:1], torch.tensor([first, first + 1], device=device), words[1:]])[None]
        mask = torch.ones_like(ids)
        positions = None
        if backbone.kind is ENCODER_DECODER:
            positions = torch.zeros_like(ids, dtype=torch.bool)
            positions[:, -2:] = True
        with torch.enable_grad():
            by_ids = backbone.logits(ids, mask, positions)
            (gradient,) = torch.autograd.grad(by_ids.float().square().mean(), rows)
        with torch.no_grad():
            arguments, places = backbone.forward_pass.arguments(ids, mask, positions)
            arguments["inputs_embeds"] = input_embedding(model)(arguments.pop("input_ids"))
            by_embeddings = model(**arguments).logits
            by_embeddings = by_embeddings if places is None else by_embeddings[places]
        backbone.head.examine(lambda: model(**arguments).logits)
    except (IndexError, RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise BackboneError(f"{family} cannot carry virtual tokens: {' '.join(str(error).split())[:200]}") from error
    finally:
        tokens.release(first)
        tokens.detach()
    tolerance = 1e-5 if by_ids.dtype == torch.float32 else 2e-2
    if not torch.allclose(by_ids, by_embeddings, rtol=tolerance, atol=tolerance * float(by_embeddings.abs().max())):
        raise BackboneError(f"{family} cannot carry virtual tokens: it reads ids elsewhere than in its input embedding")
    if not bool(gradient.abs().sum() > 0):
        raise BackboneError(f"{family} cannot carry virtual tokens: no gradient reaches its input embedding")
