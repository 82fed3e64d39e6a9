"""The server under clients' faults and load: refusals, queue, cancellation, deadline, tokens, replaced prompts."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serving import Served, rows, serving, soft_prompts, soft_prompts_with_heads, tiny_backbone
from tiny_models import tiny_model, tiny_tokenizer

from ptune.engine.engine import Engine
from ptune.errors import ConfigError
from ptune.models.backbone import Backbone
from ptune.models.deep_start import keys_and_values_of
from ptune.serve.security import read_tokens

CLASSIFY = {"model": "mood", "input": "great soup"}
CHAT = {"model": "answer", "messages": [{"role": "user", "content": "great soup"}]}
COMPLETION = {"model": "answer", "prompt": "great soup"}


def wait_until(holds: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone()


@pytest.fixture(scope="module")
def folder(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    for name, prompt in (soft_prompts(backbone) | soft_prompts_with_heads(backbone)).items():
        prompt.save(folder / name)
    other = Backbone(tiny_model("llama", seed=3), tiny_tokenizer(), "other")
    soft_prompts(other)["mood"].save(folder / "foreign")
    soft_prompts(backbone)["mood"].save(folder / "damaged")
    (folder / "damaged" / "ptune.json").write_text("{")
    return folder


@pytest.fixture(scope="module")
def served(backbone: Backbone, folder: Path) -> Iterator[Served]:
    with serving(backbone, folder, max_body=20_000, max_items=8, max_tokens=300) as server:
        yield server


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "message"),
    [
        ("classify", {**CLASSIFY, "model": "mod"}, 404, "model", r'"mod" is not served here.*Did you mean "mood"\?'),
        ("classify", {**CLASSIFY, "model": "../mood"}, 404, "model", "is not served here"),
        ("classify", {**CLASSIFY, "model": "foreign"}, 404, "model", 'trained on "other", and this server runs "tiny"'),
        ("classify", {**CLASSIFY, "model": "damaged"}, 404, "model", "is damaged; the server's log says more"),
        (
            "classify",
            {**CLASSIFY, "model": "tiny"},
            400,
            "model",
            "this is the bare model, for which /v1/classify has no answer; ask /v1/chat",
        ),
        (
            "classify",
            {**CLASSIFY, "model": "answer"},
            400,
            "model",
            "type generation.*ask /v1/chat/completions or /v1/completions$",
        ),
        ("classify", {**CLASSIFY, "input": []}, 400, "input", "at least 1 item"),
        ("classify", {**CLASSIFY, "input": ["a"] * 9}, 400, "input", "has 9 texts, and a request 8 at most"),
        ("classify", {**CLASSIFY, "input": [{"txt": "a"}]}, 400, "fields", 'no field "txt".*Did you mean "text"'),
        ("classify", {**CLASSIFY, "input": [{}]}, 400, None, 'lacks the field "text"'),
        ("classify", {**CLASSIFY, "input": "soup " * 999}, 400, None, "the text has .* tokens .* takes 256"),
        ("classify", {**CLASSIFY, "inputs": "a"}, 400, "inputs", 'is not offered here.*Did you mean "input"'),
        ("classify", [], 400, None, "the body: "),
        ("completions", {**COMPLETION, "model": "mood"}, 400, "model", "type classification.*ask /v1/classify$"),
        ("completions", {**COMPLETION, "model": "tiny", "prompt": ""}, 400, "prompt", "this one is empty"),
        ("completions", {**COMPLETION, "prompt": [1, 2]}, 400, None, "valid string"),
        ("completions", {**COMPLETION, "prompt": "soup " * 999}, 400, None, "takes 256, the answer's among them"),
        ("completions", {**COMPLETION, "fields": {"inptu": "a"}}, 400, "fields", 'Did you mean "input"'),
        ("completions", {**COMPLETION, "fields": {"instruction": "a"}}, 400, "fields", "is the text itself"),
        ("completions", {**COMPLETION, "temperature": -1}, 400, "temperature", "greater than or equal to 0"),
        ("completions", {**COMPLETION, "temperature": "1"}, 400, "temperature", "valid number"),
        ("completions", {**COMPLETION, "top_p": 0}, 400, "top_p", "greater than 0"),
        ("completions", {**COMPLETION, "max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
        ("completions", {**COMPLETION, "max_tokens": 301}, 400, "max_tokens", "300 tokens at most, not 301"),
        ("completions", {**COMPLETION, "seed": 2**64}, 400, "seed", "less than or equal to"),
        ("completions", {**COMPLETION, "n": 2}, 400, "n", "is 1 here.*leave it out"),
        ("completions", {**COMPLETION, "logprobs": 21}, 400, "logprobs", "less than or equal to 20"),
        ("chat/completions", {**CHAT, "top_logprobs": 2}, 400, None, "top_logprobs go with logprobs: true"),
        ("completions", {**COMPLETION, "frequency_penalty": 0.5}, 400, "frequency_penalty", "repetition_penalty is"),
        ("completions", {**COMPLETION, "stop": ["a", ""]}, 400, None, "at least 1 character"),
        ("completions", {**COMPLETION, "stream": True, "fields": {"x": "a"}}, 400, "fields", 'no field "x"'),
        ("completions", {**COMPLETION, "stream_options": {}}, 400, None, "go with stream: true"),
        ("chat/completions", {**CHAT, "tools": []}, 400, "tools", "is not offered here"),
        ("chat/completions", {**CHAT, "messages": []}, 400, "messages", "at least 1 item"),
        ("chat/completions", {**CHAT, "messages": CHAT["messages"] * 2}, 400, "messages", "found user, user"),
        ("chat/completions", {**CHAT, "max_tokens": 3, "max_completion_tokens": 4}, 400, None, "is the old name of"),
        (
            "chat/completions",
            {**CHAT, "messages": [{"role": "system", "content": "Be kind."}, *CHAT["messages"]]},
            400,
            "messages",
            "no field system for a system message",
        ),
    ],
)
def test_a_client_s_fault_is_said_in_openai_s_shape(
    served: Served, path: str, body: Any, status: int, param: str | None, message: str
) -> None:
    answer = served.http.post(f"/v1/{path}", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (status, "invalid_request_error"), error
    assert re.search(message, error["message"]), error
    if param is not None:
        assert error["param"] == param


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"{", 400),
        (b"\xff\xfe", 400),
        (b"[" * 10_000, 400),
        (b'{"model": "answer", "prompt": "a", "temperature": NaN}', 400),
        (b'{"model": "answer", "prompt": "a", "seed": ' + b"9" * 6000 + b"}", 400),
        (b'{"model": "answer", "prompt": "\\ud800"}', 400),
        (b"x" * 20_001, 413),
    ],
)
def test_bytes_that_are_no_request(served: Served, content: bytes, status: int) -> None:
    def pieces() -> Iterator[bytes]:
        yield content

    headers = {"Content-Type": "application/json"}
    for body in (content, pieces()):  # with its length announced, and without
        answer = served.http.post("/v1/completions", content=body, headers=headers)
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", None])
def test_a_body_under_another_type_is_told_which_to_send(served: Served, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    content = b'{"model": "answer", "prompt": "a"}'
    answer = served.http.post("/v1/completions", content=content, headers=headers)
    assert answer.status_code == 400, answer.text
    assert "send one, under Content-Type: application/json" in answer.json()["error"]["message"]


def test_unknown_paths_and_methods(served: Served) -> None:
    for answer, status in ((served.http.get("/v1/embeddings"), 404), (served.http.get("/v1/classify"), 405)):
        assert (answer.status_code, answer.json()["error"]["type"]) == (status, "invalid_request_error")


def test_the_log_holds_no_text_unless_asked(
    served: Served, backbone: Backbone, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ptune.serve")
    for asked in (False, True):
        caplog.clear()
        if asked:
            with serving(backbone, folder, log_text=True) as other:
                answer = other.http.post("/v1/completions", json=COMPLETION).json()
        else:
            answer = served.http.post("/v1/completions", json=COMPLETION).json()
            served.http.post("/v1/classify", json={**CLASSIFY, "great soup": 1})
        logged = json.dumps([vars(record) for record in caplog.records], default=str)
        assert ("great soup" in logged) is asked
        assert answer["usage"]["completion_tokens"] in {vars(r).get("completion_tokens") for r in caplog.records}


def test_a_client_that_goes_away_frees_the_engine(served: Served) -> None:
    ask = {**COMPLETION, "max_tokens": 200}
    served.before_forward.append(lambda: time.sleep(0.02))
    try:
        for body in (ask, {**ask, "stream": True}):
            served.forwards.clear()
            with contextlib.suppress(httpx.ReadTimeout):  # the whole answer, too late for its client
                with served.http.stream("POST", "/v1/completions", json=body, timeout=0.4) as stream:
                    next(stream.iter_lines())
            wait_until(lambda: bool(served.forwards))
            answer = served.http.post("/v1/classify", json=CLASSIFY)
            assert answer.status_code == 200
            assert len(served.forwards) < 150
        wait_until(lambda: served.metric('ptune_requests_total{endpoint="/v1/completions",status="499"}') >= 1)
    finally:
        served.before_forward.clear()


def test_a_request_past_its_deadline_ends(backbone: Backbone, folder: Path) -> None:
    with serving(backbone, folder, deadline_seconds=2) as served:
        served.before_forward.append(lambda: time.sleep(0.05))
        answer = served.http.post("/v1/completions", json={**COMPLETION, "max_tokens": 200})
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        stream = served.openai.completions.create(**COMPLETION, max_tokens=200, stream=True)
        with pytest.raises(openai.APIError, match="no answer within 2 s"):
            list(stream)
        served.before_forward.clear()
        assert served.http.post("/v1/classify", json=CLASSIFY).status_code == 200


def test_a_full_queue_refuses_and_loses_nothing(backbone: Backbone, folder: Path) -> None:
    with serving(backbone, folder, max_queue=2, max_items=2) as served, ThreadPoolExecutor(4) as pool:
        expected = served.http.post("/v1/classify", json=CLASSIFY).json()
        begun, go = threading.Event(), threading.Event()
        served.before_forward += [begun.set, go.wait]
        first = pool.submit(served.http.post, "/v1/classify", json=CLASSIFY)
        assert begun.wait(20)
        others = [pool.submit(served.http.post, "/v1/classify", json=CLASSIFY) for _ in range(2)]
        wait_until(lambda: served.metric("ptune_waiting_texts") == 2)
        refused = served.http.post("/v1/classify", json=CLASSIFY)
        assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
        assert re.fullmatch(r"2 texts wait already and 2 may; try again in \d+ s", refused.json()["error"]["message"])
        assert int(refused.headers["Retry-After"]) >= 1
        with pytest.raises(openai.RateLimitError):
            served.openai.completions.create(**COMPLETION)
        go.set()
        assert [one.result().json() for one in (first, *others)] == [expected] * 3


def test_a_prompt_replaced_under_load_answers_old_or_new_and_nothing_else(
    backbone: Backbone, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "mood", tmp_path / "mood")
    old = soft_prompts(backbone)["mood"]
    new = replace(old, rows=rows(backbone, 4, 77))
    with Engine(backbone) as engine:
        right = []
        for prompt in (old, new):
            engine.add("mood", prompt)
            right.append(engine.classify("mood", ["great soup"])[0]["probability"])
    assert abs(right[0] - right[1]) > 1e-3
    with serving(backbone, tmp_path) as served, ThreadPoolExecutor(3) as pool:
        over = threading.Event()
        answered: tuple[list[float], list[float]] = ([], [])

        def ask(answers: list[float]) -> None:
            while not over.is_set():
                answer = served.http.post("/v1/classify", json=CLASSIFY)
                assert answer.status_code == 200
                answers.append(answer.json()["data"][0]["probability"])

        def wait_for_answers(more: int) -> None:
            wanted = [len(answers) + more for answers in answered]
            wait_until(lambda: all(len(answers) >= count for answers, count in zip(answered, wanted, strict=True)))

        asking = [pool.submit(ask, answers) for answers in answered]
        try:
            wait_for_answers(3)
            new.save(tmp_path / "mood")
            wait_until(lambda: served.metric("ptune_prompt_loads_total") == 2)
            wait_for_answers(3)
        finally:
            over.set()
        for one in asking:
            one.result()
        for answers in answered:
            kinds = [min((0, 1), key=lambda n: abs(right[n] - answer)) for answer in answers]
            assert kinds == sorted(kinds)
            assert {kinds[0], kinds[-1]} == {0, 1}
            assert all(abs(right[kind] - answer) < 1e-5 for kind, answer in zip(kinds, answers, strict=True))
        wait_until(lambda: served.metric("ptune_prompts_in_memory") == 1)

        shutil.copytree(folder / "answer", tmp_path / "late")
        wait_until(lambda: served.http.post("/v1/completions", json={**COMPLETION, "model": "late"}).is_success)
        (tmp_path / "mood" / "ptune.json").write_text("{")  # what cannot be read leaves the one before in place
        time.sleep(0.2)
        assert served.http.post("/v1/classify", json=CLASSIFY).json()["data"][0]["probability"] == pytest.approx(
            right[1]
        )
        shutil.rmtree(tmp_path / "mood")
        wait_until(lambda: served.http.post("/v1/classify", json=CLASSIFY).status_code == 404)
        wait_until(lambda: served.http.post("/v1/completions", json={**COMPLETION, "model": "late"}).is_success)
        wait_until(lambda: served.metric("ptune_prompts_in_memory") == 1)


def test_a_request_in_flight_finishes_on_the_prompt_that_it_began_with(
    backbone: Backbone, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "answer", tmp_path / "answer")
    new = replace(soft_prompts(backbone)["answer"], rows=rows(backbone, 3, 78))
    with serving(backbone, tmp_path) as served:
        ask = {**COMPLETION, "max_tokens": 40}
        before = served.openai.completions.create(**ask).choices[0].text
        served.before_forward.append(lambda: time.sleep(0.03))
        pieces = iter(served.openai.completions.create(**ask, stream=True))
        text = next(pieces).choices[0].text
        new.save(tmp_path / "answer")
        time.sleep(0.3)
        text += "".join(chunk.choices[0].text for chunk in pieces)
        served.before_forward.clear()
        assert text == before
        after = served.openai.completions.create(**ask).choices[0].text
        assert after != before
        wait_until(lambda: served.metric("ptune_prompts_in_memory") == 1)


def test_prompts_beyond_the_budget_leave_and_come_back(backbone: Backbone, folder: Path) -> None:
    with serving(backbone, folder, prompt_memory=1) as served:
        first = [served.http.post("/v1/classify", json={**CLASSIFY, "model": n}).json() for n in ("mood", "team/topic")]
        again = [served.http.post("/v1/classify", json={**CLASSIFY, "model": n}).json() for n in ("mood", "team/topic")]
        assert first == again
        assert served.metric("ptune_prompt_loads_total") == 4
        wait_until(lambda: served.metric("ptune_prompts_in_memory") == 0)


def test_tokens_open_everything_but_the_probes(backbone: Backbone, folder: Path) -> None:
    with serving(backbone, folder, tokens=("one", "two")) as served:
        assert served.openai.completions.create(**COMPLETION).choices[0].text
        assert openai.OpenAI(base_url=f"{served.url}/v1", api_key="two").models.retrieve("mood").id == "mood"
        with pytest.raises(openai.AuthenticationError, match="send the header Authorization"):
            openai.OpenAI(base_url=f"{served.url}/v1", api_key="three").models.list()
        for path in ("/v1/models", "/metrics", "/nowhere"):
            for headers in ({}, {"Authorization": "one"}, {"Authorization": "Basic one"}, {"Authorization": "Bearer"}):
                answer = httpx.get(f"{served.url}{path}", headers=headers)
                assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
        for path in ("/healthz", "/readyz", "/openapi.json"):
            assert httpx.get(f"{served.url}{path}").status_code == 200


def test_tokens_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_tokens(None) == ()
    monkeypatch.setenv("PTUNE_SERVE_TOKENS", "one, two")
    assert read_tokens(None) == ("one", "two")
    path = tmp_path / "tokens"
    path.write_text("# of the team\nthree\n\nfour\n")
    assert read_tokens(path) == ("three", "four")
    path.write_text("# none\n")
    with pytest.raises(ConfigError, match="holds no token"):
        read_tokens(path)
    with pytest.raises(ConfigError, match="cannot read the tokens"):
        read_tokens(tmp_path / "nowhere")
    path.write_text("tökén\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds more than ASCII, which a header cannot carry; choose another"):
        read_tokens(path)


def test_requests_made_from_the_description_are_answered_as_it_says(served: Served) -> None:
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) == 9
    for operation in operations:

        @given(case=operation.as_strategy())
        @hypothesis_settings(
            max_examples=8,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def check(case: Any) -> None:
            if isinstance(case.body, dict) and "model" in case.body:
                case.body["model"] = {"/v1/classify": "mood", "/v1/tag": "tags"}.get(case.path, "brief")
            case.call_and_validate(checks=checks)

        check()


def test_a_mistake_that_only_the_model_sees_is_its_request_s_own(backbone: Backbone, tmp_path: Path) -> None:
    values, shape = keys_and_values_of(backbone, backbone.embeddings(torch.arange(30, 35)))
    answer = soft_prompts(backbone)["answer"]
    deep = replace(answer, rows=values, deep=shape, template="[P*5]{text}{answer}")
    deep.save(tmp_path / "deep")
    with Engine(backbone) as engine:
        engine.add("deep", deep)
        expected = engine.generate("deep", "great soup").text
    with serving(backbone, tmp_path, gather_seconds=0.5) as served, ThreadPoolExecutor(2) as pool:
        asked = [{"model": "deep", "prompt": text} for text in ("great soup", "")]
        good, bad = pool.map(lambda body: served.http.post("/v1/completions", json=body), asked)
        assert good.json()["choices"][0]["text"] == expected
        assert bad.status_code == 400
        assert "give each context a token of text" in bad.json()["error"]["message"]
        assert served.metric("ptune_batch_rows_count") == 1
