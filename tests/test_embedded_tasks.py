"""Soft prompts sent as embeddings: rows are the backbone's own, answers the engine's, and prompts come and go."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from gateways import engine_over_merged, engine_with_embeddings, in_thread, rows_of, saved
from safetensors import safe_open
from safetensors.torch import save_file
from serving import rows, soft_prompts, tiny_backbone
from tiny_models import tiny_model, tiny_tokenizer
from typer.testing import CliRunner

from ptune.cli import app as command_line
from ptune.engine.engine import Engine
from ptune.errors import BackboneError, ConfigError
from ptune.generation.generate import GenerationOptions
from ptune.models.backbone import Backbone
from ptune.serve.embedded_tasks import EmbeddedTasks, as_embeds, embedded
from ptune.serve.gateway import create_gateway
from ptune.serve.settings import GatewaySettings
from ptune.serve.stored_backbone import StoredBackbone
from ptune.serve.vllm_process import running_vllm

TEXTS = ["great soup", "terrible film and a wrong waiter", "苹果", "the door"]
SETTINGS = GatewaySettings(watch_seconds=0.1, max_tokens=200)
NEW = 9


def on_disk(folder: Path, family: str, **saving: Any) -> Path:
    tiny_model(family).save_pretrained(folder, **saving)
    tiny_tokenizer(family).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "bloom", "gpt_neox", "qwen3"])
def test_the_rows_are_those_of_the_embedding_and_no_other_weight_is_needed(family: str, tmp_path: Path) -> None:
    folder = on_disk(tmp_path / family, family)
    backbone = Backbone.load(str(folder))
    ids = [3, 0, 17, backbone.vocabulary_size - 1, 3, backbone.vocabulary_size + 1, backbone.vocabulary_size, 5]
    virtual = rows(backbone, 2, 1)
    matrix = backbone.model.get_input_embeddings().weight
    with safe_open(folder / "model.safetensors", "pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    kept = {name: tensor for name, tensor in kept.items() if torch.equal(tensor, matrix)}
    save_file(kept, folder / "model.safetensors")  # nobody could load this model any more
    stored = StoredBackbone(str(folder))
    expected = torch.cat(
        [backbone.embeddings(torch.tensor(ids[:5])), virtual[[1, 0]], backbone.embeddings(torch.tensor(ids[7:]))]
    )
    found = embedded(stored, ids, virtual)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert torch.equal(rows_of({"prompt_embeds": as_embeds(found)}), expected)
    assert stored.context_limit == backbone.context_limit
    assert stored.matches(backbone.fingerprint())
    other = backbone.fingerprint()
    other["rows"][0] += 1.0
    assert not stored.matches(other)


def test_rows_are_found_among_several_files_and_come_in_the_dtype_that_they_are_stored_in(tmp_path: Path) -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    stored = StoredBackbone(str(tmp_path))
    found = embedded(stored, [7, 352, 8], torch.full((1, 32), 0.3))
    assert found.dtype == torch.bfloat16
    expected = model.get_input_embeddings().weight[[7, 8]]
    assert torch.equal(found[[0, 2]], expected)
    assert torch.equal(found[1], torch.full((32,), 0.3, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("gemma", "GemmaForCausalLM .* scales its embeddings, which are sent here as they are stored; merge"),
        ("bert", 'cannot serve ".*" by embeddings: it is a masked language model, and engines such as vLLM let'),
        ("t5", "it is an encoder-decoder"),
    ],
)
def test_what_cannot_be_sent_as_it_is_stored_is_refused_by_name(family: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=words):
        StoredBackbone(str(on_disk(tmp_path, family)))


def test_a_folder_without_a_readable_matrix_is_refused(tmp_path: Path) -> None:
    folder = on_disk(tmp_path, "llama")
    with safe_open(folder / "model.safetensors", "pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    matrix = kept.pop("model.embed_tokens.weight")
    save_file(kept, folder / "model.safetensors")
    with pytest.raises(
        BackboneError, match=r"no input matrix called model\.embed_tokens\.weight; merge its soft prompts"
    ):
        StoredBackbone(str(folder))
    save_file(kept | {"model.embed_tokens.weight": matrix.to(torch.int8)}, folder / "model.safetensors")
    with pytest.raises(BackboneError, match=r"is quantised \(I8\)"):
        StoredBackbone(str(folder))


@dataclass
class Served:
    """A gateway over an engine that takes embeddings, the engine alone to compare with, and the folder of prompts."""

    url: str
    alone: Engine
    prompts: Path
    asked: list[dict[str, Any]]

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def expected(self, name: str | None, text: str = TEXTS[0], new: int = NEW) -> str:
        return self.alone.generate(name, text, GenerationOptions(max_new_tokens=new)).text

    def said(self, name: str) -> str:
        return self.client.completions.create(model=name, prompt=TEXTS[0], max_tokens=NEW).choices[0].text

    def until(self, condition: Any) -> None:
        until = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < until
            time.sleep(0.05)


@contextmanager
def gateway(folder: Path, engine: FastAPI, alone: Engine, asked: list[dict[str, Any]]) -> Iterator[Served]:
    model, prompts = saved(folder, alone.backbone, {name: one.prompt for name, one in alone.prompts.items()})
    tasks = EmbeddedTasks(Path(prompts), StoredBackbone(model))
    with in_thread(engine) as behind, in_thread(create_gateway([behind], tasks, SETTINGS)) as url:
        yield Served(url, alone, Path(prompts), asked)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    backbone, asked = tiny_backbone(), []
    with Engine(backbone) as alone:
        for name, prompt in soft_prompts(backbone).items():
            alone.add(name, prompt)
        engine = engine_with_embeddings(tiny_model("llama"), backbone.tokenizer, asked)
        with gateway(tmp_path, engine, alone, asked) as made:
            yield made


def test_each_soft_prompt_is_a_model_that_says_what_the_engine_says(served: Served) -> None:
    client = served.client
    models = {model.id: model.task for model in client.models.list()}  # type: ignore[attr-defined]
    assert models["tiny"] is None
    assert (models["answer"], models["mood"]) == ("generation", "classification")
    texts = client.completions.create(model="answer", prompt=TEXTS, max_tokens=NEW)
    assert [choice.text for choice in texts.choices] == [served.expected("answer", text) for text in TEXTS]
    assert all("prompt_embeds" in body for body in served.asked[-len(TEXTS) :])
    messages: list[Any] = [{"role": "user", "content": TEXTS[0]}]
    chat = client.chat.completions.create(model="answer", messages=messages, max_tokens=NEW)
    assert (chat.choices[0].message.content, chat.model) == (served.expected("answer"), "answer")
    assert chat.object == "chat.completion"
    assert chat.usage is not None
    assert chat.usage.completion_tokens == NEW
    client.chat.completions.create(model="brief", messages=messages)
    assert served.asked[-1]["max_tokens"] == 5  # the soft prompt's own
    bare = client.completions.create(model="tiny", prompt=TEXTS[0], max_tokens=NEW)
    assert bare.choices[0].text == served.expected(None)
    assert served.asked[-1]["prompt"] == served.alone.backbone.tokenizer(TEXTS[0])["input_ids"]
    turns: list[Any] = [*messages, {"role": "assistant", "content": "good"}, {"role": "user", "content": TEXTS[3]}]
    client.chat.completions.create(model="answer", messages=turns, max_tokens=NEW)
    assert len(rows_of(served.asked[-1])) > len(rows_of(served.asked[-4]))
    told = client.completions.create(model="answer", prompt=TEXTS[0], max_tokens=NEW, logprobs=1)
    assert told.choices[0].logprobs is not None
    assert len(told.choices[0].logprobs.token_logprobs or ()) == NEW


def test_no_more_is_asked_for_than_the_context_leaves_room_for(served: Served) -> None:
    limit = served.alone.backbone.context_limit
    text = TEXTS[0]
    while len(served.alone.backbone.tokenizer(text)["input_ids"]) < limit - 40:
        text += " soup"
    for name in ("answer", "tiny"):
        said = served.client.completions.create(model=name, prompt=text, max_tokens=100)
        assert said.usage is not None
        read = said.usage.prompt_tokens
        assert served.asked[-1]["max_tokens"] == limit - read < 100
        assert said.choices[0].text == served.expected(name if name != "tiny" else None, text, limit - read)


def test_answers_are_streamed(served: Served) -> None:
    client = served.client
    parts = list(client.completions.create(model="answer", prompt=TEXTS[0], max_tokens=NEW, stream=True))
    assert "".join(part.choices[0].text for part in parts) == served.expected("answer")
    messages: list[Any] = [{"role": "user", "content": TEXTS[0]}]
    events = list(
        client.chat.completions.create(
            model="answer",
            messages=messages,
            max_tokens=NEW,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *told, last = events
    assert "".join(event.choices[0].delta.content or "" for event in told) == served.expected("answer")
    assert [event.choices[0].delta.role for event in told] == ["assistant", None]
    assert {(event.model, event.object) for event in events} == {("answer", "chat.completion.chunk")}
    assert last.usage is not None
    assert last.usage.completion_tokens == NEW


def test_a_soft_prompt_is_added_replaced_and_removed_while_it_runs(served: Served) -> None:
    backbone, answer = served.alone.backbone, soft_prompts(served.alone.backbone)["answer"]
    before = served.said("answer")
    assert before == served.expected("answer")
    new = replace(answer, rows=rows(backbone, 3, 77))
    served.alone.add("answer", new)
    assert served.expected("answer") != before
    new.save(served.prompts / "answer")
    served.until(lambda: served.said("answer") == served.expected("answer"))
    served.alone.add("later", replace(answer, rows=rows(backbone, 3, 78)))
    served.alone.prompts["later"].prompt.save(served.prompts / "later")
    served.until(lambda: "later" in {model.id for model in served.client.models.list()})
    assert served.said("later") == served.expected("later")
    shutil.rmtree(served.prompts / "later")
    served.until(lambda: "later" not in {model.id for model in served.client.models.list()})
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        served.said("later")


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("completions", {"model": "answr", "prompt": "a"}, 404, '"answer"?'),
        ("completions", {"model": "mood", "prompt": "a"}, 400, "chooses among answers (classification)"),
        ("classify", {"model": "mood", "input": "a"}, 400, "ptune's own engine"),
        ("completions", {"model": "answer", "prompt": "a", "fields": {"inpt": "b"}}, 400, 'Did you mean "input"?'),
        ("completions", {"model": "answer", "prompt": "a", "fields": {"instruction": "b"}}, 400, "the text itself"),
        ("completions", {"model": "tiny", "prompt": "a", "fields": {"input": "b"}}, 400, "no template, so no fields"),
        ("completions", {"model": "answer", "prompt": "a", "no_repeat_ngram_size": 2}, 400, "no_repeat_ngram_size"),
        (
            "completions",
            {"model": "answer", "prompt": "a", "repetition_penalty": 1.5},
            400,
            "repetition_penalty is not",
        ),
        ("completions", {"model": "answer", "prompt": "word " * 900}, 400, "shorten it"),
        ("completions", {"model": "answer", "prompt": "a", "max_tokens": 201}, 400, "200 tokens at most"),
        ("completions", {"model": "answer", "prompt": ["a", "b"], "stream": True}, 400, "one text at a time"),
        (
            "chat/completions",
            {"model": "answer", "messages": [{"role": "user", "content": "a"}], "logprobs": True},
            400,
            "/v1/completions alone",
        ),
        (
            "chat/completions",
            {"model": "answer", "messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "a"}]},
            400,
            "no field system",
        ),
        (
            "chat/completions",
            {"model": "tiny", "messages": [{"role": "user", "content": "a"}]},
            400,
            "no chat template",
        ),
    ],
)
def test_what_it_cannot_do_it_refuses_in_a_sentence(
    path: str, body: Any, status: int, words: str, tmp_path: Path
) -> None:
    model, prompts = saved(tmp_path, tiny_backbone(), soft_prompts(tiny_backbone()))
    tasks = EmbeddedTasks(Path(prompts), StoredBackbone(model))
    with in_thread(create_gateway(["http://127.0.0.1:9"], tasks, SETTINGS)) as url:
        answer = httpx.post(f"{url}/v1/{path}", json=body, timeout=60)
        assert answer.status_code == status
        assert words in answer.json()["error"]["message"]


def _refusing() -> FastAPI:
    app = engine_over_merged(None, [])  # type: ignore[arg-type]
    app.router.routes = [route for route in app.router.routes if getattr(route, "path", "") != "/v1/completions"]

    @app.post("/v1/completions")
    def completions(body: dict[str, Any]) -> Any:
        if "prompt_embeds" in body:
            return JSONResponse({"error": {"message": "You must set --enable-prompt-embeds"}}, 400)
        logprobs = {"tokens": ["a"], "token_logprobs": [-1.0]}
        return {"choices": [{"text": "a", "logprobs": logprobs}]}

    return app


def _another_model() -> FastAPI:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(3)
    return engine_with_embeddings(model, tiny_tokenizer(), [])


@pytest.mark.parametrize(
    ("engine", "words"),
    [(_refusing, "start it with --enable-prompt-embeds"), (_another_model, "otherwise than its own ids")],
)
def test_a_server_that_does_not_read_the_rows_as_its_own_gets_no_requests(
    engine: Any, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backbone = tiny_backbone()
    with Engine(backbone) as alone:
        alone.add("answer", soft_prompts(backbone)["answer"])
        with gateway(tmp_path, engine(), alone, []) as served:
            body = {"model": "answer", "prompt": "a"}
            assert httpx.post(f"{served.url}/v1/completions", json=body, timeout=60).status_code == 503
            assert httpx.get(f"{served.url}/readyz").status_code == 503
            time.sleep(3 * SETTINGS.watch_seconds)
    told = [record.reason for record in caplog.records if record.message == "a server cannot be used"]  # type: ignore[attr-defined]
    assert len(told) == 1  # however often it is looked at
    assert words in told[0]


def test_mistakes_at_the_start_are_sentences(tmp_path: Path) -> None:
    def error(*arguments: str) -> str:
        found = CliRunner().invoke(command_line, ["serve", "--port", "0", *arguments]).exception
        assert isinstance(found, ConfigError | BackboneError), found
        return str(found)

    assert "they are sent as embeddings" in error("--engine", "vllm")
    assert "give --merged or --prompts, not both" in error(
        "--upstream", "http://a", "--merged", str(tmp_path), "--prompts", str(tmp_path)
    )
    assert "there is no folder" in error("--upstream", "http://a", "--prompts", str(tmp_path / "none"))
    assert "no config.json" in error("--upstream", "http://a", "--prompts", str(tmp_path), "--backbone", str(tmp_path))
    arguments = ("--engine", "vllm", "--prompts", str(tmp_path), "--vllm-python", "no-such-python")
    assert 'cannot run "no-such-python"' in error(*arguments)


def test_a_server_that_does_not_answer_in_time_is_ended(tmp_path: Path) -> None:
    silent = tmp_path / "python"
    silent.write_text("#!/bin/sh\nexec sleep 100\n")
    silent.chmod(0o755)
    begun = time.monotonic()
    with pytest.raises(ConfigError, match=r"vLLM does not answer after 1 s; give it more by --vllm-start"):
        with running_vllm(str(silent), tmp_path, [], 1):
            pass
    assert time.monotonic() - begun < 30
