"""How one forward pass is carried out: the same numbers at less cost. docs/performance.md says when each plan pays.

    reference        one forward over all ids
    shared prefix    rows that open with the same virtual tokens: these run once, with gradient, for all of them
    packed rows      the same, and the rows stand one behind another in one sequence, so that no pad is ever computed
    kept prefix      without gradient: virtual tokens that open a row run once for as long as they mean the same, in any
                     call; rows of a batch may open with different ones
    frozen context   text that stands before the first virtual token does not depend on the prompt: it runs without
                     gradient, and once for a whole run where its keys and values are kept

Where rows cannot be packed, a batch with much padding is run in groups of similar length.

A plan is chosen from the ids alone, batch by batch, so nothing need be said by tasks or templates. Where rows of
several prompts stand in one batch, those that open alike stand together and share what they open with.

Knows nothing of encoders, tasks or training. Shapes: B batch, T tokens, F tokens of a context, N chosen positions, H
width, V rows of the backbone's input matrix, L layers, K key-value heads, D width of a head; g rows that run together,
s tokens of what follows their contexts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import Cache

from ptune.plans.agreement import Agreement
from ptune.plans.choosing import Chooser, long_enough
from ptune.plans.context_cache import ContextCache
from ptune.plans.context_reading import read_packed, read_padded
from ptune.plans.kept_prefixes import KeptPrefixes, opening_lengths
from ptune.plans.openings import Group, contexts_in
from ptune.plans.packed_passes import packed_behind, packed_rows, reads_packed_rows
from ptune.plans.passes import PlanName, PlannedPass, Run
from ptune.plans.unread import without_unread
from ptune.pretrained.output_head import Wanted
from ptune.pretrained.sharding import held_to
from ptune.prompts.keys_and_values import new_cache, padded, read_cache
from ptune.prompts.virtual_tokens import VirtualTokens

_CONTEXT_TOKENS_AT_ONCE = 8192
"""Tokens of one pass over contexts: enough to fill a processor, few enough for its memory."""


class Plans:
    """Carries out forward passes of one backbone.

    Attributes:
        prefixes: keys and values of virtual tokens that open rows, kept from call to call.
        last: the plan of the latest pass.
        why: what it was chosen for, in a few words.
        may_pack: whether packed rows may be chosen, where they give the same numbers.
    """

    def __init__(
        self,
        run: Run,
        vocabulary_size: int,
        device: Callable[[], torch.device],
        dtype: Callable[[], torch.dtype],
        *,
        may_pack: bool = False,
        virtual_tokens: Callable[[], VirtualTokens | None] = lambda: None,
    ) -> None:
        """Plan the passes of one model.

        Args:
            run: one forward pass of it.
            vocabulary_size: V.
            device: where it is.
            dtype: of its keys and values.
            may_pack: whether its attention layers can read packed rows; tried once before it is believed.
            virtual_tokens: its table, where it has one.
        """
        self._run, self._vocabulary_size, self._device, self._dtype = run, vocabulary_size, device, dtype
        self.may_pack = may_pack
        self._chooser = Chooser(vocabulary_size, device, lambda: self.may_pack and self._packs)
        self._agreement = Agreement()
        self.prefixes = KeptPrefixes(self._run_contexts, virtual_tokens)
        self.last: PlanName = "reference"
        self.why = "nothing has run yet"

    def outputs(
        self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, wanted: Wanted = "logits"
    ) -> Tensor:
        """Return the logits after positions, ``[N, V]``, or hidden states there, by the cheapest plan that gives them.

        Args:
            input_ids: ``[B, T]`` int64.
            attention_mask: ``[B, T]`` int64.
            positions: ``[B, T]`` bool.
            wanted: what to return: logits ``[N, V]``, or one of two kinds of hidden states ``[N, H]`` (see `Wanted`).
        """
        run = functools.partial(self._run, wanted=wanted)
        input_ids, attention_mask, positions = without_unread(input_ids, attention_mask, positions)
        in_front = bool(attention_mask[:, 0].all())  # pads stand on the right, or the rows' first places would be pads
        if in_front and not torch.is_grad_enabled() and not bool((positions & ~attention_mask.bool()).any()):
            opening = opening_lengths(input_ids, attention_mask, positions, self._vocabulary_size)
            if pasts := self.prefixes.of(input_ids[:, : int(opening.max())].tolist(), opening.tolist()):
                opening = opening.new_tensor([past.shape[2] for past in pasts])
                self.note("kept prefix", f"{int(opening.max())} virtual tokens at most open rows, without gradient")
                return self._behind(run, input_ids, attention_mask, positions, opening, pasts)
        choice = self._chooser.choose(input_ids, attention_mask, positions)
        choice = self._agreement.plan(choice, may_pack=self.may_pack)
        self.note(choice.plan, choice.why)
        if choice.plan == "packed rows":
            return packed_rows(run, input_ids, attention_mask, positions, choice.groups)
        if choice.plan == "shared prefix":
            return self._shared_prefixes(run, input_ids, attention_mask, positions, choice.groups)
        if choice.lengths is not None:
            return self._frozen_context(run, input_ids, attention_mask, positions, choice.lengths)
        return self._plain(run, input_ids, attention_mask, positions)

    def choose(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> PlannedPass:
        """Return the cheapest plan for a batch, kept prefixes aside; the shapes are those of `outputs`, ``[B, T]``."""
        return self._chooser.choose(*without_unread(input_ids, attention_mask, positions))

    def run_together(self, alike: Callable[[int], bool], device: torch.device) -> None:
        """Run from now on as many passes as other processes do, each of which has a part of the layers.

        Args:
            alike: takes how many passes this process would run for a batch, and tells whether all would run as many.
            device: where the layers will be gathered.
        """
        # Tried now: later one process's batch may ask for it, and another's not.
        self.may_pack = device.type == "cpu" and self.may_pack and self._packs
        self._agreement.begin(alike)

    def agree(self, passes: int) -> bool:
        """Whether all processes would run so many passes for their batches, where they must run as many."""
        return self._agreement.on(passes)

    @property
    def contexts(self) -> ContextCache:
        """Keys and values of contexts that are kept; empty until `prepare`."""
        return self._chooser.contexts

    @contexts.setter
    def contexts(self, kept: ContextCache) -> None:
        self._chooser.contexts = kept

    def note(self, plan: PlanName, why: str) -> None:
        """Remember by which plan the latest pass went, and why."""
        self.last, self.why = plan, why

    def prepare(self, contexts: Sequence[Sequence[int]], kept: ContextCache) -> None:
        """Run contexts once and keep their keys and values.

        They are run longest first, in batches that depend on nothing but the contexts and which of them are found, so
        that a run that is resumed finds the very same numbers.

        Args:
            contexts: ids of each, virtual tokens in none.
            kept: where they are kept, from an earlier run perhaps; what it does not take is run with its batch each
                time.
        """
        self.contexts = kept
        if not long_enough(contexts):
            return
        distinct = sorted({tuple(ids) for ids in contexts}, key=lambda ids: (-len(ids), ids))
        kept.wanted += len(distinct)
        kept.wanted_tokens += sum(map(len, distinct))
        start = 0
        while start < len(distinct):
            count = max(1, _CONTEXT_TOKENS_AT_ONCE // len(distinct[start]))
            chunk = [ids for ids in distinct[start : start + count] if not kept.find(ids)]
            start += count
            if chunk and not kept.full:
                for ids, past in zip(chunk, self._run_contexts(chunk), strict=True):
                    kept.put(ids, past)

    def _shared_prefixes(
        self, run: Run, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, groups: Sequence[Group]
    ) -> Tensor:
        """Run what the rows of each group open with once, and the groups one after another."""
        outputs = []
        for start, end, shared in groups:
            ids, mask, chosen = (each[start:end] for each in (input_ids, attention_mask, positions))
            if len(groups) > 1:  # the batch's longest row may stand in another group
                longest = int(mask.any(0).nonzero().max()) + 1
                ids, mask, chosen = ids[:, :longest], mask[:, :longest], chosen[:, :longest]
            if shared:
                outputs.append(self._shared_prefix(run, ids, mask, chosen, shared))
            else:
                outputs.append(self._plain(run, ids, mask, chosen))
        return torch.cat(outputs)

    def _shared_prefix(
        self, run: Run, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, length: int
    ) -> Tensor:
        """Run the first ``length`` virtual tokens once. The last of the run stays with its row, to predict text."""
        prefix = input_ids[:1, :length]
        nowhere = torch.zeros_like(prefix, dtype=torch.bool)
        logits, cache = self._run(prefix, torch.ones_like(prefix), nowhere, keep=True)
        shared = read_cache(cache)
        if self._agreement.needed:
            shared[-1] = held_to(logits, *shared[-1])

        def run_group(rows: Tensor, end: int) -> Tensor:
            past = new_cache(shared, len(rows))
            return run(input_ids[rows, length:end], attention_mask[rows, :end], positions[rows, length:end], past)[0]

        return self._in_groups(run_group, attention_mask, positions)

    def _plain(self, run: Run, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        def run_group(rows: Tensor, end: int) -> Tensor:
            return run(input_ids[rows, :end], attention_mask[rows, :end], positions[rows, :end])[0]

        return self._in_groups(run_group, attention_mask, positions)

    def _in_groups(
        self,
        run_group: Callable[[Tensor, int], Tensor],
        attention_mask: Tensor,
        positions: Tensor,
        kept: Tensor | int = 0,
    ) -> Tensor:
        """Return the outputs ``[N, ...]`` of all rows, run in groups of similar length where that saves padding.

        Args:
            run_group: runs the rows of these numbers, ``[g]`` int64, up to a place, and returns their outputs in order.
            attention_mask: ``[B, T]`` int64.
            positions: ``[B, T]`` bool.
            kept: how many tokens of each row are not run again, ``[B]`` int64.
        """
        mask = attention_mask.bool()
        ends = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(-1)  # [B]
        alone = self._device().type != "cpu" or not bool(mask.any(-1).all()) or bool((positions & ~mask).any())
        alone = alone or self._agreement.needed  # every group would be a pass
        groups = [list(range(len(mask)))] if alone else self._chooser.groups((ends - kept).tolist())
        if len(groups) == 1:
            return run_group(torch.arange(len(mask), device=mask.device), mask.shape[1])
        counts = positions.sum(-1).tolist()
        by_row: dict[int, Tensor] = {}
        for group in groups:
            rows = torch.tensor(group, device=mask.device)
            outputs = run_group(rows, int(ends[rows].max()))
            by_row |= zip(group, outputs.split([counts[row] for row in group]), strict=True)
        return torch.cat([by_row[row] for row in range(len(mask))])

    @functools.cached_property
    def _packs(self) -> bool:
        """Whether packed rows give the model's own numbers, tried once."""
        return reads_packed_rows(self._run, self._vocabulary_size, self._device())

    def _frozen_context(
        self, run: Run, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, lengths: Tensor
    ) -> Tensor:
        """Run what follows the contexts, given their keys and values."""
        contexts = contexts_in(input_ids, lengths)
        distinct = dict.fromkeys(contexts)
        kept = {ids: past for ids in distinct if (past := self.contexts.get(ids)) is not None}
        if missing := sorted(distinct.keys() - kept.keys(), key=lambda ids: (-len(ids), ids)):
            kept |= dict(zip(missing, self._run_contexts(missing), strict=True))
        kept = {ids: past.to(self._dtype()) for ids, past in kept.items()}  # may be kept in half precision
        return self._behind(run, input_ids, attention_mask, positions, lengths, [kept[ids] for ids in contexts])

    def _behind(
        self,
        run: Run,
        input_ids: Tensor,
        attention_mask: Tensor,
        positions: Tensor,
        lengths: Tensor,
        pasts: Sequence[Tensor],
    ) -> Tensor:
        """Run what follows the first ``lengths``, ``[B]``, of each row, given their keys and values."""
        device, ends = input_ids.device, attention_mask.sum(-1)
        if self.may_pack and self._packs:
            return packed_behind(run, input_ids, attention_mask, positions, lengths, pasts)
        steps = torch.arange(input_ids.shape[1], device=device)

        def run_group(rows: Tensor, end: int) -> Tensor:
            own, longest = lengths[rows], int(lengths[rows].max())
            past = padded([pasts[row] for row in rows.tolist()], longest, pasts[0].dtype, device)
            places = own[:, None] + steps[: int((ends[rows] - own).max())]  # [g, s]
            within = places < ends[rows, None]
            places = places.clamp(max=end - 1)
            heard = steps[:longest] >= longest - own[:, None]  # [g, F], zeros stand in front
            mask = torch.cat([heard, within], dim=-1).to(attention_mask.dtype)
            chosen = positions[rows].gather(-1, places) & within
            return run(input_ids[rows].gather(-1, places), mask, chosen, new_cache(past, len(rows)))[0]

        return self._in_groups(run_group, attention_mask, positions, lengths)

    def read(
        self, contexts: Sequence[Sequence[int]], pasts: Sequence[Tensor] = (), *, predict: bool = True
    ) -> tuple[Tensor, list[Tensor]]:
        """Read ids without gradient, and what comes next where it is to be predicted.

        Args:
            contexts: ids of each, at least one; any, virtual tokens among them or alone.
            pasts: keys and values of what stands before each, ``[2 L, K, F, D]``; none where nothing does.
            predict: whether logits are wanted.

        Returns:
            The logits behind each, ``[B, V]``, and its keys and values, ``[2 L, K, T, D]`` of its own length.
        """
        how = read_packed if self.may_pack and self._packs else read_padded
        return how(self._run, contexts, pasts, self._device(), predict=predict)

    def follow(self, input_ids: Tensor, attention_mask: Tensor, past: Cache) -> Tensor:
        """Return the logits behind one more token of each row, ``[B, V]``.

        Args:
            input_ids: ``[B, 1]`` int64.
            attention_mask: ``[B, F + 1]`` int64.
            past: keys and values of F columns, to which the pass adds one.
        """
        return self._run(input_ids, attention_mask, torch.ones_like(input_ids, dtype=torch.bool), past)[0]

    def _run_contexts(self, contexts: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Return keys and values of contexts, or of virtual tokens for kept prefixes, each ``[2 L, K, F, D]``."""
        return self.read(contexts, predict=False)[1]
