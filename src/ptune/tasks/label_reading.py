"""Where the tokens of labels are read: which rows a record needs so that all labels can be scored, and at which places.

**From left to right** (and in a decoder) the labels' tokens form a trie, and a record needs one row for each longest
proper prefix in it: labels of single tokens cost one row, the bare context, and longer ones only as many as differ
before their last token.

**From both sides** a label of n tokens is read at n masks, each token at its own (Liu et al. 2021, section 4; Schick
and Schütze 2021, section 3): a record needs one row for each length that a label has.

Shapes: C labels, j tokens of the longest label, s places read in one example.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ptune.rendering.batch import IGNORED, Row
from ptune.rendering.renderer import Renderer


@dataclass(frozen=True)
class LabelReading:
    """How the labels of a verbalizer are read.

    Attributes:
        prefixes: what follows the context in each row of an example; empty for a masked model.
        masks: how many masks stand in each row of an example; empty for others.
        place: ``[C, j]`` int64, among the s places of an example in the order of its rows.
        token: ``[C, j]`` int64, the label's token.
        mask: ``[C, j]`` bool, False behind a label's last token.
    """

    prefixes: tuple[tuple[int, ...], ...]
    masks: tuple[int, ...]
    place: Tensor
    token: Tensor
    mask: Tensor

    @property
    def rows_each(self) -> int:
        """Rows of one example."""
        return len(self.prefixes) or len(self.masks)

    @property
    def single(self) -> bool:
        """Whether every label is one token, all read at one place."""
        return self.mask.shape[1] == 1 and int(self.place.max()) == 0

    def rows(self, renderer: Renderer, record: Mapping[str, Any]) -> tuple[Row, ...]:
        """Return a record's rows. All labels get the same room, so that training and serving cut records alike.

        Raises:
            DataError, TemplateError: as `Renderer.context`.
        """
        longest = self.mask.shape[1]
        if self.masks:
            return tuple(renderer.masked_row(record, count, reserve=longest) for count in self.masks)
        context = renderer.context_row(record, reserve=longest)
        return tuple(_behind(context, prefix) for prefix in self.prefixes)


def trie_reading(tokens: Sequence[tuple[int, ...]]) -> LabelReading:
    """Return how labels of these tokens are read from left to right."""
    every = sorted({label[:-1] for label in tokens})
    prefixes = [one for one in every if not any(other[: len(one)] == one and other != one for other in every)]
    starts = [sum(len(prefix) + 1 for prefix in prefixes[:number]) for number in range(len(prefixes))]
    first = [
        starts[next(n for n, prefix in enumerate(prefixes) if prefix[: len(label) - 1] == label[:-1])]
        for label in tokens
    ]
    return _reading(tokens, first, prefixes=tuple(prefixes))


def masked_reading(tokens: Sequence[tuple[int, ...]]) -> LabelReading:
    """Return how labels of these tokens are read at masks."""
    counts = sorted({len(label) for label in tokens})
    first = [sum(counts[: counts.index(len(label))]) for label in tokens]
    return _reading(tokens, first, masks=tuple(counts))


def _reading(
    tokens: Sequence[tuple[int, ...]],
    first: Sequence[int],
    prefixes: tuple[tuple[int, ...], ...] = (),
    masks: tuple[int, ...] = (),
) -> LabelReading:
    """Return the reading in which a label's tokens stand one after another from its first place on."""
    place = torch.zeros(len(tokens), max(map(len, tokens)), dtype=torch.long)
    token, mask = torch.zeros_like(place), torch.zeros_like(place, dtype=torch.bool)
    for number, label in enumerate(tokens):
        place[number, : len(label)] = torch.arange(first[number], first[number] + len(label))
        token[number, : len(label)] = torch.tensor(label)
        mask[number, : len(label)] = True
    return LabelReading(prefixes, masks, place, token, mask)


def _behind(context: Row, prefix: Sequence[int]) -> Row:
    ids = (*context.ids, *prefix)
    return replace(context, ids=ids, labels=(IGNORED,) * len(ids), read_at=range(len(context.ids) - 1, len(ids)))
