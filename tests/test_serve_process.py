"""`ptune serve` as a process: its log, its end, its mistakes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serving import soft_prompts, tiny_backbone
from typer.testing import CliRunner

from ptune.cli import app
from ptune.errors import ConfigError, MissingExtraError


@pytest.fixture
def process(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    backbone = tiny_backbone()
    backbone.model.save_pretrained(tmp_path / "tiny")
    backbone.tokenizer.save_pretrained(tmp_path / "tiny")
    soft_prompts(backbone)["answer"].save(tmp_path / "prompts" / "answer")
    command = [sys.executable, "-m", "ptune", "serve", "--port", "0"]
    command += ["--backbone", str(tmp_path / "tiny"), "--prompts", str(tmp_path / "prompts")]
    started = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PTUNE_SERVE_TOKENS": "t"}
    )
    yield started
    if started.poll() is None:
        started.kill()
    started.wait()


def test_sigterm_lets_requests_in_flight_finish(process: subprocess.Popen[str]) -> None:
    assert process.stderr is not None
    lines = [json.loads(process.stderr.readline())]
    while lines[-1]["event"] != "serving":
        lines.append(json.loads(process.stderr.readline()))
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/v1", lines[-1]["url"])
    body = {"model": "answer", "prompt": "great soup", "max_tokens": 230, "stream": True}
    headers = {"Authorization": "Bearer t"}
    url = f"{lines[-1]['url']}/completions"
    with httpx.stream("POST", url, json=body, headers=headers, timeout=120) as stream:
        assert stream.status_code == 200
        events = stream.iter_lines()
        first = next(events)
        process.send_signal(signal.SIGTERM)
        rest = [line for line in events if line]
    assert first.startswith("data: {")
    assert rest[-1] == "data: [DONE]"
    reasons = [json.loads(line.removeprefix("data: "))["choices"][0]["finish_reason"] for line in rest[:-1]]
    assert reasons[-1] in ("stop", "length")
    assert process.wait(60) == 0
    log = process.stderr.read()
    assert "great soup" not in log
    entries = [json.loads(line) for line in log.splitlines()]
    assert entries[-1]["event"] == "stopped"
    (request,) = (entry for entry in entries if entry["event"] == "request")
    assert (request["path"], request["status"], request["model"]) == ("/v1/completions", 200, "answer")


def test_mistakes_at_the_start_are_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def error(*arguments: str) -> BaseException | None:
        return CliRunner().invoke(app, ["serve", *arguments]).exception

    with socket.create_server(("127.0.0.1", 0)) as taken:
        found = error("--port", str(taken.getsockname()[1]))
    assert isinstance(found, ConfigError)
    assert re.search(r"cannot listen on 127\.0\.0\.1:\d+ .*choose another by --host and --port", str(found))
    found = error("--max-queue", "5", "--port", "0")
    assert isinstance(found, ConfigError)
    assert "raise max_queue or lower max_items" in str(found)
    found = error("--deadline", "-1", "--port", "0")
    assert isinstance(found, ConfigError)
    assert str(found) == "--deadline takes a number greater than 0, and is -1.0"
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    found = error("--port", "0")
    assert isinstance(found, MissingExtraError)
    assert str(found) == "ptune serve needs uvicorn: pip install ptune[serve]"
