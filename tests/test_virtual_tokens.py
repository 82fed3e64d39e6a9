"""Ids from V on: what they mean, whose they are, and that the model is as it was afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, VOCABULARY, tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ptune.models.backbone import Backbone
from ptune.models.prompted_model import PromptedModel
from ptune.prompts.encoder import PromptEncoder
from ptune.prompts.virtual_tokens import VirtualTokens, input_embedding, input_matrix

WORDS = torch.tensor([[5, 6, 7]])


def rows(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(seed))


def prompted(model: PreTrainedModel, kind: str = "mlp", seed: int = 0) -> PromptedModel:
    torch.manual_seed(seed)
    return PromptedModel(Backbone(model, None, "tiny"), PromptEncoder.peft(kind, 3, 32, 8))


def test_ids_from_v_on_take_rows_and_ids_below_the_frozen_matrix() -> None:
    embedding = input_embedding(tiny_model("llama"))
    model = nn.Module()
    model.get_input_embeddings = lambda: embedding  # type: ignore[assignment]
    model.add_module("embedding", embedding)
    tokens = VirtualTokens.attach(model)
    first = tokens.allocate(2)
    assert first == VOCABULARY
    tokens.set_rows(first, rows(2))
    found = embedding(torch.tensor([[4, first + 1, first, VOCABULARY - 1]]))
    assert torch.equal(found[0, [1, 2]], rows(2).flip(0))
    assert torch.equal(found[0, [0, 3]], input_matrix(model)[[4, VOCABULARY - 1]])
    tokens.detach()


@given(st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=1, max_size=6), st.randoms())
@settings(max_examples=40, deadline=None)
def test_any_mix_of_ranges_some_of_them_released_finds_its_own_rows(
    ranges: list[tuple[int, bool]], shuffle: object
) -> None:
    embedding = nn.Embedding(10, 32)
    model = nn.Module()
    model.get_input_embeddings = lambda: embedding  # type: ignore[assignment]
    model.add_module("embedding", embedding)
    tokens = VirtualTokens.attach(model)
    held: dict[int, Tensor] = {}
    for seed, (count, release) in enumerate(ranges):
        first = tokens.allocate(count)
        tokens.set_rows(first, rows(count, seed))
        if release:
            tokens.release(first)
        else:
            held.update({first + k: row for k, row in enumerate(rows(count, seed))})
    ids = [*held, 0, 9]
    shuffle.shuffle(ids)  # type: ignore[attr-defined]
    expected = torch.stack([held[i] if i in held else embedding.weight[i] for i in ids])
    assert torch.equal(embedding(torch.tensor(ids)), expected)
    tokens.detach()


def test_id_ranges_are_never_given_twice() -> None:
    model = tiny_model("gpt2")
    given_out: set[int] = set()
    for count in (3, 1, 4):
        tokens = VirtualTokens.attach(model)
        first = tokens.allocate(count)
        assert not given_out & set(range(first, first + count))
        given_out |= set(range(first, first + count))
        tokens.set_rows(first, rows(count))
        tokens.release(first)
        tokens.detach()  # the last user leaves, and the numbers go on nevertheless


def test_rows_for_ids_that_were_never_allocated_are_refused() -> None:
    tokens = VirtualTokens.attach(tiny_model("gpt2"))
    first = tokens.allocate(2)
    with pytest.raises(ValueError, match=f"ids {first} to {first + 2} were never allocated"):
        tokens.set_rows(first, rows(3))
    with pytest.raises(ValueError, match="ids 0 to 1 were never allocated"):
        tokens.set_rows(0, rows(2))


@pytest.mark.parametrize("family", FAMILIES)
def test_attachment_is_counted_and_the_last_to_leave_gives_the_forward_back(family: str) -> None:
    model = tiny_model(family)
    embedding = input_embedding(model)
    assert "forward" not in embedding.__dict__
    one, other = prompted(model), prompted(model)
    assert one.virtual_tokens is other.virtual_tokens
    assert not set(range(one.first_virtual_id, one.first_virtual_id + 3)) & {other.first_virtual_id}
    one.close()
    assert "forward" in embedding.__dict__
    other(torch.tensor([[other.first_virtual_id, 5]]), torch.ones(1, 2).long())
    other.close()
    assert "forward" not in embedding.__dict__


def test_a_forward_that_a_device_hook_had_put_there_comes_back() -> None:
    model = tiny_model("llama")
    embedding, own, calls = input_embedding(model), input_embedding(model).forward, []

    def hooked(ids: Tensor) -> Tensor:
        calls.append(ids)
        return own(ids)

    embedding.forward = hooked
    with prompted(model) as one:
        calls.clear()
        one(torch.tensor([[one.first_virtual_id, 5]]), torch.ones(1, 2).long())
        assert len(calls) == 1
    assert embedding.forward is hooked


def test_the_model_is_as_before_after_an_error_within_the_block() -> None:
    model = tiny_model("bloom")
    expected = model(WORDS).logits
    with pytest.raises(IndexError), prompted(model) as one:
        one(torch.tensor([[10**6]]), torch.ones(1, 1).long())  # an id that nobody has
    assert "forward" not in input_embedding(model).__dict__
    assert torch.equal(model(WORDS).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_text_without_virtual_tokens_is_untouched_while_attached(family: str) -> None:
    model = tiny_model(family)
    expected = model(WORDS).logits
    with prompted(model) as one:
        one.use()
        assert torch.equal(model(WORDS).logits, expected)


def test_two_prompted_models_in_one_batch_give_what_each_gives_alone() -> None:
    model = tiny_model("qwen3", dtype=torch.float64)
    one, other = prompted(model, seed=1), prompted(model, "lstm", seed=2)
    mask = torch.ones(1, 6).long()
    alone = []
    for each in (one.eval(), other.eval()):
        virtual = torch.arange(each.first_virtual_id, each.first_virtual_id + 3)[None]
        alone.append((torch.cat([virtual, WORDS], 1), each(torch.cat([virtual, WORDS], 1), mask)))
    one.use()
    other.use()
    both = one.backbone(torch.cat([ids for ids, _ in alone]), mask.expand(2, -1))
    for row, (_, logits) in enumerate(alone):
        assert torch.allclose(both[row], logits[0], rtol=1e-12, atol=1e-12)


def test_two_prompted_models_on_one_backbone_train_in_turn() -> None:
    model = tiny_model("gpt2")
    both = [prompted(model, seed=1), prompted(model, seed=2)]
    mask = torch.ones(1, 4).long()
    for _ in range(2):
        for each in both:
            ids = torch.cat([torch.tensor([[each.first_virtual_id]]), WORDS], 1)
            each.zero_grad()
            each(ids, mask, labels=ids.where(ids < VOCABULARY, -100)).backward()
            assert each.encoder.embedding.weight.grad.abs().sum() > 0
        assert both[0].encoder.embedding.weight.grad is not None


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_and_tying_while_attached_leave_the_model_sound(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    expected, names = model(WORDS).logits, list(model.state_dict())
    with prompted(model) as one:
        one.use()
        model.tie_weights()
        assert list(model.state_dict()) == names
        model.save_pretrained(tmp_path)
        assert torch.equal(model(WORDS).logits, expected)
    assert torch.equal(model(WORDS).logits, expected)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(WORDS).logits, expected)


def test_rows_in_eval_mode_are_one_tensor_until_the_encoder_changes() -> None:
    one, other = prompted(tiny_model("gpt2"), seed=1), prompted(tiny_model("gpt2"), seed=2)
    assert one.rows() is not one.rows()
    assert one.rows().requires_grad
    one.eval()
    assert one.rows() is one.rows()
    assert not one.rows().requires_grad
    one.encoder.load_state_dict(other.encoder.state_dict())
    assert torch.equal(one.rows(), other.eval().rows())
    one.double()
    assert one.rows().dtype == torch.float64


def test_prompted_model_holds_the_encoder_alone() -> None:
    one = prompted(tiny_model("gpt2"))
    assert all(name.startswith("encoder.") for name in one.state_dict())
    assert {id(p) for p in one.parameters()} == {id(p) for p in one.encoder.parameters()}
