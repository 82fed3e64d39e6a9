"""Every plan gives the numbers of the reference: losses, gradients, for every family, padded or not, kept or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, tiny_model, tiny_tokenizer
from torch import Tensor

from ptune.config.run import EncoderConfig
from ptune.models.backbone import Backbone
from ptune.models.prompted_model import PromptedModel
from ptune.plans.context_cache import ContextCache
from ptune.plans.openings import length_groups
from ptune.plans.packed_attention import PackedGroup, Packing, packed_attention
from ptune.plans.plans import Plans
from ptune.prompts.encoder import PromptEncoder, build_encoder
from ptune.rendering.batch import IGNORED

P = 5


LIMIT = {torch.float64: 1e-9, torch.float32: 1e-5}
UNEVEN, EVEN = (24, 14, 11), (24, 24, 23)
SHAPES = {
    "in front": ("packed rows", lambda words, virtual: [*virtual, *words]),
    "behind": ("frozen context", lambda words, virtual: [*words[:-2], *virtual, *words[-2:]]),
    "both": ("packed rows", lambda words, virtual: [*virtual[:3], *words[:-2], *virtual[3:], *words[-2:]]),
    "two runs": (
        "frozen context",
        lambda words, virtual: [*words[:-3], *virtual[:2], words[-3], *virtual[2:], *words[-2:]],
    ),
}
Shape = Callable[[list[int], list[int]], list[int]]


pytestmark = pytest.mark.usefixtures("true_float64")


def prompted_model(family: str, dtype: torch.dtype = torch.float64, **encoder: object) -> PromptedModel:
    backbone = Backbone(tiny_model(family, dtype=dtype), tiny_tokenizer(), family)
    initial = backbone.embeddings(torch.arange(30, 30 + P))
    settings = EncoderConfig.model_validate({"type": "mlp", "hidden_size": 8, "residual": False} | encoder)
    return PromptedModel(backbone, build_encoder(settings, initial, 0).to(dtype))


def batch(prompted: PromptedModel, shape: Shape, lengths: tuple[int, ...] = UNEVEN) -> tuple[Tensor, ...]:
    """Ids, mask and labels of rows whose last two tokens are supervised."""
    virtual = list(range(prompted.first_virtual_id, prompted.first_virtual_id + P))
    generator = torch.Generator().manual_seed(7)
    rows = [shape(torch.randint(4, 340, (n,), generator=generator).tolist(), virtual) for n in lengths]
    ids, mask = torch.zeros(len(rows), max(map(len, rows))).long(), torch.zeros(len(rows), max(map(len, rows))).long()
    labels = torch.full_like(ids, IGNORED)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = torch.tensor(row), 1
        labels[number, len(row) - 2 : len(row)] = torch.tensor(row[-2:])
    return ids, mask, labels


def loss_and_gradients(prompted: PromptedModel, plan: str, data: tuple[Tensor, ...]) -> list[Tensor]:
    prompted.backbone.plan = plan  # type: ignore[assignment]
    prompted.encoder.zero_grad()
    torch.manual_seed(0)  # of the dropout's mask
    ids, mask, labels = data
    loss = prompted(ids, mask, labels=labels)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in prompted.encoder.parameters() if p.grad is not None)]


def assert_same(ours: list[Tensor], expected: list[Tensor], limit: float) -> None:
    assert len(ours) == len(expected) > 1
    for one, other in zip(ours, expected, strict=True):
        assert float((one - other).abs().max()) <= limit * float(other.abs().max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_gives_the_reference_s_loss_and_gradients(family: str, name: str, dtype: torch.dtype) -> None:
    expected_plan, shape = SHAPES[name]
    with prompted_model(family, dtype) as prompted:
        data = batch(prompted, shape)
        expected = loss_and_gradients(prompted, "reference", data)
        ours = loss_and_gradients(prompted, "auto", data)
        if family == "bloom" and expected_plan == "packed rows":
            expected_plan = "shared prefix"
        assert prompted.backbone.plans.last == expected_plan
        assert_same(ours, expected, LIMIT[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", ["in front", "both"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_with_little_padding_share_their_prefix(family: str, name: str, dtype: torch.dtype) -> None:
    with prompted_model(family, dtype) as prompted:
        data = batch(prompted, SHAPES[name][1], EVEN)
        expected = loss_and_gradients(prompted, "reference", data)
        ours = loss_and_gradients(prompted, "auto", data)
        assert prompted.backbone.plans.last == "shared prefix"
        assert_same(ours, expected, LIMIT[dtype])


@pytest.mark.parametrize("name", ["in front", "in the middle", "both"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_run_in_groups_of_similar_length_give_the_same(
    family: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptune.plans.choosing._COST_OF_A_PASS", 2)
    shapes = {name: shape for name, (_, shape) in SHAPES.items()}
    shapes["in the middle"] = lambda words, virtual: [*words[:9], *virtual, *words[9:]]
    with prompted_model(family) as prompted:
        prompted.backbone.plans.may_pack = False
        data = batch(prompted, shapes[name], (30, 11, 29, 12, 21))
        expected = loss_and_gradients(prompted, "reference", data)
        rows: list[int] = []
        hook = prompted.backbone.model.get_output_embeddings().register_forward_pre_hook(lambda *_: rows.append(1))
        ours = loss_and_gradients(prompted, "auto", data)
        hook.remove()
        assert len(rows) >= 3
        assert_same(ours, expected, 1e-9)


@pytest.mark.parametrize(
    ("lengths", "cost", "expected"),
    [
        ([5, 5, 5], 1, [[0, 1, 2]]),
        ([100, 10, 90], 50, [[1], [0, 2]]),
        ([100, 10, 90], 1000, [[0, 1, 2]]),
        ([100, 10, 90], 1, [[1], [2], [0]]),
    ],
)
def test_groups_weigh_padding_against_passes(lengths: list[int], cost: int, expected: list[list[int]]) -> None:
    assert length_groups(lengths, cost) == expected


@pytest.mark.parametrize("prefix", [0, 1, 2, 4])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "bloom"])
def test_packed_rows_share_a_prefix_of_any_length(family: str, prefix: int) -> None:
    def shape(words: list[int], virtual: list[int]) -> list[int]:  # the rest stands where no plan looks for it
        return [*virtual[:prefix], words[0], *virtual[prefix:], *words[1:]]

    with prompted_model(family) as prompted:
        data = batch(prompted, shape, (30, 3, 9, 17))
        expected = loss_and_gradients(prompted, "reference", data)
        ours = loss_and_gradients(prompted, "auto", data)
        assert prompted.backbone.plans.last == "packed rows"
        assert_same(ours, expected, 1e-9)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "bloom"])
def test_packed_rows_may_be_padded_on_the_left_and_read_anywhere(family: str) -> None:
    with prompted_model(family) as prompted:
        ids, mask, labels = batch(prompted, SHAPES["in front"][1])
        right = prompted.token_log_probabilities(ids, mask)
        assert prompted.backbone.plans.last == "packed rows"
        prompted.backbone.plan = "reference"
        assert torch.allclose(right, prompted.token_log_probabilities(ids, mask), rtol=1e-9, equal_nan=True)
        prompted.backbone.plan = "auto"
        left_ids, left_mask = (
            torch.stack([row.roll(int((mask[n] == 0).sum())) for n, row in enumerate(t)]) for t in (ids, mask)
        )
        left = prompted.token_log_probabilities(left_ids, left_mask)
        assert prompted.backbone.plans.last == "packed rows"
        assert torch.allclose(left[left_mask.bool()], right[mask.bool()], rtol=1e-9, equal_nan=True)


@pytest.mark.parametrize("name", SHAPES)
def test_positions_at_pads_keep_their_place_in_the_answer(name: str) -> None:
    with prompted_model("llama") as prompted:
        ids, mask, _ = batch(prompted, SHAPES[name][1])
        positions = torch.zeros_like(mask, dtype=torch.bool)
        positions[:, -1] = True  # a pad in all rows but the first
        found = prompted(ids, mask, positions=positions)
        prompted.backbone.plan = "reference"
        expected = prompted(ids, mask, positions=positions)
        assert found.shape == expected.shape
        assert torch.allclose(found[0], expected[0], rtol=1e-9)


def test_the_attention_setting_is_undone_after_an_error_too() -> None:
    with prompted_model("llama") as prompted:
        model, data = prompted.backbone.model, batch(prompted, SHAPES["in front"][1])
        before = model.config._attn_implementation
        loss_and_gradients(prompted, "auto", data)
        assert prompted.backbone.plans.last == "packed rows"
        assert model.config._attn_implementation == before
        hook = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loss_and_gradients(prompted, "auto", data)
        hook.remove()
        assert model.config._attn_implementation == before
        assert_same(loss_and_gradients(prompted, "auto", data), loss_and_gradients(prompted, "reference", data), 1e-9)


def test_a_model_whose_attention_knows_no_packing_never_packs() -> None:
    model = tiny_model("llama", dtype=torch.float64)
    for layer in model.model.layers:
        own = layer.self_attn.forward

        def deaf(*arguments: Any, own: Any = own, **options: Any) -> Any:  # as a folder's own code may be
            options.pop("packing", None)
            name, config = model.config._attn_implementation, model.config
            config._attn_implementation = "sdpa"
            try:
                return own(*arguments, **options)
            finally:
                config._attn_implementation = name

        layer.self_attn.forward = deaf
    backbone = Backbone(model, tiny_tokenizer(), "deaf")
    with PromptedModel(backbone, build_encoder(EncoderConfig(), backbone.embeddings(torch.arange(P)), 0)) as prompted:
        prompted(*batch(prompted, SHAPES["in front"][1])[:2], labels=batch(prompted, SHAPES["in front"][1])[2])
        assert backbone.plans.last == "shared prefix"


@pytest.mark.parametrize("family", ["gpt2", "bloom", "llama", "qwen3"])
def test_contexts_that_are_kept_give_the_same(family: str) -> None:
    with prompted_model(family) as prompted:
        ids, mask, labels = data = batch(prompted, SHAPES["behind"][1])
        expected = loss_and_gradients(prompted, "reference", data)
        plans = prompted.backbone.plans
        contexts = [row[: length - P - 2] for row, length in zip(ids.tolist(), mask.sum(-1), strict=True)]
        plans.prepare(contexts, ContextCache(10**9))
        assert len(plans.contexts) == 3
        room_for_one = plans.contexts.bytes * len(contexts[0]) // sum(map(len, contexts))
        for budget, kept in ((10**9, 3), (room_for_one, 1), (0, 0)):
            plans.prepare(contexts, ContextCache(budget))
            assert len(plans.contexts) == kept
            assert plans.contexts.bytes <= budget
            assert_same(loss_and_gradients(prompted, "auto", data), expected, 1e-9)


def test_a_kept_context_is_not_run_again() -> None:
    with prompted_model("llama") as prompted:
        ids, mask, labels = batch(prompted, SHAPES["behind"][1])
        read: list[int] = []
        hook = prompted.backbone.model.model.layers[0].mlp.register_forward_pre_hook(
            lambda _module, arguments: read.append(arguments[0].shape[0] * arguments[0].shape[1])
        )
        prompted(ids, mask, labels=labels)
        first, read[:] = sum(read), []
        contexts = [row[: n - P - 2] for row, n in zip(ids.tolist(), mask.sum(-1).tolist(), strict=True)]
        prompted.backbone.plans.prepare(contexts, ContextCache(10**9))
        read[:] = []
        prompted(ids, mask, labels=labels)
        assert sum(read) == 3 * (P + 1)  # the second of the two answer tokens predicts nothing
        assert first >= sum(map(len, contexts)) + sum(read)
        changed = ids.clone()
        changed[0, 0] += 1  # another context is a miss
        read[:] = []
        prompted(changed, mask, labels=labels)
        assert sum(read) == 3 * (P + 1) + len(contexts[0])
        hook.remove()


@pytest.mark.parametrize("name", SHAPES)
def test_the_encoder_s_dropout_mask_is_the_same(name: str) -> None:
    with prompted_model("llama", dropout=0.5, num_layers=3) as prompted:
        prompted.train()
        data = batch(prompted, SHAPES[name][1])
        expected = loss_and_gradients(prompted, "reference", data)
        assert_same(loss_and_gradients(prompted, "auto", data), expected, 1e-9)


def test_rows_of_one_length_and_a_single_row_agree_too() -> None:
    with prompted_model("gpt2") as prompted:
        for lengths in ((12, 12), (30,)):
            for name, (_, shape) in SHAPES.items():
                data = batch(prompted, shape, lengths)
                expected = loss_and_gradients(prompted, "reference", data)
                assert_same(loss_and_gradients(prompted, "auto", data), expected, 1e-9), name


def test_what_no_plan_gives_goes_by_the_reference() -> None:
    with prompted_model("llama") as prompted:
        backbone = prompted.backbone
        ids, mask, labels = batch(prompted, SHAPES["in front"][1])
        even = batch(prompted, SHAPES["in front"][1], EVEN)[:2]
        prompted(*(tensor.roll(1, -1) for tensor in even), positions=even[1].roll(1, -1).bool())  # padded on the left
        assert backbone.plans.last == "reference"
        prompted(*even, positions=even[1].bool())  # the virtual tokens' own places are asked for
        assert backbone.plans.last == "reference"
        backbone.enable_gradient_checkpointing()
        prompted(ids, mask, labels=labels)
        assert backbone.plans.last == "reference"
    unknown = Backbone(tiny_model("gpt2"), tiny_tokenizer(), "gpt2")
    assert isinstance(unknown.plans, Plans)
    mistral = prompted_model("mistral")
    mistral.backbone.model.config.sliding_window = 8
    narrow = Backbone(mistral.backbone.model, tiny_tokenizer(), "mistral")
    narrow.logits(*(tensor[:, :20] for tensor in (ids % 340, mask)), torch.ones_like(mask[:, :20]).bool())
    assert narrow.plans.last == "reference"
    assert isinstance(mistral.encoder, PromptEncoder)


def several_prompts(
    family: str, shape: Shape, dtype: torch.dtype = torch.float64
) -> tuple[Backbone, list[PromptedModel], tuple[Tensor, ...]]:
    """Three prompts of differing length on one backbone, four rows of each in one batch."""
    backbone = Backbone(tiny_model(family, dtype=dtype), tiny_tokenizer(), family)
    prompts, rows = [], []
    generator = torch.Generator().manual_seed(3)
    for number, count in enumerate((3, 6, 4)):
        initial = backbone.embeddings(torch.arange(30 + number, 30 + number + count))
        encoder = build_encoder(EncoderConfig(type="mlp", hidden_size=8, residual=False), initial, number).to(dtype)
        prompts.append(PromptedModel(backbone, encoder))
        virtual = [prompts[-1].first_virtual_id + place for place in range(count)]
        for length in (24, 14, 11, 17):
            rows.append(shape(torch.randint(4, 340, (length,), generator=generator).tolist(), virtual))
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = torch.tensor(row), 1
        labels[number, len(row) - 2 : len(row)] = torch.tensor(row[-2:])
    return backbone, prompts, (ids, mask, labels)


@pytest.mark.parametrize("name", ["in front", "behind"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_several_prompts_in_one_batch_share_what_they_have_in_common(family: str, name: str) -> None:
    def gradients(plan: str) -> list[Tensor]:
        backbone.plan = plan  # type: ignore[assignment]
        for prompted in prompts:
            prompted.encoder.zero_grad()
            prompted.use(prompted.train().rows())
        ids, mask, labels = data
        loss = backbone(ids, mask, labels=labels)
        loss.backward()
        grads = [p.grad.clone() for one in prompts for p in one.encoder.parameters() if p.grad is not None]
        return [loss.detach(), *grads]

    backbone, prompts, data = several_prompts(family, SHAPES[name][1])
    expected = gradients("reference")
    ours = gradients("auto")
    in_front = "shared prefix" if family == "bloom" else "packed rows"
    assert backbone.plans.last == (in_front if name == "in front" else "frozen context")
    assert_same(ours, expected, 1e-9)


def test_a_batch_of_several_prompts_costs_less_than_its_padded_rows() -> None:
    backbone, _, (ids, mask, _) = several_prompts("llama", SHAPES["in front"][1])
    choice = backbone.plans.choose(ids, mask, torch.zeros_like(mask, dtype=torch.bool))
    assert choice.tokens == int(mask.sum()) - 3 * (2 + 5 + 3)  # all but the last virtual token once, not four times
    assert choice.tokens < ids.numel()


def test_packed_rows_take_no_mask() -> None:
    model = tiny_model("llama")
    ids, mask = torch.full((1, 5), 9), torch.zeros(1, 1, 5, 5)
    packing = Packing((PackedGroup(0, (2, 3)),), ids.device)
    with packed_attention(model.config), pytest.raises(TypeError, match="packed rows have no mask, and this family's"):
        model(ids, attention_mask=mask, packing=packing)
