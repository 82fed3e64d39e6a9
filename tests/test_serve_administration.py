"""Soft prompts by request: added, replaced and removed while the server runs, by those who have a token."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from serving import Served, rows, serving, soft_prompts, tiny_backbone
from tiny_models import tiny_model, tiny_tokenizer

from ptune import Engine, SoftPrompt
from ptune.config.task import ClassificationConfig
from ptune.models.backbone import Backbone
from ptune.models.deep_start import keys_and_values_of
from ptune.serve.prompts import PromptFolder
from ptune.serve.service import Service
from ptune.serve.settings import ServeSettings

ASK = {"model": "new", "input": "great soup"}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone()


@pytest.fixture
def served(backbone: Backbone, tmp_path: Path) -> Iterator[Served]:
    folder = tmp_path / "prompts"
    soft_prompts(backbone)["answer"].save(folder / "answer")
    with serving(backbone, folder, tokens=("t",), watch_seconds=1000) as server:
        yield server


def body(prompt: SoftPrompt, folder: Path) -> dict[str, str]:
    prompt.save(folder)
    tensors = (folder / "soft_prompt.safetensors").read_bytes()
    return {
        "description": (folder / "ptune.json").read_text(encoding="utf-8"),
        "tensors": base64.b64encode(tensors).decode(),
    }


def test_a_prompt_is_added_replaced_and_removed(served: Served, backbone: Backbone, tmp_path: Path) -> None:
    old = soft_prompts(backbone)["mood"]
    new = replace(old, rows=rows(backbone, 4, 55))
    expected = []
    for prompt in (old, new):
        with Engine(tiny_backbone()) as engine:
            engine.add("one", prompt)
            expected.append(engine.classify("one", ["great soup"])[0]["probability"])
    assert abs(expected[0] - expected[1]) > 1e-3
    assert served.http.post("/v1/classify", json=ASK).status_code == 404
    for prompt, right in zip((old, new), expected, strict=True):
        answer = served.http.put("/v1/prompts/new", json=body(prompt, tmp_path / "given"))
        assert (answer.status_code, answer.json()["id"], answer.json()["task"]) == (200, "new", "classification")
        found = served.http.post("/v1/classify", json=ASK).json()["data"][0]["probability"]
        assert found == pytest.approx(right, abs=1e-5)
    assert SoftPrompt.load(served.folder / "new").rows.equal(new.rows)
    (served.folder / "new" / "run").mkdir()
    assert served.http.delete("/v1/prompts/new").json() == {"id": "new", "object": "model", "deleted": True}
    assert served.http.post("/v1/classify", json=ASK).status_code == 404
    assert [path.name for path in (served.folder / "new").iterdir()] == ["run"]
    assert served.http.delete("/v1/prompts/new").status_code == 404
    assert served.http.delete("/v1/prompts/answer").status_code == 200
    assert not (served.folder / "answer").exists()


def test_what_is_no_sound_prompt_of_this_backbone_changes_nothing(
    served: Served, backbone: Backbone, tmp_path: Path
) -> None:
    good = body(soft_prompts(backbone)["mood"], tmp_path / "given")
    other = Backbone(tiny_model("llama", seed=3), tiny_tokenizer(), "other")
    foreign = body(soft_prompts(other)["mood"], tmp_path / "foreign")
    alike = ClassificationConfig(verbalizer={"good": " film", "great": " film and soup"})
    bad: list[tuple[str, Any, int, str]] = [
        ("new", body(replace(soft_prompts(backbone)["mood"], task=alike), tmp_path / "alike"), 400, "be told apart"),
        ("new", foreign, 400, "belongs to another backbone"),
        ("new", good | {"tensors": good["tensors"][:400]}, 400, "was altered or cut short"),
        ("new", good | {"tensors": "?"}, 400, "is no base64"),
        ("new", good | {"description": "{"}, 400, "ptune.json"),
        ("new", good | {"extra": 1}, 400, "is not offered here"),
        ("new", {"description": good["description"]}, 400, "tensors"),
        ("tiny", good, 409, "is the bare model"),
        ("..%2Fnew", good, 404, ""),
        ("%2E%2E", good, 400, "name"),
        (".hidden", good, 400, "a name is 1 to 64 letters, digits, - and _, no sign first"),
        ("a%20b", good, 400, "a name is 1 to 64 letters"),
        ("x" * 65, good, 400, "name"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for name, given, status, message in bad:
        answer = served.http.put(f"/v1/prompts/{name}", json=given)
        assert answer.status_code == status, (name, answer.text)
        assert message in answer.json()["error"]["message"], answer.text
        assert "/tmp" not in answer.text
    assert sorted(tmp_path.rglob("*")) == before
    assert served.http.delete("/v1/prompts/tiny").status_code == 404


def test_a_prompt_is_checked_without_a_word_to_the_model(backbone: Backbone, tmp_path: Path) -> None:
    values, shape = keys_and_values_of(backbone, backbone.embeddings(torch.arange(30, 35)))
    deep = replace(soft_prompts(backbone)["answer"], rows=values, deep=shape, template="[P*5]{text}{answer}")
    given = body(deep, tmp_path / "given")
    with serving(tiny_backbone(), tmp_path, tokens=("t",), watch_seconds=1000) as served:
        calls: list[object] = []
        for module in (served.backbone.model, served.backbone.model.get_input_embeddings()):
            module.register_forward_pre_hook(lambda module, _arguments: calls.append(module))
        assert served.http.put("/v1/prompts/new", json=given).status_code == 200
        assert calls == []
        assert served.http.post("/v1/completions", json={"model": "new", "prompt": "soup"}).status_code == 200
        assert calls


def test_a_folder_that_could_not_be_looked_at_is_looked_at_again(
    backbone: Backbone, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(backbone) as engine:
        folder = PromptFolder(tmp_path, backbone)
        service, scan, failures = Service(engine, folder, ServeSettings(watch_seconds=0.01)), folder.scan, []

        def failing() -> None:
            if len(failures) < 3:
                failures.append(1)
                raise RuntimeError("the disk is a pumpkin")
            scan()

        monkeypatch.setattr(folder, "scan", failing)

        async def late() -> None:
            while "late" not in folder.served:
                await asyncio.sleep(0.01)

        async def run() -> None:
            async with service.running():
                soft_prompts(backbone)["mood"].save(tmp_path / "late")
                await asyncio.wait_for(late(), 20)

        with caplog.at_level(logging.ERROR):
            asyncio.run(run())
    assert [vars(record)["reason"] for record in caplog.records] == ["RuntimeError('the disk is a pumpkin')"]


def test_nobody_changes_a_server_without_a_token(served: Served, backbone: Backbone, tmp_path: Path) -> None:
    good = body(soft_prompts(backbone)["mood"], tmp_path / "given")
    assert httpx.put(f"{served.url}/v1/prompts/new", json=good).status_code == 401
    assert httpx.delete(f"{served.url}/v1/prompts/answer").status_code == 401
    with serving(backbone, served.folder) as open_to_all:
        assert open_to_all.http.put("/v1/prompts/new", json=good).status_code == 404
        assert open_to_all.http.delete("/v1/prompts/answer").status_code == 404
    assert (served.folder / "answer" / "ptune.json").exists()
