"""The gateway gives the answers of the servers behind it, each exactly once, also while one of them is killed."""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi.responses import JSONResponse
from gateways import breaking, drained, engine_over_merged, in_thread, ptune_serve, saved
from serving import soft_prompts, tiny_backbone
from typer.testing import CliRunner

from ptune.cli import app as command_line
from ptune.engine.engine import Engine
from ptune.errors import ConfigError
from ptune.generation.generate import GenerationOptions
from ptune.rendering.renderer import Renderer
from ptune.serve.contexts import chat_context
from ptune.serve.gateway import create_gateway
from ptune.serve.merged_tasks import MergedTasks
from ptune.serve.protocol import ChatRequest
from ptune.serve.refusals import RefusedError
from ptune.serve.settings import GatewaySettings
from ptune.template import Template

TEXTS = ["great soup", "terrible film and a wrong waiter", "苹果", "the door"]
SETTINGS = GatewaySettings(watch_seconds=0.2, max_tokens=200)


@pytest.fixture(scope="module")
def alone() -> Iterator[Engine]:
    backbone = tiny_backbone()
    with Engine(backbone) as engine:
        for name, prompt in soft_prompts(backbone).items():
            engine.add(name, prompt)
        yield engine


def merged_tasks() -> MergedTasks:
    prompts = soft_prompts(tiny_backbone())
    tasks = {
        name: {"task": prompts[name].task.model_dump(mode="json"), "fields": fields}
        for name, fields in (("answer", ["instruction", "input"]), ("brief", ["instruction"]), ("mood", ["text"]))
    }
    return MergedTasks("tiny", tasks)


def test_one_of_two_servers_is_killed_under_load_and_every_request_has_one_right_answer(
    alone: Engine, tmp_path: Path
) -> None:
    model, folder = saved(tmp_path, tiny_backbone(), soft_prompts(tiny_backbone()))
    servers: list[tuple[subprocess.Popen[str], str]] = []
    arguments = ("--backbone", model, "--prompts", folder)
    expected = {
        (name, text): alone.generate(name, text, GenerationOptions(max_new_tokens=9)).text
        for name in ("answer", "brief")
        for text in TEXTS
    }
    labels = {text: alone.classify("mood", [text])[0]["label"] for text in TEXTS}
    try:
        servers += [ptune_serve(*arguments) for _ in range(2)]
        for process, _ in servers:
            drained(process)
        front, url = ptune_serve("--upstream", servers[0][1], "--upstream", f"{servers[1][1]}/v1", "--watch", "0.2")
        servers.append((front, url))
        drained(front)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
        http = httpx.Client(base_url=url, timeout=60)
        done: list[int] = []

        def ask(number: int) -> str | None:
            draw = random.Random(number)
            name, text = draw.choice(sorted(expected))
            messages: list[Any] = [{"role": "user", "content": text}]
            kind = number % 4
            try:
                if kind == 0:
                    answer = client.chat.completions.create(model=name, messages=messages, max_tokens=9)
                    said = answer.choices[0].message.content
                elif kind == 1:
                    said = client.completions.create(model=name, prompt=text, max_tokens=9).choices[0].text
                elif kind == 2:
                    label = http.post("/v1/classify", json={"model": "mood", "input": text}).json()["data"][0]["label"]
                    assert label == labels[text]
                    return "whole"
                else:
                    said = ""
                    for event in client.chat.completions.create(
                        model=name, messages=messages, max_tokens=9, stream=True
                    ):
                        said += event.choices[0].delta.content or ""
                assert said == expected[name, text], (kind, name)
                return "whole"
            except openai.APIError as error:
                # only a stream that has begun may end in an error event
                return "broken" if kind == 3 and "was lost" in str(error) else str(error)
            finally:
                done.append(number)

        with ThreadPoolExecutor(16) as pool:
            answers = [pool.submit(ask, number) for number in range(240)]
            while len(done) < 60:
                time.sleep(0.01)
            servers[0][0].kill()
            results = [answer.result() for answer in answers]
        assert len(results) == 240
        assert set(results) <= {"whole", "broken"}
        assert results.count("broken") <= 16
        assert sum(line.startswith("ptune_upstreams_alive 1.0") for line in http.get("/metrics").text.splitlines()) == 1

        # It comes back under its old address and is taken back.
        port = servers[0][1].rpartition(":")[2]
        again = ptune_serve("--port", port, *arguments)
        servers.append(again)
        drained(again[0])
        until = time.monotonic() + 30
        while "ptune_upstreams_alive 2.0" not in http.get("/metrics").text:
            assert time.monotonic() < until
            time.sleep(0.05)
        front.terminate()
        assert front.wait(60) == 0
    finally:
        for process, _ in servers:
            process.kill()
            process.wait()


@pytest.mark.parametrize("stream", [False, True])
def test_a_task_of_a_merged_model_is_a_model(alone: Engine, stream: bool) -> None:
    asked: list[dict[str, Any]] = []
    with in_thread(engine_over_merged(alone, asked)) as engine:
        with in_thread(create_gateway([engine], merged_tasks(), SETTINGS, ["t"])) as url:
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="t", max_retries=0, timeout=60)
            models = {model.id: model.task for model in client.models.list()}  # type: ignore[attr-defined]
            assert models == {"tiny": None, "answer": "generation", "brief": "generation", "mood": "classification"}
            expected = alone.generate("answer", TEXTS[0], GenerationOptions(max_new_tokens=9)).text
            messages: list[Any] = [{"role": "user", "content": TEXTS[0]}]
            if stream:
                events = list(
                    client.chat.completions.create(model="answer", messages=messages, max_tokens=9, stream=True)
                )
                assert "".join(event.choices[0].delta.content or "" for event in events) == expected
                assert {event.model for event in events} == {"answer"}
                parts = list(client.completions.create(model="answer", prompt=TEXTS[0], max_tokens=9, stream=True))
                assert "".join(part.choices[0].text for part in parts) == expected
                return
            answer = client.chat.completions.create(
                model="answer", messages=messages, max_tokens=9, extra_body={"fields": {"input": ""}}
            )
            assert (answer.choices[0].message.content, answer.model) == (expected, "answer")
            assert asked[-1]["chat_template_kwargs"] == {"task": "answer", "input": ""}
            client.chat.completions.create(model="brief", messages=messages)
            assert asked[-1]["max_tokens"] == 5  # the task's own
            several = client.completions.create(model="answer", prompt=TEXTS, max_tokens=9)
            assert [choice.text for choice in several.choices] == [
                alone.generate("answer", text, GenerationOptions(max_new_tokens=9)).text for text in TEXTS
            ]
            assert several.usage is not None
            assert several.usage.total_tokens == 7 * len(TEXTS)
            bare = client.completions.create(model="tiny", prompt=TEXTS[0], max_tokens=9)
            assert bare.choices[0].text == alone.generate(None, TEXTS[0], GenerationOptions(max_new_tokens=9)).text


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("chat/completions", {"model": "answr", "messages": [{"role": "user", "content": "a"}]}, 404, '"answer"?'),
        ("chat/completions", {"model": "mood", "messages": [{"role": "user", "content": "a"}]}, 400, "chooses among"),
        (
            "chat/completions",
            {"model": "answer", "messages": [{"role": "system", "content": "a"}]},
            400,
            "no field s",
        ),
        ("classify", {"model": "mood", "input": "a"}, 400, "ptune's own engine"),
        ("completions", {"model": "answer", "prompt": "a", "fields": {"inpt": "b"}}, 400, 'Did you mean "input"?'),
        ("completions", {"model": "answer", "prompt": "a", "no_repeat_ngram_size": 2}, 400, "no_repeat_ngram_size"),
        ("completions", {"model": "answer", "prompt": "a", "logprobs": 2}, 400, "/v1/chat/completions alone"),
        ("completions", {"model": "answer", "prompt": "a", "max_tokens": 201}, 400, "200 tokens at most"),
        ("completions", {"model": "answer", "prompt": "a", "n": 2}, 400, "is 1 here"),
        ("completions", {"model": "answer", "prompt": "a" * 5000}, 413, "more than the 4000 bytes"),
        ("completions", {"model": "answer", "prompt": ["a", "b"], "stream": True}, 400, "one text at a time"),
    ],
)
def test_what_it_cannot_do_it_refuses_in_a_sentence(path: str, body: Any, status: int, words: str) -> None:
    settings = SETTINGS.model_copy(update={"max_body": 4000})
    with in_thread(create_gateway(["http://127.0.0.1:9"], merged_tasks(), settings, ["t"])) as url:
        answer = httpx.post(f"{url}/v1/{path}", json=body, headers={"Authorization": "Bearer t"})
        assert answer.status_code == status
        assert words in answer.json()["error"]["message"]
        assert httpx.post(f"{url}/v1/{path}", json=body).status_code == 401


SYSTEM = {"role": "system", "content": "Be kind."}
USER = {"role": "user", "content": "soup"}


@pytest.mark.parametrize(
    ("template", "messages", "fields", "words"),
    [
        ("[P]{system} {text}{answer}", [SYSTEM, USER], {"system": "Be rude."}, "field system is the system message"),
        ("[P]{text}{answer}", [SYSTEM, USER], {}, "no field system for a system message"),
        ("[P]{system} {text}{answer}", [SYSTEM, USER], {"text": "a"}, 'the field "text" is the text itself'),
        (
            "[P]{text}[?{more}]{answer}",
            [USER],
            {"mroe": "a"},
            'no field "mroe"; it has text, more. Did you mean "more"?',
        ),
        ("[P]{system}{answer}", [SYSTEM, USER], {}, "has no field for a text"),
        ("[P]{system} {text}[?{a b}]{answer}", [SYSTEM, USER], {"a b": "c"}, None),
    ],
)
def test_a_merged_model_takes_the_fields_that_a_server_of_ptune_takes(
    template: str, messages: list[Any], fields: dict[str, str], words: str | None
) -> None:
    backbone = tiny_backbone()
    parsed = Template.parse(template)
    told = {"task": {"type": "generation", "max_new_tokens": 4}, "fields": parsed.fields}
    asked = ChatRequest(model="kind", messages=messages, fields=fields)
    renderer = Renderer(parsed, backbone.tokenizer, backbone.vocabulary_size)
    given = [(message.role, message.text) for message in asked.messages]
    ask = [
        lambda: MergedTasks("tiny", {"kind": told}).chat(asked, 9),
        lambda: chat_context(backbone, renderer, given, fields, 4),
    ]
    if words is None:
        body = ask[0]().body
        assert body["chat_template_kwargs"] == {"task": "kind", "system": "Be kind.", "fields": {"a b": "c"}}
        assert body["messages"] == [USER]
        assert "Be kind. soupc" in backbone.tokenizer.decode(ask[1]()[1:])
        return
    refused = []
    for each in ask:
        with pytest.raises(RefusedError) as error:
            each()
        refused.append((str(error.value), error.value.param))
    assert words in refused[0][0]
    assert refused[0] == refused[1]


def test_the_bare_model_of_a_merged_model_is_asked_by_an_empty_task() -> None:
    asked = ChatRequest(model="tiny", messages=[USER])
    for tasks in ({"answer": merged_tasks().tasks["answer"]}, merged_tasks().tasks):
        assert MergedTasks("tiny", tasks).chat(asked, 9).body["chat_template_kwargs"] == {"task": ""}


def test_without_a_server_behind_it_says_so_and_is_not_ready() -> None:
    with in_thread(create_gateway(["http://127.0.0.1:9"], merged_tasks(), SETTINGS)) as url:
        assert httpx.get(f"{url}/healthz").status_code == 200
        assert httpx.get(f"{url}/readyz").status_code == 503
        for stream in (False, True):
            body = {"model": "answer", "messages": [{"role": "user", "content": "a"}], "stream": stream}
            answer = httpx.post(f"{url}/v1/chat/completions", json=body)
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "2"
            assert answer.json()["error"]["code"] == "no_upstream"
            assert answer.json()["error"]["message"] == "no server behind this one answers; ask again later"
    with in_thread(create_gateway(["http://127.0.0.1:9"], None, SETTINGS)) as url:
        answer = httpx.get(f"{url}/v1/models/answer")
        assert answer.status_code == 503
        assert answer.json()["error"]["message"] == "no server behind this one answers; ask again later"


def test_a_server_that_fails_is_named_without_its_words() -> None:
    failing = engine_over_merged(None, [])  # type: ignore[arg-type]
    failing.router.routes = [route for route in failing.router.routes if "/chat/" not in getattr(route, "path", "")]

    @failing.post("/v1/chat/completions")
    def chat() -> Any:
        return JSONResponse({"error": {"message": "a secret path"}}, 500)

    with in_thread(failing) as broken, in_thread(create_gateway([broken], merged_tasks(), SETTINGS)) as url:
        body = {"model": "answer", "messages": [{"role": "user", "content": "a"}]}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_failed")
    assert answer.json()["error"]["message"] == "a server behind this one fails; its log says why"


@pytest.mark.parametrize("after", [0, 1])
def test_a_stream_that_breaks_off_is_asked_elsewhere_before_its_first_event_and_ends_in_an_error_behind_it(
    alone: Engine, after: int
) -> None:
    asked: list[list[dict[str, Any]]] = [[], []]
    with in_thread(breaking(engine_over_merged(alone, asked[0]), after)) as broken:
        with in_thread(engine_over_merged(alone, asked[1])) as whole:
            with in_thread(create_gateway([broken, whole], merged_tasks(), SETTINGS)) as url:
                body = {"model": "answer", "messages": [{"role": "user", "content": TEXTS[0]}], "stream": True}
                lines = [
                    line
                    for line in httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).text.splitlines()
                    if line
                ]
    expected = alone.generate("answer", TEXTS[0], GenerationOptions(max_new_tokens=12)).text
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line != "data: [DONE]"]
    said = "".join(event["choices"][0]["delta"]["content"] for event in events if "choices" in event)
    assert len(asked[0]) == 1
    if after == 0:
        assert len(asked[1]) == 1
        assert said == expected
        assert lines[-1] == "data: [DONE]"
    else:
        assert not asked[1]
        assert said == expected[:4]
        assert events[-1]["error"]["code"] == "upstream_lost"
        assert "data: [DONE]" not in lines


def test_mistakes_at_the_start_are_sentences(tmp_path: Path) -> None:
    def error(*arguments: str) -> str:
        found = CliRunner().invoke(command_line, ["serve", "--port", "0", *arguments]).exception
        assert isinstance(found, ConfigError)
        return str(found)

    assert '--engine is ptune or vllm, not "vlm"' in error("--engine", "vlm")
    assert "name its folder by --merged" in error("--engine", "vllm")
    assert "is no merged model" in error("--engine", "vllm", "--merged", str(tmp_path))
    assert "takes a URL" in error("--upstream", "localhost:8000")
    assert "--max-batch would do nothing, for it is one of ptune's own engine" in error(
        "--upstream", "http://a", "--max-batch", "3"
    )
    assert "goes with --engine vllm or --upstream" in error("--merged", str(tmp_path))
    (tmp_path / "ptune_merged.json").write_text('{"backbone": "tiny", "tasks": {}}')
    arguments = ("--engine", "vllm", "--merged", str(tmp_path), "--vllm-python", "no-such-python")
    assert 'cannot run "no-such-python"' in error(*arguments)
    assert "vLLM ended with" in error(*arguments[:-1], "/bin/false")
