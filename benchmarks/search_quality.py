"""What a search buys: the best of eight candidates with halving, and the best of default runs in the same seconds.

    python benchmarks/search_quality.py --data DIR          run what is missing, then print the table
    python benchmarks/search_quality.py --markdown          print the table of what is stored

A search over learning rates and numbers of virtual tokens takes some seconds of the processor. In as many seconds runs
with the default settings are made, each under a seed of its own: as many as come closest to them, and at least one.
The best of either by accuracy on dev answers test, and so does the first of the default runs, which is what somebody
has who runs once. Seconds are those that the process spent, so that other work on the machine does not count, and
loading is in neither. Each cell is stored as soon as it is finished.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from cells import Cells, parser_of, tell
from defaults import NAMES, task_of
from tables import markdown_table, of_seeds, percent
from trials import Trial, TrialTask, accuracy_on, add_limits, tune

from ptune.config.candidates import SearchConfig
from ptune.config.run import ModelConfig
from ptune.models.backbone import Backbone
from ptune.training.search import search

VARY: dict[str, tuple[Any, ...]] = {
    "training.learning_rate": (0.002, 0.005, 0.01, 0.02),
    "prompt.length": (5, 10),
}
EVALUATIONS = 4  # a halving waits for the next: after a quarter of the steps, and after half of them
OUTPUT = Path("benchmarks/results/search_quality.json")


def searched(task: TrialTask, trial: Trial, backbone: Backbone) -> dict[str, Any]:
    """Search, and return what dev and test say of the best, what it is, and the processor's seconds."""
    with tempfile.TemporaryDirectory() as folder:
        config = task.run(trial, Path(folder) / "prompt")
        begun = time.process_time()
        prompt = search(config, SearchConfig(vary=VARY), backbone=backbone, records=task.train_and_dev)
        seconds = time.process_time() - begun
    return {
        "test": accuracy_on(task, "test", [prompt], backbone),
        "dev": prompt.summary["after"][prompt.summary["metric"]],
        "virtual_tokens": len(prompt.rows),
        "learning_rate": prompt.summary["training"]["learning_rate"],
        "seconds": round(seconds, 1),
    }


def repeated(task: TrialTask, trial: Trial, backbone: Backbone, seconds: float) -> dict[str, Any]:
    """Run with the default settings for about so many seconds, and return what dev and test say of the best.

    Seeds are that of the trial, and then some that no other trial has. ``first`` is what test says of the first run.
    """
    spent, runs = 0.0, []
    while not runs or spent + spent / len(runs) / 2 <= seconds:
        seed = trial.seed + 100 * len(runs)
        begun = time.process_time()
        runs.append(tune(task, Trial(trial.steps, seed=seed, evaluations=EVALUATIONS), backbone)[0])
        spent += time.process_time() - begun
    best = max(runs, key=lambda run: run.dev)
    return {
        "test": best.test(),
        "dev": best.dev,
        "first": runs[0].test(),
        "runs": len(runs),
        "seconds": round(spent, 1),
    }


def run_all(backbone: Backbone, cells: Cells, options: argparse.Namespace) -> None:
    """Compute what is missing: all tasks under one seed before the next seed."""
    limits = {"train": options.train_limit, "dev": options.dev_limit, "test": options.test_limit}
    tasks = [task_of(name, options.data, limits, options.max_length) for name in options.tasks]
    for task in tasks:
        cells.begin(task.name, task.settings() | {"model": backbone.identity(), "steps": options.steps, "vary": VARY})
    for seed in range(options.seeds):
        trial = Trial(options.steps, seed=seed, evaluations=EVALUATIONS)
        for task in tasks:
            found = cells.get(task.name, f"search/seed {seed}", partial(searched, task, trial, backbone))
            cells.get(
                task.name, f"default/seed {seed}", partial(repeated, task, trial, backbone, float(found["seconds"]))
            )


def markdown(content: Mapping[str, Any]) -> str:
    """Return the table: accuracy on test in percent, mean ± deviation over repeats, and the median seconds."""
    lines = [["task", "one default run", "best of default runs", "search", "default runs", "s", "search, s"]]
    for name, entry in content["tasks"].items():
        cells = entry["cells"]
        values = [
            of_seeds(cells, "default", "first"),
            of_seeds(cells, "default"),
            of_seeds(cells, "search"),
        ]
        counts = [
            of_seeds(cells, "default", "runs"),
            of_seeds(cells, "default", "seconds"),
            of_seeds(cells, "search", "seconds"),
        ]
        if all(values):
            lines.append([name, *map(percent, values), *(f"{statistics.median(count):.0f}" for count in counts)])
    return markdown_table(lines)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, OUTPUT)
    parser.add_argument("--model", default="mini", help="mini, a folder or a Hub name")
    parser.add_argument("--tasks", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3, help="repeats, each under seeds of its own")
    add_limits(parser, train=500, dev=200, test=500)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark, or print what is stored; return the exit status."""
    options = _options(arguments)

    def compute(cells: Cells) -> None:
        run_all(Backbone.load(ModelConfig(name=options.model, dtype="float32")), cells, options)

    return tell(options.output, None if options.markdown else compute, markdown)


if __name__ == "__main__":
    sys.exit(main())
