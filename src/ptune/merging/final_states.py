"""What a model's output head is shown, at positions of texts that the model writes itself.

A row is added to the head for every virtual token, and what it gives is its product with the final hidden state: with
the states at hand any number of rows is tried without running the model again. What a family does behind its head
(scale, soft cap) it does itself.

Knows nothing of rows or prompts. Shapes: B batch, T tokens, N positions, H width, V rows, K values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ptune.backbone import Backbone
from ptune.batch import IGNORED, Row, collate
from ptune.generation import GenerationOptions, generate

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
        """Return the texts up to chosen positions ``[K]`` int64."""
        pairs = zip(self.text[chosen].tolist(), self.place[chosen].tolist(), strict=True)
        return [self.texts[text][: place + 1] for text, place in pairs]


def read(backbone: Backbone, texts: Sequence[Sequence[int]]) -> Positions:
    """Return the last position of each text: where the model would write on."""
    lengths = torch.tensor([len(ids) for ids in texts])
    order = lengths.argsort(stable=True)
    with _taken(backbone) as taken, torch.no_grad():
        for numbers in _batches(order.tolist(), lengths.tolist()):
            rows = [Row(tuple(texts[number]), (IGNORED,) * len(texts[number])) for number in numbers]
            batch = collate(rows, backbone.tokenizer.pad_token_id)
            ends = torch.zeros_like(batch.attention_mask, dtype=torch.bool)
            ends[torch.arange(len(rows)), lengths[numbers] - 1] = True
            plan, backbone.plan = backbone.plan, "reference"
            try:
                backbone.logits(batch.input_ids, batch.attention_mask, ends)
            finally:
                backbone.plan = plan
    own = order.argsort()  # back to the order of the texts
    return Positions(
        [list(ids) for ids in texts], torch.arange(len(texts)), lengths - 1, *(torch.cat(parts)[own] for parts in taken)
    )


def write(backbone: Backbone, starts: Sequence[Sequence[int]], seed: int) -> Positions:
    """Return the positions of what the model writes behind starts, by chance: those behind the starts alone.

    Starts beyond the model's limit are left out.
    """
    room = WRITTEN if backbone.context_limit is None else min(WRITTEN, backbone.context_limit // 2)
    limit = backbone.context_limit
    ordered = sorted((list(ids) for ids in starts if limit is None or len(ids) + room <= limit), key=len, reverse=True)
    texts: list[list[int]] = []
    columns: list[list[Tensor]] = [[], [], [], [], []]
    options = GenerationOptions(max_new_tokens=room, do_sample=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for first in range(0, len(ordered), _WRITTEN_ROWS):
            batch = ordered[first : first + _WRITTEN_ROWS]
            with _taken(backbone) as taken:
                answers = generate(backbone, batch, options, batch_size=len(batch))
            # The head was asked once for each new token: of the first by a start, of the others by the token before.
            states, given, evidence = (torch.stack(parts)[1:].transpose(0, 1) for parts in taken)  # [B, T - 1, ...]
            lengths = torch.tensor([len(answer.ids) for answer in answers])
            step = torch.arange(states.shape[1])
            told = step < lengths[:, None]  # [B, T - 1]
            before = torch.tensor([len(ids) for ids in batch])[:, None]
            number = (len(texts) + torch.arange(len(batch)))[:, None]
            parts = (number.expand_as(told), before + step, states, given, evidence)
            for column, part in zip(columns, parts, strict=True):
                column.append(part[told])
            texts += [[*ids, *answer.ids] for ids, answer in zip(batch, answers, strict=True)]
    return Positions(texts, *map(torch.cat, columns))


def behind_head(backbone: Backbone, values: Tensor) -> Tensor:
    """Return what a model makes of what its head gives, each of ``[K]`` by itself: itself, for most models."""
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
            taken[0].append(_last(arguments[0]).detach().cpu())
            taken[1].append(_last(logits).detach().float().logsumexp(-1).double().cpu())

    def at_end(_module: nn.Module, _arguments: Any, output: Any) -> None:
        if output.logits.numel():
            taken[2].append(_last(output.logits).detach().float().logsumexp(-1).double().cpu())

    hooks = [
        backbone.model.get_output_embeddings().register_forward_hook(at_head),
        backbone.model.register_forward_hook(at_end),
    ]
    try:
        yield taken
    finally:
        for hook in hooks:
            hook.remove()


def _last(values: Tensor) -> Tensor:
    """Return the last column of ``[B, T, ...]``; chosen positions ``[N, ...]`` as they are."""
    return values[:, -1] if values.dim() == 3 else values


def _batches(order: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield numbers of texts that are read at once, of an order in which texts become longer."""
    first = 0
    while first < len(order):
        size = max(1, _READ_TOKENS // lengths[order[first]])
        yield list(order[first : first + size])
        first += size
