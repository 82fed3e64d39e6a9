"""Several runs in turn on one loaded backbone: a list of tasks, or one task under several seeds.

Knows settings, backbones and folders; the runs themselves are `train`'s, which `ptune train` calls for each.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from ptune.config.run import RunConfig
from ptune.errors import ConfigError
from ptune.models.backbone import Backbone
from ptune.soft_prompts.soft_prompt import SoftPrompt
from ptune.training.run_folder import SETTINGS, RunFolder


def under_seeds(config: RunConfig, count: int) -> list[RunConfig]:
    """Return a run's settings under ``count`` seeds from its own on, each with a folder ``seed-N`` of its own.

    Dev that is split from the training data is the same under all, so that the deviation is the prompts' alone; with
    ``data.shots`` each seed draws records of its own, for there the deviation is meant to be over them too.
    """
    first, data = config.training.seed, config.data
    if data.split_seed is None and data.shots is None:
        data = data.model_copy(update={"split_seed": first})
    return [
        config.model_copy(
            update={
                "data": data,
                "training": config.training.model_copy(update={"seed": seed}),
                "output": config.output / f"seed-{seed}",
            }
        )
        for seed in range(first, first + count)
    ]


def check_series(configs: Sequence[RunConfig], *, resume: bool = False, overwrite: bool = False) -> None:
    """See that all runs may write where they want to, before the first of them takes its time.

    Raises:
        ConfigError: two runs name one folder, or a run to resume had other settings.
        OutputError: a folder holds another run, is in use, or cannot be written.
    """
    folders: set[Path] = set()
    for config in configs:
        folder = config.output.resolve()
        if folder in folders:
            raise ConfigError(f'two runs name the output "{config.output}"; give each a folder of its own')
        folders.add(folder)
        with RunFolder(config, resume=may_resume(config, resume), overwrite=overwrite):
            pass


def may_resume(config: RunConfig, resume: bool) -> bool:
    """Whether a run of a series resumes; one that had not begun when the series stopped starts from step 0."""
    return resume and (config.output / "run" / SETTINGS).is_file()


def with_backbones(configs: Sequence[RunConfig]) -> Iterator[tuple[RunConfig, Backbone]]:
    """Give each run's settings with its backbone, loaded once for all runs on it; one is in memory at a time.

    Raises:
        BackboneError: one cannot be loaded.
    """
    for model in dict.fromkeys(config.model.model_dump_json() for config in configs):
        together = [config for config in configs if config.model.model_dump_json() == model]
        backbone = Backbone.load(together[0].model)
        for config in together:
            yield config, backbone


def spread(prompts: Sequence[SoftPrompt], metric: str) -> tuple[float, float]:
    """Return mean and standard deviation (over n - 1) of a dev metric at the best step of each run."""
    values = [float(prompt.summary["after"][metric]) for prompt in prompts]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
