"""Every task on every backbone: the frozen model asked by words, ptune, and PEFT's P-tuning where it can.

    python benchmarks/tasks_table.py --data DIR --backbones mini mini-mlm=runs/mini-mlm/model
    python benchmarks/tasks_table.py --markdown              print the table of what is stored

Both sides take the same steps; learning rates are chosen on dev with seed 0, from one list for both, and test is read
for what was chosen. Each cell is stored as soon as it is finished: a stopped run goes on, and a table can be printed at
any time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from cells import Cells, parser_of, tell
from peft_peer import PeftPeer, accuracy, train_peer
from quality_tasks import TASKS as QUALITY_TASKS
from tables import markdown_table, of_seeds, percent
from trials import Trial, TrialTask, Tuned, add_limits, tune

from ptune.config.run import ModelConfig
from ptune.config.task import ClassificationConfig
from ptune.families import CAUSAL
from ptune.models.backbone import Backbone
from ptune.template import Template

RATES = (3e-3, 1e-2)
METHODS = {"frozen": "frozen", "ptune": "ptune", "peft": "PEFT"}
OUTPUT = Path("benchmarks/results/tasks_table.json")

EXAMPLES = {
    "trec": ("Question: {text} It asks for a{answer}",),
    "mr": ("{text} It was{answer}", "{text} The film is{answer}"),
    "semeval2010_task8": ("{tokens} {head} and {tail}:{answer}",),
    "shopping_categories": ("{text}。这是{answer}", "评论：{text}\n商品：{answer}"),
    "fewglue_cb": ("{premise} Question: {hypothesis}? Answer:{answer}",),
    "fewglue_rte": ("{premise} Question: {hypothesis}? Answer:{answer}",),
    "fewglue_copa": ("{premise} What is the {question}?{answer}",),
    "fewglue_wic": ("{sentence1} {sentence2} Does {word} mean the same? Answer:{answer}",),
    "fewglue_boolq": ("{passage} Question: {question}? Answer:{answer}",),
}
"""Example -> how a frozen model is asked beside the example's own words; the best on dev counts.

Without fewglue_wsc, whose training records are all of one label.
"""

FOLDERS = {"shopping_categories": "shopping_zh"}
OF_QUALITY = ("sst2", "shopping_zh", "clinc150")
NAMES = (*list(EXAMPLES)[:4], *OF_QUALITY, *list(EXAMPLES)[4:])


def task_of(name: str, data: Path, limits: Mapping[str, int], max_length: int) -> tuple[TrialTask, tuple[str, ...]]:
    """Return a task by its name in the table, and the templates by hand."""
    if name in EXAMPLES:
        task = TrialTask.of_example(name, data, limits, max_length, FOLDERS.get(name))
        return task, (task.template, *EXAMPLES[name])
    (known,) = (task for task in QUALITY_TASKS if task.name == name)
    records = {part: known.records(data, part, limit) for part, limit in limits.items()}
    config = ClassificationConfig(verbalizer=dict(known.verbalizer))
    task = TrialTask(name, config, known.template, max_length, records, batch_size=16)
    by_hand = dict.fromkeys(template for template, words in known.hand_written if words == known.verbalizer)
    return task, (task.template, *by_hand)


class TableRow:
    """One task on one backbone."""

    def __init__(self, name: str, where: str, backbone: Backbone, cells: Cells, options: argparse.Namespace) -> None:
        limits = {"train": options.train_limit, "dev": options.dev_limit, "test": options.test_limit}
        self.task, self.by_hand = task_of(name, options.data, limits, options.max_length)
        self.backbone, self.cells, self.options = backbone, cells, options
        self.key = f"{name} on {where}"
        self.tuned: dict[tuple[str, float], Tuned] = {}  # with seed 0

    def run(self) -> None:
        """Compute what is missing."""
        settings = self.task.settings() | {"by_hand": list(self.by_hand), "rates": list(RATES)}
        settings |= {"steps": self.options.steps, "model": self.backbone.identity()}
        self.cells.begin(self.key, settings)
        self.cells.get(self.key, "frozen/seed 0", self.frozen)
        methods = ["ptune", "peft"] if self.backbone.kind is CAUSAL else ["ptune"]
        for method in methods:
            by_dev = {rate: self.dev(method, rate) for rate in RATES}
            rate = max(RATES, key=by_dev.__getitem__)
            for seed in range(self.options.seeds):
                self.cells.get(self.key, f"{method}/seed {seed}", partial(self.cell, method, rate, seed))

    def frozen(self) -> dict[str, Any]:
        """Ask the bare model by every template on dev, and by the best one on test."""
        asked = [(self._asked(template, "dev"), template) for template in self.by_hand]
        dev, template = max(asked, key=lambda entry: entry[0])
        words = Template.parse(template).without_virtual_tokens().source
        return {"test": self._asked(template, "test"), "dev": dev, "template": words}

    def dev(self, method: str, rate: float) -> float:
        """Return what dev says of a rate with seed 0."""

        def compute() -> dict[str, Any]:
            tuned = self.tuned[method, rate] = self._tune(method, rate, 0)
            return {"dev": tuned.dev, "best_step": tuned.best_step}

        return self.cells.get(self.key, f"{method}/rate {rate:g}", compute)["dev"]

    def cell(self, method: str, rate: float, seed: int) -> dict[str, Any]:
        """Return a seed's results at a rate."""
        known = self.tuned.get((method, rate)) if seed == 0 else None
        return (known or self._tune(method, rate, seed)).cell() | {"learning_rate": rate}

    def _asked(self, template: str, part: str) -> float:
        return self.task.bare(self.backbone, template).evaluate(self.backbone, self.task.records[part])["accuracy"]

    def _tune(self, method: str, rate: float, seed: int) -> Tuned:
        trial = Trial(self.options.steps, rate, seed)
        if method == "ptune":
            return tune(self.task, trial, self.backbone)[0]
        task, bare = self.task, self.task.bare(self.backbone)
        peer = PeftPeer(self.backbone, virtual_tokens=Template.parse(task.template).num_virtual_tokens, seed=seed)
        run = train_peer(peer, bare, task.records["train"], task.records["dev"], trial.training(task.batch_size))
        return Tuned(run.dev, run.best_step, lambda: accuracy(peer, bare, task.records["test"], 32))


def markdown(content: Mapping[str, Any]) -> str:
    """Return the table, three columns a backbone: empty where nothing was run, a dash where PEFT cannot."""
    stored = {tuple(key.split(" on ")): entry["cells"] for key, entry in content["tasks"].items()}
    backbones = content.get("backbones", {})
    lines = [["task", *(f"{where}: {words}" for where in backbones for words in METHODS.values())]]
    for name in NAMES:
        columns = []
        for where, kind in backbones.items():
            cells = stored.get((name, where), {})
            for method in METHODS:
                missing = "-" if method == "peft" and kind != CAUSAL.name else ""
                columns.append(percent(of_seeds(cells, method), missing))
        if any(column not in ("", "-") for column in columns):
            lines.append([name, *columns])
    return markdown_table(lines)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, OUTPUT)
    parser.add_argument("--backbones", nargs="+", default=["mini"], help="mini, NAME=FOLDER or a Hub name")
    parser.add_argument("--tasks", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=2, help="runs of each tuned column")
    add_limits(parser, train=500, dev=100, test=300)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark, or print what is stored; return the exit status."""
    options = _options(arguments)

    def compute(cells: Cells) -> None:
        for named in options.backbones:
            where, _, folder = named.rpartition("=")
            backbone = Backbone.load(ModelConfig(name=folder, dtype="float32"))
            cells.content.setdefault("backbones", {})[where or folder] = backbone.kind.name
            for name in options.tasks:
                TableRow(name, where or folder, backbone, cells, options).run()

    return tell(options.output, None if options.markdown else compute, markdown)


if __name__ == "__main__":
    sys.exit(main())
