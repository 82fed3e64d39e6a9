"""Paired timing: peers take turns in one process, so that what else the machine does falls on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def interleaved(
    cases: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1, before: Callable[[], object] | None = None
) -> dict[str, list[float]]:
    """Return the seconds of each case in each round.

    Args:
        cases: what is timed, by name; one after another in every round.
        rounds: how often.
        warm_up: rounds before them that are not counted.
        before: what is done before each call and not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(warm_up + rounds):
        for name, case in cases.items():
            if before is not None:
                before()
            begun = time.perf_counter()
            case()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, peer: str) -> tuple[float, float, float]:
    """Return how many times faster a case is than its peer: the median over rounds, the least and the greatest."""
    ratios = [theirs / ours for theirs, ours in zip(seconds[peer], seconds[name], strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)
