"""PEFT's comparison of methods on arithmetic word problems, run with ptune: trained on MetaMathQA, tested on GSM8K.

    python benchmarks/metamathqa.py                                      the protocol; needs the Hub and a GPU
    python benchmarks/metamathqa.py --deep                               with deep prompts, beside prefix tuning
    python benchmarks/metamathqa.py --model FOLDER --data FOLDER --steps N --dtype float32      a local stand-in

The protocol is that of huggingface/peft, method_comparison/MetaMathQA (run.py, data.py, utils.py and
default_training_params.json; experiments/ptuning/llama-3.2-3B-default): Llama-3.2-3B in bfloat16; 5,000 steps of
batch 4 over MetaMathQA in its order, records of more than 1,300 characters left out; 20 virtual tokens; at most 768
tokens; cosine schedule with a tenth of warm-up, gradients clipped at 1, seed 0; the whole test part of GSM8K answered
greedily in at most 300 tokens, right where the number after the last "The answer is" is.

What is ptune's own, and so not theirs: the loss is over the answer alone (theirs over the question, too), the learning
rate, no weight decay (theirs 0.1), the prompt's start and encoder, and that of twenty evaluations the best is kept, by
the loss on 50 records of MetaMathQA that are not trained on; GSM8K chooses nothing.

A local folder holds metamathqa/train.jsonl (query, response), and gsm8k/train.jsonl and gsm8k/test.jsonl (question,
answer).
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from decimal import Decimal, DivisionByZero, InvalidOperation
from itertools import islice
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers
from published import options, tell

from ptune.config.run import RunConfig, TrainingConfig
from ptune.engine.engine import Engine
from ptune.errors import DataError
from ptune.models.backbone import Backbone
from ptune.records.readers import read_records
from ptune.records.record import Record
from ptune.training.train import train

TEMPLATE = "Question: {query} Think step by step.\nAnswer:{answer}"
MOST_CHARACTERS, MOST_TOKENS, NEW_TOKENS, HELD_OUT = 1300, 768, 300, 50
MARKS = ("The answer is: ", "The answer is ", "The final answer is: ", "The final answer is ", "#### ")
PUBLISHED = {
    "P-tuning": 0.350,
    "P-tuning, best of its sweep": 0.382,
    "prefix tuning": 0.416,
    "LoRA": 0.478,
}
SOURCE = "huggingface/peft, method_comparison/MetaMathQA"


def final_answer(text: str) -> str | None:
    """Return what stands behind the last mark of an answer, on its line; None where there is no mark."""
    text = text.strip().rstrip(".!?")
    mark = next((mark for mark in MARKS if mark in text), None)
    if mark is None:
        return None
    return text.rpartition(mark)[-1].strip().split("\n", 1)[0].strip(" .!?$%")


def comparable(answer: str) -> float | str:
    """Return a number or a fraction as a number, anything else as it is."""
    upper, slash, lower = answer.partition("/")
    try:
        return float(Decimal(upper.strip()) / Decimal(lower.strip()) if slash else Decimal(answer))
    except (DivisionByZero, InvalidOperation):
        return answer


def is_right(text: str, reference: str) -> bool:
    """Whether an answer ends in the reference's number.

    Raises:
        DataError: the reference ends in none.
    """
    expected, found = final_answer(reference), final_answer(text)
    if expected is None:
        raise DataError(
            f'expected a right answer with "#### " or "The answer is: " before its number, and found "{reference}"; '
            "write it so"
        )
    return found is not None and comparable(found) == comparable(expected)


def training_records(source: str, steps: int, batch_size: int) -> tuple[list[Record], list[Record]]:
    """Return as many records as the steps see, in their order, and those behind them that are held out."""
    short = (
        Record({"query": record["query"], "output": record["response"]}, record.location)
        for record in read_records(source, "train")
        if len(f"{record['query']} {record['response']}") <= MOST_CHARACTERS
    )
    records = list(islice(short, steps * batch_size + HELD_OUT))
    held_out = min(HELD_OUT, len(records) // 10)
    if not held_out:
        raise DataError(f"expected at least 10 records in {source} and found {len(records)}; add some")
    return records[:-held_out], records[-held_out:]


def school_records(source: str, split: str) -> list[Record]:
    """Return GSM8K's records of a split."""
    return [
        Record({"query": record["question"], "reference": record["answer"]}, record.location)
        for record in read_records(source, split)
    ]


def validation(records: Sequence[Record]) -> list[Record]:
    """Return the 50 records that the protocol draws from GSM8K's training part."""
    order = numpy.arange(len(records))
    numpy.random.RandomState(0).shuffle(order)
    return [records[number] for number in order[:HELD_OUT]]


def config_of(arguments: argparse.Namespace, output: Path) -> RunConfig:
    """Return the run's settings."""
    training = {
        "max_steps": arguments.steps,
        "batch_size": arguments.batch_size,
        "learning_rate": arguments.learning_rate,
        "schedule": "cosine",
        "warmup_ratio": 0.1,
        "max_grad_norm": 1.0,
        "seed": arguments.seed,
        "evaluations": 20,
        "samples": 0,
    }
    return RunConfig.model_validate(
        {
            "model": {"name": arguments.model, "dtype": arguments.dtype},
            "task": {"type": "generation", "max_new_tokens": arguments.new_tokens},
            "prompt": {
                "template": f"[P*{arguments.virtual_tokens}]{TEMPLATE}",
                "deep": arguments.deep,
                "max_length": MOST_TOKENS,
            },
            "training": training,
            "output": str(output),
        }
    )


def accuracy(engine: Engine, name: str, records: Sequence[Record], batch_size: int) -> float:
    """Return the share of records whose greedy answer ends in the right number."""
    answers = engine.predict(name, records, batch_size=batch_size)
    return sum(is_right(a["text"], r["reference"]) for a, r in zip(answers, records, strict=True)) / len(records)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, answer the test part, and return the result."""
    maths, gsm = "meta-math/MetaMathQA", "openai/gsm8k:main"
    if arguments.data is not None:
        maths, gsm = str(arguments.data / "metamathqa"), str(arguments.data / "gsm8k")
    records = training_records(maths, arguments.steps, arguments.batch_size)
    valid, test = validation(school_records(gsm, "train")), school_records(gsm, "test")[: arguments.limit]
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(arguments, arguments.output / "prompt" if arguments.output else Path(folder) / "prompt")
        backbone = Backbone.load(config.model)
        begun = time.monotonic()
        prompt = train(config, backbone=backbone, records=records, overwrite=True)
        seconds = time.monotonic() - begun
        with Engine(backbone) as engine:
            engine.add("prompt", prompt)
            scores = {
                name: accuracy(engine, "prompt", some, arguments.answers_at_once)
                for name, some in (("valid", valid), ("test", test))
            }
    return {
        "model": arguments.model,
        "method": "deep prompts" if arguments.deep else "P-tuning",
        "accuracy": scores["test"],
        "valid_accuracy": scores["valid"],
        "test_records": len(test),
        "train_examples": len(records[0]),
        "virtual_tokens": arguments.virtual_tokens,
        "best_step": prompt.summary["best_step"],
        "training": prompt.summary["training"],
        "seconds": round(seconds, 1),
        "device": f"{backbone.device.type} {platform.processor() or platform.machine()}",
        "versions": prompt.summary["versions"] | {"transformers": transformers.__version__, "torch": torch.__version__},
        "published": PUBLISHED | {"source": SOURCE},
    }


def table(result: Mapping[str, Any]) -> str:
    """Return the result beside what is published, as Markdown."""
    lines = ["| method | accuracy | |", "| --- | --- | --- |"]
    measured = f"{result['model']}, {result['training']['max_steps']} steps, {result['test_records']} questions"
    lines.append(f"| ptune, {result['method']} | {result['accuracy']:.3f} | measured here: {measured} |")
    lines += [
        f"| PEFT, {method} | {value:.3f} | published: Llama-3.2-3B, 5000 steps, {SOURCE} |"
        for method, value in PUBLISHED.items()
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 2 for a user's mistake, 130 when stopped."""
    rate = TrainingConfig().learning_rate
    defaults = {"model": "meta-llama/Llama-3.2-3B", "dtype": "bfloat16", "learning_rate": rate, "virtual_tokens": 20}
    parser = options(__doc__, seed=0, **defaults)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--deep", action="store_true", help="virtual tokens at every layer")
    parser.add_argument("--limit", type=int, help="only the first so many test questions")
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS, help="most of an answer")
    parser.add_argument("--answers-at-once", type=int, default=50)
    return tell("metamathqa", run, table, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
