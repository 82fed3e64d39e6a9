"""A real vLLM says what ptune's engine says, over a merged model and by embeddings; run by `make test-vllm`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from gateways import drained, in_thread, ptune_serve
from merged_models import on_disk, soft_prompt
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ptune import Engine, GenerationOptions, merge_prompts
from ptune.config.run import ModelConfig
from ptune.models.backbone import Backbone
from ptune.serve.gateway import create_gateway
from ptune.serve.merged_tasks import MergedTasks
from ptune.serve.vllm_process import running_vllm
from ptune.soft_prompts.soft_prompt import SoftPrompt
from ptune.template import Template

VLLM = os.environ.get("PTUNE_VLLM", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not VLLM, reason="PTUNE_VLLM names no Python with vLLM; make test-vllm does"),
]

TEXTS = ["The film was a quiet wonder", "苹果很新鲜，物流也快", "Give three tips for", "what is the weather"]
TEMPLATES = {"front": "[P*4]Human: {text}\nAssistant:", "behind": "{text}[P*3]", "both": "[P*2]Say of {text}[P*2]:"}
ARGUMENTS = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "400", "--max-num-seqs", "8"]
NEW = 12
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


def llama(folder: Path) -> Backbone:
    """Return a small random Llama whose heads are as wide as vLLM wants them, which those of no tiny model are."""
    made = on_disk(folder)  # for its tokenizer
    torch.manual_seed(3)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=made.vocabulary_size, max_position_embeddings=512))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter[0] = 0
        model.get_input_embeddings().weight[:, 0] = 6.0
    model.save_pretrained(folder)
    return Backbone.load(str(folder))


def prompt_of(backbone: Backbone, template: str, seed: int) -> SoftPrompt:
    """Return a soft prompt whose numbers bfloat16 holds, in which `mini` is stored: merging rounds none of them."""
    template += "{answer}"
    made = soft_prompt(backbone, template, Template.parse(template).num_virtual_tokens, seed=seed)
    return dataclasses.replace(made, rows=made.rows.bfloat16().float())


@pytest.fixture(scope="module", params=["mini", "llama"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    if request.param == "mini":
        backbone = Backbone.load(ModelConfig(name="mini", dtype="float32"))  # as vLLM runs it here
    else:
        backbone = llama(tmp_path_factory.mktemp("llama"))
    with Engine(backbone) as made:
        for seed, (name, template) in enumerate(TEMPLATES.items()):
            made.add(name, prompt_of(backbone, template, seed))
        yield made


@pytest.fixture(scope="module")
def merged(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "model"
    prompts = {name: loaded.prompt for name, loaded in engine.prompts.items()}
    return merge_prompts(prompts, folder, backbone=engine.backbone).folder


@pytest.fixture(scope="module")
def vllm(merged: Path) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patched:
        for name, value in ENVIRONMENT.items():
            patched.setenv(name, value)
        with running_vllm(VLLM, merged, ARGUMENTS, 500) as url:
            yield url


def whole(text: str) -> str:
    """Return a text without a last character of which only a part was written: vLLM leaves it out."""
    return text.rstrip("\ufffd")


def by_transformers(folder: Path, task: str, text: str) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        task=task,
    )
    said = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(said, skip_special_tokens=True))


def test_vllm_says_what_the_engine_and_transformers_say(engine: Engine, merged: Path, vllm: str) -> None:
    client = openai.OpenAI(base_url=f"{vllm}/v1", api_key="none", timeout=120)
    (model,) = client.models.list()
    said = []
    for task in TEMPLATES:
        for text in TEXTS:
            answer = client.chat.completions.create(
                model=model.id,
                messages=[{"role": "user", "content": text}],
                temperature=0,
                max_tokens=NEW,
                extra_body={"chat_template_kwargs": {"task": task}},
            )
            said.append(answer.choices[0].message.content)
            assert said[-1] == whole(engine.generate(task, text, GenerationOptions(max_new_tokens=NEW)).text)
        assert said[-1] == whole(by_transformers(merged, task, text))
    assert len(set(said)) > len(TEXTS)


def test_where_no_task_is_named_the_bare_model_answers(engine: Engine, vllm: str) -> None:
    client = openai.OpenAI(base_url=f"{vllm}/v1", api_key="none", timeout=120)
    (model,) = client.models.list()
    expected = whole(engine.generate(None, TEXTS[0], GenerationOptions(max_new_tokens=NEW)).text)
    plain = client.completions.create(model=model.id, prompt=TEXTS[0], temperature=0, max_tokens=NEW)
    assert plain.choices[0].text == expected
    messages: list[Any] = [{"role": "user", "content": TEXTS[0]}]
    chat = client.chat.completions.create(model=model.id, messages=messages, temperature=0, max_tokens=NEW)
    assert chat.choices[0].message.content == expected


def test_the_gateway_has_each_task_as_a_model(engine: Engine, merged: Path, vllm: str) -> None:
    with in_thread(create_gateway([vllm], MergedTasks.read(merged))) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120)
        bare = next(model.id for model in client.models.list() if model.task is None)  # type: ignore[attr-defined]
        for name in (*TEMPLATES, bare):
            task = None if name == bare else name
            expected = whole(engine.generate(task, TEXTS[0], GenerationOptions(max_new_tokens=NEW)).text)
            assert client.completions.create(model=name, prompt=TEXTS[0], max_tokens=NEW).choices[0].text == expected
            parts = list(client.completions.create(model=name, prompt=TEXTS[0], max_tokens=NEW, stream=True))
            assert "".join(part.choices[0].text for part in parts) == expected
        answer = httpx.post(
            f"{url}/v1/chat/completions", json={"model": "front", "messages": [{"role": "user", "content": "a " * 500}]}
        )
        assert answer.status_code == 400
        assert "400" in answer.json()["error"]["message"]  # vLLM's own words on its limit


@pytest.mark.parametrize("engine", ["llama"], indirect=True)
def test_one_command_starts_vllm_and_ends_it(engine: Engine, merged: Path) -> None:
    with vllm_of_its_own("--merged", str(merged)) as (url, process):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120)
        said = client.completions.create(model="both", prompt=TEXTS[1], max_tokens=NEW).choices[0].text
        assert said == whole(engine.generate("both", TEXTS[1], GenerationOptions(max_new_tokens=NEW)).text)
        sessions = {session for _, parent, session in processes() if parent == process.pid}
        assert sessions
        process.terminate()
        assert process.wait(90) == 0
        until = time.monotonic() + 10  # vLLM's engine ends too; what was killed gives its memory back first
        while sessions & {session for _, _, session in processes()}:
            assert time.monotonic() < until
            time.sleep(0.1)


@pytest.mark.parametrize("engine", ["llama", "mini"], indirect=True)
def test_soft_prompts_come_and_go_as_embeddings_while_vllm_runs(engine: Engine, tmp_path: Path) -> None:
    for name, loaded in engine.prompts.items():
        loaded.prompt.save(tmp_path / name)
    given = ("--backbone", engine.backbone.name, "--prompts", str(tmp_path), "--watch", "0.2")
    with vllm_of_its_own(*given) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120)

        def expected(name: str | None, text: str) -> str:
            return whole(engine.generate(name, text, GenerationOptions(max_new_tokens=NEW)).text)

        def said(name: str, text: str) -> str:
            return client.completions.create(model=name, prompt=text, max_tokens=NEW).choices[0].text

        bare = next(model.id for model in client.models.list() if model.task is None)  # type: ignore[attr-defined]
        assert said(bare, TEXTS[0]) == expected(None, TEXTS[0])
        for name in TEMPLATES:
            assert [said(name, text) for text in TEXTS] == [expected(name, text) for text in TEXTS]
            messages: list[Any] = [{"role": "user", "content": TEXTS[0]}]
            chat = client.chat.completions.create(model=name, messages=messages, max_tokens=NEW)
            assert chat.choices[0].message.content == expected(name, TEXTS[0])
            events = client.chat.completions.create(model=name, messages=messages, max_tokens=NEW, stream=True)
            assert "".join(event.choices[0].delta.content or "" for event in events) == expected(name, TEXTS[0])

        new = prompt_of(engine.backbone, TEMPLATES["front"], 9)
        engine.add("new", new)
        text = next(text for text in TEXTS if expected("new", text) != expected("front", text))
        before, after = expected("front", text), expected("new", text)
        engine.remove("new")
        new.save(tmp_path / "front")  # vLLM has the old one's beginnings in its cache
        until = time.monotonic() + 60
        while (now := said("front", text)) == before:
            assert time.monotonic() < until
            time.sleep(0.2)
        assert now == after


@contextmanager
def vllm_of_its_own(*options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run `ptune serve --engine vllm` while the block does; yield its URL and its process."""
    arguments = [f"--vllm-arg={argument}" for argument in ARGUMENTS]
    command = ("--engine", "vllm", "--vllm-python", VLLM, *options, *arguments)
    process, url = ptune_serve(*command, **ENVIRONMENT)
    drained(process)
    try:
        yield url, process
    finally:
        process.terminate()
        try:
            process.wait(90)
        finally:
            process.kill()
            process.wait()


def processes() -> list[tuple[int, int, int]]:
    """Return the id, the parent's id and the session of each process that runs."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            state, parent, _, session = file.read_text().rpartition(") ")[2].split()[:4]
            if state != "Z":  # ended, and nobody has asked how
                found.append((int(file.parent.name), int(parent), int(session)))
    return found
