"""Several questions to one backbone answered by one forward pass, each as if it were asked alone.

Their rows stand one under another in one batch; what the head gives is handed back apart. Rows may carry the virtual
tokens of different prompts, whose ids all mean something at that moment.

Knows tasks' questions and backbones, and nothing of training. Shapes: B batch, T tokens, N chosen positions, H width, V
rows of the backbone's input matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ptune.families import MASKED, Kind
from ptune.models.backbone import Backbone
from ptune.pretrained.losses import next_token_labels, summed_loss
from ptune.pretrained.output_head import Wanted
from ptune.rendering.batch import IGNORED
from ptune.tasks.task import Asked

_BUSY = 2048
"""Tokens of one pass that keep a processor busy: with more, what layers hand on no longer lies in memory at hand."""


def answer_side_by_side(backbone: Backbone, asked: Sequence[Asked]) -> list[Tensor]:
    """Return what `Asked.of` gives for each question, from one forward pass over the rows of all.

    Returns:
        For each its loss, a scalar, its logits ``[N, V]`` or ``[N, C]``, or its hidden states ``[N, H]``.

    Raises:
        ValueError: some ask for hidden states and some do not.
    """
    if len({one.states for one in asked}) > 1:
        raise ValueError("one forward pass gives hidden states or logits, and both are asked for; ask apart")
    wanted = [_wanted(one, backbone.kind) for one in asked]
    ids, mask, positions = stacked_rows(asked, backbone.kind)
    withheld = backbone.may_withhold and all(one.labels is not None or one.columns is not None for one in asked)
    what: Wanted = "final states" if asked[0].states else "head inputs" if withheld else "logits"
    outputs = backbone.outputs(ids, mask, positions, what)  # [N, V], or [N, H]
    parts = outputs.split([int(places.sum()) for _, places in wanted])
    answers = []
    for one, (labels, places), part in zip(asked, wanted, parts, strict=True):
        if labels is not None:
            right = labels[places].to(part.device)
            answers.append(backbone.head.loss(part, right) if withheld else summed_loss(part, right))
        elif one.columns is not None:
            answers.append(
                backbone.head.logits(part, one.columns) if withheld else part[:, one.columns.to(part.device)]
            )
        else:
            answers.append(part)
    return answers


def one_forward_each(
    asked: Sequence[Asked], backbone: Backbone, max_tokens: int | None = None, *, kept: bool = False
) -> list[list[int]]:
    """Return which questions go into one forward pass, by their places.

    Rows that open with virtual tokens are carried out by another plan than others, so each kind has its own passes. On
    a processor a pass takes only so many questions as keep it busy.

    Args:
        asked: the questions.
        backbone: that will be asked.
        max_tokens: of one pass, padding included, where it holds more than one question.
        kept: take it that contexts are kept, before they are.
    """
    opens = [int(one.input_ids[0, 0]) >= backbone.vocabulary_size for one in asked]
    passes: list[list[int]] = []
    for kind in (True, False):
        rows = longest = computed = 0
        here: list[int] = []
        for place, one in enumerate(asked):
            if opens[place] != kind:
                continue
            (more, length), own = one.input_ids.shape, _computed(one, backbone, kept)
            too_many = max_tokens is not None and (rows + more) * max(longest, length) > max_tokens
            if here and (too_many or computed + own > _BUSY):
                passes.append(here)
                here, rows, longest, computed = [], 0, 0, 0
            here.append(place)
            rows, longest, computed = rows + more, max(longest, length), computed + own
        passes += [here] if here else []
    return passes


def _computed(asked: Asked, backbone: Backbone, kept: bool) -> int:
    """Return how many tokens a question adds to a pass on a processor; 0 where only memory sets a limit.

    That is so on a GPU, and where contexts are not kept, which are computed but once for all questions of a pass.
    """
    if backbone.device.type != "cpu":
        return 0
    choice = backbone.choose(asked.input_ids, asked.attention_mask, _wanted(asked, backbone.kind)[1])
    return 0 if choice.context_tokens and not kept else choice.tokens - choice.context_tokens


def stacked_rows(asked: Sequence[Asked], kind: Kind) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, mask and positions of the rows of all questions, each ``[B, T]``, padded to the longest."""
    longest = max(one.input_ids.shape[1] for one in asked)
    triples = [(one.input_ids, one.attention_mask, _wanted(one, kind)[1]) for one in asked]
    ids, mask, positions = (
        torch.cat([functional.pad(part, (0, longest - part.shape[1])) for part in parts])
        for parts in zip(*triples, strict=True)
    )
    return ids, mask, positions


def _wanted(asked: Asked, kind: Kind) -> tuple[Tensor | None, Tensor]:
    """Return what each place predicts, ``[B, T]``, and at which places the head looks, ``[B, T]``."""
    if asked.labels is None:
        assert asked.positions is not None  # a loss asks for one or the other
        return None, asked.positions
    labels = asked.labels if kind is MASKED else next_token_labels(asked.labels)
    return labels, labels != IGNORED
