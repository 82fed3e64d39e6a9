"""P-tuning v2's figures for RoBERTa-large (Liu et al. 2022), run with ptune's deep prompts.

    python benchmarks/ptuning_v2.py                                      all tasks; needs the Hub and a GPU
    python benchmarks/ptuning_v2.py --model FOLDER --data FOLDER --tasks boolq --max-steps N        a local stand-in

Prompt lengths, learning rates, batch sizes, epochs and lengths are those of THUDM/P-tuning-v2,
run_script/run_*_roberta.sh, and the score is, as theirs, the best of one evaluation an epoch on the validation part. Of
CoNLL03 it is the F1 of entities on the test part, by the epoch that is best on the validation part.

What is ptune's own, and so not theirs: an answer is read at a mask by label words (BoolQ, RTE) or by the choices' own
words (COPA), where they train a head on the first token; the backbone has no dropout; each run is one seed.

A local folder holds for each task a folder of train.jsonl and dev.jsonl, called fewglue_boolq or boolq, and
conll2003, with test.jsonl. On the Hub the data is aps/super_glue, and tomaarsen/conll2003.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from published import options, tell

from ptune.config.run import RunConfig
from ptune.engine.engine import Engine
from ptune.errors import DataError
from ptune.models.backbone import Backbone
from ptune.records.data import load_records
from ptune.records.record import Record
from ptune.training.train import train

SOURCE = "Liu et al. 2022, P-Tuning v2, RoBERTa-large"
TAGS = ("O", *(f"{place}-{kind}" for kind in ("PER", "ORG", "LOC", "MISC") for place in "BI"))
"""What the Hub's numbers stand for, in their order."""


@dataclass(frozen=True)
class Bar:
    """One task of the published table.

    Attributes:
        published: the score in percent.
        words: behind the virtual tokens.
        task: its settings.
        virtual_tokens: at every layer.
        learning_rate: the published run's.
        batch_size: the published run's.
        epochs: the published run's.
        labels: what the Hub's numbers stand for; empty where numbers are the labels.
        metric: the score's name.
        max_length: tokens of text.
        hub: the data set's name there; a part of SuperGLUE where absent.
        folders: where it may lie in a local folder; called as in FewGLUE, or as the task, where absent.
        test: whether the score is the test part's.
    """

    published: float
    words: str
    task: Mapping[str, Any]
    virtual_tokens: int
    learning_rate: float
    batch_size: int
    epochs: int
    labels: tuple[str, ...] = ()
    metric: str = "accuracy"
    max_length: int = 128
    hub: str | None = None
    folders: tuple[str, ...] = ()
    test: bool = False


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
    "conll03": Bar(
        91.8,
        "{tokens}",
        {"type": "tagging", "tags": TAGS, "tag_names": dict(enumerate(TAGS))},
        11,
        3e-2,
        16,
        30,
        metric="entity_f1",
        max_length=152,
        hub="tomaarsen/conll2003",
        folders=("conll2003", "conll03"),
        test=True,
    ),
}
SEED = 11


def records_of(name: str, data: Path | None, split: str) -> list[Record]:
    """Return a task's records of a split, their labels by name.

    Raises:
        DataError: there are none.
    """
    bar = BARS[name]
    source = bar.hub or f"aps/super_glue:{name}"
    if data is not None:
        folders = bar.folders or (f"fewglue_{name}", name)
        source = next((str(data / folder) for folder in folders if (data / folder).is_dir()), "")
        if not source:
            raise DataError(
                f"expected a folder {' or '.join(folders)} in {data} and found neither; name another --data"
            )
    records = load_records(source, split=split)
    labels = bar.labels
    for record in records:
        number = record.get("label")
        if labels and isinstance(number, int) and not isinstance(number, bool):
            record["label"] = labels[number]
        if "ner_tags" in record:
            record["tags"] = record["ner_tags"]
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
                "max_length": bar.max_length,
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
    data = {}
    for name in arguments.tasks:
        splits = ("train", "dev", "test") if BARS[name].test else ("train", "dev")
        data[name] = [records_of(name, arguments.data, split) for split in splits]
    backbone: Backbone | None = None
    scores: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in arguments.tasks:
            config = config_of(name, arguments, (arguments.output or Path(temporary)) / name)
            backbone = backbone or Backbone.load(config.model)
            learnt, dev, *test = data[name]
            prompt = train(config, backbone=backbone, records=(learnt, dev), overwrite=True)
            metrics, scored = prompt.summary["after"], test[0] if test else dev
            if test:
                with Engine(backbone) as engine:
                    engine.add(name, prompt)
                    metrics = engine.evaluate(name, scored)
            scores[name] = {BARS[name].metric: metrics[BARS[name].metric], "records": len(scored)} | {
                key: prompt.summary[key]
                for key in ("best_step", "steps", "seconds", "train_examples", "dev_records", "training")
            }
    published = {name: bar.published for name, bar in BARS.items()}
    return {"model": arguments.model, "scores": scores, "published": published | {"source": SOURCE}}


def table(result: Mapping[str, Any]) -> str:
    """Return the scores beside what is published, as Markdown."""
    lines = [f"| task | ptune, deep prompts, {result['model']} | published: {SOURCE} |", "| --- | --- | --- |"]
    for name, bar in BARS.items():
        score = result["scores"].get(name)
        measured = f"{100 * score[bar.metric]:.1f} on {score['records']} records" if score else "not run"
        lines.append(f"| {name} | {measured} | {bar.published:.1f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 2 for a user's mistake, 130 when stopped."""
    parser = options(__doc__, model="FacebookAI/roberta-large", dtype="auto", seed=SEED)
    parser.add_argument("--tasks", nargs="+", choices=list(BARS), default=list(BARS))
    parser.add_argument("--max-steps", type=int, help="goes before the published epochs")
    return tell("ptuning_v2", run, table, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
