"""Texts written together a token a pass, on models whose attention reads a plain cache; others may join in between.

A text that joins is read in a pass of its own, behind the kept keys and values of the virtual tokens that open it; one
that has ended leaves, and costs nothing more. So every pass computes one token of each text that still grows, and no
pad, whatever the lengths of contexts and answers; and what is said is the same in any company.

transformers' ``generate`` has batches that begin and end as one. Its continuous batching would not do: it takes no
keys and values that are read already, one seed and one set of options for all, and is slower on a processor.

Knows nothing of tasks. Shapes: B texts, L layers, K key-value heads, P virtual tokens that open one, D width of a head,
V rows of the backbone's input matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ptune.families import CAUSAL
from ptune.generation.growing_cache import GrowingCache
from ptune.generation.growing_text import GrowingText
from ptune.models.backbone import Backbone
from ptune.plans.kept_prefixes import opening_run
from ptune.prompts.virtual_tokens import deep_prompts_of


class Decoding:
    """Texts that grow together."""

    def __init__(self, backbone: Backbone) -> None:
        """Begin with none."""
        self._backbone = backbone
        self._answers: list[GrowingText] = []
        self._tokens: list[int] = []  # the last of each, which the next pass reads
        self._cache = GrowingCache()

    def __len__(self) -> int:
        return len(self._answers)

    def takes(self, answer: GrowingText) -> bool:
        """Whether a text can be written here: a plain cache must do for all that it will hold."""
        columns = len(answer.context) + answer.room
        return self._backbone.kind is CAUSAL and self._backbone.hindrance(columns) is None

    @torch.no_grad()
    def join(self, answers: Sequence[GrowingText]) -> None:
        """Read the contexts of texts, at least one, and choose their first tokens."""
        pasts = _openings(self._backbone, answers)
        opened = [past.shape[2] for past in pasts] or [0] * len(answers)
        rest = [answer.context[start:] for answer, start in zip(answers, opened, strict=True)]
        logits, read = self._backbone.plans.read(rest, pasts)
        tokens = _choose(answers, logits)
        parts = [(before, own) for before, own in zip(pasts, read, strict=True)] if pasts else [(own,) for own in read]
        going = [number for number, answer in enumerate(answers) if not answer.ended]
        if going:
            self._cache.join([parts[number] for number in going])
            self._answers += [answers[number] for number in going]
            self._tokens += [tokens[number] for number in going]

    @torch.no_grad()
    def step(self) -> None:
        """Write one more token of each text; those that end leave."""
        if not self._answers:
            return
        mask = self._cache.next_mask()
        ids = torch.tensor(self._tokens, device=mask.device)[:, None]
        logits = self._backbone.plans.follow(ids, mask, self._cache.past)
        self._cache.grew()
        self._tokens = _choose(self._answers, logits)
        for row in reversed(range(len(self._answers))):
            if self._answers[row].ended:
                self._cache.leave(row)
                self._answers[row], self._tokens[row] = self._answers[-1], self._tokens[-1]  # as the cache does
                self._answers.pop()
                self._tokens.pop()


def _choose(answers: Sequence[GrowingText], logits: Tensor) -> list[int]:
    """Let each text grow by a token, from logits ``[B, V]``, and return the tokens."""
    likeliest = logits.argmax(-1).tolist()
    return [answer.grow(*one) for answer, *one in zip(answers, logits, likeliest, strict=True)]


def _openings(backbone: Backbone, answers: Sequence[GrowingText]) -> list[Tensor]:
    """Return keys and values of what opens each context and is not read again, ``[2 L, K, P, D]``.

    Nothing at all where that is so of none.
    """
    prompts, contexts = deep_prompts_of(backbone.model), [answer.context for answer in answers]
    runs = [opening_run(context, backbone.vocabulary_size) for context in contexts]
    kept = backbone.plans.prefixes.of(contexts, runs)  # a deep prompt's ids mean no rows, so it has none there
    deep = {answer.deep: prompts.get(answer.deep) for answer in answers if answer.deep is not None}
    if not deep:
        return kept
    before = {first: prompt.keys_and_values(backbone.dtype) for first, prompt in deep.items()}
    nothing = next(iter(before.values()))[:, :, :0]
    kept = kept or [nothing] * len(answers)
    return [past if answer.deep is None else before[answer.deep] for answer, past in zip(answers, kept, strict=True)]
