"""`ptune search` and `--explain` in processes of their own: what they print, write and refuse."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_models import tiny_model, tiny_tokenizer

from ptune.soft_prompts.soft_prompt import SoftPrompt

WORDS = ["soup", "film", "room", "waiter", "apple", "hotel", "door", "song"]


def ptune(*words: object, code: int = 0, columns: int = 200) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "ptune", *map(str, words)],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": str(columns), "TERM": "dumb"},
        timeout=300,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, records, and the settings of a search."""
    place = tmp_path_factory.mktemp("search")
    tiny_model("llama").save_pretrained(place / "model")
    tiny_tokenizer("llama").save_pretrained(place / "model")
    chance = random.Random(0)
    for name, count in (("train", 24), ("dev", 8)):
        lines = []
        for _ in range(count):
            good = chance.random() < 0.5
            text = " ".join([*chance.sample(WORDS, chance.randint(2, 6)), "great" if good else "terrible"])
            lines.append(json.dumps({"text": text, "label": "positive" if good else "negative"}) + "\n")
        (place / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    settings = {
        "model": str(place / "model"),
        "data": {"train": str(place / "train.jsonl"), "dev": str(place / "dev.jsonl")},
        "task": {"type": "classification", "verbalizer": {"positive": " good", "negative": " bad"}},
        "prompt": {"template": "{text}[P*4]{answer}", "encoder": {"hidden_size": 16}},
        "training": {"max_steps": 8, "batch_size": 4, "evaluations": 4, "learning_rate": 0.02},
    }
    (place / "run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    settings["search"] = {"vary": {"prompt.length": [2, 4]}}
    (place / "search.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return place


def test_a_search_prints_its_table_and_leaves_the_best(place: Path, tmp_path: Path) -> None:
    done = ptune("search", place / "search.yaml", "--vary", "encoder.type=mlp,embedding", "--output", tmp_path / "best")
    assert "4 candidates" in done.stdout
    assert "length=2  type=embedding" in done.stdout
    assert "go on:" in done.stdout
    assert "plan: frozen context" in done.stdout
    assert "not among the better half" in done.stdout
    table = json.loads((tmp_path / "best" / "run" / "search.json").read_text())
    best = table["candidates"][0]
    prompt = SoftPrompt.load(tmp_path / "best")
    assert len(prompt.rows) == best["settings"]["prompt.length"]
    assert prompt.summary["after"]["accuracy"] == best["best"]
    assert "accuracy" in ptune("eval", tmp_path / "best", "--data", place / "dev.jsonl").stdout
    assert "holds another run" in ptune("search", place / "search.yaml", "--output", tmp_path / "best", code=2).stderr


def test_the_table_shows_every_value_and_the_best_ones_number_on_a_narrow_terminal(place: Path, tmp_path: Path) -> None:
    varied = ["--vary", "learning_rate=0.0025,0.015", "--vary", "encoder.type=mlp,embedding"]
    done = ptune("search", place / "search.yaml", *varied, "--output", tmp_path / "best", columns=80)
    ranked = json.loads((tmp_path / "best" / "run" / "search.json").read_text())
    table = done.stdout.partition("best step")[2]
    for row in ranked["candidates"]:
        mark = f"{row['candidate']} best" if row["candidate"] == ranked["best"] else str(row["candidate"])
        values = r"\s+".join(re.escape(str(value)) for value in row["settings"].values())
        assert re.search(rf"^{mark}\s+{values}\s", table, re.MULTILINE), done.stdout
    assert max(map(len, table.splitlines()[:20])) <= 80


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--vary", "lerning_rate=1,2"], 'there is no setting "lerning_rate". Did you mean "learning_rate"?'),
        (["--vary", "model.name=a,b"], "model.name cannot vary: all candidates share one backbone"),
        (["--vary", "training.seed"], "--vary takes a setting and its values, as in training.seed=0,1,2, and got"),
        (["--vary", "training.seed=0,1,2", "--limit", "2"], "3 candidates are more than search.limit, which is 2"),
        ([], "a search needs two candidates or more"),
    ],
)
def test_mistakes_are_named(words: list[str], message: str, place: Path) -> None:
    assert message in ptune("search", place / "run.yaml", *words, code=2).stderr


def test_a_run_is_explained_and_not_begun(place: Path, tmp_path: Path) -> None:
    behind = ptune("train", place / "run.yaml", "--explain", "--output", tmp_path / "none").stdout
    assert "plan: frozen context for 100% of forwards" in behind
    assert "24 texts" in behind
    assert "all of it fits into training.context_cache (2GB)" in behind
    in_front = ["--template", "[P*20]{text}{answer}", "--output", tmp_path / "none"]
    shown = ptune("search", place / "run.yaml", "--vary", "seed=0,1,2", *in_front, "--explain").stdout
    assert "3 candidates at once" in shown
    assert "plan: packed rows for 100% of forwards (3 prompts, each of which opens rows of its own)" in shown
    assert "text before" not in shown
    plain = ptune("train", place / "run.yaml", "--explain", "--plan", "reference").stdout
    assert "plan: reference for 100% of forwards (training.plan says so)" in plain
    assert not (tmp_path / "none").exists()


def test_what_is_explained_is_what_a_run_says(place: Path, tmp_path: Path) -> None:
    said = ptune("train", place / "run.yaml", "--output", tmp_path / "run").stdout
    assert "plan: frozen context" in said
    assert "24 texts run once and kept" in said
