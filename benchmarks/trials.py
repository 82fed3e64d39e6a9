"""A short run of ptune or of PEFT on one task, as the tables of tasks, of starts and of settings need it.

Knows nothing of tables. Records of each part are drawn once, with one fixed seed, so all runs of a task see the same.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptune.config.file import load_config
from ptune.config.run import RunConfig, TrainingConfig
from ptune.config.settings import Settings
from ptune.config.task import ClassificationConfig
from ptune.engine.engine import Engine
from ptune.models.backbone import Backbone
from ptune.records.data import draw, load_records
from ptune.records.record import Record
from ptune.soft_prompts.soft_prompt import SoftPrompt
from ptune.tasks.registry import task_for
from ptune.tasks.task import Task
from ptune.template import Template
from ptune.training.train import train

EXAMPLES = Path(__file__).parents[1] / "examples"
PARTS = ("train", "dev", "test")


@dataclass(frozen=True)
class TrialTask:
    """A task, its template and its records.

    Attributes:
        name: of its folder in the data.
        config: what is asked.
        template: with virtual tokens.
        max_length: text tokens; the rest of a text is cut away.
        records: of train, dev and test.
        batch_size: records of a step.
    """

    name: str
    config: Settings
    template: str
    max_length: int
    records: Mapping[str, list[Record]]
    batch_size: int

    @classmethod
    def of_example(
        cls, example: str, data: Path, limits: Mapping[str, int], max_length: int, folder: str | None = None
    ) -> TrialTask:
        """The task of a config in `examples/`, scored by accuracy; its data lie in ``folder``, or one of its own name.

        Raises:
            DataError: the folder holds no such task, or a file cannot be read.
        """
        config = load_config(EXAMPLES / f"{example}.yaml")
        task: Settings = config.task
        if isinstance(task, ClassificationConfig):
            task = task.model_copy(update={"metric": "accuracy"})
        name = folder or example
        records = sample(data / name, limits, config.data.fields)
        return cls(name, task, config.prompt.template, max_length, records, min(16, config.training.batch_size))

    def bare(self, backbone: Backbone, template: str | None = None) -> Task:
        """The task without virtual tokens; with a template of its own where one is given."""
        words = Template.parse(template or self.template).without_virtual_tokens()
        return task_for(backbone, self.config, words, max_length=self.max_length)

    @property
    def train_and_dev(self) -> tuple[list[Record], list[Record]]:
        """The records that a run reads."""
        return self.records["train"], self.records["dev"]

    def run(self, trial: Trial, output: Path) -> RunConfig:
        """The settings of a run."""
        return RunConfig.model_validate(
            {
                "task": self.config,
                "prompt": {"template": trial.template or self.template, "max_length": self.max_length, **trial.prompt},
                "training": trial.training(self.batch_size),
                "output": output,
            }
        )

    def settings(self) -> dict[str, Any]:
        """What two runs must share for their results to stand in one table."""
        return {
            "task": self.config.model_dump(mode="json"),
            "template": self.template,
            "max_length": self.max_length,
            "batch_size": self.batch_size,
            "records": {part: len(records) for part, records in self.records.items()},
        }


def sample(folder: Path, limits: Mapping[str, int], fields: Mapping[str, str] | None = None) -> dict[str, list[Record]]:
    """Return up to so many records of each part."""
    return {part: draw(load_records(folder, split=part, fields=fields), limits[part]) for part in PARTS}


def add_limits(parser: argparse.ArgumentParser, cut: str = "text tokens of a record", **most: int) -> None:
    """Let a parser take how many text tokens a record keeps, and the most records of parts.

    Args:
        parser: of a benchmark.
        cut: what is said of the tokens.
        most: records of each part where nothing is said.
    """
    parser.add_argument("--max-length", type=int, default=64, help=cut)
    for part, count in most.items():
        parser.add_argument(f"--{part}-limit", type=int, default=count, help=f"most records of {part}")


@dataclass(frozen=True)
class Trial:
    """How one run is made.

    Attributes:
        steps: of the optimizer.
        rate: the highest learning rate.
        seed: of the start and of the order of records.
        evaluations: how often dev is scored; the best of them is kept.
        prompt: settings beside the template: encoder, start, deep.
        template: in place of the task's own.
    """

    steps: int
    rate: float = TrainingConfig().learning_rate
    seed: int = 0
    evaluations: int = 2
    prompt: Mapping[str, Any] = field(default_factory=dict)
    template: str | None = None

    def training(self, batch_size: int) -> TrainingConfig:
        """The settings of the run's training."""
        return TrainingConfig(
            max_steps=self.steps,
            batch_size=batch_size,
            learning_rate=self.rate,
            evaluations=max(1, min(self.evaluations, self.steps)),
            samples=0,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Tuned:
    """What a run gave: the metric on dev of the best checkpoint, after which step, and how to ask test."""

    dev: float
    best_step: int
    test: Callable[[], float]

    def cell(self) -> dict[str, Any]:
        """The results as they are stored, test among them."""
        return {"test": self.test(), "dev": self.dev, "best_step": self.best_step}


def tune(task: TrialTask, trial: Trial, backbone: Backbone, folder: Path | None = None) -> tuple[Tuned, SoftPrompt]:
    """Train a soft prompt, and keep it in ``folder`` where one is given."""
    with tempfile.TemporaryDirectory() as temporary:
        config = task.run(trial, folder or Path(temporary) / "prompt")
        prompt = train(config, backbone=backbone, records=task.train_and_dev, overwrite=folder is not None)
    summary = prompt.summary
    dev = summary["after"][summary["metric"]]
    return Tuned(dev, summary["best_step"], lambda: accuracy_on(task, "test", [prompt], backbone)), prompt


def accuracy_on(task: TrialTask, part: str, prompts: Sequence[SoftPrompt], backbone: Backbone) -> float:
    """Return the accuracy of a soft prompt, or of several whose probabilities are averaged, on dev or test."""
    return share_of_same(answers_on(task, part, prompts, backbone), right_answers(task, part, backbone))


def answers_on(task: TrialTask, part: str, prompts: Sequence[SoftPrompt], backbone: Backbone) -> list[str]:
    """Return the likeliest answer to each record of dev or test, of several prompts by their mean probabilities."""
    records = task.records[part]
    with Engine(backbone) as engine:
        answers = []
        for number, prompt in enumerate(prompts):
            engine.add(str(number), prompt)
            answers.append(engine.predict(str(number), records, batch_size=32))
    likeliest = []
    for given in zip(*answers, strict=True):
        names = list(given[0]["probabilities"])
        total = {name: sum(answer["probabilities"][name] for answer in given) for name in names}
        likeliest.append(max(names, key=lambda name: total[name]))
    return likeliest


def right_answers(task: TrialTask, part: str, backbone: Backbone) -> list[str]:
    """Return the right answer to each record of dev or test."""
    bare = task.bare(backbone)
    return [bare.names(record)[bare.target(record)] for record in task.records[part]]


def share_of_same(some: Sequence[str], others: Sequence[str]) -> float:
    """Return the share of places at which two lists of answers say the same."""
    return sum(one == other for one, other in zip(some, others, strict=True)) / len(some)
