"""The files in examples/: each is a run that fits its data set, and the tutorial's job runs through in a terminal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import tiny_model, tiny_tokenizer

from ptune.config.file import load_config
from ptune.config.run import RunConfig
from ptune.config.task import TASK_CONFIGS, ClassificationConfig
from ptune.models.backbone import Backbone
from ptune.soft_prompts.soft_prompt import SoftPrompt
from ptune.tasks import completed
from ptune.template import Template
from ptune.training.assembly import build_task, read_records

EXAMPLES = Path(__file__).parent.parent / "examples"
FILES = sorted(path.name for path in EXAMPLES.glob("*.yaml"))
DATA_SETS = {
    "alpaca_zh_bloom.yaml": "alpaca_zh",
    "conll2003_bert.yaml": "conll2003",
    "entity_types.yaml": "conll2003",
    "fewglue_rte_linear.yaml": "fewglue_rte",
    "conll2003_extraction.yaml": "conll2003",
    "resume_ner_zh_extraction.yaml": "resume_ner_zh",
    "shopping_categories.yaml": "shopping_zh",
    "sst2_deep.yaml": "sst2",
    "sst2_mini.yaml": "sst2",
}
"""Folders of the data sets of examples that are not called as theirs."""

LANGUAGES = ["English", "French", "German", "Italian", "Spanish", "Russian"]
QUESTION = "数学考试有哪些技巧？"


@pytest.fixture(scope="module")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of BLOOM's shape, on disk."""
    folder = tmp_path_factory.mktemp("bloom")
    tiny_model("bloom").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def ptune(*arguments: object) -> str:
    """Return what a command prints that runs through."""
    done = subprocess.run(
        [sys.executable, "-m", "ptune", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_examples_and_the_tutorials_job_is_among_them() -> None:
    assert "alpaca_zh_bloom.yaml" in FILES
    assert len(FILES) >= 3
    assert set(DATA_SETS) <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_an_example_is_a_run_with_a_task_and_virtual_tokens(name: str) -> None:
    config = load_config(EXAMPLES / name)
    assert isinstance(config, RunConfig)
    assert isinstance(config.task, TASK_CONFIGS)
    template = Template.parse(config.prompt.template)
    assert template.num_virtual_tokens > 0
    assert template.fields
    assert config.output.parts[0] == "prompts"
    first = (EXAMPLES / name).read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith(f"# ptune train examples/{name}")


def test_no_two_examples_write_into_one_folder() -> None:
    outputs = [load_config(EXAMPLES / name).output for name in FILES]
    assert len(set(outputs)) == len(outputs)


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
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize("name", ["lama.yaml", "lama_candidates.yaml"])
def test_facts_of_lama_s_shape_are_learnt_and_predicted(name: str, bloom: Path, tmp_path: Path) -> None:
    write_facts(tmp_path)
    prompt, fields = tmp_path / "prompt", load_config(EXAMPLES / name).data.fields
    few = ["--model", bloom, "--training.max_steps", 3, "--training.evaluations", 1]
    assert "24 examples" in ptune("train", EXAMPLES / name, "--data", tmp_path, "--output", prompt, *few)
    mapping = [part for field, column in fields.items() for part in ("--field", f"{field}={column}")]
    answers = [json.loads(line) for line in ptune("predict", prompt, tmp_path, *mapping).splitlines()]
    assert len(answers) == 12
    for answer in answers:
        assert sum(answer["probabilities"].values()) == pytest.approx(1)
        if fields:
            assert answer["candidates"] == [answer[choice] for choice in answer["probabilities"]]
            assert answer["sentence"] == answer["masked_sentences"][0]
        else:
            assert list(answer["probabilities"]) == LANGUAGES


@pytest.mark.parametrize("name", FILES)
def test_an_example_fits_its_data_set(name: str, request: pytest.FixtureRequest, bloom: Path, tmp_path: Path) -> None:
    if name.startswith("lama"):
        folder = tmp_path
        write_facts(folder)
    else:
        real_data = request.getfixturevalue("real_data")
        folder = real_data / DATA_SETS.get(name, Path(name).stem)
    if name == "entity_types.yaml":
        subprocess.run([sys.executable, EXAMPLES / "data" / "entity_types.py", folder, tmp_path], check=True)
        folder = tmp_path
    if name == "summaries.yaml":
        folder, recipe = tmp_path, EXAMPLES.parent / "recipes" / "summaries.py"
        subprocess.run([sys.executable, recipe, real_data / "text_en", folder], check=True, stdout=subprocess.DEVNULL)
    config = load_config(EXAMPLES / name, {"data.train": str(folder), "data.limit": 30})
    if isinstance(config.task, ClassificationConfig):  # the tiny tokenizer spells words, which may begin one another
        letters = {label: f" {chr(ord('A') + number)}" for number, label in enumerate(config.task.verbalizer)}
        config = config.model_copy(update={"task": config.task.model_copy(update={"verbalizer": letters})})
    template = Template.parse(config.prompt.template)
    train, dev = read_records(config)
    assert train
    assert dev
    config = config.model_copy(update={"task": completed(config.task, [*train, *dev])})
    task = build_task(config, template, Backbone.load(str(bloom)))
    examples = [task.example(record) for record in (*train[:30], *dev[:30])]
    assert sum(example is not None for example in examples) > len(examples) // 2
    virtual = [
        sum(token < 0 or token >= 352 for token in row.ids)
        for example in examples
        if example is not None
        for row in example.rows
    ]
    assert set(virtual) == {template.num_virtual_tokens}


def test_the_tutorials_job_is_the_tutorials() -> None:
    config = load_config(EXAMPLES / "alpaca_zh_bloom.yaml")
    assert (config.model.name, config.data.train) == ("Langboat/bloom-1b4-zh", "shibing624/alpaca-zh")
    assert config.prompt.template == "[P*10]Human: {instruction}[?\n{input}]\n\nAssistant: {answer}"
    encoder, training = config.prompt.encoder, config.training
    assert (encoder.type, encoder.num_layers, encoder.hidden_size, encoder.dropout) == ("mlp", 5, 1024, 0.1)
    assert (training.batch_size, training.gradient_accumulation_steps, training.epochs) == (1, 8, 1)
    assert (training.logging_steps, config.prompt.max_length) == (10, 256)


def test_the_tutorials_job_runs_through_and_answers(real_data: Path, bloom: Path, tmp_path: Path) -> None:
    folder, output = real_data / "alpaca_zh", tmp_path / "prompt"
    where = ["--model", bloom, "--data", folder, "--output", output]
    said = ptune("train", EXAMPLES / "alpaca_zh_bloom.yaml", *where, "--limit", 24, "--dev-limit", 8)
    assert "24 examples" in said
    assert "8 held out, 3 steps" in said
    prompt = SoftPrompt.load(output)
    assert prompt.rows.shape == (10, 32)
    assert prompt.summary["steps"] == 3
    assert prompt.summary["after"]["loss"] < prompt.summary["before"]["loss"]
    log = [json.loads(line) for line in (output / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in log if "loss" in line] == [0, 1, 2, 3]
    assert ptune("generate", output, QUESTION).strip()
