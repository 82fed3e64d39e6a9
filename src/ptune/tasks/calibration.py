"""Probabilities that mean what they say: how far they are off, and one temperature that mends most of it.

Scores divided by a temperature keep their order, so labels stay as they are and only confidence changes (Guo et al.
2017, "On Calibration of Modern Neural Networks", section 4.2). Knows scores and no models.

Shapes: E examples, C answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_RECORDS = 50
"""Of fewer held-out records a temperature would say more about which ones they are than about the prompt."""
LOWEST, HIGHEST = 0.05, 20.0
"""Temperatures looked at."""
_HALVINGS = 50
_BINS = 15
"""Between confidence 0 and 1."""


@dataclass(frozen=True)
class Bin:
    """Predictions of similar confidence: mean confidence, how many of them are right, how many records."""

    confidence: float
    accuracy: float
    records: int


@dataclass(frozen=True)
class FittedTemperature:
    """The temperature that fits held-out records best; ``value`` None where none can be had, and ``why``."""

    value: float | None
    why: str


def fit_temperature(scores: Tensor, targets: Sequence[int], *, labels: bool = True) -> FittedTemperature:
    """Return the temperature at which held-out records have the least negative log-likelihood.

    That likelihood is convex in the temperature's inverse, so halving by the sign of its slope finds the one minimum.

    Args:
        scores: ``[E, C]``.
        targets: E numbers of the right answers.
        labels: the same number means the same answer in every record; else each has answers of its own.
    """
    if len(targets) < LEAST_RECORDS:
        return FittedTemperature(
            None, f"{len(targets)} held-out records are too few for a temperature, which takes {LEAST_RECORDS}"
        )
    if labels and len(set(targets)) == 1:
        return FittedTemperature(None, "all held-out records are of one label, so no temperature can be fitted on them")
    scores, right = scores.double(), torch.tensor(targets)[:, None]
    own = scores.gather(-1, right).squeeze(-1)  # [E]

    def slope(inverse: float) -> float:
        expected = ((scores * inverse).softmax(-1) * scores).sum(-1)  # [E]
        return float((expected - own).mean())

    low, high = 1 / HIGHEST, 1 / LOWEST
    if slope(high) <= 0:
        return FittedTemperature(
            None, "the prompt answers held-out records so well that no temperature fits best; give it harder ones"
        )
    if slope(low) >= 0:
        return FittedTemperature(
            None, "scores say too little about held-out records for a temperature; the prompt has yet to learn them"
        )
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return FittedTemperature(1 / math.sqrt(low * high), f"fitted on {len(targets)} held-out records")


def reliability(probabilities: Tensor, targets: Tensor) -> list[Bin]:
    """Return those of fifteen bins of equal width that hold a prediction, from unsure to sure.

    Args:
        probabilities: ``[E, C]``.
        targets: ``[E]`` int64.
    """
    confidence, predicted = probabilities.double().max(-1)
    right = (predicted == targets).double()
    place = (confidence * _BINS).ceil().clamp(1, _BINS)
    found = []
    for number in range(1, _BINS + 1):
        within = place == number
        if count := int(within.sum()):
            found.append(Bin(float(confidence[within].mean()), float(right[within].mean()), count))
    return found


def calibration_error(bins: Sequence[Bin]) -> float:
    """Return the mean gap between confidence and accuracy (Guo et al. 2017, section 2), over all records."""
    total = sum(one.records for one in bins)
    return math.fsum(one.records * abs(one.accuracy - one.confidence) for one in bins) / total
