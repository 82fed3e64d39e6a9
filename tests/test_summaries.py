"""Summarising from end to end: a set made of books, a run on it, its scores; and fields of any name."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import tiny_model, tiny_tokenizer

from ptune.tasks.generation import rouge_l, rouge_n

ROOT = Path(__file__).parent.parent


def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two books of paragraphs whose first sentences say who does something."""
    folder, chance = tmp_path_factory.mktemp("books"), random.Random(0)
    words = ["soup", "film", "room", "waiter", "apple", "hotel", "door", "song"]
    for book in ("one", "two"):
        paragraphs = ["Chapter One", "Too short. It is."]
        for number in range(210):
            rest = " ".join(chance.choice(words) for _ in range(45))
            paragraphs.append(f"Mr. {book.title()} saw the {chance.choice(words)} number {number}. The {rest}.")
        (folder / f"{book}.txt").write_text("\n".join(paragraphs) + "\n", encoding="utf-8")
    return folder


def test_the_set_is_the_same_each_time_and_its_parts_are_apart(books: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        said = run(ROOT / "recipes" / "summaries.py", books, tmp_path / name).stdout
    assert said == "train: 340 passages\ndev: 40 passages\ntest: 40 passages\n"
    seen: set[str] = set()
    for part in ("train", "dev", "test"):
        text = (tmp_path / "first" / f"{part}.jsonl").read_text(encoding="utf-8")
        assert text == (tmp_path / "second" / f"{part}.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()]
        for row in rows:
            assert row["summary"].startswith("Mr. ")
            assert row["summary"].endswith(".")
            assert row["summary"] not in row["document"]
        summaries = {row["summary"] for row in rows}
        assert not summaries & seen
        seen |= summaries
    assert "expected *.txt" in run(ROOT / "recipes" / "summaries.py", tmp_path, tmp_path / "x", code=2).stderr


def test_summarising_runs_through(books: Path, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    run(ROOT / "recipes" / "summaries.py", books, tmp_path / "data")
    where = ["--model", tmp_path / "model", "--data", tmp_path / "data", "--output", tmp_path / "prompt"]
    small = ["--limit", 16, "--dev-limit", 4, "--max-steps", 2, "--max-length", 160, "--max-new-tokens", 8]
    config = ROOT / "examples" / "summaries.yaml"
    run("-m", "ptune", "train", config, *where, *small, "--evaluations", 1)
    scores = tmp_path / "scores.json"
    run("-m", "ptune", "eval", tmp_path / "prompt", "--data", tmp_path / "data", "--limit", 4, "--json", scores)
    metrics = json.loads(scores.read_text(encoding="utf-8"))["metrics"]
    assert {"loss", "perplexity", "rouge_1", "rouge_2", "rouge_l", "exact_match", "prediction_share"} == set(metrics)
    said = run("-m", "ptune", "predict", tmp_path / "prompt", tmp_path / "data", "--limit", 1).stdout
    assert {"document", "summary", "text", "finish_reason"} == set(json.loads(said))


def test_rouge_n_counts_runs_of_words() -> None:
    assert rouge_n("the cat sat", "the cat sat down", 1) == pytest.approx(2 * 3 / 7)
    assert rouge_n("the cat sat", "the cat sat down", 2) == pytest.approx(2 * 2 / 5)
    assert rouge_n("the the the", "the cat", 1) == pytest.approx(2 * 1 / 5)
    assert rouge_n("苹果很新鲜", "苹果新鲜", 2) == pytest.approx(2 * 2 / 7)
    assert rouge_n("one", "one", 2) == 1.0
    assert rouge_n("one", "one two", 2) == 0.0
    assert rouge_l("sat cat", "cat sat") < rouge_n("sat cat", "cat sat", 1) == 1.0
