"""What nothing reads is not computed: tokens behind the last chosen place, and most of the last layer."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import FAMILIES, tiny_model, tiny_tokenizer
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ptune.models.backbone import Backbone
from ptune.plans.unread import without_unread


def rows_seen(module: nn.Module, seen: list[int]) -> None:
    module.register_forward_hook(lambda _module, _arguments, output: seen.append(output.flatten(0, -2).shape[0]))


def layers_of(model: nn.Module) -> list[GradientCheckpointingLayer]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_multiplies_what_is_read_alone(family: str) -> None:
    backbone = Backbone(tiny_model(family), tiny_tokenizer(), family)
    first, last = layers_of(backbone.model)
    seen: dict[str, list[int]] = {"first": [], "last": []}
    rows_seen(first.fc1 if family == "opt" else first.mlp, seen["first"])
    rows_seen(last.fc1 if family == "opt" else last.mlp, seen["last"])
    ids = torch.randint(4, 340, (3, 12), generator=torch.Generator().manual_seed(1))
    positions = torch.zeros_like(ids, dtype=torch.bool)
    positions[0, 4], positions[1, [2, 11]], positions[2, 11] = True, True, True
    expected = backbone.logits(ids, torch.ones_like(ids))[positions]
    backbone.logits(ids, torch.ones_like(ids), positions)  # packing is tried once
    for part in seen.values():
        part.clear()
    logits = backbone.logits(ids, torch.ones_like(ids), positions)
    torch.testing.assert_close(logits, expected)
    assert sum(seen["last"]) == 4
    assert sum(seen["first"]) >= 5 + 12 + 12


def test_what_is_predicted_and_predicts_nothing_is_not_run() -> None:
    backbone = Backbone(tiny_model("llama"), tiny_tokenizer(), "llama")
    seen: list[int] = []
    rows_seen(layers_of(backbone.model)[0].mlp, seen)
    ids = torch.randint(4, 340, (4, 9), generator=torch.Generator().manual_seed(1))
    labels = torch.full_like(ids, -100)
    labels[:, 8] = ids[:, 8]
    backbone(ids, torch.ones_like(ids), labels=labels)
    assert seen == [4 * 8]


ROWS = st.integers(1, 4).flatmap(
    lambda length: st.lists(
        st.lists(st.tuples(st.integers(0, 9), st.booleans(), st.booleans()), min_size=length, max_size=length),
        min_size=1,
        max_size=4,
    )
)


@given(ROWS)
def test_all_that_is_read_and_all_before_it_stays(rows: list[list[tuple[int, bool, bool]]]) -> None:
    ids, mask, positions = (torch.tensor(part) for part in zip(*(zip(*row, strict=True) for row in rows), strict=True))
    kept_ids, kept_mask, kept = without_unread(ids, mask.long(), positions)
    end = kept_ids.shape[1]
    assert torch.equal(kept_ids, ids[:, :end])
    assert int(kept.sum()) == int(positions.sum())
    for row in range(len(rows)):
        last = last_true(positions[row])
        whole = last is None or bool((positions & ~mask).any())
        read = mask[row].clone() if whole else mask[row] & (torch.arange(mask.shape[1]) <= last)
        assert torch.equal(kept_mask[row].bool(), read[:end])
        assert not bool(read[end:].any())


def last_true(row: Tensor) -> int | None:
    return int(row.nonzero().max()) if bool(row.any()) else None


def test_another_thread_s_passes_are_left_alone() -> None:
    backbone = Backbone(tiny_model("llama"), tiny_tokenizer(), "llama")
    ids = torch.randint(4, 340, (4, 20), generator=torch.Generator().manual_seed(1))
    others = torch.randint(4, 340, (8, 40), generator=torch.Generator().manual_seed(2))
    positions = torch.zeros_like(ids, dtype=torch.bool)
    positions[:, 9] = True
    with torch.no_grad():
        expected = backbone.model(input_ids=others).logits
    done = threading.Event()

    def ask() -> None:
        with torch.no_grad():
            while not done.is_set():
                backbone.logits(ids, torch.ones_like(ids), positions)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        with torch.no_grad():
            for _ in range(100):
                torch.testing.assert_close(backbone.model(input_ids=others).logits, expected)
    finally:
        done.set()
        thread.join()
