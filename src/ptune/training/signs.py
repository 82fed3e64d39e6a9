"""What looks wrong in a run, by its evaluations on dev: a sentence each, told as it begins and not while it lasts.

Told by the evaluations alone, so a resumed run says nothing twice. Knows metrics, and neither tasks nor models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_CONSTANT_SHARE = 0.98
_DIVERGED = 2.0
"""Times the untrained loss."""
_RISEN = 1.5
"""Times the least loss so far."""


def new_signs(history: Sequence[Mapping[str, float]], right: str) -> list[str]:
    """Return what the latest evaluation shows for the first time.

    Args:
        history: step and metrics of each evaluation, the one before training first.
        right: the metric that says how many answers are wholly right.
    """
    return [sign for sign in (_rise(history), _constant(history, right)) if sign is not None]


def no_gain(best_step: int, steps: int) -> str | None:
    """Return what to say where no evaluation beat the untrained prompt; None where one did, or there was no step."""
    if best_step or not steps:
        return None
    return (
        f"no evaluation in {steps} steps was better than the untrained prompt, which is what is saved; try another "
        "training.learning_rate or more steps"
    )


def _rise(history: Sequence[Mapping[str, float]]) -> str | None:
    """Return what to say when the loss first rises, and again when it first is far above the untrained one's."""
    first = best = history[0]
    told, sentence = 0, None
    for entry in history[1:]:
        loss, sentence, degree = entry["loss"], None, 0
        if loss > _DIVERGED * first["loss"]:
            degree = 2
            said = f"was {first['loss']:.3f} before training: it diverges; lower training.learning_rate"
        elif loss > _RISEN * best["loss"]:
            degree = 1
            when = f"at step {best['step']:.0f}" if best["step"] else "before training"
            said = (
                f"was {best['loss']:.3f} {when}: it diverges or overfits; lower training.learning_rate, or take fewer "
                "steps"
            )
        if degree > told:
            told, sentence = degree, f"dev loss is {loss:.3f} and {said}"
        if loss < best["loss"]:
            best = entry
    return sentence


def _constant(history: Sequence[Mapping[str, float]], right: str) -> str | None:
    """Return that nearly all answers are the same, and not because they are right."""
    now, *before = [_is_constant(entry, right) for entry in reversed(history) if entry["step"]] or [False]
    if not now or any(before[:1]):
        return None
    same = "predictions are one label" if right == "accuracy" else "answers are the same"
    return (
        f"nearly all {same}: the prompt has learnt nothing yet but the majority; "
        "try another learning rate or seed, or more steps"
    )


def _is_constant(metrics: Mapping[str, float], right: str) -> bool:
    share = metrics.get("prediction_share", 0.0)
    return share >= _CONSTANT_SHARE and metrics[right] < share
