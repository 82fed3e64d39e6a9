"""When does a prompt that starts from another task's learn better (Vu et al. 2022, SPoT)?

    python benchmarks/spot.py --data DIR          run what is missing, then print the table
    python benchmarks/spot.py --markdown          print the table of what is stored

A prompt is trained on a source task, and then the target task is learnt from it and from scratch, with few steps and
with more, under the same seeds, records and rate. Each cell is stored as soon as it is finished.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from cells import Cells, parser_of, tell
from quality_tasks import TASKS
from tables import markdown_table, of_seeds, percent
from trials import Trial, TrialTask, add_limits, sample, tune

from ptune.config.run import ModelConfig
from ptune.config.task import ClassificationConfig
from ptune.models.backbone import Backbone

PAIRS = (("trec", "clinc150"), ("shopping_zh", "waimai_zh"), ("imdb", "sst2"))
"""Source and target; not mr and sst2, whose sentences come from one source."""

STEPS = (15, 60)
RATE = 5e-3  # ptune's default
OUTPUT = Path("benchmarks/results/spot.json")
WAYS = {"scratch": "from scratch", "prompt": "from the source's prompt"}


def task_of(name: str, data: Path, limits: Mapping[str, int], max_length: int) -> TrialTask:
    """Return a task with ten virtual tokens behind the text."""
    if name == "trec":
        return TrialTask.of_example("trec", data, limits, max_length)
    of_quality = {task.name: task for task in TASKS}
    like = of_quality["shopping_zh" if name == "waimai_zh" else name]
    records = (
        sample(data / name, limits)
        if name == "waimai_zh"
        else {part: like.records(data, part, limit) for part, limit in limits.items()}
    )
    config = ClassificationConfig(verbalizer=dict(like.verbalizer))
    return TrialTask(name, config, like.template, max_length, records, batch_size=16)


def run_pair(source: str, target: str, backbone: Backbone, cells: Cells, options: argparse.Namespace) -> None:
    """Compute what is missing of a pair."""
    limits = {"train": options.train_limit, "dev": options.dev_limit, "test": options.test_limit}
    tasks = [task_of(name, options.data, limits, options.max_length) for name in (source, target)]
    key = f"{source} -> {target}"
    settings = {"model": backbone.identity(), "rate": RATE, "source_steps": options.source_steps}
    cells.begin(key, settings | {"tasks": [task.settings() for task in tasks]})
    wanted = [f"{way}, {steps} steps/seed {seed}" for steps in STEPS for way in WAYS for seed in range(options.seeds)]
    if all(name in cells.cells(key) for name in wanted):
        return
    with tempfile.TemporaryDirectory() as folder:
        prompt = Path(folder) / "source"
        trained, _ = tune(tasks[0], Trial(options.source_steps, RATE), backbone, prompt)
        cells.get(key, "source", trained.cell)

        def learn(steps: int, way: str, seed: int) -> dict[str, Any]:
            start = {"start": {"method": "prompt", "prompt": str(prompt)}} if way == "prompt" else {}
            return tune(tasks[1], Trial(steps, RATE, seed, prompt=start), backbone)[0].cell()

        for steps in STEPS:
            for seed in range(options.seeds):
                for way in WAYS:
                    cells.get(key, f"{way}, {steps} steps/seed {seed}", partial(learn, steps, way, seed))


def markdown(content: Mapping[str, Any]) -> str:
    """Return the table: accuracy on test in percent, mean ± deviation over seeds, and the gain in points."""
    head = ["source -> target", "steps", "seeds", *WAYS.values(), "gain"]
    lines = [head]
    for pair, stored in content["tasks"].items():
        for steps in STEPS:
            values = [of_seeds(stored["cells"], f"{way}, {steps} steps") for way in WAYS]
            if not all(values):
                continue
            gain = 100 * (sum(values[1]) / len(values[1]) - sum(values[0]) / len(values[0]))
            seeds = str(min(map(len, values)))
            lines.append([pair, str(steps), seeds, *map(percent, values), f"{gain:+.1f}"])
    return markdown_table(lines)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, OUTPUT)
    parser.add_argument("--model", default="mini", help="mini, a folder or a Hub name")
    parser.add_argument("--pairs", nargs="+", choices=[target for _, target in PAIRS], help="by their targets")
    parser.add_argument("--source-steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    add_limits(parser, train=500, dev=100, test=400)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark, or print what is stored; return the exit status."""
    options = _options(arguments)

    def compute(cells: Cells) -> None:
        backbone = Backbone.load(ModelConfig(name=options.model, dtype="float32"))
        for source, target in PAIRS:
            if options.pairs is None or target in options.pairs:
                run_pair(source, target, backbone, cells, options)

    return tell(options.output, None if options.markdown else compute, markdown)


if __name__ == "__main__":
    sys.exit(main())
