"""What was tried for the defaults, and what each gave: short runs that differ from the defaults in one thing.

    python benchmarks/defaults.py --data DIR                        run what is missing, then print the tables
    python benchmarks/defaults.py --data DIR --questions start      one of them
    python benchmarks/defaults.py --markdown                        print the tables of what is stored

Accuracy is that of the best checkpoint on dev: defaults are chosen here, so test is not read. Each cell is stored as
soon as it is finished. The runs as they are stand under the name `default`, once for all questions.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cells import Cells, tell
from quality_tasks import TASKS
from tables import markdown_table, of_seeds, percent
from trials import Trial, TrialTask, accuracy_on, tune

from ptune.backbone import Backbone
from ptune.config import ModelConfig
from ptune.task_config import ClassificationConfig

NAMES = ("sst2", "trec", "shopping_zh")
RATE = 5e-3  # ptune's default
OUTPUT = Path("benchmarks/results/defaults.json")
TEXTS = {
    "sst2": "Is the film great or terrible? The film was",
    "trec": "What is the question about? It is about a",
    "shopping_zh": "这个东西好不好？总之，很",
}
DEEP_TEMPLATE = "[P*10]{text} It was{answer}"


def variants(question: str, task: str, base: Trial) -> dict[str, Trial]:
    """Return what is compared under a question, by the names of its lines."""
    default = {"default": base}
    if question == "start":
        starts = {method: {"method": method} for method in ("labels", "normal")}
        starts["text"] = {"method": "text", "text": TEXTS[task]}
        return default | {name: replace(base, prompt={"start": start}) for name, start in starts.items()}
    if question == "encoder":
        encoders = {
            "embedding": {"type": "embedding"},
            "mlp, no residual": {"type": "mlp", "residual": False},
            "lstm, residual": {"type": "lstm"},
        }
        return default | {name: replace(base, prompt={"encoder": encoder}) for name, encoder in encoders.items()}
    if question == "rate":
        return default | {f"{rate:g}": replace(base, rate=rate) for rate in (1e-3, 2e-3, 1e-2, 2e-2)}
    if question == "tokens":
        return default | {
            f"{count}": replace(base, template=f"{{text}}[P*{count}]{{answer}}") for count in (2, 5, 20, 40)
        }
    if question == "place":
        places = {"in front": "[P*10]{text}{answer}", "both": "[P*5]{text}[P*5]{answer}"}
        return default | {name: replace(base, template=template) for name, template in places.items()}
    if question == "deep":
        deep = replace(base, template=DEEP_TEMPLATE, prompt={"deep": True})
        return default | {
            f"deep, {rate:g}": replace(deep, rate=rate) for rate in (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
        }
    return default


QUESTIONS = {
    "deep": "Deep prompts, by their learning rate (default: ten plain tokens behind the text)",
    "start": "What virtual tokens start from (default: sampled rows of the vocabulary)",
    "encoder": "The prompt encoder (default: an mlp around which the rows go, residual)",
    "rate": "The learning rate (default: 0.005)",
    "place": "Where virtual tokens stand (default: ten behind the text)",
    "tokens": "How many virtual tokens (default: 10)",
    "voting": "One prompt a seed, or all of them with their probabilities averaged",
}


def task_of(name: str, data: Path, limits: Mapping[str, int], max_length: int) -> TrialTask:
    """Return a task with ten virtual tokens behind the text."""
    if name == "trec":
        return TrialTask.of_example("trec", data, limits, max_length)
    (known,) = (task for task in TASKS if task.name == name)
    records = {part: known.records(data, part, limit) for part, limit in limits.items()}
    config = ClassificationConfig(verbalizer=dict(known.verbalizer))
    return TrialTask(name, config, "{text}[P*10]{answer}", max_length, records, batch_size=16)


def run_question(question: str, name: str, backbone: Backbone, cells: Cells, options: argparse.Namespace) -> None:
    """Compute what is missing of a question on a task."""
    limits = {"train": options.train_limit, "dev": options.dev_limit, "test": 1}
    task = task_of(name, options.data, limits, options.max_length)
    base = Trial(options.steps, RATE)
    cells.begin(name, task.settings() | {"model": backbone.identity(), "steps": base.steps, "rate": base.rate})
    if question == "voting":
        cells.get(name, f"voting of {options.seeds}", partial(voting, task, base, backbone, options.seeds))

    def run(trial: Trial) -> dict[str, Any]:
        tuned, _ = tune(task, trial, backbone)
        return {"dev": tuned.dev, "best_step": tuned.best_step}

    for line, trial in variants(question, name, base).items():
        for seed in range(options.seeds):
            cells.get(name, f"{_stored(question, line)}/seed {seed}", partial(run, replace(trial, seed=seed)))


def voting(task: TrialTask, base: Trial, backbone: Backbone, count: int) -> dict[str, Any]:
    """Return the accuracy on dev of the default's prompts under ``count`` seeds, their probabilities averaged."""
    prompts = [tune(task, replace(base, seed=seed), backbone)[1] for seed in range(count)]
    return {"dev": accuracy_on(task, "dev", prompts, backbone)}


def _stored(question: str, line: str) -> str:
    return line if line == "default" else f"{question}: {line}"


def markdown(content: Mapping[str, Any]) -> str:
    """Return a table for each question that has results: accuracy on dev in percent, mean ± deviation over seeds."""
    stored = {name: entry["cells"] for name, entry in content["tasks"].items()}
    pieces = []
    for question, title in QUESTIONS.items():
        table = {
            line: [of_seeds(stored.get(name, {}), _stored(question, line), "dev") for name in NAMES]
            for line in variants(question, NAMES[0], Trial(1, RATE))
        }
        if question == "voting":
            table |= _votes(stored)
        asked = [any(values[at] for line, values in table.items() if line != "default") for at in range(len(NAMES))]
        lines = [
            [line, *(percent(value) for value, kept in zip(values, asked, strict=True) if kept)]
            for line, values in table.items()
            if any(values)
        ]
        if any(asked):
            head = ["", *(name for name, kept in zip(NAMES, asked, strict=True) if kept)]
            pieces.append(f"**{title}**\n\n{markdown_table([head, *lines])}")
    return "\n\n".join(pieces)


def _votes(stored: Mapping[str, Mapping[str, dict[str, Any]]]) -> dict[str, list[list[float]]]:
    found = dict.fromkeys(name for cells in stored.values() for name in cells if name.startswith("voting of "))
    return {
        f"{name.removeprefix('voting of ')} averaged": [
            [stored[task][name]["dev"]] if name in stored.get(task, {}) else [] for task in NAMES
        ]
        for name in found
    }


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with one folder per task")
    parser.add_argument("--model", default="mini", help="mini, a folder or a Hub name")
    parser.add_argument("--questions", nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    parser.add_argument("--tasks", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=64, help="text tokens of a record")
    parser.add_argument("--train-limit", type=int, default=500, help="most records of train")
    parser.add_argument("--dev-limit", type=int, default=200, help="most records of dev")
    parser.add_argument("--markdown", action="store_true", help="compute nothing, print what is stored")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark, or print what is stored; return the exit status."""
    options = _options(arguments)

    def compute(cells: Cells) -> None:
        backbone = Backbone.load(ModelConfig(name=options.model, dtype="float32"))
        for question in options.questions:
            for name in options.tasks:
                run_question(question, name, backbone, cells, options)

    return tell(options.output, None if options.markdown else compute, markdown)


if __name__ == "__main__":
    sys.exit(main())
