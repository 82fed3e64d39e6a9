"""One mathematics: loss and every gradient against PEFT's P-tuning, against padding, accumulation and a naive sum."""

from __future__ import annotations

import copy
import hashlib
import math
from typing import Any

import pytest
import torch
from peft import PromptEncoderConfig, TaskType, get_peft_model
from tiny_models import FAMILIES, tiny_model
from torch import Tensor, nn
from torch.nn import functional

from ptune.drop_in.prefixed_model import PrefixedModel
from ptune.models.backbone import Backbone
from ptune.models.prompted_model import PromptedModel
from ptune.prompts.encoder import PromptEncoder
from ptune.rendering.batch import IGNORED

pytestmark = pytest.mark.usefixtures("true_float64")

P, HIDDEN = 5, 12
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
WITH_PEFT = ["gpt2", "bloom", "llama", "qwen2", "qwen3"]
# Their own forward takes positions or distances from the mask, so PEFT is right on left-padded rows too.
PEFT_PADS_LEFT = ["bloom"]


def text_batch(side: str = "right") -> dict[str, Tensor]:
    """Three rows of 9, 6 and 4 tokens, of which the last ones are supervised."""
    generator = torch.Generator().manual_seed(11)
    ids, mask, labels = torch.zeros(3, 9).long(), torch.zeros(3, 9).long(), torch.full((3, 9), IGNORED)
    for row, length in enumerate((9, 6, 4)):
        words = torch.randint(4, 340, (length,), generator=generator)
        here = slice(0, length) if side == "right" else slice(9 - length, 9)
        ids[row, here], mask[row, here] = words, 1
        labels[row, here] = words.where(torch.arange(length) >= 2, IGNORED)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def peft_and_ours(family: str, kind: str, dtype: torch.dtype) -> tuple[Any, PrefixedModel]:
    config = PromptEncoderConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=P,
        encoder_reparameterization_type=kind.upper(),
        encoder_hidden_size=HIDDEN,
        encoder_num_layers=2,
        encoder_dropout=0.0,
    )
    torch.manual_seed(5)
    theirs = get_peft_model(tiny_model(family), config).to(dtype)
    theirs.base_model.eval()
    encoder = PromptEncoder.peft(kind, P, 32, HIDDEN)
    encoder.load_state_dict(theirs.prompt_encoder["default"].state_dict())
    ours = PrefixedModel(PromptedModel(Backbone(tiny_model(family, dtype=dtype), None, family), encoder.to(dtype)))
    return theirs, ours


def peft_loss(theirs: Any, batch: dict[str, Tensor]) -> Tensor:
    """PEFT's loss from its logits, for transformers' own loss rounds float64 down to float32."""
    logits = theirs(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = functional.pad(batch["labels"], (P, 0), value=IGNORED)
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def assert_close(a: Tensor, b: Tensor, tolerance: float, what: str = "") -> None:
    assert a.shape == b.shape
    a, b = a.detach(), b.detach()
    worst = float((a - b).abs().max())
    assert worst <= tolerance * float(b.abs().max()), f"{what} differs by {worst:.2e}"


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("kind", ["mlp", "lstm"])
@pytest.mark.parametrize("family", WITH_PEFT)
def test_loss_and_every_gradient_are_those_of_peft(family: str, kind: str, dtype: torch.dtype) -> None:
    theirs, ours = peft_and_ours(family, kind, dtype)
    batch = text_batch()
    their_loss, our_loss = peft_loss(theirs, batch), ours(**batch).loss
    assert_close(our_loss, their_loss, TOLERANCE[dtype], "loss")
    their_loss.backward()
    our_loss.backward()
    expected, found = gradients(theirs.prompt_encoder["default"]), gradients(ours.prompted.encoder)
    assert set(found) == set(expected)
    assert len(found) == {"mlp": 7, "lstm": 21}[kind]
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert_close(found[name], gradient, TOLERANCE[dtype], name)


@pytest.mark.parametrize("family", WITH_PEFT)
def test_loss_is_what_peft_itself_reports(family: str) -> None:
    theirs, ours = peft_and_ours(family, "mlp", torch.float32)
    assert_close(ours(**text_batch()).loss, theirs(**text_batch()).loss, 1e-5, "loss")


@pytest.mark.parametrize("family", PEFT_PADS_LEFT)
def test_left_padded_rows_are_those_of_peft_where_peft_is_right(family: str) -> None:
    theirs, ours = peft_and_ours(family, "mlp", torch.float32)
    their_loss, our_loss = peft_loss(theirs, text_batch("left")), ours(**text_batch("left")).loss
    assert_close(our_loss, their_loss, 1e-4, "loss")


@pytest.mark.parametrize("kind", ["mlp", "lstm"])
@pytest.mark.parametrize("family", WITH_PEFT)
def test_twenty_steps_end_where_pefts_end(family: str, kind: str) -> None:
    theirs, ours = peft_and_ours(family, kind, torch.float64)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (theirs.prompt_encoder["default"], ours)]
    losses = []
    for _ in range(20):
        pair = (peft_loss(theirs, text_batch()), ours(**text_batch()).loss)
        losses.append([loss.item() for loss in pair])
        for loss, optimizer in zip(pair, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert losses[-1][0] < losses[0][0]
    for theirs_at, ours_at in losses:
        assert math.isclose(ours_at, theirs_at, rel_tol=1e-6)
    expected = dict(theirs.prompt_encoder["default"].named_parameters())
    for name, parameter in ours.prompted.encoder.named_parameters():
        assert_close(parameter, expected[name], 1e-6, name)


def prompted_tiny(family: str, dtype: torch.dtype = torch.float64, seed: int = 0, *, count: int = P) -> PromptedModel:
    torch.manual_seed(3)
    encoder = PromptEncoder.peft("mlp", count, 32, HIDDEN).to(dtype)
    return PromptedModel(Backbone(tiny_model(family, dtype=dtype, seed=seed), None, family), encoder)


def loss_and_gradients(model: nn.Module, loss: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: gradient.clone() for name, gradient in gradients(model).items()}


def with_virtual_ids(batch: dict[str, Tensor], first: int, at: int, *, count: int = P) -> dict[str, Tensor]:
    """Set the virtual tokens behind the first ``at`` tokens of every row's text, pads staying where they are."""
    rows = []
    for ids, mask, labels in zip(*batch.values(), strict=True):
        begin = int(mask.argmax()) + at
        virtual = torch.arange(first, first + count)
        rows.append(
            [
                torch.cat([values[:begin], new, values[begin:]])
                for values, new in (
                    (ids, virtual),
                    (mask, torch.ones_like(virtual)),
                    (labels, torch.full_like(virtual, IGNORED)),
                )
            ]
        )
    return dict(zip(batch, map(torch.stack, zip(*rows, strict=True)), strict=True))


@pytest.mark.parametrize("at", [0, 2], ids=["in front", "within the text"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_either_side_or_none_moves_nothing(family: str, at: int) -> None:
    # transformers' BLOOM itself gives nan for left pads in float64: it takes softmax in float32, where a row that is
    # masked with the least float64 holds nothing but minus infinity.
    dtype = torch.float32 if family == "bloom" else torch.float64
    model, tolerance = prompted_tiny(family, dtype), 1e-4 if family == "bloom" else 1e-9
    right, left = (with_virtual_ids(text_batch(side), model.first_virtual_id, at) for side in ("right", "left"))
    alone = [
        {name: values[row : row + 1, : P + length] for name, values in right.items()}
        for row, length in enumerate((9, 6, 4))
    ]
    expected = loss_and_gradients(model, sum((model(**one) for one in alone), torch.zeros((), dtype=dtype)))
    for batch in (right, left):
        found = loss_and_gradients(model, model(**batch))
        assert_close(found[0], expected[0], tolerance, "loss")
        for name, gradient in expected[1].items():
            assert_close(found[1][name], gradient, tolerance, name)


@pytest.mark.parametrize("family", ["gpt2", "bloom", "llama"])
def test_prefixed_model_pads_either_side_with_a_supervised_first_token(family: str) -> None:
    torch.manual_seed(3)
    model = PrefixedModel(prompted_tiny(family, torch.float32))
    losses = []
    for side in ("right", "left"):
        batch = text_batch(side)
        batch["labels"] = batch["input_ids"].where(batch["attention_mask"] == 1, IGNORED)
        losses.append(model(**batch).loss)
    assert_close(losses[1], losses[0], 1e-5)


def test_one_batch_of_eight_equals_eight_of_one_weighted_by_tokens() -> None:
    model = PrefixedModel(prompted_tiny("llama"))
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(4, 340, (8, 12), generator=generator)
    lengths = torch.randint(3, 13, (8,), generator=generator)
    mask = (torch.arange(12) < lengths.unsqueeze(-1)).long()
    labels = ids.where((mask == 1) & (torch.arange(12) > 1), IGNORED)
    assert len(set((labels != IGNORED).sum(-1).tolist())) > 1
    whole = loss_and_gradients(model, model(input_ids=ids, attention_mask=mask, labels=labels).loss)
    model.zero_grad()
    items, total = (labels != IGNORED).sum(), 0.0
    for row in range(8):
        here = slice(row, row + 1)
        loss = model(input_ids=ids[here], attention_mask=mask[here], labels=labels[here], num_items_in_batch=items).loss
        loss.backward()
        total += loss.item()
    assert math.isclose(total, whole[0].item(), rel_tol=1e-12)
    for name, gradient in gradients(model).items():
        assert_close(gradient, whole[1][name], 1e-9, name)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("count", [1, P])
@pytest.mark.parametrize("family", FAMILIES)
def test_token_log_probabilities_line_up_with_a_naive_computation(family: str, count: int, side: str) -> None:
    dtype, tolerance = (torch.float32, 1e-4) if family == "bloom" else (torch.float64, 1e-9)  # as above
    model = prompted_tiny(family, dtype, count=count).eval()
    batch = with_virtual_ids(text_batch(side), model.first_virtual_id, at=2, count=count)
    found = model.token_log_probabilities(batch["input_ids"], batch["attention_mask"])
    assert found.shape == batch["input_ids"].shape
    first = model.use()
    for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
        places = mask.nonzero().squeeze(-1).tolist()
        for before, place in enumerate(places):
            if before == 0 or ids[place] >= first:
                assert found[row, place].isnan()
                continue
            so_far = ids[places[:before]].unsqueeze(0)
            logits = model.backbone.logits(so_far, torch.ones_like(so_far))[0, -1]
            expected = torch.log_softmax(logits, -1)[ids[place]].item()
            assert math.isclose(found[row, place], expected, rel_tol=tolerance)
    assert found[batch["attention_mask"] == 0].isnan().all()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_without_virtual_tokens_probabilities_are_the_bare_model_s(family: str) -> None:
    """Rows of text alone: the model as transformers has it, the backbone with nobody attached, and the prompted one."""
    batch, plain = text_batch(), tiny_model(family, dtype=torch.float64)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    logits = plain(input_ids=ids, attention_mask=mask).logits
    expected = torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    wanted = mask[:, 1:] == 1
    model = prompted_tiny(family).eval()
    found = model.token_log_probabilities(ids, mask)
    assert found[:, 0].isnan().all()
    assert_close(found[:, 1:][wanted], expected[wanted], 1e-9)
    bare = Backbone(plain, None, family)
    assert_close(bare.logits(ids, mask)[mask == 1], logits[mask == 1], 1e-9)
    assert_close(bare(ids, mask, labels=batch["labels"]), model(ids, mask, labels=batch["labels"]), 1e-9)


def digest(module: nn.Module) -> str:
    sha = hashlib.sha256()
    for name, value in module.state_dict().items():
        sha.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


@pytest.mark.parametrize("family", FAMILIES)
def test_training_moves_the_encoder_and_not_one_bit_of_the_backbone(family: str) -> None:
    model = prompted_tiny(family, torch.float32)
    batch = with_virtual_ids(text_batch(), model.first_virtual_id, at=0)
    before, encoder = digest(model.backbone.model), copy.deepcopy(model.encoder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch).backward()
        optimizer.step()
    assert digest(model.backbone.model) == before
    assert all(p.grad is None and not p.requires_grad for p in model.backbone.model.parameters())
    for old, new in zip(encoder.parameters(), model.encoder.parameters(), strict=True):
        assert not torch.equal(old, new)


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_layers_give_the_same_gradient(family: str) -> None:
    model = prompted_tiny(family)
    batch = with_virtual_ids(text_batch(), model.first_virtual_id, at=0)
    expected = loss_and_gradients(model, model(**batch))
    model.backbone.enable_gradient_checkpointing()
    runs: list[str] = []
    layers = [m for m in model.backbone.model.modules() if type(m).__name__.endswith(("Layer", "Block"))]
    assert len(layers) == 2
    for layer in layers:
        norm = next(m for m in layer.modules() if "norm" in type(m).__name__.lower())
        norm.register_forward_hook(lambda *_: runs.append("run"))
    found = loss_and_gradients(model, model(**batch))
    assert len(runs) == 4  # each of two layers once forward, once more in the backward pass
    assert_close(found[0], expected[0], 1e-12)
    for name, gradient in expected[1].items():
        assert_close(found[1][name], gradient, 1e-12, name)
    assert not any(m.training for m in model.backbone.model.modules())
