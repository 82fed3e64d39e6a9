"""Frozen weights cost nothing in training: no activation is kept for them, no gradient computed, no optimizer state.

What autograd keeps is counted by `saved_tensors_hooks`, what the backward pass computes by a dispatch mode; the same
model with its weights trained is the control that shows that the count sees them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, tiny_model, tiny_tokenizer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ptune.config.run import EncoderConfig
from ptune.models.backbone import Backbone
from ptune.models.prompted_model import PromptedModel
from ptune.prompts.encoder import build_encoder
from ptune.rendering.batch import IGNORED
from ptune.tasks.side_by_side import answer_side_by_side
from ptune.tasks.task import Asked

P = 3
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")


class Shapes(TorchDispatchMode):
    """Remembers the shapes of all that is computed."""

    def __init__(self, frozen: set[int]) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()
        self._frozen = frozen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in self._frozen:
            self.seen.add(tuple(result.shape))
        return result


def rows(first: int, *, in_front: bool, lengths: tuple[int, ...] = (23, 17, 11, 14, 20)) -> Asked:
    """Rows whose last four tokens are supervised, virtual tokens in front of the text or behind it."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.zeros(len(lengths), max(lengths) + P, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for number, length in enumerate(lengths):
        words = torch.randint(4, 340, (length,), generator=generator).tolist()
        place = 0 if in_front else length - 4
        row = [*words[:place], *range(first, first + P), *words[place:]]
        ids[number, : len(row)], mask[number, : len(row)] = torch.tensor(row), 1
        labels[number, len(row) - 4 : len(row)] = torch.tensor(row[-4:])
    return Asked(ids, mask, labels=labels)


def prompted_of(backbone: Backbone, seed: int) -> PromptedModel:
    settings = EncoderConfig(type="mlp", hidden_size=6)
    return PromptedModel(backbone, build_encoder(settings, backbone.embeddings(torch.arange(30, 30 + P)), seed))


def measured(backbone: Backbone, forward: Callable[[], Tensor]) -> tuple[list[Tensor], set[str], set[tuple[int, ...]]]:
    """What the backward pass keeps, the projections whose inputs are among that, the shapes that it computes."""
    frozen = {parameter.untyped_storage().data_ptr() for parameter in backbone.model.parameters()}
    kept: dict[int, Tensor] = {}
    inputs: list[tuple[str, Tensor]] = []
    hooks = [
        module.register_forward_pre_hook(
            lambda _module, arguments, name=name: inputs.append((name.rsplit(".", 1)[-1], arguments[0]))
        )
        for name, module in backbone.model.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in PROJECTIONS
    ]

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage().data_ptr()
        if storage not in frozen:
            kept[storage] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward()
    for hook in hooks:
        hook.remove()
    own = {name for name, tensor in inputs if tensor.untyped_storage().data_ptr() in kept}
    held = list(kept.values())
    with Shapes(frozen) as shapes:
        loss.backward()
    return held, own, shapes.seen


CASES = [("packed rows", True), ("frozen context", False), ("reference", True)]


@pytest.mark.parametrize(("plan", "in_front"), CASES)
def test_a_step_keeps_and_computes_nothing_for_frozen_weights(plan: str, in_front: bool) -> None:
    backbone = Backbone(tiny_model("llama"), tiny_tokenizer("llama"), "llama")
    backbone.plan = "reference" if plan == "reference" else "auto"
    matrices = {tuple(parameter.shape) for parameter in backbone.model.parameters() if parameter.dim() == 2}
    with prompted_of(backbone, 0) as prompted:
        asked = rows(prompted.first_virtual_id, in_front=in_front)
        kept, inputs, computed = measured(backbone, lambda: asked.of(prompted))
        assert backbone.plans.last == plan
        assert inputs == set()
        assert not computed & matrices
        assert all(parameter.grad is None for parameter in backbone.model.parameters())
        assert all(parameter.grad is not None for parameter in prompted.encoder.parameters())
        if plan != "reference":
            assert all(tensor.shape[-1:] != (VOCABULARY,) for tensor in kept)

        optimizer = torch.optim.AdamW(prompted.parameters())
        optimizer.step()
        numbers = sum(v.numel() for state in optimizer.state.values() for k, v in state.items() if k != "step")
        assert numbers == 2 * sum(parameter.numel() for parameter in prompted.encoder.parameters())

        backbone.model.requires_grad_(True)  # the control: a model that is trained itself
        _, inputs, computed = measured(backbone, lambda: asked.of(prompted))
        assert {"gate_proj", "down_proj"} <= inputs
        assert computed & matrices


@pytest.mark.parametrize("in_front", [True, False])
def test_nor_does_a_step_of_many_candidates(in_front: bool) -> None:
    backbone = Backbone(tiny_model("llama"), tiny_tokenizer("llama"), "llama")
    matrices = {tuple(parameter.shape) for parameter in backbone.model.parameters() if parameter.dim() == 2}
    prompts = [prompted_of(backbone, seed) for seed in range(3)]

    def forward() -> Tensor:
        for prompted in prompts:
            prompted.use(prompted.train().rows())
        asked = [rows(prompted.first_virtual_id, in_front=in_front) for prompted in prompts]
        return torch.stack(answer_side_by_side(backbone, asked)).sum()

    kept, inputs, computed = measured(backbone, forward)
    assert backbone.plans.last == ("packed rows" if in_front else "frozen context")
    assert inputs == set()
    assert not computed & matrices
    assert all(tensor.shape[-1:] != (VOCABULARY,) for tensor in kept)
    assert all(parameter.grad is None for parameter in backbone.model.parameters())
    assert all(parameter.grad is not None for prompted in prompts for parameter in prompted.encoder.parameters())


def test_logits_and_hidden_states_are_not_asked_for_by_one_pass() -> None:
    backbone = Backbone(tiny_model("llama"), tiny_tokenizer("llama"), "llama")
    ids = torch.full((1, 4), 9)
    mask = torch.ones_like(ids)
    asked = [Asked(ids, mask, positions=mask.bool(), states=states) for states in (True, False)]
    with pytest.raises(ValueError, match="gives hidden states or logits, and both are asked for; ask apart"):
        answer_side_by_side(backbone, asked)
