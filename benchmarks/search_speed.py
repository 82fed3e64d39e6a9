"""Speed of a search: candidates trained at once against runs of them one after another, the same steps, the same rows.

    python benchmarks/search_speed.py [--candidates 8] [--family qwen|bloom] [--rounds 5] [--json FILE]
    python benchmarks/search_speed.py --quality CONFIG.yaml --vary learning_rate=0.002,0.01 [--vary ...] [--json FILE]

The first form times steps on random weights and random texts of 24 to 64 tokens, ten virtual tokens. "behind" is a
template whose virtual tokens stand behind the text, timed from the second epoch on, when contexts are kept; "in front"
is timed from the second step on. Loading and what comes before the first step are counted apart, evaluations not at
all. PEFT's steps are those of one candidate, the same rows as one padded batch behind its virtual tokens, optimizer
included, times the candidates. All take turns in every round; ratios are medians over rounds, with the least and the
greatest.

The second form asks what a search buys: it is run as CONFIG says, and then the same candidates are trained alone, one
after another, until the same wall clock is used up. Shown are the best dev metric of both and the candidates finished.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from train_speed import ENCODER_HIDDEN, SMALL, VOCABULARY, Peft
from transformers import AutoTokenizer

from ptune.config.candidates import SearchConfig, candidates_of, load_search, parse_vary
from ptune.config.file import parse_overrides
from ptune.config.run import ModelConfig, RunConfig
from ptune.models.backbone import Backbone
from ptune.pretrained.loading import MINI
from ptune.training.reporting import Reporter, SearchReporter
from ptune.training.search import search
from ptune.training.train import train

TEMPLATES = {"behind": "{text}[P*10]{answer}", "in front": "[P*10]{text}{answer}"}
LABELS = {"positive": " good", "negative": " bad"}


class Clock(SearchReporter):
    """Notes when each step ended, of a run or of a search."""

    def __init__(self) -> None:
        self.begun = time.perf_counter()
        self.ends: list[float] = []

    def stepped(self, step: int, loss: float, learning_rate: float) -> None:
        """A step of a run is done."""
        self.ends.append(time.perf_counter())

    def went_on(self, step: int, running: int) -> None:
        """A step of a search is done."""
        self.ends.append(time.perf_counter())

    def warned(self, sentence: str) -> None:
        """Random weights learn nothing; that is not what is asked here."""

    def start(self) -> float:
        """Return the seconds before the first step's end."""
        return self.ends[0] - self.begun

    def steps(self, after: int) -> float:
        """Return the seconds of all steps after the first ``after``."""
        return self.ends[-1] - self.ends[after - 1]


def texts(count: int, seed: int) -> list[dict[str, str]]:
    """Return records whose texts have 24 to 64 tokens of ptune-mini's vocabulary, about."""
    tokenizer, chance = AutoTokenizer.from_pretrained(MINI), random.Random(seed)
    return [
        {
            "text": tokenizer.decode([chance.randrange(300, len(tokenizer)) for _ in range(chance.randint(24, 64))]),
            "label": chance.choice(list(LABELS)),
        }
        for _ in range(count)
    ]


def run_config(template: str, steps: int, batch_size: int, output: Path) -> RunConfig:
    """Return the settings that all candidates have in common; dev is scored once at the start and once at the end."""
    return RunConfig.model_validate(
        {
            "task": {"type": "classification", "verbalizer": LABELS},
            "prompt": {"template": template, "encoder": {"type": "mlp", "hidden_size": ENCODER_HIDDEN}},
            "training": {"max_steps": steps, "batch_size": batch_size, "evaluations": 1, "samples": 0},
            "output": str(output),
        }
    )


class PeftCandidate:
    """One of the candidates under PEFT, in a bare loop."""

    def __init__(self, backbone: Backbone, records: list[dict[str, str]], batch_size: int) -> None:
        tokenizer = backbone.tokenizer
        self._peft = Peft(copy.deepcopy(backbone.model), 10, at_once=batch_size)
        self._optimizer = torch.optim.AdamW(p for p in self._peft.model.parameters() if p.requires_grad)
        rows = [(tokenizer(record["text"] + LABELS[record["label"]])["input_ids"], 1) for record in records]
        self._batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]

    def seconds(self, steps: int) -> float:
        """Return what so many steps take."""
        begun = time.perf_counter()
        for step in range(steps):
            self._peft.step(self._batches[step % len(self._batches)], self._optimizer)
        return time.perf_counter() - begun


def timed(arguments: argparse.Namespace, place: str, folder: Path) -> dict[str, Any]:
    """Return seconds of both ways and their ratio, for one place of the prompt."""
    if arguments.model is not None:
        backbone = Backbone.load(ModelConfig(name=arguments.model, dtype=arguments.dtype))
    else:
        model = SMALL.model(arguments.family, torch.float32 if arguments.dtype == "float32" else torch.bfloat16)
        backbone = Backbone(model, AutoTokenizer.from_pretrained(MINI), arguments.family)
    records = texts(arguments.records, 0), texts(4, 1)
    epoch = -(-arguments.records // arguments.batch_size)
    first = epoch if place == "behind" else 1
    config = run_config(TEMPLATES[place], first + arguments.steps, arguments.batch_size, folder / place)
    rates = tuple(0.001 * (number + 1) for number in range(arguments.candidates))
    settings = SearchConfig(vary={"training.learning_rate": rates}, halvings=0, limit=max(2, arguments.candidates))
    theirs = PeftCandidate(backbone, records[0], arguments.batch_size)
    rounds: list[dict[str, float]] = []
    for _ in range(arguments.rounds + 1):
        clock = Clock()
        search(config, settings, backbone=backbone, records=records, reporter=clock, overwrite=True)
        seconds = {"start_together": clock.start(), "together": clock.steps(first), "start_apart": 0.0, "apart": 0.0}
        for candidate in candidates_of(config, settings):
            one = Clock()
            train(candidate.config, backbone=backbone, records=records, reporter=one, overwrite=True)
            seconds["start_apart"] += one.start()
            seconds["apart"] += one.steps(first)
        rounds.append(seconds | {"peft": arguments.candidates * theirs.seconds(arguments.steps)})
    rounds = rounds[1:]  # the first warms up
    medians = {name: statistics.median(seconds[name] for seconds in rounds) for name in rounds[0]}
    return (
        {"place": place, "steps": arguments.steps}
        | medians
        | {
            f"times_{peer}": spread([seconds[peer] / seconds["together"] for seconds in rounds])
            for peer in ("apart", "peft")
        }
    )


def spread(ratios: list[float]) -> tuple[float, float, float]:
    """Return median, least and greatest."""
    return statistics.median(ratios), min(ratios), max(ratios)


def quality(config: RunConfig, settings: SearchConfig, folder: Path) -> dict[str, Any]:
    """Return the best dev metric of a search, and that of runs one after another in the same wall clock."""
    backbone = Backbone.load(config.model)
    begun = time.perf_counter()
    config = config.model_copy(update={"output": folder / "search"})
    best = search(config, settings, backbone=backbone)
    seconds = time.perf_counter() - begun
    metric, greater = best.summary["metric"], best.summary["metric"] not in ("loss", "perplexity")
    finished: list[float] = []
    deadline = time.perf_counter() + seconds
    candidates = candidates_of(config, settings)
    random.Random(config.training.seed).shuffle(candidates)  # the order of the grid would favour its first values
    for candidate in candidates:
        alone = candidate.config.model_copy(update={"output": folder / f"alone-{candidate.number}"})
        try:
            prompt = train(alone, backbone=backbone, reporter=_Deadline(deadline))
        except TimeoutError:
            break
        finished.append(prompt.summary["after"][metric])
    return {
        "metric": metric,
        "seconds": seconds,
        "candidates": len(candidates),
        "search": best.summary["after"][metric],
        "alone": (max if greater else min)(finished) if finished else None,
        "finished_alone": len(finished),
    }


class _Deadline(Reporter):
    """Ends a run when the time is used up."""

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline

    def stepped(self, step: int, loss: float, learning_rate: float) -> None:
        """Look at the clock after every step."""
        if time.perf_counter() > self._deadline:
            raise TimeoutError


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(description="Speed of a search.")
    parser.add_argument("--family", choices=("qwen", "bloom"), default="qwen")
    parser.add_argument("--model", help="folder or mini, in place of random weights; mini is quick to try")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--records", type=int, default=128, help="of training, and so of an epoch")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=16, help="that are timed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quality", type=Path, help="settings of a run, with a section search or --vary")
    parser.add_argument("--vary", action="append", default=[])
    parser.add_argument("--json", type=Path)
    given, rest = parser.parse_known_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        if given.quality is not None:
            config, settings = load_search(given.quality, parse_overrides(rest), {"vary": parse_vary(given.vary)})
            results = [quality(config, settings, Path(folder))]
            for name, value in results[0].items():
                print(f"{name:<16} {value}")
        else:
            if rest:
                parser.error(f"there is no option {rest[0]}")
            results = [timed(given, place, Path(folder)) for place in TEMPLATES]
            shape = given.model or f"{given.family}, V {VOCABULARY}"
            print(f"{given.candidates} candidates, {shape}, {given.dtype}, {given.rounds} rounds")
            print(
                "| prompt | at once, s | one after another, s | times | PEFT, one after another, s | times "
                "| start, s | starts, s |"
            )
            print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
            for row in results:
                alone, peft = ("{:.2f} ({:.2f} to {:.2f})".format(*row[f"times_{peer}"]) for peer in ("apart", "peft"))
                print(
                    f"| {row['place']} | {row['together']:.2f} | {row['apart']:.2f} | {alone} | {row['peft']:.2f} | "
                    f"{peft} | {row['start_together']:.2f} | {row['start_apart']:.2f} |"
                )
    if given.json is not None:
        machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
        machine |= {"torch": torch.__version__, "transformers": transformers.__version__}
        given.json.write_text(json.dumps({"results": results, "machine": machine}, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
