"""What `ptune demo` shows: `mini` learns, in about a minute, whether a sentence praises or complains.

The same library calls as anywhere; nothing here is known to the rest of ptune.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ptune.config.run import RunConfig
from ptune.config.task import ClassificationConfig
from ptune.models.backbone import Backbone
from ptune.records.data import load_records
from ptune.records.record import Record
from ptune.tasks.registry import task_for
from ptune.template import Template

SENTENCE = "This movie was fantastic!"

HAND_WRITTEN = (
    ("{text} It was{answer}", {"positive": " great", "negative": " terrible"}),
    ("{text} In short, it was{answer}", {"positive": " good", "negative": " bad"}),
    ("Review: {text}\nSentiment:{answer}", {"positive": " positive", "negative": " negative"}),
    ("{text} 总之，很{answer}", {"positive": "好", "negative": "差"}),
    ("{text} 我{answer}", {"positive": "喜欢", "negative": "失望"}),
    ("Human: Is this good or bad? {text}\n\nAssistant: {answer}", {"positive": "Good", "negative": "Bad"}),
)
"""Templates without virtual tokens, each with its label words: what a frozen model is asked by hand."""


@dataclass(frozen=True)
class Frozen:
    """The best hand-written template: chosen on dev, scored on test."""

    template: str
    accuracy: float


def demo_data() -> Path:
    """Return the folder of the sentences: in the installed package, or in the repository that ptune runs from."""
    package = Path(__file__).parent
    installed = package / "demo_data"
    return installed if installed.is_dir() else package.parents[1] / "examples" / "data" / "sentiment"


def demo_config(output: Path, seed: int = 0) -> RunConfig:
    """Return the settings of the demo's run."""
    return RunConfig.model_validate(
        {
            "model": "mini",
            "data": {"train": str(demo_data()), "dev": str(demo_data())},
            "task": {"type": "classification", "verbalizer": {"positive": " good", "negative": " bad"}},
            "prompt": {"template": "{text}[P*10]{answer}"},
            "training": {"epochs": 8, "batch_size": 16, "evaluations": 4, "samples": 0, "seed": seed},
            "output": str(output),
        }
    )


def best_hand_written(backbone: Backbone, dev: list[Record], test: list[Record]) -> Frozen:
    """Return the hand-written template that is best on dev, with its accuracy on test."""

    def accuracy(template: str, verbalizer: dict[str, str], records: list[Record]) -> float:
        task = task_for(backbone, ClassificationConfig(verbalizer=verbalizer), Template.parse(template))
        return task.evaluate(backbone, records, batch_size=64)["accuracy"]

    template, verbalizer = max(HAND_WRITTEN, key=lambda pair: accuracy(pair[0], pair[1], dev))
    return Frozen(template, accuracy(template, verbalizer, test))


def demo_records(split: str) -> list[Record]:
    """Return the sentences of a split: train, dev or test."""
    return load_records(demo_data(), split=split)
