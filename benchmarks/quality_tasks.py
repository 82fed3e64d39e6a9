"""The tasks of the quality benchmark: their data, templates, label words, and what a frozen model is asked by hand.

Every part is drawn with one fixed seed, so each method and each run sees the same records.
Knows nothing of training.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ptune.records.data import load_records
from ptune.records.record import Record

_SAMPLE_SEED = 0


@dataclass(frozen=True)
class QualityTask:
    """One classification task and how much of it is used.

    Attributes:
        name: of its folder in the data.
        template: of ptune; the peer gets the same words without virtual tokens, which PEFT sets in front.
        verbalizer: label -> its words, the same for ptune and for PEFT. Records of other labels are left out.
        hand_written: templates without virtual tokens, each with its label words; the best of them on dev is "frozen".
        max_length: text tokens; the rest of a text is cut away.
        batch_size: records of a step.
        steps: optimizer steps, unless the command line says otherwise.
        limits: most records of train, dev and test.
    """

    name: str
    template: str
    verbalizer: Mapping[str, str]
    hand_written: tuple[tuple[str, Mapping[str, str]], ...]
    max_length: int
    batch_size: int
    steps: int
    limits: Mapping[str, int]

    def records(self, data: Path, split: str, limit: int | None = None) -> list[Record]:
        """Return the task's sample of a split: train, dev or test; ``limit`` takes the place of the task's own.

        Raises:
            DataError: the folder holds no such task, or a file cannot be read.
        """
        known = [record for record in load_records(data / self.name, split=split) if record["label"] in self.verbalizer]
        count = limit or self.limits[split]
        return known if len(known) <= count else random.Random(_SAMPLE_SEED).sample(known, count)


def _sentiment(positive: str, negative: str) -> dict[str, str]:
    return {"positive": positive, "negative": negative}


_REVIEWS = tuple(
    (template, words)
    for template in ("{text} It was{answer}", "{text} In short, it was{answer}", "{text} The film is{answer}")
    for words in (_sentiment(" great", " terrible"), _sentiment(" good", " bad"))
) + (("Review: {text}\nSentiment:{answer}", _sentiment(" positive", " negative")),)

_SHOPPING = tuple(
    (template, words)
    for template in ("{text}。总之，很{answer}", "{text}。我觉得很{answer}", "{text}。{answer}")
    for words in (_sentiment("好", "差"), _sentiment("满意", "失望"))
) + (("评论：{text}\n态度：{answer}", _sentiment("好", "差")),)

# The first twenty intents in sorted order. Each has one word of its own that is one token of ptune's model: every
# method then reads all labels at one place, and the words cost none of them a second row.
_INTENTS = {
    "accept_reservations": " table",
    "account_blocked": " account",
    "alarm": " time",
    "application_status": " status",
    "apr": " interest",
    "are_you_a_bot": " human",
    "balance": " balance",
    "bill_balance": " bill",
    "bill_due": " due",
    "book_flight": " flight",
    "book_hotel": " hotel",
    "calculator": " number",
    "calendar": " date",
    "calendar_update": " event",
    "calories": " food",
    "cancel": " stop",
    "cancel_reservation": " never",
    "car_rental": " rent",
    "card_declined": " card",
    "carry_on": " carry",
}

_INTENT_TEMPLATES = tuple(
    (template, _INTENTS)
    for template in ("{text}{answer}", "{text} It is about the{answer}", "{text}\nTopic:{answer}", "{text} The{answer}")
)

TASKS = (
    QualityTask(
        name="sst2",
        template="{text}[P*10]{answer}",
        verbalizer=_sentiment(" great", " terrible"),
        hand_written=_REVIEWS,
        max_length=64,
        batch_size=16,
        steps=200,
        limits={"train": 6000, "dev": 400, "test": 2000},
    ),
    QualityTask(
        name="imdb",
        template="{text}[P*10]{answer}",
        verbalizer=_sentiment(" great", " terrible"),
        hand_written=_REVIEWS,
        max_length=128,
        batch_size=8,
        steps=60,
        limits={"train": 4000, "dev": 150, "test": 600},
    ),
    QualityTask(
        name="clinc150",
        template="{text}[P*10]{answer}",
        verbalizer=_INTENTS,
        hand_written=_INTENT_TEMPLATES,
        max_length=64,
        batch_size=16,
        steps=120,
        limits={"train": 2000, "dev": 400, "test": 600},
    ),
    QualityTask(
        name="shopping_zh",
        template="{text}[P*10]{answer}",
        verbalizer=_sentiment("好", "差"),
        hand_written=_SHOPPING,
        max_length=64,
        batch_size=16,
        steps=100,
        limits={"train": 6000, "dev": 400, "test": 2000},
    ),
)
"""Sentiment of English sentences and of long reviews, intents of English requests, sentiment of Chinese reviews."""
