"""What is wrong with a folder is said in words, and no kill, reader or failure ever meets half a soft prompt."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from soft_prompts import assert_same, make
from tiny_models import tiny_model, tiny_tokenizer

from ptune.errors import OutputError, SoftPromptError
from ptune.models.backbone import Backbone
from ptune.soft_prompts.library import read_library
from ptune.soft_prompts.soft_prompt import SoftPrompt


@pytest.fixture(scope="module")
def gpt2() -> Backbone:
    return Backbone(tiny_model("gpt2"), tiny_tokenizer(), "tiny/gpt2")


# Damaged folders


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "ptune.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def replace_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    data = save(tensors)
    (folder / "soft_prompt.safetensors").write_bytes(data)
    edit(folder, lambda values: values["virtual_tokens"].update(sha256=hashlib.sha256(data).hexdigest()))


def cut_tensors(folder: Path) -> None:
    path = folder / "soft_prompt.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def alter_tensors(folder: Path) -> None:
    rows = load_file(folder / "soft_prompt.safetensors")
    rows["virtual_tokens"][2, 3] += 1e-3
    save_file(rows, folder / "soft_prompt.safetensors")


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no description": (
        lambda folder: (folder / "ptune.json").unlink(),
        r'"\S+prompt" is no soft prompt: it has no ptune\.json; its saving or copying was cut off, so save or copy',
    ),
    "broken JSON": (
        lambda folder: (folder / "ptune.json").write_text('{"format_version": 1,'),
        r"ptune\.json, line 1, column \d+: broken JSON",
    ),
    "another JSON": (
        lambda folder: (folder / "ptune.json").write_text("[1]"),
        r'ptune\.json" expected format_version 1 and holds None; it is not ptune\'s or was altered, so copy it again',
    ),
    "no version": (
        lambda folder: edit(folder, lambda values: values.pop("format_version")),
        r'ptune\.json" expected format_version 1 and holds None',
    ),
    "a version that is no number": (
        lambda folder: edit(folder, lambda values: values.update(format_version="1")),
        r'ptune\.json" expected format_version 1 and holds \'1\'',
    ),
    "a newer version": (
        lambda folder: edit(folder, lambda values: values.update(format_version=2, new_idea=True)),
        r'ptune\.json" is of format_version 2, and this ptune reads up to 1; it was written by a newer ptune: upgrade',
    ),
    "an unknown field": (
        lambda folder: edit(folder, lambda values: values["task"].update(colour="red")),
        r'ptune\.json" was altered or comes from another version of ptune \(task\.classification\.colour is unknown',
    ),
    "a missing field": (
        lambda folder: edit(folder, lambda values: values.pop("template")),
        r'ptune\.json" was altered .* \(template is missing\); copy it again or upgrade ptune$',
    ),
    "no tensors": (
        lambda folder: (folder / "soft_prompt.safetensors").unlink(),
        r'"\S+prompt" is damaged: it has no soft_prompt\.safetensors; copy the folder again$',
    ),
    "cut tensors": (
        cut_tensors,
        r'soft_prompt\.safetensors" was altered or cut short: its SHA-256 is not the one in ptune\.json; copy',
    ),
    "altered tensors": (alter_tensors, r'soft_prompt\.safetensors" was altered or cut short'),
    "tensors of another file": (
        lambda folder: replace_tensors(folder, {"prompt_embeddings": torch.zeros(4, 32)}),
        r"expected one tensor virtual_tokens \[4, 32\] and holds prompt_embeddings \[4, 32\]; copy the",
    ),
    "more tensors": (
        lambda folder: replace_tensors(folder, {"virtual_tokens": torch.zeros(4, 32), "more": torch.zeros(1)}),
        r"expected one tensor virtual_tokens \[4, 32\] and holds more \[1\], virtual_tokens \[4, 32\]",
    ),
    "another shape": (
        lambda folder: replace_tensors(folder, {"virtual_tokens": torch.zeros(5, 32)}),
        r"expected one tensor virtual_tokens \[4, 32\] and holds virtual_tokens \[5, 32\]",
    ),
    "rows that are not finite": (
        lambda folder: replace_tensors(folder, {"virtual_tokens": torch.full((4, 32), torch.nan)}),
        r'"\S+prompt" is damaged: virtual tokens \[0, 1, 2, 3\] hold a value that is infinite or not a number',
    ),
    "an edited template": (
        lambda folder: edit(folder, lambda values: values.update(template="[P*6]{text}{answer}")),
        r'"\S+prompt" is damaged: the template has 6 virtual tokens, and the tensor .* \[4, 32\]; write \[P\*4\]',
    ),
    "a broken template": (
        lambda folder: edit(folder, lambda values: values.update(template="[P*4]{text}")),
        r'"\S+prompt" is damaged: .*answer',
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_refused_in_one_sentence(tmp_path: Path, gpt2: Backbone, name: str) -> None:
    damage, message = DAMAGES[name]
    folder = tmp_path / "prompt"
    make(gpt2).save(folder)
    damage(folder)
    with pytest.raises(SoftPromptError, match=message) as caught:
        SoftPrompt.load(folder)
    assert "\n" not in str(caught.value) or "template" in name


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_can_be_saved_over(tmp_path: Path, gpt2: Backbone, name: str) -> None:
    folder = tmp_path / "prompt"
    make(gpt2).save(folder)
    DAMAGES[name][0](folder)
    prompt = make(gpt2, rows=torch.ones(4, 32))
    prompt.save(folder)
    assert_same(SoftPrompt.load(folder), prompt)


def test_a_folder_that_is_not_there_is_named_with_the_nearest_one(tmp_path: Path, gpt2: Backbone) -> None:
    make(gpt2).save(tmp_path / "sentiment")
    with pytest.raises(SoftPromptError) as caught:
        SoftPrompt.load(tmp_path / "sentimnet")
    expected = f'there is no soft prompt folder "{tmp_path}/sentimnet"; check the path. Did you mean "sentiment"?'
    assert str(caught.value) == expected


def test_what_stands_in_a_folder_instead_is_told(tmp_path: Path, gpt2: Backbone) -> None:
    make(gpt2).save(tmp_path / "b")
    make(gpt2).save(tmp_path / "a")
    (tmp_path / "unfinished" / "run").mkdir(parents=True)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "else").mkdir()
    for folder, mend in {
        tmp_path: "name one of the soft prompts in it: a, b",
        tmp_path / "unfinished": "its run has not ended yet, so go on with it by --resume",
        tmp_path / "adapter": "it is an adapter of PEFT, so import it first by `ptune import`",
        tmp_path / "else": "name the folder that a run wrote",
    }.items():
        with pytest.raises(SoftPromptError) as caught:
            SoftPrompt.load(folder)
        assert str(caught.value) == f'"{folder}" is no soft prompt: it has no ptune.json; {mend}'
    with pytest.raises(SoftPromptError, match=r'ptune\.json" is a file; a soft prompt is given as its folder'):
        SoftPrompt.load(tmp_path / "a" / "ptune.json")


# Saving again

WRITER = """
import sys, torch
from ptune.config.task import GenerationConfig
from ptune.soft_prompts.soft_prompt import SoftPrompt
count = 0
while True:
    tokens = 1 + count % 3
    SoftPrompt(
        rows=torch.full((tokens, 20_000), float(count)), template=f"[P*{tokens}]{count}{{text}}{{answer}}",
        task=GenerationConfig(), overlong="cut", backbone_name="b",
        fingerprint={"kind": "causal", "config": {}, "rows": [0.5]},
        summary={"count": count},
    ).save(sys.argv[1])
    if not count: print("ready", flush=True)
    count += 1
"""


def start_writer(folder: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WRITER, str(folder)]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "ready\n"
    return writer


def assert_whole(prompt: SoftPrompt) -> int:
    count = int(prompt.summary["count"])
    tokens = 1 + count % 3
    assert prompt.template == f"[P*{tokens}]{count}{{text}}{{answer}}"
    assert torch.equal(prompt.rows, torch.full((tokens, 20_000), float(count)))
    return count


def test_a_kill_at_any_moment_leaves_a_whole_soft_prompt(tmp_path: Path) -> None:
    moments = random.Random(0)
    interrupted = kills = 0
    # A few times, and on until two kills have fallen between tensors and description: without those it shows nothing.
    while kills < 3 or interrupted < 2:
        assert kills < 40, "no kill falls within a save"
        writer = start_writer(tmp_path)
        time.sleep(moments.uniform(0, 0.05))
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        assert_whole(SoftPrompt.load(tmp_path))
        kills += 1
        digest = hashlib.sha256((tmp_path / "soft_prompt.safetensors").read_bytes()).hexdigest()
        interrupted += digest not in (tmp_path / "ptune.json").read_text()


def test_who_reads_while_another_saves_gets_a_whole_soft_prompt(tmp_path: Path) -> None:
    writer = start_writer(tmp_path)
    try:
        counts = [assert_whole(SoftPrompt.load(tmp_path)) for _ in range(100)]
        while counts[-1] < counts[0] + 3:  # a busy machine may let the writer wait
            counts.append(assert_whole(SoftPrompt.load(tmp_path)))
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
    assert counts == sorted(counts)


def test_a_save_that_fails_leaves_the_soft_prompt_before_it(tmp_path: Path, gpt2: Backbone) -> None:
    prompt = make(gpt2)
    prompt.save(tmp_path)
    broken = make(gpt2, rows=torch.ones(4, 32), summary={"rows": object()})
    for _ in range(2):
        with pytest.raises(OutputError, match=r'cannot write "\S+ptune\.json": the summary expected JSON values'):
            broken.save(tmp_path)
        assert_same(SoftPrompt.load(tmp_path), prompt)
    make(gpt2, rows=torch.zeros(4, 32)).save(tmp_path)
    assert not SoftPrompt.load(tmp_path).rows.any()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("summary", "said"),
    [
        ({"before": 3}, "summary: takes names with values as before"),
        ({"after": [0.5]}, "summary: takes names with values as after"),
        ({"metric": {"a": 1}}, "summary: takes a text as metric"),
    ],
)
def test_a_summary_that_readers_would_stumble_on_is_neither_written_nor_read(
    tmp_path: Path, gpt2: Backbone, summary: dict[str, Any], said: str
) -> None:
    prompt = make(gpt2)
    prompt.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(OutputError, match=rf'cannot write "\S+ptune\.json": {said}'):
        make(gpt2, rows=torch.ones(4, 32), summary=summary).save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    edit(tmp_path, lambda values: values["summary"].update(summary))
    with pytest.raises(SoftPromptError, match=said):
        SoftPrompt.load(tmp_path)
    assert said in str(read_library(tmp_path)[0].mistake)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, gpt2: Backbone) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write \S+/file/prompt/.*: a part of the path is a file"):
        make(gpt2).save(tmp_path / "file" / "prompt")
