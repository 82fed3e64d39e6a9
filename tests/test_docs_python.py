"""The documentation's Python runs as it stands, in a folder that holds what it names.

Only compiled: `docs/serving.md`, whose client speaks to a server that runs (tests/test_serve.py asks one by it).
"""

from __future__ import annotations

import ast
import asyncio
import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from example_records import write_records
from pages import PAGES, READMES, ROOT, fenced, name_of
from peft import PeftModel
from tiny_models import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments
from typer.testing import CliRunner

import ptune
from ptune.cli import app

REPLACED = {"bigscience/bloom-560m": str(ptune.MINI)}
"""Models of pages that tests do not download -> the model in their place."""
COMPILED = {ROOT / "docs" / "serving.md"}
RUN = {*READMES, *(ROOT / "docs" / f"{name}.md" for name in ("drop_in", "evaluation", "heads", "search"))}


def replaced(text: str) -> str:
    for name, instead in REPLACED.items():
        text = text.replace(name, instead)
    return text


def run(page: Path, blocks: list[str], namespace: dict[str, Any]) -> dict[str, Any]:
    """Run blocks one after another, ``await`` outside of functions allowed, and return what names then stand for."""
    for block in blocks:
        code = compile(replaced(block), page.name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        waiting = eval(code, namespace)
        if waiting is not None:
            asyncio.run(waiting)
    return namespace


def indented(page: Path, word: str) -> str:
    """Return the indented lines on a page that stand together with one that holds a word."""
    blocks = re.findall(r"(?:^    .*\n)+", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    (found,) = (block for block in blocks if word in block)
    return re.sub(r"^    ", "", found, flags=re.MULTILINE)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with the data FOLDER and the example that pages name."""
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "examples").mkdir()
    write_records("sst2", tmp_path / "FOLDER")
    example = (ROOT / "examples" / "sst2_mini.yaml").read_text(encoding="utf-8")
    (tmp_path / "examples" / "sst2_mini.yaml").write_text(example, encoding="utf-8")
    (tmp_path / "run.yaml").write_text(example + "data: FOLDER\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train_example(example: str, records: str, place: Path, **changes: object) -> None:
    """Train a soft prompt of mini for one step, for pages that say what is done with it."""
    data = place / records
    data.mkdir()
    write_records(records, data)
    few = {"model": "mini", "data": str(data), "training.max_steps": 1, "training.samples": 0}
    ptune.train(ptune.load_config(ROOT / "examples" / example, few | changes))


def test_every_page_with_python_is_run_or_says_why_not() -> None:
    assert {page for page in PAGES if fenced(page, "python")} == RUN | COMPILED


@pytest.mark.parametrize("page", sorted(RUN | COMPILED), ids=name_of)
def test_python_compiles_and_names_what_exists(page: Path) -> None:
    for block in fenced(page, "python"):
        compile(block, page.name, "exec")
        for name in re.findall(r"\bptune\.([A-Za-z_]+)\b(?!\.)", re.sub(r"^(?:from|import) .*", "", block, flags=re.M)):
            assert hasattr(ptune, name), name


@pytest.mark.parametrize("page", READMES, ids=lambda page: page.name)
def test_the_readme_s_python_trains_and_answers(page: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = fenced(page, "python")
    run(page, [first], {})
    answers = ast.literal_eval(capsys.readouterr().out.splitlines()[-1])
    assert {answer["label"] for answer in answers} <= {"positive", "negative"}
    assert len(answers) == 2

    tokenizer, model = tiny_tokenizer(), tiny_model("bloom")
    namespace: dict[str, Any] = {
        "model": model,
        "tokenizer": tokenizer,
        "rows": [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}] * 4,
        "collator": DataCollatorForSeq2Seq(tokenizer),
        "Trainer": Trainer,
        "TrainingArguments": functools.partial(
            TrainingArguments, max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True
        ),
    }
    trainer = run(page, [second], namespace)["trainer"]
    assert trainer.train().global_step == 2


@pytest.mark.parametrize("page", READMES, ids=lambda page: page.name)
def test_the_readme_s_engine_answers_in_an_event_loop_and_its_adapter_loads(page: Path, place: Path) -> None:
    changes = {"task.max_new_tokens": 4, "prompt.encoder.hidden_size": 8}
    train_example("alpaca_zh_bloom.yaml", "alpaca_zh", place, **changes)
    answer = run(page, [indented(page, "await ")], {"ptune": ptune})["answer"]
    assert isinstance(answer.text, str)
    assert answer.ids

    (line,) = re.findall(r"`(PeftModel\.from_pretrained\(.*?\))`", page.read_text(encoding="utf-8"))
    names = {"PeftModel": PeftModel, "model": AutoModelForCausalLM.from_pretrained(ptune.MINI)}
    assert eval(line, names).get_prompt(batch_size=1).shape == (1, 10, 320)


def test_the_page_of_searching_searches(place: Path) -> None:
    page = ROOT / "docs" / "search.md"
    prompt = run(page, fenced(page, "python"), {})["prompt"]
    assert prompt.summary["steps"] == 3
    assert (place / "prompts" / "sst2" / "run" / "search.json").is_file()


def test_the_page_of_evaluation_tells_wet_from_dry() -> None:
    page = ROOT / "docs" / "evaluation.md"
    values = run(page, fenced(page, "python"), {})
    assert -20 < values["dry"] < 0
    assert -20 < values["wet"] < 0
    assert values["wet"] != values["dry"]


def test_the_page_of_heads_tags(place: Path) -> None:
    train_example("conll2003.yaml", "conll2003", place)
    page, engine = ROOT / "docs" / "heads.md", ptune.Engine("mini")
    (block,) = fenced(page, "python")
    run(page, [block], {"engine": engine})
    lines = [line for line in block.splitlines() if line.startswith("engine.tag")]
    (answers,) = (eval(line, {"engine": engine}) for line in lines)
    assert [len(answer["tokens"]) for answer in answers] == [6, 2]


def test_the_page_for_scripts_with_trainer_trains_saves_and_is_read_back(place: Path) -> None:
    page = ROOT / "docs" / "drop_in.md"
    whole, read_back, settings = fenced(page, "python")
    namespace = run(page, [whole], {})
    model, tokenizer = namespace["model"], namespace["tokenizer"]
    assert namespace["ids"].shape[0] == 2
    checkpoints = sorted(path.name for path in Path("runs/fruit").iterdir())
    assert checkpoints == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    question = "Human: Name a fruit.\n\nAssistant: "
    ids = tokenizer(question, return_tensors="pt").input_ids
    said = tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :])
    logits = model.eval()(input_ids=ids).logits

    tuned = run(page, [read_back], namespace)["tuned"]
    with torch.no_grad():
        assert torch.allclose(tuned(input_ids=ids).logits[:, 10:], logits, rtol=1e-4, atol=1e-4)

    Path("fruit.yaml").write_text(replaced(fenced(page, "yaml")[0]), encoding="utf-8")
    (command,) = re.findall(r"^    ptune (import .*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 0, result.output
    engine = ptune.Engine("mini")
    engine.load("prompts/fruit", name="fruit")
    options = ptune.GenerationOptions(max_new_tokens=8)
    assert engine.generate("fruit", "Name a fruit.", options).text == said

    again = run(page, [settings], namespace)["model"]
    assert again.rows().shape == model.rows().shape
