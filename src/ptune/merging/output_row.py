"""The row of the output head that keeps virtual tokens from ever being generated, found and held to measurement.

A head has no bias in most families, so what a row gives is its product with the final hidden state h, and "never" asks
for a row w whose w·h stays far below the logsumexp of all logits at every h that the model comes to. The mean of all
rows is below it by the logarithm of V at least, whatever h is (Jensen); from there w goes on against the states: it is
fitted to stay below by a margin, by least squares on the states that are not yet there (the finite Newton method for
squared hinge losses, Keerthi and DeCoste 2005, section 4). Final states of a trained model lie to one side of the
origin, and behind a final LayerNorm with a bias such a row exists exactly; in general it depends on the model, so it is
measured on states that it was not fitted to, with what the family does behind its head (scale, soft cap) done by the
family itself.

States come from texts that the model itself writes: from single words of its vocabulary, from the contexts of the soft
prompts and, since what breaks a row is a rare kind of state, on from where rows so far were worst. Each state is
computed once, whatever is tried on it. Shapes: N positions, H width, V rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptune.errors import BackboneError
from ptune.merging.final_states import Positions, behind_head, read, write
from ptune.merging.tokenizer_files import opening_ids
from ptune.models.backbone import Backbone

LIMIT = 1e-6
"""Most summed probability of all virtual tokens at any position, and on the mean where no row keeps to that."""
TOLERATED = 0.05
"""Most of it at a rare position, where the mean keeps to the limit: far from ever being the likeliest."""
_SAFE = 1e-12
_MARGINS = (20.0, 40.0, 100.0)
_RIDGES = (1e-1, 1e-2, 1e-4)
_ROUNDS = (128, 256, 512)
_CONFIRMED = 256
_WORST = 16  # positions from which the model writes on
_ALONE = 2  # words that are read besides, for each text that is written
_ENOUGH = 5_000, 16  # held-out positions, and of them for each number of a row: more do not make rows better


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


def find_output_row(
    backbone: Backbone,
    contexts: Sequence[Sequence[int]],
    count: int,
    dtype: torch.dtype,
    tell: Callable[[str], None],
) -> OutputRow:
    """Return the row that keeps ``count`` virtual tokens from being generated.

    It is fitted to every other text, measured on the rest, and what is good there is confirmed on new texts. Where it
    does not hold there come more texts, for the row of a wide model has as many numbers that chance may fit.

    Args:
        backbone: its table holds the virtual tokens that stand in ``contexts``.
        contexts: ids of some contexts of the soft prompts.
        count: virtual tokens of the whole model.
        dtype: what the row is stored in.
        tell: is told each round when it begins.

    Raises:
        BackboneError: none keeps their summed probability below `LIMIT` nor, when enough was tried, the mean there and
            each below `TOLERATED`.
    """
    opening = opening_ids(backbone.tokenizer)
    known = read(backbone, contexts)
    worst: list[list[int]] = []
    for number, size in enumerate(_ROUNDS):
        tell(
            "fitting the row that keeps virtual tokens from being said to texts that the model writes, "
            f"round {number + 1} of at most {len(_ROUNDS)}"
        )
        words = _words(backbone, opening, (1 + _ALONE) * size, 2 * number)
        known += read(backbone, words)
        starts = [*words[: size // 2], *_repeated(contexts, size // 2), *_repeated(worst, 2 * len(worst))]
        known += write(backbone, starts, 2 * number)
        held_out = known.half(1)
        best, chances = _best_row(backbone, known.half(0), held_out, count, dtype)
        worst = _distinct(held_out, chances)
        enough = len(held_out) >= max(_ENOUGH[0], _ENOUGH[1] * len(best.weight))
        if not _keeps(best, enough):
            continue
        # A rare state may not have been among them.
        words = _words(backbone, opening, _CONFIRMED // 2, 2 * number + 1)
        starts = [*words, *_repeated(contexts, _CONFIRMED // 2), *worst]
        fresh = write(backbone, starts, 2 * number + 1)
        new = _chances(backbone, fresh, best.weight, best.bias or 0.0, count)
        worst += _distinct(fresh, new)
        best = _measured(best.weight, best.bias, torch.cat([chances, new]))
        if _keeps(best, enough):
            return best
        known += fresh
    if _keeps(best, True):
        return best
    raise BackboneError(
        f'virtual tokens cannot be kept from being generated by "{backbone.name}": its final hidden states point every '
        f"way, and the best output row gives them a probability of {best.probability:.1g} at one of {best.positions} "
        f"positions, {best.mean:.1g} on the mean; serve it by ptune's own engine"
    )


def _keeps(row: OutputRow, enough: bool) -> bool:
    """Whether a row keeps virtual tokens from being generated, as far as may be asked where enough was tried."""
    return row.probability < LIMIT or (enough and row.probability < TOLERATED and row.mean < LIMIT)


def _words(backbone: Backbone, opening: list[int], count: int, seed: int) -> list[list[int]]:
    """Return ids of texts of one word each."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(len(backbone.tokenizer), (count,), generator=generator).tolist()
    return [[*opening, word] for word in words]


def _repeated(starts: Sequence[Sequence[int]], count: int) -> list[Sequence[int]]:
    """Return ``count`` starts or more, each an even number of times, for it shall be in either half of the texts."""
    times = 2 * -(-count // (2 * len(starts))) if starts else 0
    return [start for start in starts for _ in range(times)]


def _distinct(positions: Positions, chances: Tensor) -> list[list[int]]:
    """Return the texts up to the positions with the greatest chances ``[N]``, one of each text."""
    found: dict[int, int] = {}
    for position in chances.argsort(descending=True).tolist():
        found.setdefault(int(positions.text[position]), position)
        if len(found) == _WORST:
            break
    return positions.starts(torch.tensor(list(found.values())))


def _best_row(
    backbone: Backbone, positions: Positions, held_out: Positions, count: int, dtype: torch.dtype
) -> tuple[OutputRow, Tensor]:
    """Return the first good one of rows fitted to positions, as held-out ones measure it, or the best; its chances."""
    head = backbone.model.get_output_embeddings()
    bias = None if getattr(head, "bias", None) is None else -1e4
    if bias is None:
        mean_row = head.weight.detach().double().mean(0).cpu()
        rows = _candidates(mean_row, positions.states.double(), positions.given, count)
    else:
        rows = iter([torch.zeros(head.weight.shape[1])])
    best: tuple[OutputRow, Tensor] | None = None
    for row in rows:
        weight = row.to(dtype)
        chances = _chances(backbone, held_out, weight, bias or 0.0, count)
        found = _measured(weight, bias, chances)
        if best is None or found.probability < best[0].probability:
            best = found, chances
        if best[0].probability < _SAFE:
            break  # those that follow go further from the mean row, for no need
    assert best is not None
    return best


def _measured(weight: Tensor, bias: float | None, chances: Tensor) -> OutputRow:
    return OutputRow(weight, bias, float(chances.max()), float(chances.mean()), len(chances))


def _chances(backbone: Backbone, positions: Positions, row: Tensor, bias: float, count: int) -> Tensor:
    """Return the summed probabilities of ``count`` tokens of output ``row`` [H] at positions, ``[N]`` float64."""
    head = positions.states @ row.to(positions.states) + bias  # [N, H] -> [N]
    virtual = behind_head(backbone, head).double() + math.log(count)
    return (virtual - positions.evidence).sigmoid()


def _candidates(mean_row: Tensor, states: Tensor, evidence: Tensor, count: int) -> Iterator[Tensor]:
    """Yield rows ``[H]``, the most promising first: by a share of the states kept apart, then by the way to them.

    Args:
        mean_row: of the head, ``[H]`` float64.
        states: final hidden states ``[N, H]`` float64.
        evidence: logsumexp of the logits at each, ``[N]`` float64.
        count: virtual tokens.
    """
    slack = evidence - states @ mean_row - math.log(count)  # [N], by how much the mean row is below already
    apart = torch.arange(len(states), device=states.device) % 4 == 0
    found: list[tuple[float, float, Tensor]] = []
    for margin in _MARGINS:
        for ridge in _RIDGES:
            step = _step_below(states[~apart], slack[~apart] - margin, ridge)
            over = float((states[apart] @ step - slack[apart]).max())
            # The mean row is below at any state, so of steps that do, the shortest has least to go wrong with.
            found.append((max(over, math.log(_SAFE)), float(step.norm()), mean_row + step))
    yield from (row for _, _, row in sorted(found, key=lambda one: one[:2])[:3])


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
