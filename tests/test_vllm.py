"""A merged model under a plain vLLM says what ptune's engine says: run by `make test-vllm`, never by `make test`."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator

import httpx
import openai
import pytest
import torch
from merged_models import on_disk, soft_prompt
from transformers import LlamaConfig, LlamaForCausalLM

from ptune import Engine, GenerationOptions, merge_prompts
from ptune.backbone import Backbone
from ptune.template import Template

VLLM = os.environ.get("PTUNE_VLLM", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not VLLM, reason="PTUNE_VLLM names no Python with vLLM; make test-vllm does"),
]

TEXTS = ["The film was a quiet wonder", "苹果很新鲜，物流也快", "Give three tips for", "A", "what is the weather"]
TEMPLATES = {"front": "[P*4]Human: {text}\nAssistant:", "behind": "{text}[P*3]", "both": "[P*2]Say of {text}[P*2]:"}


@pytest.fixture(scope="module", params=["mini", "llama"])
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    if request.param == "mini":
        return Backbone.load("mini")
    folder = tmp_path_factory.mktemp("llama")
    made = on_disk(folder)  # its tokenizer; heads of 64 numbers, which vLLM wants, are in no tiny model
    torch.manual_seed(3)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=made.vocabulary_size, max_position_embeddings=512))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter[0] = 0
        model.get_input_embeddings().weight[:, 0] = 2.0
    model.save_pretrained(folder)
    return Backbone.load(str(folder))


@pytest.fixture(scope="module")
def served(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, openai.OpenAI]]:
    folder = tmp_path_factory.mktemp("merged") / "model"
    prompts = {
        name: soft_prompt(backbone, f"{template}{{answer}}", _virtual_tokens(template), seed=number)
        for number, (name, template) in enumerate(TEMPLATES.items())
    }
    merge_prompts(prompts, folder, backbone=backbone)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Of `vllm serve` the wheel for processors has no more than this: its command asks for a package of another name.
    command = [VLLM, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    command += ["--served-model-name", "merged", "--enforce-eager", "--dtype", "float32"]
    command += ["--max-model-len", "400", "--max-num-seqs", "8"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    log = folder.parent / "log"
    with log.open("w") as output, Engine(backbone) as engine:
        for name, prompt in prompts.items():
            engine.add(name, prompt)
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            until = time.monotonic() + 500
            while not _answers(f"http://127.0.0.1:{port}/health"):
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < until, log.read_text()[-3000:]
                time.sleep(1)
            yield engine, openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120)
        finally:
            process.terminate()
            process.wait(60)


def _virtual_tokens(template: str) -> int:
    return Template.parse(template + "{answer}").num_virtual_tokens


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).is_success
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("task", TEMPLATES)
def test_vllm_says_what_the_engine_says(served: tuple[Engine, openai.OpenAI], task: str) -> None:
    engine, client = served
    said = []
    for text in TEXTS:
        expected = engine.generate(task, text, GenerationOptions(max_new_tokens=12)).text
        answer = client.chat.completions.create(
            model="merged",
            messages=[{"role": "user", "content": text}],
            temperature=0,
            max_tokens=12,
            extra_body={"chat_template_kwargs": {"task": task}},
        )
        assert answer.choices[0].message.content == expected
        said.append(expected)
    assert len(set(said)) > 1


def test_the_bare_model_is_still_there(served: tuple[Engine, openai.OpenAI]) -> None:
    engine, client = served
    expected = engine.generate(None, TEXTS[0], GenerationOptions(max_new_tokens=12)).text
    answer = client.completions.create(model="merged", prompt=TEXTS[0], temperature=0, max_tokens=12)
    assert answer.choices[0].text == expected
