"""Virtual tokens in front of the text, behind it, or both: what each place costs and what it reaches.

    python benchmarks/place.py --data DIR            run what is missing, then print the table
    python benchmarks/place.py --markdown            print the table of what is stored

Text before the virtual tokens does not depend on them and is computed once (plan "frozen context"), so a prompt behind
the text trains faster; whether it also answers better differs from task to task. Steps, records and rate are the same
for all places. Seconds are those that the process spent on its thread, so that other work on the machine does not
count, evaluations on dev included. Each cell is stored as soon as it is finished.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from cells import Cells, parser_of, tell
from quality_tasks import TASKS
from tables import markdown_table, of_seeds, percent
from trials import Trial, TrialTask, add_limits, sample, tune

from ptune.config.run import ModelConfig
from ptune.config.task import ClassificationConfig, GenerationConfig
from ptune.models.backbone import Backbone

OUTPUT = Path("benchmarks/results/place.json")
PLACES = ("in front", "behind", "both")
CLASSIFICATION = ("[P*10]{text}{answer}", "{text}[P*10]{answer}", "[P*5]{text}[P*5]{answer}")
INSTRUCTION = tuple(
    f"{front}{{instruction}}[?\n{{input}}]\n{behind}{{answer}}"
    for front, behind in (("[P*10]", ""), ("", "[P*10]"), ("[P*5]", "[P*5]"))
)
TEMPLATES = {"sst2": CLASSIFICATION, "clinc150": CLASSIFICATION, "alpaca_zh": INSTRUCTION}


def task_of(name: str, options: argparse.Namespace) -> TrialTask:
    """Return a task whose template is to be given by each trial."""
    limits = {"train": options.train_limit, "dev": options.dev_limit, "test": 1}
    if name == "alpaca_zh":
        config = GenerationConfig(answer_field="output", metric="loss")
        records = sample(options.data / name, limits)
        return TrialTask(name, config, TEMPLATES[name][0], 2 * options.max_length, records, batch_size=8)
    (known,) = (task for task in TASKS if task.name == name)
    records = {part: known.records(options.data, part, limit) for part, limit in limits.items()}
    config = ClassificationConfig(verbalizer=dict(known.verbalizer))
    return TrialTask(name, config, TEMPLATES[name][0], options.max_length, records, batch_size=16)


def measured(task: TrialTask, trial: Trial, backbone: Backbone) -> dict[str, Any]:
    """Train once; return what dev says of the best checkpoint, and the processor's seconds a step."""
    begun = time.process_time()
    tuned, _ = tune(task, trial, backbone)
    return {"dev": tuned.dev, "seconds_per_step": round((time.process_time() - begun) / trial.steps, 3)}


def run_task(name: str, backbone: Backbone, cells: Cells, options: argparse.Namespace) -> None:
    """Compute what is missing of a task."""
    task = task_of(name, options)
    cells.begin(name, task.settings() | {"model": backbone.identity(), "steps": options.steps})
    for seed in range(options.seeds):
        for place, template in zip(PLACES, TEMPLATES[name], strict=True):
            trial = Trial(options.steps, seed=seed, template=template)
            cells.get(name, f"{place}/seed {seed}", partial(measured, task, trial, backbone))


def markdown(content: Mapping[str, Any]) -> str:
    """Return the table: on dev accuracy in percent or loss, and seconds a step, a pair of columns for each place."""
    lines = [["task", *(f"{place}{what}" for place in PLACES for what in ("", ", s/step"))]]
    for name, entry in content["tasks"].items():
        columns = []
        for place in PLACES:
            values = of_seeds(entry["cells"], place, "dev")
            seconds = of_seeds(entry["cells"], place, "seconds_per_step")
            value = _loss(values) if name == "alpaca_zh" else percent(values)
            columns += [value, f"{statistics.median(seconds):.2f}" if seconds else ""]
        lines.append([f"{name} (loss)" if name == "alpaca_zh" else name, *columns])
    return markdown_table(lines)


def _loss(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}" if values else ""


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, OUTPUT)
    parser.add_argument("--model", default="mini", help="mini, a folder or a Hub name")
    parser.add_argument("--tasks", nargs="+", choices=TEMPLATES, default=list(TEMPLATES))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=2)
    add_limits(parser, "text tokens; twice that of instructions", train=500, dev=200)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark, or print what is stored; return the exit status."""
    options = _options(arguments)

    def compute(cells: Cells) -> None:
        backbone = Backbone.load(ModelConfig(name=options.model, dtype="float32"))
        for name in options.tasks:
            run_task(name, backbone, cells, options)

    return tell(options.output, None if options.markdown else compute, markdown)


if __name__ == "__main__":
    sys.exit(main())
