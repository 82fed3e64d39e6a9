"""How likely a model finds given answers behind given contexts: what any evaluator asks of it.

Knows nothing of soft prompts or templates: rows are ids, virtual ones among them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ptune.errors import BackboneError
from ptune.families import MASKED
from ptune.models.backbone import Backbone
from ptune.rendering.batch import IGNORED, Row, collate
from ptune.tasks.side_by_side import answer_side_by_side
from ptune.tasks.task import Asked


@torch.no_grad()
def log_probabilities(
    backbone: Backbone, contexts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], *, batch_size: int
) -> list[float]:
    """Return the log-probability of each answer behind its context, summed over its tokens.

    Args:
        backbone: that is asked.
        contexts: ids of each, at least one.
        answers: ids of each, at least one.
        batch_size: rows read at once.

    Raises:
        BackboneError: a masked model, which gives no text a probability from left to right.
    """
    if backbone.kind is MASKED:
        raise BackboneError(f"{backbone.kind.words} gives a text no probability from left to right; use another model")
    rows = [
        Row((*context, *answer), (*[IGNORED] * len(context), *answer))
        for context, answer in zip(contexts, answers, strict=True)
    ]
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number].ids))
    found: dict[int, float] = {}
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        batch = collate([rows[number] for number in numbers], backbone.tokenizer.pad_token_id)
        each = zip(*(part.split(1) for part in (batch.input_ids, batch.attention_mask, batch.labels)), strict=True)
        losses = answer_side_by_side(backbone, [Asked(ids, mask, labels=labels) for ids, mask, labels in each])
        found |= {number: -float(loss) for number, loss in zip(numbers, losses, strict=True)}
    return [found[number] for number in range(len(rows))]
