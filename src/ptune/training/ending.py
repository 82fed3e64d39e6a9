"""How a run or a search ends: the best soft prompt saved, and what is told then. Knows no loops."""

from __future__ import annotations

from ptune.errors import OutputError
from ptune.soft_prompts.soft_prompt import SoftPrompt
from ptune.training.assembly import Parts
from ptune.training.checkpoint import Progress
from ptune.training.comparison import compare_with_bare_model
from ptune.training.dev_assessment import assess_dev
from ptune.training.learner import Learner
from ptune.training.reporting import Reporter
from ptune.training.run_folder import RunFolder
from ptune.training.signs import no_gain


def save_best(learner: Learner, folder: RunFolder, reporter: Reporter, *, writes: bool = True) -> SoftPrompt:
    """Save the soft prompt of the best evaluation, with what dev says of it.

    Args:
        learner: that has evaluated at least once.
        folder: of the run.
        reporter: that is told.
        writes: whether this process writes.

    Raises:
        OutputError: the folder cannot be written.
    """
    learner.use_best()
    assessed = assess_dev(learner.parts, batch_size=2 * learner.settings.batch_size)
    prompt = learner.soft_prompt(assessed and assessed[0].temperature)
    if assessed is not None:
        folder.assessed(assessed[0].values())
        reporter.assessed(*assessed)
    if writes:
        prompt.save(folder.path)  # last: where it stands, everything does
    return prompt


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
