"""The files in examples/: each is a run that fits its data set, and the tutorial's job runs through in a terminal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from example_records import LANGUAGES, write_facts, write_records
from tiny_models import VOCABULARY, tiny_model, tiny_tokenizer

import ptune
from ptune.config.candidates import SearchConfig, load_search
from ptune.config.file import load_config
from ptune.config.run import RunConfig
from ptune.config.task import TASK_CONFIGS, ClassificationConfig, ExtractionConfig, GenerationConfig
from ptune.models.backbone import Backbone
from ptune.records.record import Record
from ptune.soft_prompts.soft_prompt import SoftPrompt
from ptune.tasks.registry import completed
from ptune.template import Template
from ptune.training.assembly import task_of_run, template_for, train_and_dev_records

Records: TypeAlias = tuple[list[Record], list[Record]]

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
    "sst2_search.yaml": "sst2",
}
"""Folders of the data sets of examples that are not called as theirs."""

QUESTION = "数学考试有哪些技巧？"


@pytest.fixture(scope="module")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of BLOOM's shape, on disk."""
    folder = tmp_path_factory.mktemp("bloom")
    tiny_model("bloom").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def command(*arguments: object) -> str:
    """Return what a command prints that runs through."""
    done = subprocess.run(
        [sys.executable, "-m", "ptune", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def settings_of(name: str, changes: Mapping[str, Any] | None = None) -> tuple[RunConfig, SearchConfig | None]:
    """Return the settings of an example's run, and those of its search where it is one."""
    config, search = load_search(EXAMPLES / name, changes)
    return config, search if search.vary else None


def tiny_backbone(family: str) -> Backbone:
    """Return a tiny model whose tokenizer has a chat template, which one of the examples asks for."""
    tokenizer = tiny_tokenizer(family)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    return Backbone(tiny_model(family), tokenizer, family)


def test_there_are_examples_and_the_tutorials_job_is_among_them() -> None:
    assert "alpaca_zh_bloom.yaml" in FILES
    assert len(FILES) >= 26
    assert set(DATA_SETS) <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_an_example_is_a_run_with_a_task_and_virtual_tokens(name: str) -> None:
    config, search = settings_of(name)
    assert isinstance(config, RunConfig)
    assert isinstance(config.task, TASK_CONFIGS)
    template = Template.parse(config.prompt.template)
    assert template.num_virtual_tokens > 0
    assert template.fields
    assert config.output.parts[0] == "prompts"
    first = (EXAMPLES / name).read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith(f"# ptune {'search' if search else 'train'} examples/{name}")


def test_no_two_examples_write_into_one_folder() -> None:
    outputs = [settings_of(name)[0].output for name in FILES]
    assert len(set(outputs)) == len(outputs)


@pytest.mark.parametrize("name", ["lama.yaml", "lama_candidates.yaml"])
def test_facts_of_lama_s_shape_are_learnt_and_predicted(name: str, bloom: Path, tmp_path: Path) -> None:
    write_facts(tmp_path)
    prompt, fields = tmp_path / "prompt", load_config(EXAMPLES / name).data.fields
    few = ["--model", bloom, "--training.max_steps", 3, "--training.evaluations", 1]
    assert "24 examples" in command("train", EXAMPLES / name, "--data", tmp_path, "--output", prompt, *few)
    mapping = [part for field, column in fields.items() for part in ("--field", f"{field}={column}")]
    answers = [json.loads(line) for line in command("predict", prompt, tmp_path, *mapping).splitlines()]
    assert len(answers) == 12
    for answer in answers:
        assert sum(answer["probabilities"].values()) == pytest.approx(1)
        if fields:
            assert answer["candidates"] == [answer[choice] for choice in answer["probabilities"]]
            assert answer["sentence"] == answer["masked_sentences"][0]
        else:
            assert list(answer["probabilities"]) == LANGUAGES


def example_data(name: str, source: str, folder: Path, request: pytest.FixtureRequest) -> Path:
    """Return the folder of an example's data: of the real set, or of a few records of its shape, written to folder."""
    if name.startswith("lama"):  # there is no set of it at hand
        write_facts(folder)
        return folder
    data_set = DATA_SETS.get(name, Path(name).stem)
    if source == "written":
        write_records(data_set, folder)
        found = folder
    else:
        found = request.getfixturevalue("real_data") / data_set
    if name == "summaries.yaml" and source == "real":
        recipe = EXAMPLES.parent / "recipes" / "summaries.py"
        texts = found.with_name("text_en")
        subprocess.run([sys.executable, recipe, texts, folder], check=True, stdout=subprocess.DEVNULL)
        return folder
    if name == "entity_types.yaml":
        made = folder / "made"
        subprocess.run([sys.executable, EXAMPLES / "data" / "entity_types.py", found, made], check=True)
        return made
    return found


def few_steps(name: str, data: Path, output: Path) -> tuple[RunConfig, SearchConfig | None, Records]:
    """Return an example's settings for two steps of a tiny model, those of its search if it has one, and its records.

    The tiny tokenizer spells words, which may begin one another, so labels are letters. What few records leave out of
    labels and tags is taken from dev.
    """
    changes = {"data.train": str(data), "data.limit": 30, "output": str(output), "training.max_steps": 2}
    config, search = settings_of(name, changes | {"training.evaluations": 1})
    train, dev = train_and_dev_records(config)
    task = completed(config.task, [*train, *dev])
    if isinstance(task, ClassificationConfig):
        letters = {label: f" {chr(ord('A') + number)}" for number, label in enumerate(task.verbalizer)}
        task = task.model_copy(update={"verbalizer": letters})
    if isinstance(task, GenerationConfig | ExtractionConfig):
        task = task.model_copy(update={"max_new_tokens": 8})
    return config.model_copy(update={"task": task}), search, (train, dev[:30])


@pytest.mark.parametrize("source", ["written", "real"])
@pytest.mark.parametrize("name", FILES)
def test_an_example_fits_its_data_set_and_is_trained(
    name: str, source: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    data = example_data(name, source, data, request)
    config, search, (train, dev) = few_steps(name, data, tmp_path / "prompt")
    backbone = tiny_backbone("bert" if name == "conll2003_bert.yaml" else "bloom")
    template = template_for(config, backbone)
    task = task_of_run(config, template, backbone)
    examples = [task.example(record) for record in (*train, *dev)]
    rows = [row for example in examples if example is not None for row in example.rows]
    assert sum(example is not None for example in examples) > len(examples) // 2
    assert {sum(token >= VOCABULARY for token in row.ids) for row in rows} == {template.num_virtual_tokens}

    records = train[:6], dev[:4]
    if search is None:
        prompt = ptune.train(config, backbone=backbone, records=records)
    else:
        prompt = ptune.search(config, search, backbone=backbone, records=records)
    assert prompt.summary["steps"] == 2
    saved = SoftPrompt.load(config.output)
    assert saved.rows.shape[0] == template.num_virtual_tokens
    assert (saved.deep is not None) == config.prompt.deep
    log = [json.loads(line) for line in (config.output / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in log if "loss" in line] == [0, 2]


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
    said = command("train", EXAMPLES / "alpaca_zh_bloom.yaml", *where, "--limit", 24, "--dev-limit", 8)
    assert "24 examples" in said
    assert "8 held out, 3 steps" in said
    prompt = SoftPrompt.load(output)
    assert prompt.rows.shape == (10, 32)
    assert prompt.summary["steps"] == 3
    assert prompt.summary["after"]["loss"] < prompt.summary["before"]["loss"]
    log = [json.loads(line) for line in (output / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in log if "loss" in line] == [0, 1, 2, 3]
    assert command("generate", output, QUESTION).strip()
