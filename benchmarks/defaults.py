"""What was tried for the defaults, and what each gave: runs that differ from the defaults in one thing.

    python benchmarks/defaults.py --data DIR                        run what is missing, then print the tables
    python benchmarks/defaults.py --data DIR --questions start      one of them
    python benchmarks/defaults.py --markdown                        print the tables of what is stored

All lines of a question, under all seeds, are the candidates of one `ptune.search` without halving, each of which ends
as its run alone would. Accuracy is that of the best checkpoint on dev: defaults are chosen here, so test is not read.
A question's cells are stored as soon as it is finished. The runs as they are stand under the name `default`, once for
all questions.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import leads
from cells import Cells, parser_of, tell
from quality_tasks import TASKS
from tables import markdown_table, of_seeds, percent
from trials import Trial, TrialTask, accuracy_on, add_limits, tune

from ptune.config.candidates import SearchConfig
from ptune.config.run import ModelConfig
from ptune.config.task import ClassificationConfig
from ptune.models.backbone import Backbone
from ptune.training.search import search

NAMES = ("sst2", "trec", "shopping_zh")
RATE = Trial(1).rate
OUTPUT = Path("benchmarks/results/defaults.json")
TEXTS = {
    "sst2": "Is the film great or terrible? The film was",
    "trec": "What is the question about? It is about a",
    "shopping_zh": "这个东西好不好？总之，很",
}
DEEP_TEMPLATE = "[P*10]{text} It was{answer}"
DEEP_RATES = (5e-3, 1e-2, 2e-2, 5e-2, 1e-1)


@dataclass(frozen=True)
class Question:
    """One thing in which runs differ.

    Attributes:
        title: of its table.
        setting: what varies.
        lines: name -> the setting's value; the default is not among them.
    """

    title: str
    setting: str
    lines: Mapping[str, Any] = field(default_factory=dict)


def questions(task: str) -> dict[str, Question]:
    """Return what is asked of a task by search: every question but deep prompts, leads and voting."""
    return {
        "rate": Question(
            f"The learning rate (default: {RATE:g})",
            "training.learning_rate",
            {f"{rate:g}": rate for rate in (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2) if rate != RATE},
        ),
        "start": Question(
            "What virtual tokens start from (default: sampled rows of the vocabulary)",
            "prompt.start",
            {
                "label words": {"method": "labels"},
                "noise of their scale": {"method": "normal"},
                "a question in words": {"method": "text", "text": TEXTS[task]},
            },
        ),
        "encoder": Question(
            "The prompt encoder (default: an mlp around which the rows go, residual)",
            "prompt.encoder",
            {
                "embedding": {"type": "embedding"},
                "mlp, no residual": {"type": "mlp", "residual": False},
                "mlp, one hidden layer": {"type": "mlp", "num_layers": 1},
                "mlp, dropout 0.1": {"type": "mlp", "dropout": 0.1},
                "lstm, residual": {"type": "lstm"},
                "lstm, no residual": {"type": "lstm", "residual": False},
            },
        ),
        "schedule": Question(
            "How the rate falls (default: linearly)",
            "training.schedule",
            {"cosine": "cosine", "constant": "constant"},
        ),
        "tokens": Question(
            "How many virtual tokens (default here: 10)",
            "prompt.length",
            {str(count): count for count in (1, 3, 5, 20, 40)},
        ),
        "place": Question(
            "Where virtual tokens stand (default here: ten behind the text)",
            "prompt.template",
            {"in front": "[P*10]{text}{answer}", "five in front, five behind": "[P*5]{text}[P*5]{answer}"},
        ),
    }


ALONE = {
    "lead": "Encoders that papers propose, in place of ptune's mlp",
    "deep": "Deep prompts in front, by their learning rate (default: ten plain tokens behind the text)",
    "voting": "One prompt a seed, or all of them with their probabilities averaged",
}
QUESTIONS = (*questions(NAMES[0]), *ALONE)


def task_of(name: str, data: Path, limits: Mapping[str, int], max_length: int) -> TrialTask:
    """Return a task with ten virtual tokens behind the text."""
    if name == "trec":
        return TrialTask.of_example("trec", data, limits, max_length)
    (known,) = (task for task in TASKS if task.name == name)
    records = {part: known.records(data, part, limit) for part, limit in limits.items()}
    config = ClassificationConfig(verbalizer=dict(known.verbalizer))
    return TrialTask(name, config, "{text}[P*10]{answer}", max_length, records, batch_size=16)


class Asker:
    """Asks questions of one task."""

    def __init__(self, name: str, backbone: Backbone, cells: Cells, options: argparse.Namespace) -> None:
        limits = {"train": options.train_limit, "dev": options.dev_limit, "test": 1}
        self.task = task_of(name, options.data, limits, options.max_length)
        self.name, self.backbone, self.cells = name, backbone, cells
        self.base, self.seeds = Trial(options.steps), options.seeds
        cells.begin(name, self.task.settings() | {"model": backbone.identity(), "steps": options.steps, "rate": RATE})

    def ask(self, question: str) -> None:
        """Compute what is missing of a question."""
        if question == "deep":
            self._deep()
        elif question == "lead":
            for lead in leads.NAMES:
                self._search(Question("", "prompt.template", {f"lead: {lead}": self.task.template}), lead)
        elif question == "voting":
            self.cells.get(self.name, f"voting of {self.seeds}", self._voting)
        else:
            asked = questions(self.name)[question]
            lines = {_stored(question, line): value for line, value in asked.lines.items()}
            self._search(Question(asked.title, asked.setting, {"default": self._default(asked.setting)} | lines))

    def _search(self, question: Question, lead: str | None = None) -> None:
        """Train the lines that have no result yet, under all seeds together."""
        stored = self.cells.cells(self.name)
        missing = {line: value for line, value in question.lines.items() if f"{line}/seed 0" not in stored}
        if not missing:
            return
        vary = {question.setting: tuple(missing.values()), "training.seed": tuple(range(self.seeds))}
        settings = SearchConfig(vary=vary, halvings=0, limit=len(missing) * self.seeds)
        context = leads.in_place_of_the_encoder(leads.built_by(lead, self.backbone)) if lead else nullcontext()
        with context, tempfile.TemporaryDirectory() as folder:
            config = self.task.run(self.base, Path(folder) / "prompt")
            search(config, settings, backbone=self.backbone, records=self.task.train_and_dev)
            table = json.loads((config.output / "run" / "search.json").read_text(encoding="utf-8"))
        line_of = {json.dumps(value, sort_keys=True): line for line, value in missing.items()}
        for row in table["candidates"]:
            line = line_of[json.dumps(row["settings"][question.setting], sort_keys=True)]
            result = {"dev": row["best"], "best_step": row["best_step"], "wall_seconds": row["seconds"]}
            self.cells.put(self.name, f"{line}/seed {row['settings']['training.seed']}", result)

    def _default(self, setting: str) -> Any:
        if setting == "prompt.length":
            return 10
        values: Any = self.task.run(self.base, Path("unused")).model_dump(mode="json", exclude_defaults=False)
        for name in setting.split("."):
            values = values[name]
        return values

    def _deep(self) -> None:
        def run(trial: Trial) -> dict[str, Any]:
            tuned, _ = tune(self.task, trial, self.backbone)
            return {"dev": tuned.dev, "best_step": tuned.best_step}

        for rate in DEEP_RATES:
            trial = Trial(self.base.steps, rate, prompt={"deep": True}, template=DEEP_TEMPLATE)
            self.cells.get(self.name, f"{_stored('deep', f'{rate:g}')}/seed 0", partial(run, trial))

    def _voting(self) -> dict[str, Any]:
        prompts = [tune(self.task, Trial(self.base.steps, seed=seed), self.backbone)[1] for seed in range(self.seeds)]
        return {"dev": accuracy_on(self.task, "dev", prompts, self.backbone)}


def _stored(question: str, line: str) -> str:
    return f"{question}: {line}"


def markdown(content: Mapping[str, Any]) -> str:
    """Return a table for each question that has results: accuracy on dev in percent, mean ± deviation over seeds."""
    stored = {name: entry["cells"] for name, entry in content["tasks"].items()}
    pieces = []
    for name, question in questions(NAMES[0]).items():
        pieces += _table(question.title, [_stored(name, line) for line in question.lines], stored)
    pieces += _table(ALONE["lead"], [_stored("lead", line) for line in leads.NAMES], stored)
    pieces += _table(ALONE["deep"], [_stored("deep", f"{rate:g}") for rate in DEEP_RATES], stored)
    votes = dict.fromkeys(name for cells in stored.values() for name in cells if name.startswith("voting of "))
    return "\n\n".join([*pieces, *_table(ALONE["voting"], list(votes), stored)])


def _table(title: str, lines: Sequence[str], stored: Mapping[str, Mapping[str, dict[str, Any]]]) -> list[str]:
    """Return a titled table of the lines that have results, for the tasks that have one of them."""
    found = {line: {name: _accuracies(cells, line) for name, cells in stored.items()} for line in ("default", *lines)}
    asked = [name for name in NAMES if any(found[line].get(name) for line in lines)]
    if not asked:
        return []
    rows = [
        [line.split(": ", 1)[-1], *(percent(found[line][name]) for name in asked)]
        for line in found
        if any(found[line][name] for name in asked)
    ]
    return [f"**{title}**\n\n{markdown_table([['', *asked], *rows])}"]


def _accuracies(cells: Mapping[str, dict[str, Any]], line: str) -> list[float]:
    return [cells[line]["dev"]] if line in cells else of_seeds(cells, line, "dev")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, OUTPUT)
    parser.add_argument("--model", default="mini", help="mini, a folder or a Hub name")
    parser.add_argument("--questions", nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    parser.add_argument("--tasks", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each line, at least 2; of deep prompts one")
    add_limits(parser, train=500, dev=200)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark, or print what is stored; return the exit status."""
    options = _options(arguments)

    def compute(cells: Cells) -> None:
        backbone = Backbone.load(ModelConfig(name=options.model, dtype="float32"))
        for question in options.questions:
            for name in options.tasks:
                Asker(name, backbone, cells, options).ask(question)

    return tell(options.output, None if options.markdown else compute, markdown)


if __name__ == "__main__":
    sys.exit(main())
