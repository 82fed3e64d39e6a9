"""What a frozen model of fewer bits costs in accuracy, trained on it, or trained in float32 and only served on it.

    python benchmarks/precision.py --data DIR          run what is missing, then print the tables
    python benchmarks/precision.py --markdown          print the tables of what is stored

Each precision is trained and evaluated under the same seeds, records, steps and rate as `defaults.py` has them. The
prompt that float32 gives is then evaluated under the other precisions too, and its answers there are compared with
those in float32. With int8 and int4 the hidden states stay float32, so that the rounding of the weights alone differs.
Each cell is stored as soon as it is finished.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cells import Cells, parser_of, tell
from defaults import NAMES, RATE, task_of
from tables import markdown_table, of_seeds, percent
from trials import Trial, TrialTask, add_limits, answers_on, right_answers, share_of_same, tune

from ptune.config.run import ModelConfig
from ptune.models.backbone import Backbone

PRECISIONS: dict[str, dict[str, str]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "float32", "quantization": "int8"},
    "int4": {"dtype": "float32", "quantization": "int4"},
}
"""Name -> settings of the model; the first is the one that others are held against."""

FULL, *FEWER = PRECISIONS
OUTPUT = Path("benchmarks/results/precision.json")
Backbones = Mapping[str, Backbone]


def measured(task: TrialTask, trial: Trial, trained_in: str, backbones: Backbones) -> dict[str, Any]:
    """Train in one precision, and return dev of the best checkpoint, test, and of float32 what the others make of it.

    ``test in int8`` is the accuracy of the float32 prompt on that backbone, ``same in int8`` the share of answers that
    are those of float32.
    """
    tuned, prompt = tune(task, trial, backbones[trained_in])
    right = right_answers(task, "test", backbones[trained_in])
    own = answers_on(task, "test", [prompt], backbones[trained_in])
    result: dict[str, Any] = {"test": share_of_same(own, right), "dev": tuned.dev, "best_step": tuned.best_step}
    for precision in FEWER if trained_in == FULL else ():
        answers = answers_on(task, "test", [prompt], backbones[precision])
        result[f"test in {precision}"] = share_of_same(answers, right)
        result[f"same in {precision}"] = share_of_same(answers, own)
    return result


def run(backbones: Backbones, cells: Cells, options: argparse.Namespace) -> None:
    """Compute what is missing: all tasks under one seed before the next seed."""
    limits = {"train": options.train_limit, "dev": options.dev_limit, "test": options.test_limit}
    tasks = [task_of(name, options.data, limits, options.max_length) for name in options.tasks]
    common = {"model": backbones[FULL].identity(), "steps": options.steps, "rate": RATE}
    for task in tasks:
        cells.begin(task.name, task.settings() | common)
    for seed in range(options.seeds):
        for task in tasks:
            for precision in PRECISIONS:
                compute = partial(measured, task, Trial(options.steps, seed=seed), precision, backbones)
                cells.get(task.name, f"{precision}/seed {seed}", compute)


def markdown(content: Mapping[str, Any]) -> str:
    """Return two tables in percent: trained in each precision, and trained in float32 and served in each.

    Their last column is the mean over tasks and seeds of what is gained in points, each run against float32's of the
    same task and seed.
    """
    tasks = {name: entry["cells"] for name, entry in content["tasks"].items()}
    full = [of_seeds(cells, FULL) for cells in tasks.values()]
    own = [["trained and served in", *tasks, "gain"], [FULL, *map(percent, full), ""]]
    heads = [name for task in tasks for name in (task, "same answers")]
    served = [["trained in float32, served in", *heads, "gain"]]
    for precision in FEWER:
        trained = [of_seeds(cells, precision) for cells in tasks.values()]
        own.append([precision, *map(percent, trained), _gain(trained, full)])
        there = [of_seeds(cells, FULL, f"test in {precision}") for cells in tasks.values()]
        same = [of_seeds(cells, FULL, f"same in {precision}") for cells in tasks.values()]
        pairs = [percent(values) for pair in zip(there, same, strict=True) for values in pair]
        served.append([precision, *pairs, _gain(there, full)])
    return f"{markdown_table(own)}\n\n{markdown_table(served)}"


def _gain(some: Sequence[Sequence[float]], full: Sequence[Sequence[float]]) -> str:
    """Return mean and deviation of the differences in points, run by run."""
    gains = [
        100 * (one - other)
        for runs, others in zip(some, full, strict=True)
        for one, other in zip(runs, others, strict=False)
    ]
    return f"{statistics.fmean(gains):+.1f} ± {statistics.stdev(gains):.1f}" if len(gains) > 1 else ""


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, OUTPUT)
    parser.add_argument("--model", default="mini", help="mini, a folder or a Hub name")
    parser.add_argument("--tasks", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    add_limits(parser, train=500, dev=200, test=500)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark, or print what is stored; return the exit status."""
    options = _options(arguments)

    def compute(cells: Cells) -> None:
        backbones = {
            name: Backbone.load(ModelConfig(name=options.model, **settings)) for name, settings in PRECISIONS.items()
        }
        run(backbones, cells, options)

    return tell(options.output, None if options.markdown else compute, markdown)


if __name__ == "__main__":
    sys.exit(main())
