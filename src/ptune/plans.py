"""How one forward pass is carried out: the same numbers at less cost. See ARCHITECTURE.md for when each plan pays.

    reference        one forward over all ids
    shared prefix    rows that open with the same virtual tokens: these run once, with gradient, for the whole batch
    packed rows      the same, and the rows stand one behind another in one sequence, so that no pad is ever computed
    frozen context   text that stands before the first virtual token does not depend on the prompt: it runs without
                     gradient, and once for a whole run where its keys and values are kept

Where rows cannot be packed, a batch with much padding is run in groups of similar length.

A plan is chosen from the ids alone, batch by batch, so nothing need be said by tasks or templates.

Knows nothing of encoders, tasks or training. Shapes: B batch, T tokens, P virtual tokens that open a row, F tokens of a
context, S tokens of what follows it, R tokens of packed rows, N chosen positions, H width, V rows of the backbone's
input matrix.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from ptune.context_cache import ContextCache
from ptune.keys_and_values import new_cache, padded, read_cache, stacked
from ptune.output_head import Wanted
from ptune.packed_attention import Packing

PlanName = Literal["reference", "shared prefix", "packed rows", "frozen context"]

_SHORTEST_CONTEXT = 8
"""Contexts of fewer tokens, on average, are not worth a pass of their own."""
_LEAST_PADDING = 0.05
"""Share of padding from which on packed rows pay."""
_CONTEXT_TOKENS_AT_ONCE = 8192
"""Tokens of one pass over contexts: enough to fill a processor, few enough for its memory."""
_COST_OF_A_PASS = 48
"""What another pass over fewer rows costs a processor, in tokens."""


class Run(Protocol):
    """One forward pass of the model, its head at the chosen positions alone, or not at all."""

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        positions: Tensor,
        past: DynamicCache | None = None,
        *,
        keep: bool = False,
        wanted: Wanted = "logits",
        packing: Packing | None = None,
    ) -> tuple[Tensor, DynamicCache | None]:
        """Return logits ``[N, V]``, or hidden states ``[N, H]``, and, if they are to be kept, keys and values.

        Args:
            input_ids: ``[B, T]`` int64.
            attention_mask: ``[B, past + T]`` int64.
            positions: ``[B, T]`` bool.
            past: keys and values of what stands before.
            keep: whether keys and values are wanted.
            wanted: hidden states ``[N, H]``, where it is no logits.
            packing: where rows begin that stand one behind another in one; None where each has its own.
        """


class Plans:
    """Carries out forward passes of one backbone.

    Attributes:
        contexts: keys and values of contexts that are kept; empty until `prepare`.
        last: the plan of the latest pass.
        why: what it was chosen for, in a few words.
        may_pack: whether packed rows may be chosen, where they give the same numbers.
    """

    def __init__(
        self, run: Run, vocabulary_size: int, device: Callable[[], torch.device], *, may_pack: bool = False
    ) -> None:
        """Plan the passes of one model.

        Args:
            run: one forward pass of it.
            vocabulary_size: V.
            device: where it is.
            may_pack: whether its attention layers can read packed rows; tried once before it is believed.
        """
        self._run, self._vocabulary_size, self._device = run, vocabulary_size, device
        self.may_pack = may_pack
        self.contexts = ContextCache(0)
        self.last: PlanName = "reference"
        self.why = "nothing has run yet"

    def outputs(
        self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, wanted: Wanted = "logits"
    ) -> Tensor:
        """Return the logits after positions, ``[N, V]``, by the cheapest plan that gives them.

        Args:
            input_ids: ``[B, T]`` int64.
            attention_mask: ``[B, T]`` int64.
            positions: ``[B, T]`` bool.
            wanted: hidden states ``[N, H]`` in place of logits, where it says so.
        """
        run = functools.partial(self._run, wanted=wanted)
        prefix = shared_prefix_length(input_ids, attention_mask, self._vocabulary_size)
        shared = prefix - 1 if len(input_ids) > 1 and prefix > 1 and not bool(positions[:, : prefix - 1].any()) else 0
        real = not bool(
            (positions & ~attention_mask.bool()).any()
        )  # else pads are asked for, which have no numbers here
        pads = padding_share(attention_mask[:, shared:]) if real else 0.0
        if shared:
            if pads >= _LEAST_PADDING and self.may_pack and self._packs:
                self.note("packed rows", f"{prefix} virtual tokens open every row, and {pads:.0%} would be padding")
                return self._packed_rows(run, input_ids, attention_mask, positions, shared)
            self.note("shared prefix", f"{prefix} virtual tokens open every row")
            return self._shared_prefix(run, input_ids, attention_mask, positions, shared)
        lengths = context_lengths(input_ids, attention_mask, self._vocabulary_size)
        if lengths is not None and float(lengths.float().mean()) >= _SHORTEST_CONTEXT:
            before = torch.arange(input_ids.shape[1], device=input_ids.device) < lengths[:, None]
            if real and not bool((positions & before).any()):
                self.note("frozen context", f"{float(lengths.float().mean()):.0f} tokens stand before the prompt")
                return self._frozen_context(run, input_ids, attention_mask, positions, lengths)
        if pads >= _LEAST_PADDING and self.may_pack and self._packs:
            self.note("packed rows", f"{pads:.0%} would be padding")
            return self._packed_rows(run, input_ids, attention_mask, positions, 0)
        self.note("reference", "rows share nothing" if len(input_ids) > 1 else "one row")

        def run_group(rows: Tensor, end: int) -> Tensor:
            return run(input_ids[rows, :end], attention_mask[rows, :end], positions[rows, :end])[0]

        return self._in_groups(run_group, attention_mask, positions)

    def note(self, plan: PlanName, why: str) -> None:
        """Remember by which plan the latest pass went, and why."""
        self.last, self.why = plan, why

    def prepare(self, contexts: Sequence[Sequence[int]], budget: int) -> None:
        """Run contexts once and keep their keys and values.

        They are run longest first, in batches that depend on nothing but the contexts, so that a run that is resumed
        finds the very same numbers.

        Args:
            contexts: ids of each, virtual tokens in none.
            budget: bytes that may be kept; what comes later is run with its batch each time.
        """
        self.contexts = ContextCache(budget)
        if not self._plans_contexts(contexts):
            return
        distinct = sorted({tuple(ids) for ids in contexts}, key=lambda ids: (-len(ids), ids))
        start = 0
        while start < len(distinct) and not self.contexts.full:
            count = max(1, _CONTEXT_TOKENS_AT_ONCE // len(distinct[start]))
            chunk = distinct[start : start + count]
            for ids, past in zip(chunk, self._run_contexts(chunk), strict=True):
                self.contexts.put(ids, past)
            start += count

    @staticmethod
    def _plans_contexts(contexts: Sequence[Sequence[int]]) -> bool:
        """Whether contexts are long enough, on average, that `logits` will ask for them."""
        return bool(contexts) and sum(map(len, contexts)) >= _SHORTEST_CONTEXT * len(contexts)

    def _shared_prefix(
        self, run: Run, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, length: int
    ) -> Tensor:
        """Run the first ``length`` virtual tokens once. The last of the run stays with its row, to predict text."""
        prefix = input_ids[:1, :length]
        nowhere = torch.zeros_like(prefix, dtype=torch.bool)
        _, cache = self._run(prefix, torch.ones_like(prefix), nowhere, keep=True)
        shared = read_cache(cache)

        def run_group(rows: Tensor, end: int) -> Tensor:
            past = new_cache(shared, len(rows))
            return run(input_ids[rows, length:end], attention_mask[rows, :end], positions[rows, length:end], past)[0]

        return self._in_groups(run_group, attention_mask, positions)

    def _in_groups(
        self, run_group: Callable[[Tensor, int], Tensor], attention_mask: Tensor, positions: Tensor
    ) -> Tensor:
        """Return the outputs ``[N, ...]`` of all rows, run in groups of similar length where that saves padding.

        Args:
            run_group: runs the rows of these numbers, ``[G]`` int64, up to a place, and returns their outputs in order.
            attention_mask: ``[B, T]`` int64.
            positions: ``[B, T]`` bool.
        """
        mask = attention_mask.bool()
        ends = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(-1)  # [B]
        alone = self._device().type != "cpu" or not bool(mask.any(-1).all()) or bool((positions & ~mask).any())
        groups = [list(range(len(mask)))] if alone else length_groups(ends.tolist(), _COST_OF_A_PASS)
        if len(groups) == 1:
            return run_group(torch.arange(len(mask), device=mask.device), mask.shape[1])
        counts = positions.sum(-1).tolist()
        by_row: dict[int, Tensor] = {}
        for group in groups:
            rows = torch.tensor(group, device=mask.device)
            outputs = run_group(rows, int(ends[rows].max()))
            by_row |= zip(group, outputs.split([counts[row] for row in group]), strict=True)
        return torch.cat([by_row[row] for row in range(len(mask))])

    def _packed_rows(
        self, run: Run, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, length: int
    ) -> Tensor:
        """Run the first ``length`` tokens of all rows, and behind them what follows in each row, as one sequence."""
        kept = attention_mask.bool() & (torch.arange(input_ids.shape[1], device=input_ids.device) >= length)  # [B, T]
        ids = torch.cat([input_ids[0, :length], input_ids[kept]])[None]  # [1, P + R]
        chosen = torch.cat([torch.zeros_like(positions[0, :length]), positions[kept]])[None]
        packing = Packing(length, tuple(kept.sum(-1).tolist()), ids.device)
        return run(ids, torch.ones_like(ids), chosen, packing=packing)[0]

    @staticmethod
    def _packed_behind(
        run: Run,
        input_ids: Tensor,
        attention_mask: Tensor,
        positions: Tensor,
        lengths: Tensor,
        pasts: Sequence[Tensor],
    ) -> Tensor:
        """Run what follows the first ``lengths``, ``[B]``, of each row as one sequence, given their keys and values."""
        kept = attention_mask.bool() & (torch.arange(input_ids.shape[1], device=lengths.device) >= lengths[:, None])
        ids = input_ids[kept][None]  # [1, R]
        packing = Packing(0, tuple(kept.sum(-1).tolist()), ids.device, tuple(pasts))
        return run(ids, torch.ones_like(ids), positions[kept][None], packing=packing)[0]

    @functools.cached_property
    def _packs(self) -> bool:
        """Whether packed rows give the model's own numbers, tried once on a few tokens."""
        if self._device().type != "cpu":  # elsewhere a padded batch may well be cheaper than many rows one by one
            return False
        words = torch.arange(12, device=self._device()).remainder(self._vocabulary_size)
        ids = torch.stack([words, words.roll(3)])
        ids[1, :4] = words[:4]
        mask = torch.ones_like(ids)
        mask[0, 9:] = 0
        positions = mask.bool()
        positions[:, :4] = False
        with torch.no_grad():
            plain = self._run(ids, mask, positions)[0]
            packed = self._packed_rows(self._run, ids, mask, positions, 4)
            pasts = self._packed_contexts([tuple(row[:4]) for row in ids.tolist()])
            behind = self._packed_behind(self._run, ids, mask, positions, torch.full_like(ids[:, 0], 4), pasts)
        limit = (1e-3 if plain.dtype.itemsize >= 4 else 5e-2) * float(plain.abs().max())
        return all(float((one - plain).abs().max()) <= limit for one in (packed, behind))

    def _frozen_context(
        self, run: Run, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, lengths: Tensor
    ) -> Tensor:
        """Run what follows the contexts, given their keys and values."""
        ends = attention_mask.sum(-1)
        contexts = [tuple(row[:length]) for row, length in zip(input_ids.tolist(), lengths.tolist(), strict=True)]
        missing = sorted({ids for ids in contexts if ids not in self.contexts}, key=lambda ids: (-len(ids), ids))
        new = dict(zip(missing, self._run_contexts(missing), strict=True)) if missing else {}
        pasts = [new[ids] if ids in new else self.contexts[ids] for ids in contexts]
        device = input_ids.device
        if self.may_pack and self._packs:
            return self._packed_behind(run, input_ids, attention_mask, positions, lengths, pasts)
        steps = torch.arange(input_ids.shape[1], device=device)

        def run_group(rows: Tensor, end: int) -> Tensor:
            own, longest = lengths[rows], int(lengths[rows].max())
            past = padded([pasts[row] for row in rows.tolist()], longest, pasts[0].dtype, device)
            places = own[:, None] + steps[: int((ends[rows] - own).max())]  # [G, S]
            within = places < ends[rows, None]
            places = places.clamp(max=end - 1)
            heard = steps[:longest] >= longest - own[:, None]  # [G, F], zeros stand in front
            mask = torch.cat([heard, within], dim=-1).to(attention_mask.dtype)
            chosen = positions[rows].gather(-1, places) & within
            return run(input_ids[rows].gather(-1, places), mask, chosen, new_cache(past, len(rows)))[0]

        return self._in_groups(run_group, attention_mask, positions)

    def _run_contexts(self, contexts: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Return the keys and values of contexts, each ``[2 L, K, F, D]`` of its own length."""
        if self.may_pack and self._packs:
            return self._packed_contexts(contexts)
        longest = max(map(len, contexts))
        ids = torch.zeros(len(contexts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for number, context in enumerate(contexts):
            ids[number, : len(context)] = torch.tensor(context)
            mask[number, : len(context)] = 1
        ids, mask = ids.to(self._device()), mask.to(self._device())
        with torch.no_grad():
            _, cache = self._run(ids, mask, torch.zeros_like(ids, dtype=torch.bool), keep=True)
        layers = read_cache(cache)
        return [stacked(layers, number, 0, len(context)) for number, context in enumerate(contexts)]

    def _packed_contexts(self, contexts: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Return what `_run_contexts` does, by one sequence of them all."""
        ids = torch.tensor([[token for context in contexts for token in context]], device=self._device())  # [1, R]
        lengths = tuple(map(len, contexts))
        packing = Packing(0, lengths, ids.device)
        nowhere = torch.zeros_like(ids, dtype=torch.bool)
        with torch.no_grad():
            _, cache = self._run(ids, torch.ones_like(ids), nowhere, keep=True, packing=packing)
        layers, ends = read_cache(cache), list(itertools.accumulate(lengths))
        return [stacked(layers, 0, end - length, end) for length, end in zip(lengths, ends, strict=True)]


def context_of(ids: Sequence[int], vocabulary_size: int) -> tuple[int, ...]:
    """Return what stands before the first virtual token of a row; nothing where it has none or opens with one."""
    first = next((place for place, token in enumerate(ids) if token >= vocabulary_size), 0)
    return tuple(ids[:first])


def shared_prefix_length(input_ids: Tensor, attention_mask: Tensor, vocabulary_size: int) -> int:
    """Return how many virtual tokens open every row alike, 0 where rows differ or begin with pads.

    Args:
        input_ids: ``[B, T]`` int64.
        attention_mask: ``[B, T]`` int64.
        vocabulary_size: V.
    """
    alike = (input_ids == input_ids[:1]).all(0) & (input_ids[0] >= vocabulary_size) & attention_mask.bool().all(0)
    return int(alike.int().cumprod(0).sum())


def length_groups(lengths: Sequence[int], cost_of_a_pass: int) -> list[list[int]]:
    """Return the numbers of rows in groups of similar length, so that padding and passes together cost least.

    Args:
        lengths: of each row.
        cost_of_a_pass: in tokens, of each group.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    best: list[tuple[int, int]] = [(0, 0)]  # of the first k rows in order: least cost, where its last group begins
    for end in range(1, len(order) + 1):
        best.append(
            min(
                (best[start][0] + cost_of_a_pass + (end - start) * lengths[order[start]], start) for start in range(end)
            )
        )
    groups, end = [], len(order)
    while end:
        start = best[end][1]
        groups.append(sorted(order[start:end]))
        end = start
    return groups


def padding_share(attention_mask: Tensor) -> float:
    """Return which share of a mask ``[B, T]`` is padding; 0 where a row has no token at all."""
    lengths = attention_mask.bool().sum(-1)
    return 0.0 if int(lengths.min()) == 0 else 1 - float(lengths.float().mean()) / attention_mask.shape[1]


def context_lengths(input_ids: Tensor, attention_mask: Tensor, vocabulary_size: int) -> Tensor | None:
    """Return how many tokens stand before each row's first virtual token, ``[B]`` int64.

    None where a row has no virtual token, or begins with pads.

    Args:
        input_ids: ``[B, T]`` int64.
        attention_mask: ``[B, T]`` int64.
        vocabulary_size: V.
    """
    virtual = (input_ids >= vocabulary_size) & attention_mask.bool()
    if not bool(virtual.any(-1).all()) or not bool(attention_mask[:, 0].all()):
        return None
    return virtual.int().argmax(-1)
