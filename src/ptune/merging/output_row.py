"""The row of the output head that keeps virtual tokens from ever being generated, found and held to measurement.

A head has no bias in most families, so what a row gives is its product with the final hidden state h, and "never" asks
for a row w whose w·h stays far below the logsumexp of all logits at every h that the model comes to. The mean of all
rows is below it by the logarithm of V at least, whatever h is (Jensen); from there w goes on against the states: it is
fitted to stay below by a margin, by least squares on the states that are not yet there (the finite Newton method for
squared hinge losses, Keerthi and DeCoste 2005, section 4). Final states of a trained model lie to one side of the
origin, and behind a final LayerNorm with a bias such a row exists exactly; in general it depends on the model, so it is
measured on states that it was not fitted to, with what the family does behind its head (scale, soft cap) done by the
family itself.

States come from texts that the model itself writes: from single words of its vocabulary, and from the contexts of the
soft prompts. Shapes: B batch, T tokens, N positions, H width, V rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ptune.backbone import Backbone
from ptune.batch import IGNORED, Row, collate
from ptune.errors import BackboneError
from ptune.generation import GenerationOptions, generate
from ptune.merging.tokenizer_files import opening_ids

LIMIT = 1e-6
"""Most summed probability of all virtual tokens at any position, and on the mean where no row keeps to that."""
TOLERATED = 0.05
"""Most of it at a rare position, where the mean keeps to the limit: far from ever being the likeliest."""
_SAFE = 1e-12
_MARGINS = (30.0, 60.0, 1000.0)
_RIDGES = (1e-1, 1e-3, 1e-6)
_ROUNDS = (128, 512, 2048)
_CONFIRMED = 256
_WRITTEN = 32
_BATCH = 8  # texts whose logits are held at once


@dataclass(frozen=True)
class OutputRow:
    """What stands in the output head for every virtual token.

    Attributes:
        weight: ``[H]``, of the dtype that it is stored in.
        bias: of the head, where it has one.
        probability: the greatest that all virtual tokens together were measured to have.
        mean: of it, over all positions.
        positions: at how many positions it was measured, none of which it was fitted to.
    """

    weight: Tensor
    bias: float | None
    probability: float
    mean: float
    positions: int


def sample_texts(
    backbone: Backbone, contexts: Sequence[Sequence[int]], count: int, seed: int, *, singles: bool = True
) -> list[list[int]]:
    """Return ids of texts: what the model writes behind ``count`` words and behind contexts, and single words."""
    generator = torch.Generator().manual_seed(seed)
    tokenizer, limit = backbone.tokenizer, backbone.context_limit
    opening = opening_ids(tokenizer)
    words = torch.randint(len(tokenizer), (9 * count,), generator=generator).tolist()
    short = [[*opening, word] for word in words[:count]]
    alone = [[*opening, word] for word in words[count:]] if singles else []
    room = _WRITTEN if limit is None else min(_WRITTEN, limit - len(opening) - 1)
    long = [list(ids) for ids in contexts if limit is None or len(ids) + room <= limit]
    options = GenerationOptions(max_new_tokens=room, do_sample=True, seed=seed)
    written = generate(backbone, [*short, *long], options, batch_size=256)
    return [*([*start, *answer.ids] for start, answer in zip([*short, *long], written, strict=True)), *alone]


def find_output_row(backbone: Backbone, contexts: Sequence[Sequence[int]], count: int, dtype: torch.dtype) -> OutputRow:
    """Return the row that keeps ``count`` virtual tokens from being generated.

    It is fitted to every other text, measured on the rest, and what is good there is confirmed on new texts; where that
    shows too little for a row of a wide model, which has as many numbers that chance may fit, there come more texts.

    Args:
        backbone: its table holds the virtual tokens that stand in ``contexts``.
        contexts: ids of some contexts of the soft prompts.
        count: virtual tokens of the whole model.
        dtype: what the row is stored in.

    Raises:
        BackboneError: none keeps their summed probability below `LIMIT`, nor the mean there and each below `TOLERATED`.
    """
    texts: list[list[int]] = []
    for number, size in enumerate(_ROUNDS):
        texts += sample_texts(backbone, contexts, size, 2 * number)
        best = _best_row(backbone, texts[::2], texts[1::2], count, dtype)
        if best.probability >= LIMIT:
            continue
        # A rare state may not have been among them; words that stand alone, which no text does, are not counted.
        fresh = sample_texts(backbone, contexts, _CONFIRMED, 2 * number + 1, singles=False)
        greatest, mean, positions = _measure(backbone, fresh, best.weight.to(backbone.device), best.bias or 0.0, count)
        whole = best.positions + positions
        mean = (best.mean * best.positions + mean * positions) / whole
        best = replace(best, probability=max(best.probability, greatest), mean=mean, positions=whole)
        if best.probability < LIMIT:
            return best
        texts += fresh
    if best.probability < TOLERATED and best.mean < LIMIT:
        return best
    raise BackboneError(
        f'virtual tokens cannot be kept from being generated by "{backbone.name}": its final hidden states point every '
        f"way, and the best output row gives them a probability of {best.probability:.1g} at one of {best.positions} "
        f"positions, {best.mean:.1g} on the mean; serve it by ptune's own engine"
    )


def _best_row(
    backbone: Backbone, texts: Sequence[list[int]], held_out: Sequence[list[int]], count: int, dtype: torch.dtype
) -> OutputRow:
    """Return the best of a few rows that are fitted to texts, as held-out ones measure it."""
    head = backbone.model.get_output_embeddings()
    bias = None if getattr(head, "bias", None) is None else -1e4
    if bias is None:
        rows = _candidates(head.weight.detach().double().mean(0), *_final_states(backbone, texts), count)
    else:
        rows = iter([torch.zeros_like(head.weight[0])])
    best = OutputRow(head.weight[0], bias, 1.0, 1.0, 0)
    for row in rows:
        stored = row.to(dtype)
        found = OutputRow(stored.cpu(), bias, *_measure(backbone, held_out, stored, bias or 0.0, count))
        if found.probability <= best.probability:
            best = found
        if best.probability < _SAFE:
            break
    return best


def _candidates(mean_row: Tensor, states: Tensor, evidence: Tensor, count: int) -> Iterator[Tensor]:
    """Yield rows ``[H]``, the most promising by a share of the states kept apart first.

    Args:
        mean_row: of the head, ``[H]`` float64.
        states: final hidden states ``[N, H]`` float64.
        evidence: logsumexp of the logits at each, ``[N]`` float64.
        count: virtual tokens.
    """
    slack = evidence - states @ mean_row - math.log(count)  # [N], by how much the mean row is below already
    apart = torch.arange(len(states), device=states.device) % 4 == 0
    found: list[tuple[float, int, Tensor]] = []
    for margin in _MARGINS:
        for ridge in _RIDGES:
            step = _step_below(states[~apart], slack[~apart] - margin, ridge)
            found.append((float((states[apart] @ step - slack[apart]).max()), len(found), mean_row + step))
    yield from (row for _, _, row in sorted(found)[:3])


def _step_below(states: Tensor, bounds: Tensor, ridge: float) -> Tensor:
    """Return d ``[H]`` with d·h at most the bound, ``[N]``, of each state, ``[N, H]``, as far as that can be had."""
    damping = ridge * len(states) * states.square().mean() * torch.eye(states.shape[1]).to(states)
    active = torch.ones_like(bounds, dtype=torch.bool)
    best, least = torch.zeros_like(states[0]), float("inf")
    for _ in range(25):
        chosen = states[active]
        step = torch.linalg.solve(chosen.T @ chosen + damping, chosen.T @ bounds[active])
        over = states @ step - bounds  # [N]
        if float(over.max()) < least:
            best, least = step, float(over.max())
        if torch.equal(over > 0, active) or not bool((over > 0).any()):
            break
        active = over > 0
    return best


def _final_states(backbone: Backbone, texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return what the head is shown at every position of texts, ``[N, H]``, and its logsumexp, ``[N]``, in float64."""
    states: list[Tensor] = []
    evidence: list[Tensor] = []

    def keep(_module: nn.Module, arguments: tuple[Tensor, ...], logits: Tensor) -> None:
        states.append(arguments[0].detach().double())
        evidence.append(logits.detach().float().logsumexp(-1).double())

    hook = backbone.model.get_output_embeddings().register_forward_hook(keep)
    try:
        for ids, mask in _batches(backbone, texts):
            _logits(backbone, ids, mask)
    finally:
        hook.remove()
    return torch.cat(states), torch.cat(evidence)


def _measure(
    backbone: Backbone, texts: Sequence[Sequence[int]], row: Tensor, bias: float, count: int
) -> tuple[float, float, int]:
    """Return summed probabilities of ``count`` tokens of output ``row`` [H]: the greatest, the mean, and how many."""
    greatest, total, positions = 0.0, 0.0, 0
    head = backbone.model.get_output_embeddings()

    def extend(module: nn.Module, arguments: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        column = arguments[0] @ row.to(arguments[0])[:, None] + bias  # [..., H] -> [..., 1]
        return torch.cat([logits, column.to(logits)], -1)

    hook = head.register_forward_hook(extend)
    try:
        for ids, mask in _batches(backbone, texts):
            logits = _logits(backbone, ids, mask).float()  # [N, V + 1]
            virtual = logits[:, -1] + math.log(count)
            others = logits[:, :-1].logsumexp(-1)
            probabilities = (virtual - others).double().sigmoid()
            greatest, total = max(greatest, float(probabilities.max())), total + float(probabilities.sum())
            positions += len(logits)
    finally:
        hook.remove()
    return greatest, total / positions, positions


def _logits(backbone: Backbone, ids: Tensor, mask: Tensor) -> Tensor:
    """Return logits at all positions that are no pads, of ids and mask ``[B, T]``: by the plain forward pass."""
    plan, backbone.plan = backbone.plan, "reference"
    try:
        with torch.no_grad():
            return backbone.logits(ids, mask, mask.bool())
    finally:
        backbone.plan = plan


def _batches(backbone: Backbone, texts: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ids and mask ``[B, T]`` of texts of like length, so many that their logits take little memory."""
    ordered = sorted(texts, key=len)
    while ordered:
        size = _BATCH * max(1, (_WRITTEN + 2) // len(ordered[0]))
        rows = [Row(tuple(ids), (IGNORED,) * len(ids)) for ids in ordered[:size]]
        ordered = ordered[size:]
        batch = collate(rows, backbone.tokenizer.pad_token_id)
        yield batch.input_ids, batch.attention_mask
