"""What dev says once a run has ended: the temperature of its probabilities, its confusion matrix, its calibration.

Knows a run's parts, and nothing of the loop or of files.
"""

from __future__ import annotations

from accelerate.utils import broadcast_object_list

from ptune.tasks.calibration import fit_temperature
from ptune.tasks.choice import Choice
from ptune.tasks.scoring import ScoringTask
from ptune.tasks.task import Assessment
from ptune.training.assembly import Parts


def assess_dev(parts: Parts, *, batch_size: int) -> tuple[Assessment, str] | None:
    """Score dev with the rows in use, and fit a temperature on it where the task's settings say so.

    Args:
        parts: of the run; the table holds the rows to score.
        batch_size: rows read at once.

    Returns:
        The assessment with its temperature, and a sentence on how that came about, or why there is none; None for
        tasks without labels.
    """
    task, records = parts.task, parts.dev
    if not isinstance(task, ScoringTask):
        return None
    scores = task.all_scores(parts.prompted.backbone, records, batch_size)
    if not getattr(task.config, "fit_temperature", False):
        return task.assessment(scores, records), "no temperature: task.fit_temperature is off"
    if task.answer_key != "label":
        return task.assessment(scores, records), "no temperature: a record has several labels, or none"
    targets = [task.target(record) for record in records]
    fitted = fit_temperature(scores, targets, labels=not isinstance(task, Choice))
    (temperature,) = broadcast_object_list([fitted.value])  # scores of processes may differ in their last digits
    assessment = task.with_temperature(temperature).assessment(scores, records)
    if temperature is None:
        return assessment, f"no temperature: {fitted.why}"
    errors = (assessment.metrics[name] for name in ("calibration_error_before", "calibration_error"))
    return assessment, temperature_sentence(temperature, fitted.why, *errors)


def temperature_sentence(temperature: float, why: str, before: float, after: float) -> str:
    """Return what a fitted temperature does to the calibration error, which it is not fitted to."""
    said = f"temperature {temperature:.3g}, {why}: calibration error {before:.3f} -> {after:.3f}, labels unchanged"
    if after > before:
        said += "; the fit is to the likelihood of the right labels, which rose even so"
    return said
