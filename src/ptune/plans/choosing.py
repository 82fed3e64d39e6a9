"""Which plan carries a batch: the cheapest that gives the reference's numbers, chosen from the ids alone.

Runs nothing but the one trial of whether rows can be packed. Shapes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ptune.plans.context_cache import ContextCache
from ptune.plans.openings import Group, context_lengths, contexts_in, length_groups, padding_share, prefix_groups
from ptune.plans.passes import PlannedPass

_SHORTEST_CONTEXT = 8
"""Contexts of fewer tokens, on average, are not worth a pass of their own."""
_LEAST_PADDING = 0.05
"""Share of padding from which on packed rows pay."""
_LEAST_SHARED = 0.05
"""Share of a batch's tokens, pads included, that must be saved where rows of several prompts are to share these."""
_COST_OF_A_PASS = 48
"""What another pass over fewer rows costs a processor, in tokens."""


class Chooser:
    """Chooses among the plans of one model.

    Attributes:
        contexts: whose keys and values are kept, and cost nothing more.
    """

    def __init__(self, vocabulary_size: int, device: Callable[[], torch.device], packs: Callable[[], bool]) -> None:
        """Choose for a model.

        Args:
            vocabulary_size: V, rows of its input matrix; ids from there on are virtual.
            device: where it is.
            packs: whether its rows may be packed.
        """
        self._vocabulary_size, self._device, self._packs = vocabulary_size, device, packs
        self.contexts = ContextCache(0)

    def choose(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> PlannedPass:
        """Return the cheapest plan for a batch, of which `without_unread` has taken what nothing reads.

        Args:
            input_ids: ``[B, T]`` int64.
            attention_mask: ``[B, T]`` int64.
            positions: ``[B, T]`` bool.
        """
        rows, length = input_ids.shape
        # pads that are asked for have no numbers in some plans
        real = not bool((positions & ~attention_mask.bool()).any())
        groups = prefix_groups(input_ids, attention_mask, positions, self._vocabulary_size)
        if len(groups) > 1 and real and (several := self._for_several_prompts(attention_mask, groups)) is not None:
            return several
        shared = groups[0].shared if len(groups) == 1 else 0
        whole = (Group(0, rows, shared),)
        pads = padding_share(attention_mask[:, shared:]) if real else 0.0
        packs = pads >= _LEAST_PADDING and self._packs()
        packed = shared + int(attention_mask[:, shared:].sum())
        if shared:
            why = f"{shared + 1} virtual tokens open every row"
            if packs:
                return PlannedPass("packed rows", f"{why}, and {pads:.0%} would be padding", packed, groups=whole)
            tokens = shared + self._padded_tokens((attention_mask[:, shared:]).sum(-1).tolist())
            return PlannedPass("shared prefix", why, tokens, groups=whole)
        lengths = context_lengths(input_ids, attention_mask, self._vocabulary_size)
        if lengths is not None and float(lengths.float().mean()) >= _SHORTEST_CONTEXT:
            before = torch.arange(length, device=input_ids.device) < lengths[:, None]
            if real and not bool((positions & before).any()):
                why = f"{float(lengths.float().mean()):.0f} tokens stand before the prompt"
                contexts = self._missing(contexts_in(input_ids, lengths))
                behind = (attention_mask.sum(-1) - lengths).tolist()
                may = self._packs()
                missing = sum(map(len, contexts)) if may else len(contexts) * max(map(len, contexts), default=0)
                tokens = missing + (sum(behind) if may else self._padded_tokens(behind))
                return PlannedPass("frozen context", why, tokens, missing, lengths=lengths)
        if packs:
            return PlannedPass("packed rows", f"{pads:.0%} would be padding", packed, groups=whole)
        why = "rows share nothing" if rows > 1 else "one row"
        tokens = self._padded_tokens(attention_mask.sum(-1).tolist()) if real else rows * length
        return PlannedPass("reference", why, tokens)

    def groups(self, lengths: list[int]) -> list[list[int]]:
        """Return the numbers of rows of these lengths in groups that are run one after another, at least one."""
        if self._device().type == "cpu":
            return length_groups(lengths, _COST_OF_A_PASS)
        return [list(range(len(lengths)))]

    def _padded_tokens(self, lengths: list[int]) -> int:
        return sum(len(group) * max(lengths[row] for row in group) for group in self.groups(lengths))

    def _for_several_prompts(self, attention_mask: Tensor, groups: Sequence[Group]) -> PlannedPass | None:
        """Return the plan for groups of rows behind prompts of their own; None where sharing saves too little."""
        lengths = attention_mask.sum(-1).tolist()
        saved = sum(group.shared * (group.end - group.start - 1) for group in groups)
        if not saved or min(lengths) == 0:
            return None
        packs = self._packs()
        apart = (shared + (end - start) * (max(lengths[start:end]) - shared) for start, end, shared in groups)
        tokens = sum(lengths) - saved if packs else sum(apart)
        if tokens > (1 - _LEAST_SHARED) * attention_mask.numel():
            return None
        why = f"{len(groups)} prompts, each of which opens rows of its own"
        return PlannedPass("packed rows" if packs else "shared prefix", why, tokens, groups=tuple(groups))

    def _missing(self, contexts: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Return the contexts that are not kept, each once, longest first."""
        return sorted({ids for ids in contexts if ids not in self.contexts}, key=lambda ids: (-len(ids), ids))


def long_enough(contexts: Sequence[Sequence[int]]) -> bool:
    """Whether contexts are long enough, on average, that a plan would run them apart."""
    return bool(contexts) and sum(map(len, contexts)) >= _SHORTEST_CONTEXT * len(contexts)
