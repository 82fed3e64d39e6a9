"""`/v1/tag` and `/v1/classify` answer for every kind of soft prompt as the engine does, in batches with the others."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import Served, serving, soft_prompts, soft_prompts_with_heads, tiny_backbone

from ptune.engine.engine import Engine
from ptune.models.backbone import Backbone
from ptune.soft_prompts.soft_prompt import SoftPrompt

TEXT = "Some great soup, and a terrible film."
WORDS = ["great", "soup", "Wrong", "waiter"]


def all_prompts(backbone: Backbone) -> dict[str, SoftPrompt]:
    return soft_prompts(backbone) | soft_prompts_with_heads(backbone)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    for name, prompt in all_prompts(tiny_backbone()).items():
        prompt.save(folder / name)
    return folder


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    with serving(tiny_backbone(), folder, gather_seconds=0.3, max_items=8) as server:
        yield server


@pytest.fixture(scope="module")
def alone() -> Iterator[Engine]:
    backbone = tiny_backbone()
    with Engine(backbone) as engine:
        for name, prompt in all_prompts(backbone).items():
            engine.add(name, prompt)
        yield engine


def close(value: Any) -> Any:
    """Return JSON values to compare with, floats nearly equal."""
    if isinstance(value, dict):
        return {name: close(one) for name, one in value.items()}
    if isinstance(value, list):
        return [close(one) for one in value]
    return pytest.approx(value, abs=1e-5) if isinstance(value, float) else value


def numbered(answers: list[dict[str, Any]]) -> Any:
    return close([{"index": index, **answer} for index, answer in enumerate(answers)])


def batches(served: Served) -> list[float]:
    """Return how many batches were read, of how many texts together, and how many were written, of how many."""
    kinds, counts = ("scored", "written"), ("count", "sum")
    return [served.metric(f'ptune_batch_rows_{count}{{kind="{kind}"}}') for kind in kinds for count in counts]


def test_tags_are_those_of_the_engine(served: Served, alone: Engine) -> None:
    body = {"model": "tags", "input": [TEXT, WORDS, {"tokens": WORDS}, {"tokens": TEXT}]}
    answer = served.http.post("/v1/tag", json=body).json()
    expected = alone.tag("tags", [TEXT, WORDS, WORDS, TEXT])
    assert answer["data"] == numbered(expected)
    assert answer["data"][0]["tokens"] == ["Some", "great", "soup", ",", "and", "a", "terrible", "film", "."]
    assert {span["type"] for one in expected for span in one["spans"]} == {"FOOD", "FILM"}
    task = alone.prompts["tags"].task
    read = 2 * sum(len(row.ids) for given in (TEXT, WORDS) for row in task.rows({"tokens": given}))  # type: ignore[attr-defined]
    assert answer["usage"] == {"prompt_tokens": read, "completion_tokens": 0, "total_tokens": read}
    assert served.http.post("/v1/tag", json={"model": "tags", "input": TEXT}).json()["data"] == answer["data"][:1]


def test_words_beyond_the_length_of_training_are_told(served: Served) -> None:
    (answer,) = served.http.post("/v1/tag", json={"model": "tags", "input": [WORDS * 12]}).json()["data"]
    assert len(answer["tags"]) == len(answer["tokens"]) == 48
    assert answer["unread_words"] > 0
    assert set(answer["tags"][-answer["unread_words"] :]) == {"O"}


def test_extracted_entities_are_those_of_the_engine(served: Served, alone: Engine) -> None:
    body = {"model": "entities", "input": [TEXT, WORDS, {"tokens": WORDS}]}
    answer = served.http.post("/v1/tag", json=body).json()
    expected = alone.predict("entities", [{"tokens": TEXT}, {"tokens": WORDS}, {"tokens": WORDS}])
    assert answer["data"] == numbered(expected)
    assert all(set(one) == {"index", "text", "finish_reason", "spans", "dropped"} for one in answer["data"])
    assert answer["usage"]["completion_tokens"] > 0
    record = {"text": TEXT, "domain": "dinner"}
    answer = served.http.post("/v1/tag", json={"model": "entities/of_text", "input": [record]}).json()
    assert answer["data"] == numbered(alone.predict("entities/of_text", [record]))


def test_what_the_model_writes_is_read_back_to_spans(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    # A random model writes no entities, so the tokenizer of this server says for it what a trained one would.
    monkeypatch.setattr(served.backbone.tokenizer, "decode", lambda *_args, **_named: "good: soup; film: opera")
    (answer,) = served.http.post("/v1/tag", json={"model": "entities", "input": [WORDS]}).json()["data"]
    assert answer["spans"] == [{"type": "FOOD", "start": 1, "end": 2, "text": "soup"}]
    assert answer["dropped"] == 1


def test_several_labels_and_one_of_a_linear_head(served: Served, alone: Engine) -> None:
    several = served.http.post("/v1/classify", json={"model": "topics", "input": [TEXT, "the door"]}).json()["data"]
    expected = alone.classify("topics", [TEXT, "the door"])
    assert several == numbered(expected)
    assert any(one["labels"] for one in expected)
    assert all(len(one["probabilities"]) == 5 for one in several)
    one = served.http.post("/v1/classify", json={"model": "topic", "input": TEXT}).json()["data"]
    assert one == numbered(alone.classify("topic", [TEXT]))


def test_tags_share_a_batch_with_labels_and_entities_one_with_texts(served: Served, alone: Engine) -> None:
    asked = [
        ("/v1/tag", {"model": "tags", "input": [TEXT, WORDS]}),
        ("/v1/classify", {"model": "topics", "input": [TEXT]}),
        ("/v1/classify", {"model": "mood", "input": [TEXT]}),
        ("/v1/tag", {"model": "entities", "input": [TEXT]}),
        ("/v1/completions", {"model": "answer", "prompt": TEXT, "max_tokens": 9}),
    ]
    before = batches(served)
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda one: served.http.post(one[0], json=one[1]).json(), asked))
    assert [new - old for old, new in zip(before, batches(served), strict=True)] == [1, 4, 1, 2]
    assert answers[0]["data"] == numbered(alone.tag("tags", [TEXT, WORDS]))
    assert answers[1]["data"] == numbered(alone.classify("topics", [TEXT]))
    assert answers[2]["data"][0]["label"] == alone.classify("mood", [TEXT])[0]["label"]
    assert answers[3]["data"] == numbered(alone.predict("entities", [{"tokens": TEXT}]))
    assert served.metric('ptune_requests_total{endpoint="/v1/tag",status="200"}') >= 2


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("tag", {"model": "mood", "input": "a"}, "model", "type classification, for which /v1/tag .*ask /v1/classify$"),
        ("tag", {"model": "topics", "input": "a"}, "model", "type linear_classification.*ask /v1/classify$"),
        ("tag", {"model": "chooser", "input": "a"}, "model", "type choice.*ask /v1/classify$"),
        ("tag", {"model": "answer", "input": "a"}, "model", "ask /v1/chat/completions or /v1/completions$"),
        ("tag", {"model": "tiny", "input": "a"}, "model", "this is the bare model.*ask /v1/chat/completions or"),
        ("classify", {"model": "tags", "input": "a"}, "model", "type tagging, for which /v1/classify .*ask /v1/tag$"),
        ("classify", {"model": "entities", "input": "a"}, "model", "type extraction.*ask /v1/tag or /v1/chat"),
        ("completions", {"model": "tags", "prompt": "a"}, "model", "type tagging.*ask /v1/tag$"),
        ("completions", {"model": "topics", "prompt": "a"}, "model", "type linear_classification.*ask /v1/classify$"),
        ("tag", {"model": "tags", "input": [["a", 1]]}, None, "valid string"),
        ("tag", {"model": "tags", "input": [[]]}, None, "at least 1 item"),
        ("tag", {"model": "tags", "input": [["a", " "]]}, None, "a list of words, none of them empty"),
        ("tag", {"model": "tags", "input": ""}, None, "holds no words"),
        ("tag", {"model": "tags", "input": ["a"] * 9}, "input", "has 9 texts, and a request 8 at most"),
        ("tag", {"model": "tags", "input": [{"text": "a"}]}, "fields", 'no field "text"; it has tokens'),
        ("tag", {"model": "tags", "input": [["soup"] * 400]}, None, "takes 256"),
        ("tag", {"model": "entities/of_text", "input": "a"}, None, 'lacks the field "domain"'),
        ("tag", {"model": "entities/of_text", "input": [WORDS]}, "input", "no list of words; send it as one"),
        ("tag", {"model": "entities", "input": "soup " * 400}, None, "takes 256"),
    ],
)
def test_a_wrong_kind_or_input_is_one_sentence(
    served: Served, path: str, body: Any, param: str | None, message: str
) -> None:
    answer = served.http.post(f"/v1/{path}", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error"), error
    assert re.search(message, error["message"]), error
    if param is not None:
        assert error["param"] == param


def test_a_prompt_that_another_task_s_has_replaced_is_not_asked_as_the_old_one(tmp_path: Path) -> None:
    backbone = tiny_backbone()
    prompts = all_prompts(backbone)
    prompts["tags"].save(tmp_path / "one")
    with serving(backbone, tmp_path, watch_seconds=1000) as served:
        shutil.rmtree(tmp_path / "one")
        prompts["entities"].save(tmp_path / "one")
        answer = served.http.post("/v1/tag", json={"model": "one", "input": TEXT})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_usable")
        assert "is being replaced by one of another task; ask again" in answer.json()["error"]["message"]


def test_a_process_tags_as_ptune_predict_does(folder: Path, tmp_path: Path) -> None:
    backbone = tiny_backbone()
    backbone.model.save_pretrained(tmp_path / "tiny")
    backbone.tokenizer.save_pretrained(tmp_path / "tiny")
    data = tmp_path / "words.jsonl"
    data.write_text(json.dumps({"tokens": WORDS}) + "\n" + json.dumps({"tokens": [*WORDS, "apple"]}) + "\n")
    ptune = [sys.executable, "-m", "ptune"]
    predict = [*ptune, "predict", str(folder / "tags"), str(data), "--model", str(tmp_path / "tiny")]
    predicted = [json.loads(line) for line in subprocess.check_output(predict, text=True).splitlines()]
    command = [*ptune, "serve", "--port", "0", "--backbone", str(tmp_path / "tiny"), "--prompts", str(folder)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    try:
        assert process.stderr is not None
        event: dict[str, Any] = {}
        while event.get("event") != "serving":
            event = json.loads(process.stderr.readline())
        body = {"model": "tags", "input": [WORDS, [*WORDS, "apple"]]}
        answer = httpx.post(f"{event['url']}/tag", json=body, timeout=60).json()
    finally:
        process.terminate()
        process.wait(60)
    for one, other in zip(answer["data"], predicted, strict=True):
        other.pop("given_tokens")
        assert one == {"index": one["index"]} | close(other)
