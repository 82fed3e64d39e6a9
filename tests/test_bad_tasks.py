"""What only a task can find wrong, through the real command line: one sentence, exit code 2, nothing written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_models import tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

RELATIONS = [
    {"tokens": ["the", "soup", "of", "the", "waiter"], "head": "soup", "tail": "waiter", "label": "yes"},
    {"tokens": ["a", "film", "in", "a", "room"], "head": "film", "tail": "room", "label": "no"},
] * 4


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words between blanks, so that blanks alone are no token, as in BERT's tokenizers."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "[MASK]", "yes", "no", "soup", "film", "it", "was"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "[MASK]", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal model, and a masked one of whole words."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, family, tokenizer in (("causal", "gpt2", tiny_tokenizer()), ("masked", "bert", word_tokenizer())):
        tiny_model(family).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def ptune(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ptune", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def config_file(folder: Path, model: Path, records: list[dict[str, Any]], template: str, **task: Any) -> Path:
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records), encoding="utf-8")
    values = {
        "model": str(model),
        "data": {"train": str(folder / "train.jsonl"), "dev": str(folder / "train.jsonl")},
        "task": {"type": "classification", "verbalizer": {"yes": " yes", "no": " no"}} | task,
        "prompt": {"template": template, "max_length": 20, "encoder": {"type": "embedding"}},
        "training": {"max_steps": 1, "batch_size": 2, "evaluations": 1},
        "output": str(folder / "out"),
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return folder / "run.yaml"


@pytest.mark.parametrize(
    ("model", "mistake", "template", "task", "expected"),
    [
        (
            "causal",
            {"head": "door"},
            "{tokens}[P*4] {head}[P*3] {tail}{answer}",
            {"contained": {"head": "tokens", "tail": "tokens"}},
            ['train.jsonl, line 9: the head "door" does not stand in its tokens; mend the record, or leave head out'],
        ),
        (
            "causal",
            {},
            "{tokens}[P*4]{answer}",
            {"contained": {"haed": "tokens"}},
            ['train.jsonl, line 1 lacks the field "haed" that task.contained names', 'Did you mean "head"?'],
        ),
        (
            "masked",
            {},
            "[P*4]{tokens} it was{answer}",
            {"verbalizer": {"yes": " ", "no": " no"}},
            ["label \"yes\": its words ' ' tokenise to nothing; choose others"],
        ),
        (
            "masked",
            {},
            "[P*4]{tokens}" + " it was" * 10 + "{answer}",
            {},
            ["the template's own words take 20 tokens, the answer needs 1, and the limit is max_length 20", "shorten"],
        ),
    ],
    ids=["head-not-in-text", "no-such-field", "label-of-nothing", "no-room-for-the-answer"],
)
def test_a_mistake_is_one_sentence(
    places: Path,
    tmp_path: Path,
    model: str,
    mistake: dict[str, Any],
    template: str,
    task: dict[str, Any],
    expected: list[str],
) -> None:
    records = [*RELATIONS, RELATIONS[0] | mistake]
    done = ptune("train", config_file(tmp_path, places / model, records, template, **task))
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("ptune: ")
    assert done.stderr.count("\n") == 1
    assert all(part in done.stderr for part in expected), done.stderr
    assert not (tmp_path / "out").exists()


def test_entities_that_stand_in_the_text_are_trained_on_and_asked_for_again_at_prediction(
    places: Path, tmp_path: Path
) -> None:
    template = "{tokens}[P*4] {head}[P*3] {tail}{answer}"
    contained = {"head": "tokens", "tail": "tokens"}
    file = config_file(tmp_path, places / "causal", RELATIONS, template, contained=contained, calibration="prior")
    assert (done := ptune("train", file)).returncode == 0, done.stderr
    (tmp_path / "wrong.jsonl").write_text(json.dumps(RELATIONS[0] | {"tail": "door"}) + "\n", encoding="utf-8")
    done = ptune("predict", tmp_path / "out", tmp_path / "wrong.jsonl")
    assert done.returncode == 2
    assert 'wrong.jsonl, line 1: the tail "door" does not stand in its tokens' in done.stderr


@pytest.mark.parametrize("name", ["boolq", "cb", "rte", "wic", "wsc"])
def test_examples_of_pairs_set_each_text_by_a_field_of_its_own(name: str) -> None:
    from ptune.config.file import load_config
    from ptune.template import Template

    file = Path(__file__).parents[1] / "examples" / f"fewglue_{name}.yaml"
    template = Template.parse(load_config(file).prompt.template)
    assert len(template.fields) >= 2
    assert "field" in file.read_text(encoding="utf-8").splitlines()[1].lower()
