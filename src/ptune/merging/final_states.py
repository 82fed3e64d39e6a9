"""What a model's output head is shown, at positions of texts that the model writes itself.

A row is added to the head for every virtual token, and what it gives is its product with the final hidden state: with
the states at hand any number of rows is tried without running the model again. What a family does behind its head
(scale, soft cap) it does itself.

Knows nothing of rows or prompts. Shapes: N chosen positions, H width, k of the positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ptune.generation.generate import GenerationOptions, generate
from ptune.models.backbone import Backbone
from ptune.rendering.batch import IGNORED, Row, collate

WRITTEN = 32
"""Tokens that the model writes behind each start."""
_READ_TOKENS = 256
"""Of texts that are read at once."""
_WRITTEN_ROWS = 256


@dataclass(frozen=True)
class Positions:
    """Positions of texts.

    Attributes:
        texts: ids of each.
        text: ``[N]`` int64, in which text each position is.
        place: ``[N]`` int64, and at which of its tokens.
        states: ``[N, H]``, what the head is shown there.
        given: ``[N]`` float64, logsumexp of what the head gives for it.
        evidence: ``[N]`` float64, logsumexp of the model's logits: the same, where nothing is done behind the head.
    """

    texts: list[list[int]]
    text: Tensor
    place: Tensor
    states: Tensor
    given: Tensor
    evidence: Tensor

    def __len__(self) -> int:
        return len(self.states)

    def __add__(self, other: Positions) -> Positions:
        return Positions(
            [*self.texts, *other.texts],
            torch.cat([self.text, other.text + len(self.texts)]),
            torch.cat([self.place, other.place]),
            torch.cat([self.states, other.states]),
            torch.cat([self.given, other.given]),
            torch.cat([self.evidence, other.evidence]),
        )

    def half(self, number: int) -> Positions:
        """Return the positions in every other text, from the first or the second on."""
        mine = self.text % 2 == number
        parts = (self.text, self.place, self.states, self.given, self.evidence)
        return Positions(self.texts, *(part[mine] for part in parts))

    def starts(self, chosen: Tensor) -> list[list[int]]:
        """Return the texts up to chosen positions ``[k]`` int64."""
        pairs = zip(self.text[chosen].tolist(), self.place[chosen].tolist(), strict=True)
        return [self.texts[text][: place + 1] for text, place in pairs]


def read(backbone: Backbone, texts: Sequence[Sequence[int]], firsts: Sequence[int] | None = None) -> Positions:
    """Return positions of each text, in the order of the texts, by the plain forward pass.

    Args:
        backbone: the model.
        texts: ids of each, one at least.
        firsts: from which place on, of each; where absent, the last alone: where the model would write on.
    """
    lengths = [len(ids) for ids in texts]
    firsts = [length - 1 for length in lengths] if firsts is None else firsts
    order = sorted(range(len(texts)), key=lengths.__getitem__)
    plan, backbone.plan = backbone.plan, "reference"
    try:
        with _taken(backbone) as taken, torch.no_grad():
            for numbers in _batches(order, lengths):
                rows = [Row(tuple(texts[number]), (IGNORED,) * lengths[number]) for number in numbers]
                batch = collate(rows, backbone.tokenizer.pad_token_id)
                asked = torch.zeros_like(batch.attention_mask, dtype=torch.bool)
                for row, number in enumerate(numbers):
                    asked[row, firsts[number] : lengths[number]] = True
                backbone.logits(batch.input_ids, batch.attention_mask, asked)
    finally:
        backbone.plan = plan
    text = torch.tensor([number for number in order for _ in range(firsts[number], lengths[number])], dtype=torch.long)
    place = [place for number in order for place in range(firsts[number], lengths[number])]
    own = text.argsort(stable=True)  # back to the order of the texts
    parts = (torch.tensor(place, dtype=torch.long), *map(torch.cat, taken))
    return Positions([list(ids) for ids in texts], text[own], *(part[own] for part in parts))


def write(backbone: Backbone, starts: Sequence[Sequence[int]], seed: int) -> Positions:
    """Return the positions of what the model writes behind starts, by chance: those behind the starts alone.

    Starts beyond the model's limit are left out, and those behind which it writes nothing.
    """
    room = WRITTEN if backbone.context_limit is None else min(WRITTEN, backbone.context_limit // 2)
    limit = backbone.context_limit
    ordered = sorted((list(ids) for ids in starts if limit is None or len(ids) + room <= limit), key=len, reverse=True)
    options = GenerationOptions(max_new_tokens=room, do_sample=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        answers = generate(backbone, ordered, options, batch_size=_WRITTEN_ROWS)
    written = [(start, answer.ids) for start, answer in zip(ordered, answers, strict=True) if answer.ids]
    return read(backbone, [[*start, *ids] for start, ids in written], [len(start) for start, _ in written])


def behind_head(backbone: Backbone, values: Tensor) -> Tensor:
    """Return what a model makes of each value that its head gives, in the same shape ``[k]``: itself, mostly."""
    head, width = backbone.model.get_output_embeddings(), backbone.vocabulary_size
    token = torch.tensor([[backbone.tokenizer.eos_token_id]], device=backbone.device)
    made = []
    for part in values.split(width):
        filled = torch.zeros(width).to(values)
        filled[: len(part)] = part

        def instead(_module: nn.Module, _arguments: Any, logits: Tensor, filled: Tensor = filled) -> Tensor:
            return filled.to(logits).expand_as(logits)

        hook = head.register_forward_hook(instead)
        try:
            with torch.no_grad():
                logits = backbone.model(
                    **backbone.inputs(*(t.to(backbone.device) for t in (token, token * 0 + 1)))
                ).logits
        finally:
            hook.remove()
        made.append(logits[0, -1, : len(part)].to(values))
    return torch.cat(made)


@contextmanager
def _taken(backbone: Backbone) -> Iterator[list[list[Tensor]]]:
    """Give three lists, which grow by what each forward pass shows of states, what the head gives, and the logits."""
    taken: list[list[Tensor]] = [[], [], []]

    def at_head(_module: nn.Module, arguments: tuple[Tensor, ...], logits: Tensor) -> None:
        if logits.numel():  # else it is run for its keys and values alone
            taken[0].append(arguments[0].detach().cpu())
            taken[1].append(logits.detach().float().logsumexp(-1).double().cpu())

    def at_end(_module: nn.Module, _arguments: Any, output: Any) -> None:
        if output.logits.numel():
            taken[2].append(output.logits.detach().float().logsumexp(-1).double().cpu())

    hooks = [
        backbone.model.get_output_embeddings().register_forward_hook(at_head),
        backbone.model.register_forward_hook(at_end),
    ]
    try:
        yield taken
    finally:
        for hook in hooks:
            hook.remove()


def _batches(order: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield numbers of texts that are read at once, of an order in which texts become longer."""
    first = 0
    while first < len(order):
        size = max(1, _READ_TOKENS // lengths[order[first]])
        yield list(order[first : first + size])
        first += size
