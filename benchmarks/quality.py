"""Quality of tuning: ptune against a frozen model asked by hand and against PEFT's P-tuning, task by task.

    python benchmarks/quality.py --data DIR                 run what is missing, then print the table
    python benchmarks/quality.py --markdown                 print the table of what is stored
    python benchmarks/quality.py --shots 16 --seeds 5       few-shot: 16 train and 16 dev records a label, drawn by seed

Learning rates are chosen on dev with seed 0, from one list for all; test is read only for what was
chosen. Each cell is stored as soon as it is finished, so a stopped benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from cells import Cells
from peft_peer import PeftPeer, accuracy, train_peer
from quality_tasks import TASKS, QualityTask

from ptune.config.run import ModelConfig, RunConfig, TrainingConfig
from ptune.config.task import ClassificationConfig
from ptune.engine.engine import Engine
from ptune.errors import PtuneError
from ptune.models.backbone import Backbone
from ptune.records.data import draw_shots
from ptune.records.record import Record
from ptune.soft_prompts.soft_prompt import SoftPrompt
from ptune.tasks.registry import task_for
from ptune.template import Template
from ptune.training.assembly import Parts
from ptune.training.reporting import Reporter
from ptune.training.train import train

RATES = (1e-3, 3e-3, 1e-2)
"""The learning rates from which each row's is chosen, the same for all."""

TIMED = ("ptune", "peft_same_steps")
"""The rows whose seconds per step are compared."""

TRAINER_RATE: float = transformers.TrainingArguments.__dataclass_fields__["learning_rate"].default

ROWS = {
    "frozen": "frozen, best template by hand",
    "ptune": "ptune",
    "peft_same_steps": "PEFT, same steps",
    "peft_same_time": "PEFT, same time",
    "peft_default": "PEFT, Trainer's defaults",
}
"""The table's columns by their names in the stored file."""


@dataclass(frozen=True)
class Outcome:
    """A tuned prompt: what dev says of it, what it cost, and how to ask test."""

    dev: float
    best_step: int
    seconds_per_step: float
    test: Callable[[], float]


class StepTimer(Reporter):
    """Times ptune's steps, and what is run once before them for all of them to read.

    Steps right after an evaluation are left out, for they bear its traces and the checkpoint's.
    """

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._last: float | None = None
        self._begun = self._preparation = 0.0
        self._steps = 1

    @property
    def seconds_per_step(self) -> float:
        """The mean, with a step's share of the preparation."""
        return statistics.fmean(self._seconds) + self._preparation / self._steps

    def started(self, config: RunConfig, parts: Parts, total_steps: int, step: int) -> None:
        """Note when the preparation begins."""
        self._begun, self._steps = time.perf_counter(), total_steps

    def kept_contexts(self, count: int, size: int, *, full: bool) -> None:
        """Note what the preparation took."""
        self._preparation = time.perf_counter() - self._begun

    def stepped(self, step: int, loss: float, learning_rate: float) -> None:
        """Note the time since the step before."""
        now = time.perf_counter()
        if self._last is not None:
            self._seconds.append(now - self._last)
        self._last = now

    def evaluated(self, step: int, metrics: Mapping[str, float], *, best: bool) -> None:
        """Leave the next step out."""
        self._last = None


class TaskBenchmark:
    """All rows of one task."""

    def __init__(self, task: QualityTask, backbone: Backbone, cells: Cells, options: argparse.Namespace) -> None:
        self.task, self.backbone, self.cells, self.options = task, backbone, cells, options
        self.steps = options.steps or task.steps
        given = {"train": options.train_limit, "dev": options.dev_limit, "test": options.test_limit}
        self.records: dict[str, list[Record]] = {
            split: task.records(options.data, split, limit) for split, limit in given.items()
        }
        self.config = ClassificationConfig(verbalizer=dict(task.verbalizer))
        self.template = Template.parse(task.template)
        self.bare = self._task(self.template.without_virtual_tokens(), self.config)
        self.tuned: dict[tuple[str, float], Outcome] = {}  # by method and rate, of seed 0

    def run(self) -> None:
        """Compute what is missing."""
        name = self.task.name
        self.cells.begin(name, self._settings())
        self.cells.get(name, "frozen", self.frozen)
        rates = {method: self.chosen_rate(method, self.steps) for method in TIMED}
        for seed in range(self.options.seeds):  # side by side, so that both are timed under the same load
            for method, rate in rates.items():
                self._cell(method, rate, seed, self.steps)
        same_time = self.cells.get(name, "steps of the same time", self.steps_of_same_time)["steps"]
        rate = self.chosen_rate("peft_same_time", same_time)
        for seed in range(self.options.seeds):
            self._cell("peft_same_time", rate, seed, same_time)
            self._cell("peft_default", TRAINER_RATE, seed, self.steps)

    def frozen(self) -> dict[str, Any]:
        """Ask the bare model by every hand-written template on dev, and by the best one on test."""
        asked = []
        for template, words in self.task.hand_written:
            task = self._task(Template.parse(template), ClassificationConfig(verbalizer=dict(words)))
            dev = task.evaluate(self.backbone, self.records["dev"], batch_size=32)["accuracy"]
            asked.append((dev, template, dict(words), task))
        dev, template, words, task = max(asked, key=lambda entry: entry[0])
        test = task.evaluate(self.backbone, self.records["test"], batch_size=32)["accuracy"]
        return {"test": test, "dev": dev, "template": template, "words": words, "asked": len(asked)}

    def chosen_rate(self, method: str, steps: int) -> float:
        """Return the method's learning rate that is best on dev with seed 0."""

        def search(rate: float) -> float:
            def compute() -> dict[str, Any]:
                outcome = self.tuned[method, rate] = self._tune(method, rate, 0, steps)
                return {"dev": outcome.dev, "best_step": outcome.best_step}

            return self.cells.get(self.task.name, f"{method}/rate {rate:g}", compute)["dev"]

        return max(RATES, key=search)

    def steps_of_same_time(self) -> dict[str, Any]:
        """Return how many steps PEFT takes in the time of ptune's, as measured by this benchmark."""
        cells = self.cells.cells(self.task.name)
        ours, theirs = (_mean_of(cells, method, "seconds_per_step") for method in TIMED)
        return {"steps": max(1, round(self.steps * ours / theirs))}

    def _cell(self, method: str, rate: float, seed: int, steps: int) -> None:
        def compute() -> dict[str, Any]:
            known = self.tuned.get((method, rate)) if seed == 0 else None
            outcome = known or self._tune(method, rate, seed, steps)
            return {
                "test": outcome.test(),
                "dev": outcome.dev,
                "learning_rate": rate,
                "steps": steps,
                "best_step": outcome.best_step,
                "seconds_per_step": outcome.seconds_per_step,
            }

        self.cells.get(self.task.name, f"{method}/seed {seed}", compute)

    def _tune(self, method: str, rate: float, seed: int, steps: int) -> Outcome:
        settings = TrainingConfig(
            max_steps=steps,
            batch_size=self.task.batch_size,
            learning_rate=rate,
            evaluations=max(1, min(self.options.evaluations, steps // 2)),
            samples=0,
            seed=seed,
        )
        if method == "peft_default":
            settings = settings.model_copy(update={"warmup_ratio": 0.0})
        return self._tune_ptune(settings) if method == "ptune" else self._tune_peft(settings)

    def _tune_ptune(self, settings: TrainingConfig) -> Outcome:
        timer = StepTimer()
        with tempfile.TemporaryDirectory() as folder:
            config = RunConfig.model_validate(
                {
                    "model": self.options.model,
                    "task": self.config,
                    "prompt": {"template": self.task.template, "max_length": self.task.max_length},
                    "training": settings,
                    "output": Path(folder) / "prompt",
                }
            )
            records = self._drawn(settings.seed)
            prompt = train(config, backbone=self.backbone, records=records, reporter=timer)
        after = prompt.summary["after"]
        best_step = prompt.summary["best_step"]
        return Outcome(after["accuracy"], best_step, timer.seconds_per_step, lambda: self._test(prompt))

    def _tune_peft(self, settings: TrainingConfig) -> Outcome:
        peer = PeftPeer(self.backbone, virtual_tokens=self.template.num_virtual_tokens, seed=settings.seed)
        run = train_peer(peer, self.bare, *self._drawn(settings.seed), settings)
        test = self.records["test"]
        return Outcome(run.dev, run.best_step, run.seconds_per_step, lambda: accuracy(peer, self.bare, test, 32))

    def _drawn(self, seed: int) -> tuple[list[Record], list[Record]]:
        """Return the records to learn from and those of dev: all of them, or a few of each label drawn by the seed."""
        train, dev = self.records["train"], self.records["dev"]
        shots = self.options.shots
        return (train, dev) if shots is None else tuple(draw_shots(part, "label", shots, seed) for part in (train, dev))

    def _test(self, prompt: SoftPrompt) -> float:
        with Engine(self.backbone) as engine:
            engine.add("prompt", prompt)
            return engine.evaluate("prompt", self.records["test"], batch_size=32)["accuracy"]

    def _task(self, template: Template, config: ClassificationConfig) -> Any:
        return task_for(self.backbone, config, template, max_length=self.task.max_length)

    def _settings(self) -> dict[str, Any]:
        """Return what two runs must share for their cells to stand in one table."""
        return {
            "model": self.backbone.identity(),
            "template": self.task.template,
            "words": dict(self.task.verbalizer),
            "hand_written": [[template, dict(words)] for template, words in self.task.hand_written],
            "max_length": self.task.max_length,
            "batch_size": self.task.batch_size,
            "steps": self.steps,
            "evaluations": self.options.evaluations,
            "shots": self.options.shots,
            "records": {split: len(records) for split, records in self.records.items()},
            "rates": list(RATES),
        }


def summary(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one entry a task: accuracy on test by row as mean and deviation over seeds, and seconds per step."""
    entries = []
    for name, stored in content["tasks"].items():
        cells = stored["cells"]
        entry: dict[str, Any] = {"task": name, "rows": {}, "seconds_per_step": {}}
        for method in ROWS:
            seeds = _of_seeds(cells, method)
            values = [cell["test"] for cell in seeds] or [cells[method]["test"] for _ in [0] if method in cells]
            if not values:
                continue
            row: dict[str, Any] = {"mean": statistics.fmean(values), "seeds": len(seeds)}
            if len(values) > 1:
                row["deviation"] = statistics.stdev(values)
            if seeds:
                row |= {"steps": seeds[0]["steps"], "learning_rate": seeds[0]["learning_rate"]}
                if method in TIMED:
                    entry["seconds_per_step"][method] = _mean_of(cells, method, "seconds_per_step")
            entry["rows"][method] = row
        entries.append(entry)
    return entries


def markdown(entries: list[dict[str, Any]]) -> str:
    """Return the table: accuracy on test in percent, mean ± standard deviation over seeds."""
    head = ["task", *ROWS.values(), "s/step ptune", "s/step PEFT"]
    lines = [head, ["---"] * len(head)]
    for entry in entries:
        accuracies = [_percent(entry["rows"].get(method)) for method in ROWS]
        seconds = [entry["seconds_per_step"].get(method) for method in TIMED]
        lines.append([entry["task"], *accuracies, *("-" if value is None else f"{value:.3f}" for value in seconds)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _percent(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    deviation = f" ± {100 * row['deviation']:.1f}" if "deviation" in row else ""
    return f"{100 * row['mean']:.1f}{deviation}"


def _of_seeds(cells: Mapping[str, dict[str, Any]], method: str) -> list[dict[str, Any]]:
    return [cell for name, cell in cells.items() if name.startswith(f"{method}/seed ")]


def _mean_of(cells: Mapping[str, dict[str, Any]], method: str, value: str) -> float:
    return statistics.fmean(cell[value] for cell in _of_seeds(cells, method))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [task.name for task in TASKS]
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with one folder per task")
    parser.add_argument("--model", default="mini", help="mini, a folder or a Hub name")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/quality.json, or few_shot.json")
    parser.add_argument("--shots", type=int, help="few-shot: so many train and dev records a label, drawn by the seed")
    parser.add_argument("--tasks", nargs="+", choices=names, default=names)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each tuned row")
    parser.add_argument("--steps", type=int, help="optimizer steps of every task, at least 4; each has its own default")
    parser.add_argument("--evaluations", type=int, default=4, help="how often a run scores dev")
    for split in ("train", "dev", "test"):
        parser.add_argument(f"--{split}-limit", type=int, help=f"most records of {split}; each task has its default")
    parser.add_argument("--threads", type=int, help="of torch on the processor")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON instead of the table")
    parser.add_argument("--markdown", action="store_true", help="compute nothing, print what is stored")
    options = parser.parse_args(arguments)
    if options.output is None:
        options.output = Path("benchmarks/results") / ("quality.json" if options.shots is None else "few_shot.json")
    if options.steps is not None and options.steps < 4:
        parser.error("--steps is at least 4: a rate of seconds per step needs that many")
    if options.seeds < 1:
        parser.error("--seeds is at least 1")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark, or print what is stored; return the exit status."""
    options = _options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        cells = Cells(options.output)
        if not options.markdown:
            _run(options, cells)
    except PtuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    entries = summary(cells.content)
    print(json.dumps(entries, indent=2) if options.json else markdown(entries))
    return 0


def _run(options: argparse.Namespace, cells: Cells) -> None:
    backbone = Backbone.load(ModelConfig(name=options.model, dtype="float32"))
    cells.content["environment"] = {
        "model": options.model,
        "device": str(backbone.device),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
    for task in TASKS:
        if task.name in options.tasks:
            TaskBenchmark(task, backbone, cells, options).run()
    print(f"{cells.computed} cells computed, stored in {options.output}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
