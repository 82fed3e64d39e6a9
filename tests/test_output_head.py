"""The output head: a loss without logits, some words' logits without the rest, and no head taken for another."""

from __future__ import annotations

import pytest
import torch
from tiny_models import ALL_FAMILIES, VOCABULARY, tiny_model, tiny_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, PreTrainedConfig

from ptune.config.run import EncoderConfig
from ptune.models.backbone import Backbone
from ptune.models.prompted_model import PromptedModel
from ptune.pretrained import losses
from ptune.pretrained.losses import summed_linear_loss, summed_loss
from ptune.prompts.encoder import build_encoder
from ptune.rendering.batch import IGNORED

pytestmark = pytest.mark.usefixtures("true_float64")

_SHAPE = {"vocab_size": 352, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
_SHAPE |= {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 256}
NOT_PLAIN: dict[str, PreTrainedConfig] = {
    "soft cap": Gemma2Config(**_SHAPE, head_dim=8, final_logit_softcapping=30.0, sliding_window=64),
    "scale": CohereConfig(**_SHAPE, logit_scale=0.0625),
}


def prompted_of(backbone: Backbone) -> PromptedModel:
    initial = backbone.embeddings(torch.arange(30, 35))
    return PromptedModel(backbone, build_encoder(EncoderConfig(type="embedding"), initial, 0).to(backbone.dtype))


def rows_of(prompted: PromptedModel) -> tuple[Tensor, Tensor, Tensor]:
    """Two rows, virtual tokens in front; the last four tokens of one and three of the other are supervised."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(4, 340, (2, 16), generator=generator)
    ids[:, :5] = torch.arange(prompted.first_virtual_id, prompted.first_virtual_id + 5)
    mask, labels = torch.ones_like(ids), torch.full_like(ids, IGNORED)
    mask[1, 12:] = 0
    labels[0, 12:], labels[1, 9:12] = ids[0, 12:], ids[1, 9:12]
    return ids, mask, labels


def loss_and_gradient(prompted: PromptedModel, plan: str) -> list[Tensor]:
    prompted.backbone.plan = plan  # type: ignore[assignment]
    prompted.zero_grad()
    ids, mask, labels = rows_of(prompted)
    loss = prompted(ids, mask, labels=labels)
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in prompted.parameters())]


def assert_same(ours: list[Tensor], expected: list[Tensor], limit: float) -> None:
    for one, other in zip(ours, expected, strict=True):
        assert float(other.abs().max()) > 0
        assert float((one - other).abs().max()) <= limit * float(other.abs().max())


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_plain_head_s_loss_is_the_reference_s(family: str) -> None:
    backbone = Backbone(tiny_model(family, dtype=torch.float64), tiny_tokenizer(family), family)
    assert backbone.head.plain
    with prompted_of(backbone) as prompted:
        assert_same(loss_and_gradient(prompted, "auto"), loss_and_gradient(prompted, "reference"), 1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("name", NOT_PLAIN)
def test_a_model_that_does_more_after_the_head_keeps_its_own_logits(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(NOT_PLAIN[name]).to(dtype).eval()
    backbone = Backbone(model, None, name)
    assert not backbone.head.plain
    if dtype == torch.float64:
        with prompted_of(backbone) as prompted:
            assert_same(loss_and_gradient(prompted, "auto"), loss_and_gradient(prompted, "reference"), 1e-9)


def test_a_head_that_was_changed_after_loading_is_plain_no_more() -> None:
    for change in ("another", "unfrozen", "other weight"):
        backbone = Backbone(tiny_model("qwen2", dtype=torch.float64), None, "qwen2")
        head = backbone.model.get_output_embeddings()
        if change == "another":
            backbone.model.lm_head = nn.Linear(32, VOCABULARY, dtype=torch.float64).requires_grad_(False)
        elif change == "unfrozen":
            head.weight.requires_grad_()
        else:
            head.weight = nn.Parameter(head.weight.flip(0), requires_grad=False)
        assert not backbone.head.plain
        with prompted_of(backbone) as prompted:
            assert_same(loss_and_gradient(prompted, "auto"), loss_and_gradient(prompted, "reference"), 1e-9)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("count", [0, 1, 7, 8])
def test_chunks_of_any_size_give_the_loss_of_all_logits(
    count: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_LOGITS_AT_ONCE", 3 * 50)  # three rows at once
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(count, 6, generator=generator).double().requires_grad_()
    matrix = 3 * torch.randn(50, 6, generator=generator).double()
    bias = torch.randn(50, generator=generator).double() if with_bias else None
    labels = torch.randint(0, 50, (count,), generator=generator)
    expected = summed_loss(nn.functional.linear(states, matrix, bias), labels)
    ours = summed_linear_loss(states, matrix, bias, labels)
    assert torch.allclose(ours, expected, rtol=1e-12)
    found, wanted = (torch.autograd.grad(2.5 * loss, states)[0] for loss in (ours, expected))
    assert torch.allclose(found, wanted, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        assert torch.allclose(summed_linear_loss(states, matrix, bias, labels), expected, rtol=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5"])
def test_columns_are_those_of_all_logits(family: str) -> None:
    backbone = Backbone(tiny_model(family, dtype=torch.float64), tiny_tokenizer(family), family)
    ids, columns = torch.arange(5, 25).view(2, 10), torch.tensor([7, 300, 7])
    positions = torch.zeros_like(ids, dtype=torch.bool)
    positions[:, -1] = True
    with torch.no_grad():
        every = backbone(ids, torch.ones_like(ids), positions=positions)
        for plan in ("auto", "reference"):
            backbone.plan = plan  # type: ignore[assignment]
            some = backbone(ids, torch.ones_like(ids), positions=positions, columns=columns)
            assert torch.allclose(some, every[:, columns], rtol=1e-12)


def test_nothing_is_kept_for_frozen_weights_nor_any_logits() -> None:
    model = tiny_model("qwen2")
    backbone = Backbone(model, None, "qwen2")
    frozen = {parameter.data_ptr() for parameter in model.parameters()}
    with prompted_of(backbone) as prompted:
        ids, mask, labels = rows_of(prompted)
        labels = ids.where(ids < VOCABULARY, IGNORED).where(mask.bool(), IGNORED)
        supervised = int((labels != IGNORED).sum())

        def kept_by(plan: str) -> dict[int, int]:
            """Numbers that the backward pass keeps, by the storage that they lie in."""
            backbone.plan = plan  # type: ignore[assignment]
            kept: dict[int, Tensor] = {}

            def keep(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage().data_ptr()
                if storage not in frozen:
                    kept[storage] = tensor  # held, so that no other gets its place
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = prompted(ids, mask, labels=labels)
            loss.backward()
            return {storage: tensor.untyped_storage().nbytes() for storage, tensor in kept.items()}

        plain, ours = kept_by("reference"), kept_by("auto")
        assert backbone.plans.last == "packed rows"
        logits = supervised * VOCABULARY * 4
        assert max(plain.values()) >= logits
        assert max(ours.values()) < logits / 4
        assert sum(ours.values()) < sum(plain.values()) - logits
        optimizer = torch.optim.AdamW(prompted.parameters())
        optimizer.step()
        trained = sum(parameter.numel() for parameter in prompted.parameters())
        held = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor) and t.dim()]
        assert sum(tensor.numel() for tensor in held) == 2 * trained
        assert all(parameter.grad is None for parameter in model.parameters())
