"""A few records of the shape that each example in examples/ reads, for where its data set is not at hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LANGUAGES = ["English", "French", "German", "Italian", "Spanish", "Russian"]

_FILMS = [
    {"text": "a quiet wonder", "label": "positive"},
    {"text": "the waiter is the best of it", "label": "negative"},
    {"text": "wonderful", "label": "positive"},
]
_INSTRUCTIONS = [
    {"instruction": "Give three tips for staying healthy.", "input": "", "output": "Sleep, walk, and eat greens."},
    {"instruction": "翻译成英文。", "input": "苹果很新鲜", "output": "The apples are fresh."},
    {"instruction": "Name a fruit.", "output": "An apple."},
]
_PAIRS = ["The film was a quiet wonder.", "It was good.", "Nobody saw it.", "The waiter brought soup."]

RECORDS: dict[str, list[dict[str, Any]]] = {
    "alpaca_en": _INSTRUCTIONS,
    "alpaca_zh": _INSTRUCTIONS,
    "clinc150": [
        {"text": "how do i say soup in french", "label": "translate"},
        {"text": "what is the rate", "label": "exchange_rate"},
        {"text": "who knows", "label": "oos"},
    ],
    "conll2003": [
        {"tokens": ["EU", "rejects", "German", "call", "."], "tags": ["B-ORG", "O", "B-MISC", "O", "O"]},
        {"tokens": ["Peter", "Blackburn", "in", "Paris"], "tags": ["B-PER", "I-PER", "O", "B-LOC"]},
        {"tokens": ["The", "film", "was", "good"], "tags": ["O", "O", "O", "O"]},
    ],
    "fewglue_boolq": [
        {"passage": "The film was made in 1995.", "question": "is the film new", "label": False},
        {"passage": "An apple is a fruit.", "question": "is an apple a fruit", "label": True},
    ],
    "fewglue_cb": [
        {"premise": _PAIRS[0], "hypothesis": _PAIRS[1], "label": "entailment"},
        {"premise": _PAIRS[0], "hypothesis": _PAIRS[2], "label": "contradiction"},
        {"premise": _PAIRS[0], "hypothesis": _PAIRS[3], "label": "neutral"},
    ],
    "fewglue_copa": [
        {
            "premise": "The film ended.",
            "choice1": "We left.",
            "choice2": "It rained.",
            "question": "effect",
            "label": 0,
        },
        {"premise": "The soup fell.", "choice1": "It was hot.", "choice2": "He ran.", "question": "cause", "label": 1},
    ],
    "fewglue_rte": [
        {"premise": _PAIRS[0], "hypothesis": _PAIRS[1], "label": "entailment"},
        {"premise": _PAIRS[0], "hypothesis": _PAIRS[3], "label": "not_entailment"},
    ],
    "fewglue_wic": [
        {"word": "feel", "sentence1": "You make me feel good.", "sentence2": "She felt the wall.", "label": False},
        {"word": "fair", "sentence1": "a fair price", "sentence2": "It was a fair game.", "label": True},
    ],
    "fewglue_wsc": [
        {"text": "The waiter ran, he was late.", "target": {"span1_text": "waiter", "span2_text": "he"}, "label": True},
        {"text": "Anna saw Mary, who was late.", "target": {"span1_text": "Anna", "span2_text": "who"}, "label": False},
    ],
    "mr": _FILMS,
    "resume_ner_zh": [
        {"tokens": list("高勇，中国籍"), "tags": ["B-NAME", "E-NAME", "O", "B-CONT", "M-CONT", "E-CONT"]},
        {"tokens": list("他是服务员"), "tags": ["O", "O", "B-TITLE", "M-TITLE", "E-TITLE"]},
    ],
    "semeval2010_task8": [
        {"tokens": ["the", "play", "was", "full", "of", "humor"], "head": "play", "tail": "humor", "relation": "Other"},
        {
            "tokens": ["the", "soup", "from", "the", "kitchen"],
            "head": "soup",
            "tail": "kitchen",
            "relation": "Entity-Origin(e1,e2)",
        },
    ],
    "shopping_zh": [
        {"text": "这家店的苹果很新鲜", "label": "positive", "category": "水果"},
        {"text": "酒店的房间有点小", "label": "negative", "category": "酒店"},
    ],
    "sst2": _FILMS,
    "summaries": [
        {
            "document": "The film was a quiet wonder. Nobody saw it, for it rained.",
            "summary": "A film that nobody saw.",
        },
        {"document": "The waiter brought the wrong soup twice. He ran.", "summary": "A waiter ran."},
    ],
    "trec": [
        {"text": "What is an apple ?", "label": "DESC"},
        {"text": "Who made the film ?", "label": "HUM"},
        {"text": "When was it made ?", "label": "NUM"},
    ],
}
"""Data set -> its records."""


def write_records(data_set: str, folder: Path) -> None:
    """Write the records of a data set as its train and its dev part."""
    for split in ("train", "dev"):
        write_lines(folder / f"{split}.jsonl", RECORDS[data_set])


def write_facts(folder: Path) -> None:
    """Write facts of LAMA's shape, with the candidates that one of its examples asks for."""
    for split, count in (("train", 24), ("dev", 12), ("test", 12)):
        rows = []
        for number in range(count):
            subject, spoken = f"Speaker {number}", LANGUAGES[number % 6]
            others = [language for language in LANGUAGES if language != spoken][:3]
            rows.append(
                {
                    "predicate_id": "P103",
                    "sub_label": subject,
                    "obj_label": spoken,
                    "masked_sentences": [f"The native language of {subject} is [MASK] ."],
                    "candidates": sorted([spoken, *others]),
                }
            )
        write_lines(folder / f"{split}.jsonl", rows)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write records as JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
