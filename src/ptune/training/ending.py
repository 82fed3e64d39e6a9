"""What is told once a soft prompt is saved: its answers beside the bare model's, what looks wrong. Knows no loops."""

from __future__ import annotations

from ptune.errors import OutputError
from ptune.soft_prompts.soft_prompt import SoftPrompt
from ptune.training.assembly import Parts
from ptune.training.checkpoint import Progress
from ptune.training.comparison import compare_with_bare_model
from ptune.training.reporting import Reporter
from ptune.training.run_folder import RunFolder
from ptune.training.signs import no_gain


def tell_the_end(parts: Parts, prompt: SoftPrompt, progress: Progress, folder: RunFolder, reporter: Reporter) -> None:
    """Compare with the bare model, store that, and tell.

    A disk that is full by now is warned of, for the soft prompt is whole.

    Args:
        parts: of the run; backbone and task know the rows that were saved.
        prompt: as saved.
        progress: of its run.
        folder: where the comparison is stored.
        reporter: that is told.
    """
    comparison = compare_with_bare_model(parts)
    sentences = [no_gain(progress.best_step, progress.step)]
    if comparison is not None:
        sentences.append(comparison.warning)
        try:
            folder.compared(comparison.values())
        except OutputError as error:
            sentences.append(f"the soft prompt is saved, but not its comparison with the bare model: {error}")
    reporter.finished(prompt, progress, comparison)
    for sentence in sentences:
        if sentence is not None:
            reporter.warned(sentence)
