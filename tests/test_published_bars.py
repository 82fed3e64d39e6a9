"""The published comparisons as commands, on tiny models and a few rows: they run through and count as the papers do."""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest
from tiny_models import tiny_model, tiny_tokenizer

from ptune.errors import DataError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def metamathqa(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("metamathqa")


@pytest.fixture
def ptuning_v2(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("ptuning_v2")


def model_of(folder: Path, family: str) -> Path:
    tiny_model(family).save_pretrained(folder / "model")
    tiny_tokenizer(family).save_pretrained(folder / "model")
    return folder / "model"


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "reference", "right"),
    [
        ("So it is 4.\nThe answer is: 16", "#### 16", True),
        ("The answer is: 3. No, wait. The answer is: 16.", "#### 16", True),
        ("The answer is: 16\n\nQuestion: The next one?", "#### 16", True),
        ("The answer is: $16.00", "#### 16", True),
        ("The answer is 20/35", "#### 0.5714285714285714", True),
        ("The final answer is 50%", "#### 50", True),
        ("The answer is: 1/0", "#### 1", False),
        ("16", "#### 16", False),  # no mark, no answer
        ("The answer is: 17", "#### 16", False),
        ("The answer is: x+1", "The answer is: x+1", True),
    ],
)
def test_an_answer_is_right_where_its_last_number_is(
    metamathqa: ModuleType, text: str, reference: str, right: bool
) -> None:
    assert metamathqa.is_right(text, reference) is right


def test_a_right_answer_without_a_number_is_named(metamathqa: ModuleType) -> None:
    with pytest.raises(DataError, match='expected a right answer with "#### "'):
        metamathqa.is_right("The answer is: 1", "one")


def test_arithmetic_is_learnt_and_scored_beside_the_published_figures(
    metamathqa: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(0)
    sums = [(chance.randint(1, 9), chance.randint(1, 9)) for _ in range(40)]
    asked = [(f"What is {one} plus {other}?", one + other) for one, other in sums]
    maths = [{"query": question, "response": f" The answer is: {answer}"} for question, answer in asked]
    maths.insert(0, {"query": "x" * 1300, "response": " The answer is: 1"})  # left out as too long
    school = [{"question": question, "answer": f"#### {answer}"} for question, answer in asked]
    write(tmp_path / "data" / "metamathqa" / "train.jsonl", maths)
    write(tmp_path / "data" / "gsm8k" / "train.jsonl", school[:20])
    write(tmp_path / "data" / "gsm8k" / "test.jsonl", school[20:])
    where = ["--model", model_of(tmp_path, "llama"), "--data", tmp_path / "data", "--output", tmp_path / "out"]
    sizes = ["--steps", 6, "--dtype", "float32", "--virtual-tokens", 3, "--new-tokens", 8, "--limit", 6]
    assert metamathqa.main([str(part) for part in [*where, *sizes]]) == 0
    said = capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    assert (result["train_examples"], result["test_records"]) == (36, 6)
    assert result["accuracy"] in [n / 6 for n in range(7)]
    assert result["training"]["schedule"] == "cosine"
    assert f"| ptune, P-tuning | {result['accuracy']:.3f} | measured here" in said
    for method, value in (("P-tuning", "0.350"), ("prefix tuning", "0.416"), ("LoRA", "0.478")):
        assert f"| PEFT, {method} | {value} | published: Llama-3.2-3B, 5000 steps, huggingface/peft" in said
    where[3] = tmp_path / "nowhere"
    assert metamathqa.main([str(part) for part in [*where, *sizes]]) == 2
    assert "metamathqa: " in capsys.readouterr().err


def test_sigterm_in_training_ends_a_comparison_with_a_sentence(
    ptuning_v2: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, object]] = [
        {"premise": "A film.", "hypothesis": f"Film {n}.", "label": n % 2} for n in range(8)
    ]
    for split in ("train", "dev", "test"):
        write(tmp_path / "data" / "rte" / f"{split}.jsonl", rows)

    def stop_once_it_trains() -> None:
        while signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_once_it_trains, daemon=True).start()
    where = ["--model", model_of(tmp_path, "roberta"), "--data", tmp_path / "data", "--output", tmp_path / "out"]
    sizes = ["--tasks", "rte", "--max-steps", 100_000, "--virtual-tokens", 3]
    assert ptuning_v2.main([str(part) for part in [*where, *sizes]]) == 130
    assert capsys.readouterr().err.endswith("ptuning_v2: stopped; no result was written\n")
    assert not (tmp_path / "out" / "result.json").exists()


def test_the_tasks_of_p_tuning_v2_run_on_a_masked_model(
    ptuning_v2: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    yes_no = [{"passage": "The soup was great.", "question": f"was it {n}", "label": n % 2 == 0} for n in range(8)]
    pairs = [{"premise": "A great film.", "hypothesis": f"A film {n}.", "label": n % 2} for n in range(8)]  # the Hub's
    choices = [
        {"premise": "I sat.", "question": "cause", "choice1": f"tired {n}", "choice2": "soup", "label": n % 2}
        for n in range(8)
    ]
    words, tags = ["Great", "soup", "in", "Berlin"], [["O", "B-MISC", "O", "B-LOC"], [0, 7, 0, 5]]
    tagged = [{"tokens": words, "tags": tags[0]} if n % 2 else {"tokens": words, "ner_tags": tags[1]} for n in range(8)]
    for name, rows in (("fewglue_boolq", yes_no), ("rte", pairs), ("fewglue_copa", choices), ("conll2003", tagged)):
        for split in ("train", "dev", "test"):
            write(tmp_path / "data" / name / f"{split}.jsonl", rows)
    where = ["--model", model_of(tmp_path, "roberta"), "--data", tmp_path / "data", "--output", tmp_path / "out"]
    sizes = ["--max-steps", 4, "--virtual-tokens", 3]
    assert ptuning_v2.main([str(part) for part in [*where, *sizes]]) == 0
    said = capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    assert list(result["scores"]) == ["boolq", "rte", "copa", "conll03"]
    for name, bar in (("boolq", "84.0"), ("rte", "86.6"), ("copa", "92.0")):
        assert f"| {name} | {100 * result['scores'][name]['accuracy']:.1f} on 8 records | {bar} |" in said
        assert result["scores"][name]["steps"] == 4
    found = result["scores"]["conll03"]
    assert f"| conll03 | {100 * found['entity_f1']:.1f} on 8 records | 91.8 |" in said
    assert found["entity_f1"] > 0  # the same sentence over and over is learnt in four steps
    only = [*where[:4], "--tasks", "rte", *sizes]
    assert ptuning_v2.main([str(part) for part in only]) == 0
    assert "| conll03 | not run | 91.8 |" in capsys.readouterr().out
    assert ptuning_v2.main(["--data", str(tmp_path), "--tasks", "rte"]) == 2
    assert "expected a folder fewglue_rte or rte in" in capsys.readouterr().err
