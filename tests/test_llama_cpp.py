"""A merged model under llama.cpp says what ptune's engine says: run by `make test-llama-cpp`, never by `make test`."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from merged_models import on_disk, soft_prompt
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptune import Engine, GenerationOptions, merge_prompts
from ptune.models.backbone import Backbone

LLAMA_CPP = os.environ.get("PTUNE_LLAMA_CPP", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not LLAMA_CPP, reason="PTUNE_LLAMA_CPP names no Python with it; make test-llama-cpp does"),
]

TEXTS = ["The film was a quiet wonder", "苹果很新鲜，物流也快", "Give three tips for", "A"]
TEMPLATES = {"front": ("[P*4]Human: {text}\nAssistant:", 4), "behind": ("{text}[P*3]", 3), "long": ("[P*9]{text}", 9)}


@pytest.mark.parametrize("kind", ["mini", "tied", "untied"])
def test_llama_cpp_says_what_the_engine_says(kind: str, tmp_path: Path) -> None:
    backbone = Backbone.load("mini") if kind == "mini" else on_disk(tmp_path / "model", "llama", tied=kind == "tied")
    prompts = {
        name: soft_prompt(backbone, f"{template}{{answer}}", count, seed=number)
        for number, (name, (template, count)) in enumerate(TEMPLATES.items())
    }
    folder = tmp_path / "merged"
    merge_prompts(prompts, folder, backbone=backbone)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    contexts, expected = [], []
    with Engine(backbone) as engine:
        for name, prompt in prompts.items():
            engine.add(name, prompt)
        for name in prompts:
            for text in TEXTS:
                asked = [{"role": "user", "content": text}]
                contexts.append(tokenizer.apply_chat_template(asked, task=name, return_dict=False))
                expected.append(list(engine.generate(name, text, GenerationOptions(max_new_tokens=12)).ids))
    assert len({tuple(ids) for ids in expected}) > 3
    said = greedy(folder, tmp_path, contexts)
    end = tokenizer.eos_token_id
    assert [ids[: ids.index(end)] if end in ids else ids for ids in said] == expected


def greedy(folder: Path, tmp_path: Path, contexts: list[list[int]]) -> list[list[int]]:
    """Return what llama.cpp says behind contexts, twelve tokens each."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    np.savez(tmp_path / "tensors.npz", **tensors)
    model.config.to_json_file(tmp_path / "config.json", use_diff=False)
    command = [LLAMA_CPP, str(Path(__file__).parent / "llama_cpp_greedy.py"), str(tmp_path), "12"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, input=json.dumps(contexts), capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[list[int]] = json.loads(done.stdout)
    return found
