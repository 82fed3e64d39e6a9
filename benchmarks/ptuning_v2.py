"""P-tuning v2's figures for RoBERTa-large (Liu et al. 2022), run with ptune's deep prompts.

    python benchmarks/ptuning_v2.py                                      all tasks; needs the Hub and a GPU
    python benchmarks/ptuning_v2.py --model FOLDER --data FOLDER --tasks boolq --max-steps N        a local stand-in

Prompt lengths, learning rates, batch sizes, epochs and lengths are those of THUDM/P-tuning-v2,
run_script/run_*_roberta.sh, and the score is, as theirs, the best of one evaluation an epoch on the validation part.

What is ptune's own, and so not theirs: an answer is read at a mask by label words (BoolQ, RTE) or by the choices' own
words (COPA), where they train a head on the first token; the backbone has no dropout; each run is one seed.

A local folder holds for each task a folder of train.jsonl and dev.jsonl, called fewglue_boolq or boolq. On the Hub the
data is aps/super_glue.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptune.backbone import Backbone
from ptune.config import RunConfig
from ptune.data import Record, load_records
from ptune.errors import DataError, PtuneError
from ptune.files import write_json
from ptune.training import train

SOURCE = "Liu et al. 2022, P-Tuning v2, RoBERTa-large"
NOT_RUN = {"conll03": 91.8}
"""Of the published table, what ptune has no task for."""


@dataclass(frozen=True)
class Bar:
    """One task of the published table.

    Attributes:
        published: accuracy in percent.
        words: behind the virtual tokens; ends in the answer.
        task: its settings.
        virtual_tokens: at every layer.
        learning_rate: the published run's.
        batch_size: the published run's.
        epochs: the published run's.
        labels: what the Hub's numbers stand for; empty where numbers are the labels.
    """

    published: float
    words: str
    task: Mapping[str, Any]
    virtual_tokens: int
    learning_rate: float
    batch_size: int
    epochs: int
    labels: tuple[str, ...] = ()


BARS = {
    "boolq": Bar(
        84.0,
        "{passage} Question: {question}? Answer:{answer}.",
        {"type": "classification", "verbalizer": {"true": " yes", "false": " no"}},
        8,
        7e-3,
        32,
        100,
        ("false", "true"),
    ),
    "rte": Bar(
        86.6,
        "{premise} Question: {hypothesis} Answer:{answer}.",
        {"type": "classification", "verbalizer": {"entailment": " yes", "not_entailment": " no"}},
        128,
        5e-3,
        32,
        100,
        ("entailment", "not_entailment"),
    ),
    "copa": Bar(
        92.0,
        "{premise} What was the {question}?{answer}",
        {"type": "choice", "choices": ["choice1", "choice2"]},
        8,
        9e-3,
        16,
        120,
    ),
}
MOST_TOKENS, SEED = 128, 11


def records_of(name: str, data: Path | None, split: str) -> list[Record]:
    """Return a task's records of a split, their labels by name.

    Raises:
        DataError: there are none.
    """
    source = f"aps/super_glue:{name}"
    if data is not None:
        folders = [data / f"fewglue_{name}", data / name]
        source = next((str(folder) for folder in folders if folder.is_dir()), "")
        if not source:
            raise DataError(
                f"expected a folder fewglue_{name} or {name} in {data} and found neither; name another --data"
            )
    records = load_records(source, split=split)
    labels = BARS[name].labels
    for record in records:
        number = record.get("label")
        if labels and isinstance(number, int) and not isinstance(number, bool):
            record["label"] = labels[number]
    return records


def config_of(name: str, arguments: argparse.Namespace, output: Path) -> RunConfig:
    """Return the settings of a task's run."""
    bar = BARS[name]
    return RunConfig.model_validate(
        {
            "model": {"name": arguments.model, "dtype": arguments.dtype},
            "task": bar.task,
            "prompt": {
                "template": f"[P*{arguments.virtual_tokens or bar.virtual_tokens}]{bar.words}",
                "deep": True,
                "max_length": MOST_TOKENS,
            },
            "training": {
                "epochs": bar.epochs,
                "max_steps": arguments.max_steps,
                "batch_size": bar.batch_size,
                "learning_rate": arguments.learning_rate or bar.learning_rate,
                "seed": arguments.seed,
                "evaluations": bar.epochs,
                "samples": 0,
            },
            "output": str(output),
        }
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train each task's prompt on one loaded backbone and return the scores."""
    data = {
        name: tuple(records_of(name, arguments.data, split) for split in ("train", "dev")) for name in arguments.tasks
    }
    backbone: Backbone | None = None
    scores: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in arguments.tasks:
            config = config_of(name, arguments, (arguments.output or Path(temporary)) / name)
            backbone = backbone or Backbone.load(config.model)
            prompt = train(config, backbone=backbone, records=data[name], overwrite=True)
            summary = prompt.summary
            scores[name] = {"accuracy": summary["after"]["accuracy"]} | {
                key: summary[key]
                for key in ("best_step", "steps", "seconds", "train_examples", "dev_records", "training")
            }
    return {"model": arguments.model, "scores": scores, "published": published() | {"source": SOURCE}}


def published() -> dict[str, float]:
    """Return the published scores, in percent."""
    return {name: bar.published for name, bar in BARS.items()} | NOT_RUN


def table(result: Mapping[str, Any]) -> str:
    """Return the scores beside what is published, as Markdown."""
    lines = [f"| task | ptune, deep prompts, {result['model']} | published: {SOURCE} |", "| --- | --- | --- |"]
    for name, bar in published().items():
        score = result["scores"].get(name)
        measured = f"{100 * score['accuracy']:.1f} on {score['dev_records']} records" if score else "not run"
        lines.append(f"| {name} | {measured} | {bar:.1f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 2 for a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="FacebookAI/roberta-large", help="folder or Hub name of a masked model")
    parser.add_argument("--data", type=Path, help="folder of the tasks' folders; the Hub where absent")
    parser.add_argument("--tasks", nargs="+", choices=list(BARS), default=list(BARS))
    parser.add_argument("--max-steps", type=int, help="goes before the published epochs")
    parser.add_argument("--virtual-tokens", type=int, help="goes before the published lengths")
    parser.add_argument("--learning-rate", type=float, help="goes before the published rates")
    parser.add_argument("--dtype", default="auto", help="of the frozen weights")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--output", type=Path, help="folder for result.json and the soft prompts")
    arguments = parser.parse_args(argv)
    try:
        result = run(arguments)
        if arguments.output is not None:
            write_json(arguments.output / "result.json", result)
    except PtuneError as error:
        print(f"ptuning_v2: {error}", file=sys.stderr)
        return 2
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
