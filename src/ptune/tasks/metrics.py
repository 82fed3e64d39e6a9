"""How right answers are: F1 in two ways, which label is taken for which, how alike they are. Knows no models."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor


def macro_f1(targets: Sequence[int], predicted: Sequence[int]) -> float:
    """Return the mean F1 over the labels that occur among targets or predictions."""
    labels = {*targets, *predicted}
    return math.fsum(_f1(targets, predicted, [label]) for label in labels) / len(labels)


def micro_f1(targets: Sequence[int], predicted: Sequence[int], negative: int | None = None) -> float:
    """Return the F1 of all labels but ``negative`` counted together, 0 where none of them occurs.

    With a negative label it is what relation extraction reports, as SemEval-2010 task 8 leaves out ``Other``; without
    one it is the accuracy.
    """
    return _f1(targets, predicted, [label for label in {*targets, *predicted} if label != negative])


def average_f1s(wanted: Tensor, given: Tensor) -> tuple[float, float]:
    """Return micro and macro F1 of examples with several labels; macro over the labels that occur on either side.

    Args:
        wanted: ``[E, C]`` bool, which labels each has.
        given: ``[E, C]`` bool, which were predicted.
    """
    hits = (wanted & given).sum(0).double()  # [C]
    either = (wanted.sum(0) + given.sum(0)).double()
    occurs = either > 0
    if not bool(occurs.any()):
        return 0.0, 0.0
    return float(2 * hits.sum() / either.sum()), float((2 * hits[occurs] / either[occurs]).mean())


def prediction_share(answers: Sequence[Hashable]) -> float:
    """Return how many answers are the most frequent one, as a share; near 1 nothing but the majority is learnt."""
    return max(Counter(answers).values()) / len(answers)


def confusion(targets: Sequence[int], predicted: Sequence[int], count: int) -> list[list[int]]:
    """Return how often each label (row) was taken for each (column), ``count`` by ``count``."""
    table = torch.zeros(count, count, dtype=torch.long)
    for target, answer in zip(targets, predicted, strict=True):
        table[target, answer] += 1
    return table.tolist()


def _f1(targets: Sequence[int], predicted: Sequence[int], labels: Sequence[int]) -> float:
    hits = sum(target == answer and target in labels for target, answer in zip(targets, predicted, strict=True))
    either = sum(target in labels for target in targets) + sum(answer in labels for answer in predicted)
    return 2 * hits / either if either else 0.0
