"""A summarising set out of plain books: a passage, and the sentence that it opens with.

    python recipes/summaries.py TEXT_FOLDER OUTPUT

TEXT_FOLDER holds ``*.txt`` with a paragraph a line. OUTPUT gets train.jsonl, dev.jsonl and test.jsonl with the fields
``document`` and ``summary``. A passage's summary is its first sentence, which is taken out of it, as news sets take
their summaries from the sentence above the text (Narayan et al. 2018, XSum). It is made for trying summarising where no
set is at hand; nobody wrote these as summaries.

The same books give the same files, byte for byte. Every tenth block of passages of a book goes to dev, every tenth to
test, so that neighbouring passages stand on one side.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

_SENTENCE = re.compile(r"[^.!?]*[.!?]+[”’\"')]*(?=\s+[“‘\"'(]?[A-Z])")
_ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|St|Rev|Hon|No|[A-Z])\.$")
_SUMMARY_WORDS = range(6, 31)
_DOCUMENT_WORDS = range(40, 161)
_BLOCK = 20
"""Passages in turn that go to one part together."""


def first_sentence(passage: str) -> str:
    """Return the sentence that a passage opens with; nothing where no other follows it."""
    end = 0
    while match := _SENTENCE.match(passage, end):
        end = match.end()
        if not _ABBREVIATION.search(passage[:end]):
            return passage[:end]
    return ""


def records_of(text: str) -> Iterator[dict[str, str]]:
    """Yield passages whose first sentence and rest are neither too short nor too long."""
    for line in text.splitlines():
        passage = " ".join(line.split())
        summary = first_sentence(passage)
        document = passage[len(summary) :].strip()
        if summary and len(summary.split()) in _SUMMARY_WORDS and len(document.split()) in _DOCUMENT_WORDS:
            yield {"document": document, "summary": summary}


def parts_of(folder: Path) -> dict[str, list[dict[str, str]]]:
    """Return the records of all books, by part."""
    parts: dict[str, list[dict[str, str]]] = {"train": [], "dev": [], "test": []}
    for path in sorted(folder.glob("*.txt")):
        for number, record in enumerate(records_of(path.read_text(encoding="utf-8"))):
            block = number // _BLOCK % 10
            parts["dev" if block == 4 else "test" if block == 9 else "train"].append(record)
    return parts


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", type=Path, help="folder of *.txt, a paragraph a line")
    parser.add_argument("output", type=Path, help="folder of the three files")
    arguments = parser.parse_args()
    parts = parts_of(arguments.texts)
    empty = [part for part, records in parts.items() if not records]
    if empty:
        parser.error(
            f"{arguments.texts} gives no passages for {', '.join(empty)}: expected *.txt with a paragraph a line"
        )
    arguments.output.mkdir(parents=True, exist_ok=True)
    for part, records in parts.items():
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (arguments.output / f"{part}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{part}: {len(records)} passages")


if __name__ == "__main__":
    main()
