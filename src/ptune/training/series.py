"""Several runs in turn on one loaded backbone: a list of tasks, or one task under several seeds.

Knows settings, backbones and folders; the runs themselves are `train`'s, which `ptune train` calls for each.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from ptune.config.run import RunConfig
from ptune.errors import ConfigError
from ptune.models.backbone import Backbone
from ptune.soft_prompts.soft_prompt import SoftPrompt
from ptune.training.run_folder import SETTINGS, RunFolder

_Result = TypeVar("_Result")


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


def in_turn(configs: Sequence[RunConfig], run: Callable[[RunConfig, Backbone], _Result]) -> list[_Result]:
    """Carry out runs, those on one backbone together, each loaded once; one is in memory at a time.

    Args:
        configs: the settings of each.
        run: carries one out on its loaded backbone, which it must not keep.

    Returns:
        What each run gives, in the order in which they were carried out.

    Raises:
        BackboneError: one cannot be loaded.
    """
    results: list[_Result] = []
    for model in dict.fromkeys(config.model.model_dump_json() for config in configs):
        results += _on_one_backbone([config for config in configs if config.model.model_dump_json() == model], run)
        gc.collect()  # a loaded model is part of cycles
    return results


def _on_one_backbone(configs: Sequence[RunConfig], run: Callable[[RunConfig, Backbone], _Result]) -> list[_Result]:
    backbone = Backbone.load(configs[0].model)
    return [run(config, backbone) for config in configs]


def spread(prompts: Sequence[SoftPrompt], metric: str) -> tuple[float, float]:
    """Return mean and standard deviation (over n - 1) of a dev metric at the best step of each run."""
    values = [float(prompt.summary["after"][metric]) for prompt in prompts]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
