"""Batches hold their rows and nothing else; grouping by length loses no row and saves padding."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptune.rendering.batch import IGNORED, Batch, collate, length_grouped_batches, within_budget


@dataclass(frozen=True)
class Row:
    ids: tuple[int, ...]
    labels: tuple[int, ...]


IDS = st.integers(0, 2**40)
ROWS = st.lists(
    st.lists(st.tuples(IDS, IDS | st.just(IGNORED)), max_size=12).map(
        lambda pairs: Row(ids=tuple(i for i, _ in pairs), labels=tuple(label for _, label in pairs))
    ),
    min_size=1,
    max_size=6,
)
LENGTHS = st.lists(st.integers(0, 1000), max_size=300)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def padding(batches: list[list[int]], lengths: list[int]) -> int:
    return sum(max(lengths[index] for index in batch) - lengths[index] for batch in batches for index in batch)


@given(rows=ROWS, side=st.sampled_from(["left", "right"]), pad_id=st.integers(0, 9))
def test_a_batch_holds_each_row_at_its_side_and_padding_elsewhere(rows: list[Row], side: str, pad_id: int) -> None:
    batch = collate(rows, pad_id, side)
    longest = max(len(row.ids) for row in rows)
    for tensor in (batch.input_ids, batch.attention_mask, batch.labels):
        assert tensor.shape == (len(rows), longest)
        assert tensor.dtype == torch.int64
    for index, row in enumerate(rows):
        rest = longest - len(row.ids)

        def placed(values: tuple[int, ...], filler: int, rest: int = rest) -> list[int]:
            return [filler] * rest + list(values) if side == "left" else list(values) + [filler] * rest

        assert batch.input_ids[index].tolist() == placed(row.ids, pad_id)
        assert batch.attention_mask[index].tolist() == placed((1,) * len(row.ids), 0)
        assert batch.labels[index].tolist() == placed(row.labels, IGNORED)


def test_padding_stands_at_the_right_unless_asked_otherwise() -> None:
    rows = [Row(ids=(5, 6), labels=(IGNORED, 6)), Row(ids=(7,), labels=(7,))]
    assert collate(rows, 0).input_ids.tolist() == [[5, 6], [7, 0]]
    assert collate(rows, 0, "left").input_ids.tolist() == [[5, 6], [0, 7]]


def test_what_a_batch_ignores_is_what_rows_ignore_and_what_cross_entropy_ignores() -> None:
    from ptune.rendering.renderer import IGNORED as IGNORED_BY_ROWS

    assert IGNORED == IGNORED_BY_ROWS == torch.nn.CrossEntropyLoss().ignore_index


def test_a_batch_moves_as_a_whole() -> None:
    batch = collate([Row(ids=(5, 6), labels=(IGNORED, 6))], 0)
    moved = batch.to("meta")
    assert isinstance(moved, Batch)
    assert {tensor.device.type for tensor in (moved.input_ids, moved.attention_mask, moved.labels)} == {"meta"}
    assert batch.to("cpu") is batch


def test_unusable_arguments_are_refused_with_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"^a batch needs at least one row and got none; leave empty batches out\.$"):
        collate([], 0)
    with pytest.raises(ValueError, match=r"\"left\" or \"right\", not at 'middle'; choose one of the two\.$"):
        collate([Row(ids=(1,), labels=(1,))], 0, "middle")
    with pytest.raises(ValueError, match=r"^batch_size must be at least 1 and is 0; raise it\.$"):
        length_grouped_batches([1], 0, seeded(0))


@given(lengths=LENGTHS, batch_size=st.integers(1, 40), seed=st.integers(0, 2**32))
def test_each_index_stands_in_one_batch_and_all_batches_but_one_are_full(
    lengths: list[int], batch_size: int, seed: int
) -> None:
    batches = length_grouped_batches(lengths, batch_size, seeded(seed))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    rest = len(lengths) % batch_size
    sizes = sorted(len(batch) for batch in batches)
    assert sizes == [rest] * bool(rest) + [batch_size] * (len(lengths) // batch_size)


@given(lengths=LENGTHS, batch_size=st.integers(1, 40), seed=st.integers(0, 2**32))
def test_a_seed_decides_the_batches(lengths: list[int], batch_size: int, seed: int) -> None:
    assert length_grouped_batches(lengths, batch_size, seeded(seed)) == length_grouped_batches(
        lengths, batch_size, seeded(seed)
    )


@given(lengths=LENGTHS, batch_size=st.integers(1, 5), seed=st.integers(0, 2**32))
def test_padding_is_never_more_than_that_of_the_random_order(lengths: list[int], batch_size: int, seed: int) -> None:
    order = torch.randperm(len(lengths), generator=seeded(seed)).tolist()
    in_order = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    grouped = length_grouped_batches(lengths, batch_size, seeded(seed))
    assert padding(grouped, lengths) <= padding(in_order, lengths)


def test_skewed_lengths_are_hardly_padded() -> None:
    lengths = (torch.empty(5000).exponential_(generator=seeded(0)) * 100).long().tolist()
    order = torch.randperm(5000, generator=seeded(1)).tolist()
    in_order = padding([order[start : start + 16] for start in range(0, 5000, 16)], lengths)
    assert padding(length_grouped_batches(lengths, 16, seeded(2)), lengths) < in_order / 10


def test_epochs_differ_in_their_batches() -> None:
    lengths = torch.randint(1, 100, (1000,), generator=seeded(0)).tolist()
    generator = seeded(1)
    first, second = (length_grouped_batches(lengths, 8, generator) for _ in range(2))
    assert not {frozenset(batch) for batch in first} & {frozenset(batch) for batch in second}


def test_batches_do_not_come_in_the_order_of_their_lengths() -> None:
    batches = length_grouped_batches(list(range(400)), 8, seeded(0))
    longest = [max(batch) for batch in batches]
    assert longest != sorted(longest)
    assert longest != sorted(longest, reverse=True)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 200))
def test_parts_hold_each_row_once_and_no_more_tokens_than_allowed(lengths: list[int], most: int) -> None:
    parts = within_budget(range(len(lengths)), lengths, most)
    assert sorted(index for part in parts for index in part) == list(range(len(lengths)))
    for part in parts:
        assert len(part) == 1 or len(part) * max(lengths[index] for index in part) <= most
