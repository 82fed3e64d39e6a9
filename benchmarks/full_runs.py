"""What the runs in `examples/` reach on `mini`, each trained in full as its file has it.

    python benchmarks/full_runs.py --data DIR                        run what is missing, then print the table
    python benchmarks/full_runs.py --data DIR --examples trec mr     some of them
    python benchmarks/full_runs.py --markdown                        print the table of what is stored

The score is the task's own metric on test. The frozen model is asked by the example's words without virtual tokens, or
by one of the templates by hand of `tasks_table.py` where dev likes it better; a linear head is nothing without
training, so a dash stands there. Each example is stored as soon as it is finished.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cells import Cells, parser_of, tell
from tables import markdown_table
from tasks_table import EXAMPLES as BY_HAND
from trials import EXAMPLES as FOLDER

from ptune.config.file import load_config
from ptune.config.run import ModelConfig, RunConfig
from ptune.config.task import LinearClassificationConfig, TaggingConfig
from ptune.engine.engine import Engine
from ptune.models.backbone import Backbone
from ptune.records.data import draw, load_records
from ptune.records.record import Record
from ptune.tasks.registry import completed, task_for
from ptune.template import Template
from ptune.training.assembly import train_and_dev_records
from ptune.training.train import train

OUTPUT = Path("benchmarks/results/full_runs.json")
DATA_OF = {
    "trec": "trec",
    "mr": "mr",
    "sst2_mini": "sst2",
    "sst2_deep": "sst2",
    "shopping_categories": "shopping_zh",
    "semeval2010_task8": "semeval2010_task8",
    "clinc150": "clinc150",
    "entity_types": "conll2003",
    "conll2003": "conll2003",
    "resume_ner_zh": "resume_ner_zh",
    "resume_ner_zh_extraction": "resume_ner_zh",
    "fewglue_cb": "fewglue_cb",
    "fewglue_rte": "fewglue_rte",
    "fewglue_rte_linear": "fewglue_rte",
    "fewglue_copa": "fewglue_copa",
    "fewglue_wic": "fewglue_wic",
    "fewglue_boolq": "fewglue_boolq",
    "fewglue_wsc": "fewglue_wsc",
}
"""Example -> the folder of its data set; those of `mini` that have one."""

UNITS = {"accuracy": "accuracy", "macro_f1": "macro F1", "micro_f1": "micro F1", "f1": "F1"}


def run(name: str, options: argparse.Namespace, backbone: Backbone) -> dict[str, Any]:
    """Train an example and ask it, and the frozen model, for the answers to test."""
    with tempfile.TemporaryDirectory() as temporary:
        overrides = {"data.train": str(options.data / DATA_OF[name]), "output": str(Path(temporary) / "prompt")}
        config = load_config(FOLDER / f"{name}.yaml", overrides | {"training.samples": 0})
        records = load_records(options.data / DATA_OF[name], split="test", fields=config.data.fields)
        asked = draw(records, min(options.test_limit, len(records)))
        begun = time.perf_counter()
        prompt = train(config, backbone=backbone)
        minutes = (time.perf_counter() - begun) / 60
        metric = prompt.summary["metric"]
        with Engine(backbone) as engine:
            engine.add(name, prompt)
            reached = engine.evaluate(name, asked, batch_size=32)[metric]
    return {
        "metric": metric,
        "frozen": frozen(name, config, backbone, asked, metric),
        "ptune": reached,
        "dev": prompt.summary["after"][metric],
        "records": prompt.summary["train_examples"],
        "asked": len(asked),
        "minutes": round(minutes, 1),
    }


def frozen(name: str, config: RunConfig, backbone: Backbone, asked: Sequence[Record], metric: str) -> float | None:
    """Return what the bare model reaches by the template that is best on dev; None for a head."""
    if isinstance(config.task, LinearClassificationConfig | TaggingConfig):
        return None
    known, dev = train_and_dev_records(config)
    tasks = [
        task_for(
            backbone,
            completed(config.task, known),
            Template.parse(template).without_virtual_tokens(),
            max_length=config.prompt.max_length,
        )
        for template in (config.prompt.template, *BY_HAND.get(name, ()))
    ]
    best = max(tasks, key=lambda task: task.evaluate(backbone, dev[:200])[metric])
    return best.evaluate(backbone, asked)[metric]


def markdown(content: Mapping[str, Any]) -> str:
    """Return the table of what is stored: scores in percent."""
    lines = [["example", "metric", "records", "minutes", "frozen", "ptune"]]
    for name in DATA_OF:
        cell = content["tasks"].get(name, {}).get("cells", {}).get("run")
        if cell:
            bare = "-" if cell["frozen"] is None else f"{100 * cell['frozen']:.1f}"
            unit = UNITS.get(cell["metric"], cell["metric"])
            lines.append(
                [name, unit, f"{cell['records']:,}", f"{cell['minutes']:.1f}", bare, f"{100 * cell['ptune']:.1f}"]
            )
    return markdown_table(lines, words=2)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, OUTPUT)
    parser.add_argument("--examples", nargs="+", choices=list(DATA_OF), default=list(DATA_OF))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the frozen model")
    parser.add_argument("--test-limit", type=int, default=1000, help="most records of test")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark, or print what is stored; return the exit status."""
    options = _options(arguments)

    def compute(cells: Cells) -> None:
        backbone = Backbone.load(ModelConfig(name="mini", dtype=options.dtype))
        for name in options.examples:
            text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
            settings = {"example": text, "model": backbone.identity(), "dtype": str(backbone.dtype)}
            cells.begin(name, settings | {"test_limit": options.test_limit})
            cells.get(name, "run", partial(run, name, options, backbone))

    return tell(options.output, None if options.markdown else compute, markdown)


if __name__ == "__main__":
    sys.exit(main())
