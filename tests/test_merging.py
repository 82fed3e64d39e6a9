"""A merged model is a plain model folder that says what ptune's own engine says, and never a virtual token."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from merged_models import TOKENS, on_disk, soft_prompt
from tiny_models import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import ptune
from ptune import Engine, GenerationOptions, MergedModel, merge_prompts
from ptune.errors import BackboneError, OutputError, SoftPromptError
from ptune.merging import output_row
from ptune.merging.folder import DESCRIPTION, write_folder
from ptune.merging.tokenizer_files import add_tokens
from ptune.models.backbone import Backbone
from ptune.pretrained.stored_tensors import INDEX, TensorFile, shards_of

CHAT = "[P*3]Human: {instruction}[?\n{input}]\nAssistant:{answer}"
TEXTS = ["The film was a quiet wonder", "苹果很新鲜", "Give three tips"]


def greedy(folder: Path, content: str, **kwargs: Any) -> list[int]:
    """Return what a plain model says, by nothing but transformers."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        **kwargs,
    )
    said = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    return said[: said.index(2)] if 2 in said else said


def virtual_probability(merged: MergedModel) -> tuple[float, int]:
    """Return the greatest summed probability of virtual tokens over what the merged model itself writes."""
    model = AutoModelForCausalLM.from_pretrained(merged.folder)
    starts = torch.randint(3, TOKENS, (80, 1), generator=torch.Generator().manual_seed(9))
    torch.manual_seed(9)
    texts = model.generate(starts, max_new_tokens=30, do_sample=True, top_k=0, eos_token_id=-1, pad_token_id=0)
    ids = [token for task in merged.tasks.values() for token in task]
    with torch.no_grad():
        probabilities = torch.softmax(model(texts).logits.double(), -1)
    return float(probabilities[..., ids].sum(-1).max()), texts.numel()


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_merge_that_is_stopped_leaves_nothing_and_says_so(sent: signal.Signals, tmp_path: Path) -> None:
    soft_prompt(on_disk(tmp_path / "model"), CHAT, 3).save(tmp_path / "chat")
    typed = [sys.executable, "-m", "ptune", "merge", str(tmp_path / "chat"), "--output", str(tmp_path / "merged")]
    merge = subprocess.Popen(
        typed,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background ignore it
    )
    assert merge.stderr is not None
    lines = [merge.stderr.readline()]
    assert lines[0] == f"loading {tmp_path / 'model'}\n"
    while "round 1" not in lines[-1] and lines[-1]:
        lines.append(merge.stderr.readline())
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".ptune-tmp")]
    merge.send_signal(sent)
    said, error = merge.communicate(timeout=60)
    assert (merge.returncode, said) == (130, "")
    assert error == f"ptune: stopped before the merged model was whole; nothing was written to {tmp_path / 'merged'}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chat", "model"]


@pytest.mark.parametrize(
    ("family", "tied", "rows"),
    [
        ("gpt2", True, 352),
        ("gpt2", False, TOKENS),
        ("bloom", True, TOKENS),
        ("opt", True, 352),
        ("gpt_neox", False, TOKENS),
        ("gpt_neox", True, 352),
        ("llama", True, TOKENS),
        ("llama", False, 352),
        ("mistral", False, TOKENS),
        ("qwen2", True, 352),
        ("qwen3", True, TOKENS),
        ("gemma", True, 352),
    ],
)
def test_a_merged_model_says_what_the_engine_says_and_no_virtual_token(
    family: str, tied: bool, rows: int, tmp_path: Path
) -> None:
    backbone = on_disk(tmp_path / "model", family, tied=tied, rows=rows)
    prompts = {
        "chat": soft_prompt(backbone, CHAT, 3),
        "film": soft_prompt(backbone, "{text}[P*2] so[P*30]{answer}", 32, seed=1, labels=True),
    }
    merged = merge_prompts(prompts, tmp_path / "merged", backbone=backbone)
    first = len(backbone.tokenizer)
    assert merged.tasks["chat"] == [first, first + 1, first + 2]
    assert merged.rows % 64 == 0
    assert merged.untied == tied
    with Engine(backbone) as engine:
        for name, prompt in prompts.items():
            engine.add(name, prompt)
        answers = []
        for task in ("chat", "film", None):
            expected = engine.generate(task, TEXTS[0], GenerationOptions(max_new_tokens=8)).ids
            assert greedy(merged.folder, TEXTS[0], task=task) == list(expected)
            answers.append(expected)
    assert len(set(answers)) > 1
    probability, positions = virtual_probability(merged)
    assert positions > 2000
    assert probability < 1e-6
    assert merged.probability < 1e-6


def test_hundreds_of_prompts_stand_in_one_folder_and_the_rest_of_a_sharded_model_is_linked(tmp_path: Path) -> None:
    backbone = on_disk(tmp_path / "model", "gpt_neox", tied=False, max_shard_size="40KB")
    prompts = {
        f"task {number}": soft_prompt(
            backbone, ("[P*2]{text}{answer}", "{text}[P*2]{answer}")[number % 2], 2, seed=number
        )
        for number in range(400)
    }
    began = time.process_time()
    merged = merge_prompts(prompts, tmp_path / "merged", backbone=backbone)
    assert time.process_time() - began < 60
    assert len({token for task in merged.tasks.values() for token in task}) == 800
    shards = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert 1 <= len(merged.rewritten) <= 2 < len(shards)
    for shard in shards:
        same = os.path.samefile(tmp_path / "model" / shard, merged.folder / shard)
        assert same == (shard not in merged.rewritten), shard
    index = json.loads((merged.folder / "model.safetensors.index.json").read_text())
    for shard in shards:
        assert all(index["weight_map"][name] == shard for name in TensorFile.open(merged.folder / shard).entries)
    with Engine(backbone) as engine:
        for name in ("task 7", "task 398"):
            engine.add(name, prompts[name])
            expected = engine.generate(name, TEXTS[1], GenerationOptions(max_new_tokens=8)).ids
            assert greedy(merged.folder, TEXTS[1], task=name) == list(expected)


def test_the_command_line_merges_and_a_fresh_process_loads_with_nothing_but_transformers(tmp_path: Path) -> None:
    backbone = on_disk(tmp_path / "model")
    prompt = soft_prompt(backbone, CHAT, 3)
    prompt.save(tmp_path / "chat")
    command = [sys.executable, "-m", "ptune", "merge", str(tmp_path / "chat"), "--output", str(tmp_path / "merged")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"3, ids {TOKENS} to {TOKENS + 2}" in done.stdout
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert again.stderr.strip().endswith("holds a merged model; choose another --output, or --overwrite it")
    script = (
        "import sys\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"folder = {str(tmp_path / 'merged')!r}\n"
        "tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)\n"
        f"chat = [{{'role': 'user', 'content': {TEXTS[2]!r}}}]\n"
        "inputs = tokenizer.apply_chat_template(chat, return_dict=True, return_tensors='pt')\n"
        "said = model.generate(**inputs, max_new_tokens=8, do_sample=False)\n"
        "print(said[0, inputs['input_ids'].shape[1]:].tolist())\n"
        "assert 'ptune' not in sys.modules\n"
    )
    fresh = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert fresh.returncode == 0, fresh.stderr
    said = json.loads(fresh.stdout)
    with Engine(backbone) as engine:
        engine.add("chat", prompt)
        expected = list(engine.generate("chat", TEXTS[2], GenerationOptions(max_new_tokens=8)).ids)
    assert said[: len(expected)] == expected
    readme = (tmp_path / "merged" / "README.md").read_text()
    for engine_name in ("vLLM", "SGLang", "TGI", "llama.cpp", "transformers"):
        assert engine_name in readme


def test_an_older_merge_is_replaced_whole_and_anything_else_is_left_alone(tmp_path: Path) -> None:
    backbone = on_disk(tmp_path / "model")
    prompts = {"one": soft_prompt(backbone, CHAT, 3)}
    merge_prompts(prompts, tmp_path / "merged", backbone=backbone)
    (tmp_path / "merged" / "of the old one").write_text("")
    with pytest.raises(OutputError, match="holds a merged model"):
        merge_prompts(prompts, tmp_path / "merged", backbone=backbone)
    merge_prompts(prompts | {"two": prompts["one"]}, tmp_path / "merged", backbone=backbone, overwrite=True)
    assert not (tmp_path / "merged" / "of the old one").exists()
    assert set(json.loads((tmp_path / "merged" / "ptune_merged.json").read_text())["tasks"]) == {"one", "two"}
    with pytest.raises(OutputError, match="is no merged model and is not overwritten"):
        merge_prompts(prompts, tmp_path / "model", backbone=backbone, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "model"]


def test_half_precision_rounds_the_rows_and_says_what_that_costs(tmp_path: Path) -> None:
    backbone = on_disk(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    backbone = Backbone.load(str(tmp_path / "model"))
    prompt = soft_prompt(backbone, CHAT, 3)
    merged = merge_prompts({"chat": prompt}, tmp_path / "merged", backbone=backbone)
    assert 1e-4 < merged.rounding.relative < 1e-2
    assert merged.rounding.contexts > 0
    assert merged.probability < 1e-6
    stored = AutoModelForCausalLM.from_pretrained(merged.folder, dtype="auto").get_input_embeddings().weight
    assert torch.equal(stored[merged.tasks["chat"]], prompt.rows.to(torch.bfloat16))


def test_what_cannot_be_merged_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = on_disk(tmp_path / "model", "llama")
    prompt = soft_prompt(backbone, CHAT, 3)
    for name in ("a", "b"):
        prompt.save(tmp_path / name / "chat")
    output = tmp_path / "merged"
    with pytest.raises(SoftPromptError, match=r'are both named "chat".*rename one of the folders'):
        merge_prompts([tmp_path / "a" / "chat", tmp_path / "b" / "chat"], output)
    with pytest.raises(SoftPromptError, match="no soft prompt to merge"):
        merge_prompts({}, output)

    masked = Backbone(tiny_model("bert"), tiny_tokenizer("bert"), "bert")
    with pytest.raises(SoftPromptError, match="kind masked cannot be merged"):
        merge_prompts({"one": soft_prompt(masked, "{text}[P*2]{answer}", 2)}, output)
    other = Backbone(tiny_model("llama", seed=3), tiny_tokenizer(), "other")
    with pytest.raises(SoftPromptError, match='"two" on another backbone, "other"'):
        merge_prompts({"one": prompt, "two": soft_prompt(other, CHAT, 3)}, output)
    with pytest.raises(SoftPromptError, match='"two": the soft prompt belongs to another backbone'):
        merge_prompts({"two": soft_prompt(other, CHAT, 3)}, output, backbone=backbone)

    tiny_model("llama").save_pretrained(tmp_path / "isotropic")
    tiny_tokenizer().save_pretrained(tmp_path / "isotropic")
    isotropic = Backbone.load(str(tmp_path / "isotropic"))
    monkeypatch.setattr(output_row, "_ROUNDS", (128,))
    with pytest.raises(BackboneError, match="virtual tokens cannot be kept from being generated"):
        merge_prompts({"one": soft_prompt(isotropic, CHAT, 3)}, output, backbone=isotropic)

    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(BackboneError, match="is not stored as safetensors"):
        merge_prompts({"chat": prompt}, output)
    assert not output.exists()
    assert hasattr(ptune, "merge_prompts")


def test_a_merge_whose_place_is_gone_meanwhile_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "merged"
    folder.mkdir()
    (folder / DESCRIPTION).write_text("{}")

    def write(fresh: Path) -> None:
        fresh.mkdir()
        (fresh / DESCRIPTION).write_text("{}")
        shutil.rmtree(folder)  # by somebody else

    with pytest.raises(OutputError, match=r'cannot replace ".*merged": No such file .*; close what uses it'):
        write_folder(folder, write, overwrite=True)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_was_changed_since_it_was_loaded_is_not_merged(tmp_path: Path) -> None:
    backbone = on_disk(tmp_path / "model", "llama")
    with torch.no_grad():
        backbone.model.get_input_embeddings().weight[5] += 1
    with pytest.raises(BackboneError, match=r'was changed since it was loaded from ".*model"; save it'):
        merge_prompts({"chat": soft_prompt(backbone, CHAT, 3)}, tmp_path / "merged", backbone=backbone)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["<|one:0|>", "<unk>"], "the tokenizer already has tokens named like the virtual ones; merge into the plain"),
        (["<x", "<x<x"], "the tokenizer does not give added tokens back as it got them; nothing can be merged"),
    ],
)
def test_a_tokenizer_that_cannot_hold_the_tokens_is_refused(names: list[str], sentence: str, tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    taken = [tiny_tokenizer().eos_token if name == "<unk>" else name for name in names]
    with pytest.raises(BackboneError, match=sentence):
        add_tokens(tmp_path, taken)


@pytest.mark.parametrize("index", [[], {}, {"weight_map": {"a": "../model.safetensors"}}], ids=str)
def test_an_index_that_names_no_files_beside_it_is_refused(index: Any, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(BackboneError, match=r'index\.json" names no files beside it; copy the model again'):
        shards_of(tmp_path)


def test_a_file_of_weights_that_is_cut_while_it_is_copied_is_refused(tmp_path: Path) -> None:
    on_disk(tmp_path / "model", "llama")
    path = tmp_path / "model" / "model.safetensors"
    file = TensorFile.open(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BackboneError, match=r'model\.safetensors" is cut short; copy the model again'):
        file.write_with(tmp_path / "copy.safetensors", {})
