"""A frozen model with virtual tokens in front of every row's text, for code that is written around transformers' own
Trainer and ``generate``.

Batches hold no virtual tokens: `PrefixedModel` sets them in front of each row's text, behind its pads, and takes them
out of everything that it gives back, so that logits line up with labels and generated ids are words.

Knows nothing of templates, tasks, or what starts an encoder. Shapes: B batch, t text tokens, P virtual tokens, H width,
V rows of the backbone's input matrix, N chosen positions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.modeling_outputs import CausalLMOutput

from ptune.drop_in.prefixed_generation import generate_text
from ptune.errors import BackboneError, ConfigError, SoftPromptError
from ptune.models.prompted_model import PromptedModel
from ptune.pretrained.losses import next_token_labels, summed_loss
from ptune.prompts.encoder import count_parameters
from ptune.rendering.batch import IGNORED
from ptune.soft_prompts.peft_format import write_peft_adapter


class PrefixedModel(nn.Module):
    """A frozen model with P virtual tokens in front of every row's text. Built by `ptune.prompted`.

    Its parameters and state are the encoder's alone, so a Trainer's checkpoints are small, and bring all of it back.

    Attributes:
        prompted: encoder, table and backbone.
        config: a copy of the model's config, for Trainer writes into it.
    """

    accepts_loss_kwargs = True  # Trainer then passes num_items_in_batch

    def __init__(self, prompted: PromptedModel) -> None:
        super().__init__()
        self.prompted = prompted
        self._closed = False
        self.config = copy.deepcopy(prompted.backbone.model.config)
        if hasattr(prompted.backbone.model, "hf_device_map"):  # Trainer moves such a model nowhere
            self.hf_device_map = prompted.backbone.model.hf_device_map

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        num_items_in_batch: Tensor | int | None = None,
        skip_logits: bool | None = None,
        **unknown: Any,
    ) -> CausalLMOutput:
        """Return loss and logits for rows of text.

        Args:
            input_ids: ``[B, t]`` int64, text alone.
            attention_mask: ``[B, t]``, 0 at pads, which may stand on either side; None where there are none.
            labels: ``[B, t]`` int64, the id itself at supervised positions, -100 elsewhere. A row's first token may
                be supervised too, for the virtual tokens predict it.
            num_items_in_batch: what the summed loss is divided by; the batch's own supervised tokens where absent.
            skip_logits: leave the logits out, and compute them at supervised positions alone. None does so in training
                with ``num_items_in_batch``: that is Trainer's own step, which looks at the loss and nothing else.
            unknown: anything else is refused.

        Returns:
            ``loss``, with labels only: a scalar in float32, or float64 where the backbone is. ``logits`` ``[B, t, V]``,
            at t those of the token at t + 1, as they would be without virtual tokens.

        Raises:
            ConfigError: an argument that would be ignored.
            BackboneError: called in a thread of `torch.nn.DataParallel`, or virtual tokens and text are longer than
                the model takes.
        """
        if unknown:
            raise ConfigError(
                "a model with virtual tokens takes input_ids, attention_mask and labels, and found "
                f"{', '.join(unknown)}, which would be ignored; leave it out"
            )
        if getattr(self, "_is_replica", False):
            raise BackboneError(
                "one process spreads its batch over several GPUs, and the frozen model is on one; "
                "start the script by torchrun or accelerate launch, or let CUDA_VISIBLE_DEVICES name one GPU"
            )
        ids, mask, prefixed_labels = self._prefixed(input_ids, attention_mask, labels)
        if skip_logits is None:
            skip_logits = self.training and num_items_in_batch is not None
        if labels is not None and skip_logits:
            return CausalLMOutput(
                loss=_mean(self.prompted(ids, mask, labels=prefixed_labels), labels, num_items_in_batch)
            )
        text, following = ids < self.prompted.backbone.vocabulary_size, next_token_labels(prefixed_labels)
        wanted = text | (following != IGNORED)  # the last virtual token where it predicts a supervised first token
        logits = self.prompted(ids, mask, positions=wanted)  # [N, V]
        loss = None
        if labels is not None:
            following = following[wanted]
            total = summed_loss(logits[following != IGNORED], following[following != IGNORED])
            loss = _mean(total, labels, num_items_in_batch)
        logits = logits[text[wanted]].view(*input_ids.shape, -1)
        return CausalLMOutput(loss=loss, logits=logits)

    def token_log_probabilities(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the log-probability of every token of text behind the virtual tokens, for a loss of your own.

        The first token of a row has one, too: the virtual tokens predict it.

        Args:
            input_ids: ``[B, T]`` int64, text alone.
            attention_mask: ``[B, T]``, 0 at pads, which may stand on either side; None where there are none.

        Returns:
            ``[B, T]`` float32, in training mode with gradient to the encoder; nan at pads.

        Raises:
            ConfigError: ids and mask have different shapes.
            BackboneError: virtual tokens and text are longer than the model takes.
        """
        ids, mask, _ = self._prefixed(input_ids, attention_mask, None)
        values = self.prompted.token_log_probabilities(ids, mask)  # [B, P + T]
        return values[ids < self.prompted.backbone.vocabulary_size].view(input_ids.shape)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        """Continue rows of text by transformers' ``generate``, dropout off, and return them as it does.

        Args:
            input_ids: ``[B, t]`` int64, text alone, padded on the left.
            attention_mask: ``[B, t]``, 0 at pads.
            options: those of ``generate``; ``max_length`` and ``min_length`` count text tokens.

        Returns:
            ``[B, t + new]`` int64, text and continuation without virtual tokens; or, with
            ``return_dict_in_generate``, transformers' output whose ``sequences`` they are.

        Raises:
            ConfigError: an option that cannot be had with virtual tokens, pads without a mask, or pads on the right,
                behind which a text would go on.
            BackboneError: virtual tokens and text are longer than the model takes.
        """
        backbone, was_training = self.prompted.backbone, self.training
        pad = getattr(self.generation_config, "pad_token_id", None)
        if attention_mask is None and len(input_ids) > 1 and pad is not None and bool((input_ids == pad).any()):
            raise ConfigError("generate expected an attention_mask for a batch with pads; pass that of the tokenizer")
        if attention_mask is not None and attention_mask.dim() == 2 and not bool(attention_mask[:, -1].all()):
            raise ConfigError(
                "generate goes on behind each row's last place, and found pads there; pad on the left: "
                'tokenizer.padding_side = "left"'
            )
        ids, mask, _ = self._prefixed(input_ids, attention_mask, None)
        self.eval()
        try:
            self.prompted.use()
            backbone.model.eval()
            return generate_text(backbone.model, ids, mask, backbone.vocabulary_size, **options)
        finally:
            self.train(was_training)

    def _prefixed(
        self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids, mask and labels, ``[B, P + t]`` each, with the virtual tokens where each row's text begins."""
        if self._closed:
            raise BackboneError("the model was closed, and has no virtual tokens any more; call prompted() again")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if labels is None:
            labels = torch.full_like(input_ids, IGNORED)
        for name, tensor in (("attention_mask", attention_mask), ("labels", labels)):
            if tensor.shape != input_ids.shape or input_ids.dim() != 2:
                raise ConfigError(
                    f"input_ids and {name} have one shape [B, T], and found {list(input_ids.shape)} and "
                    f"{list(tensor.shape)}; give both as the collator made them"
                )
        count, length = self.prompted.num_virtual_tokens, input_ids.shape[1]
        limit = self.prompted.backbone.context_limit
        if limit is not None and count + length > limit and (most := int(attention_mask.sum(-1).max())) + count > limit:
            raise BackboneError(
                f"{count} virtual tokens and a text of {most} tokens are more than the {limit} positions of "
                f'"{self.prompted.backbone.name}"; cut texts to {limit - count} tokens'
            )
        begin = (attention_mask != 0).int().argmax(-1, keepdim=True)  # [B, 1]
        # [B, P + t], counted from the first virtual token
        place = torch.arange(count + length, device=input_ids.device) - begin
        virtual = (place >= 0) & (place < count)
        source = (place + begin - count * (place >= count)).clamp(max=length - 1)  # whence each of the others comes
        ids = input_ids.gather(1, source).where(~virtual, self.prompted.first_virtual_id + place)
        mask = attention_mask.long().gather(1, source).masked_fill(virtual, 1)
        return ids, mask, labels.gather(1, source).masked_fill(virtual, IGNORED)

    def rows(self) -> Tensor:
        """Return the virtual tokens as they stand, ``[P, H]`` float32, dropout off, without gradient."""
        was_training = self.training
        self.eval()
        try:
            return self.prompted.rows()
        finally:
            self.train(was_training)

    def print_trainable_parameters(self) -> None:
        """Print how many numbers are trained, how many there are, and their share."""
        trained = count_parameters(self)
        total = trained + self.prompted.backbone.model.num_parameters()
        print(f"trained: {trained:,} of {total:,} parameters ({trained / total:.4%})")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the virtual tokens as PEFT's pair, which ``PeftModel.from_pretrained(model, folder)`` reads.

        The encoder is not part of it: a Trainer's checkpoints hold that.

        Raises:
            OutputError: the folder cannot be written.
        """
        config = self.config.get_text_config()
        write_peft_adapter(
            folder,
            self.rows(),
            base_model=self.prompted.backbone.model.name_or_path or None,
            num_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
        )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take the encoder's weights from a checkpoint; whatever ``strict`` says, all must fit.

        Raises:
            SoftPromptError: they are of another encoder, or of more or fewer virtual tokens.
        """
        if difference := _difference(state_dict, self.state_dict()):
            raise SoftPromptError(f"the checkpoint is of another prompt encoder: {difference}")
        return super().load_state_dict(state_dict, strict=True, assign=assign)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **settings: Any
    ) -> None:
        """Recompute the frozen layers' activations in the backward pass; Trainer calls this by either of its names.

        Raises:
            ConfigError: a setting other than the arguments of `torch.utils.checkpoint.checkpoint`.
            BackboneError: the family's layers cannot do it.
        """
        arguments = gradient_checkpointing_kwargs or settings.pop("activation_checkpointing_kwargs", None) or {}
        for name, neutral in (("every_n_layers", 1), ("offload", False)):
            if settings.pop(name, neutral) != neutral:
                raise ConfigError(f"gradient checkpointing cannot take {name} with virtual tokens; leave it out")
        if settings:
            raise ConfigError(f"gradient checkpointing has no setting {', '.join(settings)}; leave it out")
        self.prompted.backbone.enable_gradient_checkpointing(**arguments)

    activation_checkpointing_enable = gradient_checkpointing_enable

    def close(self) -> None:
        """Take the virtual tokens away from the model, which stays frozen. Nothing can be run afterwards."""
        self.prompted.close()
        self._closed = True

    @property
    def device(self) -> torch.device:
        """Where ids go."""
        return self.prompted.backbone.device

    @property
    def generation_config(self) -> GenerationConfig | None:
        """The model's own."""
        return self.prompted.backbone.model.generation_config

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PrefixedModel:
        # Trainer moves what it trains; the frozen model goes along, but keeps its dtype.
        super()._apply(fn, recurse)
        model, device = self.prompted.backbone.model, next(self.parameters()).device
        placed = hasattr(self, "hf_device_map") or getattr(model, "is_quantized", False)
        if model.device != device and not placed:
            model.to(device)
        return self

    def _get_name(self) -> str:
        # Trainer's label smoothing shifts labels by one only for names that it knows as causal language models.
        return type(self.prompted.backbone.model).__name__


def _difference(found: Mapping[str, Any], expected: Mapping[str, Tensor]) -> str | None:
    """Return how one encoder's state differs from another's, and the mend; None where each tensor has its shape."""
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    others = {name: tuple(tensor.shape) for name, tensor in found.items()}
    if others == shapes:
        return None
    if others.keys() != shapes.keys():
        return "its parts are those of another kind; give prompted() the encoder that it was trained with"
    rows = next(name for name in shapes if name.endswith("encoder.embedding.weight"))  # [P, H]
    for place, what, mend in ((0, "virtual tokens", "num_virtual_tokens"), (1, "the width", "the model")):
        if others[rows][place] != shapes[rows][place]:
            there, here = others[rows][place], shapes[rows][place]
            return f"it has {there} {what} and this one {here}; give prompted() {mend} as it was"
    return "its layers have another width; give prompted() the encoder's settings that it was trained with"


def _mean(total: Tensor, labels: Tensor, count: Tensor | int | None) -> Tensor:
    items = (labels != IGNORED).sum() if count is None else count
    return total / torch.as_tensor(items, device=total.device)
