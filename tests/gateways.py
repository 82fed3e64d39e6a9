"""Servers behind a real gateway, for tests: processes of `ptune serve`, and an engine that serves a merged model."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from transformers import PreTrainedModel

from ptune.engine.engine import Engine
from ptune.generation.generate import GenerationOptions


@contextmanager
def in_thread(app: FastAPI) -> Iterator[str]:
    """Serve an application on a free port while the block runs."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def ptune_serve(*arguments: str, **environment: str) -> tuple[subprocess.Popen[str], str]:
    """Start `ptune serve` on a free port, and return the process and its URL when it listens."""
    command = [sys.executable, "-m", "ptune", "serve", "--port", "0", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})
    assert process.stderr is not None
    while True:
        line = process.stderr.readline()
        assert line, f"{command} ended with {process.wait()}"
        entry = json.loads(line) if line.startswith("{") else {}
        if entry.get("event") == "serving":
            return process, entry["url"].removesuffix("/v1")


def drained(process: subprocess.Popen[str]) -> None:
    """Read a process' log to its end in a thread, so that it never waits for a reader."""
    assert process.stderr is not None
    threading.Thread(target=process.stderr.read, daemon=True).start()


def engine_over_merged(engine: Engine, asked: list[dict[str, Any]]) -> FastAPI:
    """Return what vLLM is over a merged model: one model, tasks chosen by the chat template's variables.

    Args:
        engine: answers, with the soft prompts that were merged.
        asked: gets the bodies of requests.
    """
    app, lock = FastAPI(), threading.Lock()

    def said(body: dict[str, Any], task: str | None, text: str) -> str:
        assert body["temperature"] == 0
        with lock:
            return engine.generate(task, text, GenerationOptions(max_new_tokens=body["max_tokens"])).text

    @app.get("/v1/models")
    def models() -> Any:
        return {"object": "list", "data": [{"id": "/models/merged", "object": "model", "owned_by": "vllm"}]}

    @app.post("/v1/chat/completions")
    def chats(body: dict[str, Any]) -> Any:
        asked.append(body)
        if body["model"] != "/models/merged":
            return JSONResponse({"error": {"message": "no such model", "type": "NotFound", "code": 404}}, 404)
        task, text = body["chat_template_kwargs"]["task"], body["messages"][-1]["content"]
        usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
        whole = said(body, task, text)
        head = {"id": "x", "created": 1, "model": "/models/merged"}
        if not body.get("stream"):
            choice = {"index": 0, "message": {"role": "assistant", "content": whole}, "finish_reason": "length"}
            return {**head, "object": "chat.completion", "choices": [choice], "usage": usage}

        def events() -> Iterator[str]:
            for part in (whole[:4], whole[4:]):
                choice = {"index": 0, "delta": {"content": part}, "finish_reason": None}
                yield f"data: {json.dumps({**head, 'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"
            yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage})}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    @app.post("/v1/completions")
    def completions(body: dict[str, Any]) -> Any:
        asked.append(body)
        choice = {"index": 0, "text": said(body, None, body["prompt"]), "finish_reason": "length", "logprobs": None}
        usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
        return {"id": "x", "object": "text_completion", "created": 1, "model": "y", "choices": [choice], "usage": usage}

    return app


def breaking(app: FastAPI, after: int) -> FastAPI:
    """Return an application whose streams break off after some events."""

    class BrokenError(Exception):
        pass

    @app.middleware("http")
    async def break_off(request: Request, call_next: Any) -> Any:
        response = await call_next(request)
        if request.method == "POST":
            body = response.body_iterator

            async def cut() -> Any:
                count = 0
                async for part in body:
                    if count == after:
                        raise BrokenError
                    count += 1
                    yield part

            response.body_iterator = cut()
        return response

    return app


def saved(folder: Path, backbone: Any, prompts: dict[str, Any]) -> tuple[str, str]:
    """Save a backbone and soft prompts; return what `ptune serve` calls them."""
    backbone.model.save_pretrained(folder / "tiny")
    backbone.tokenizer.save_pretrained(folder / "tiny")
    for name, prompt in prompts.items():
        prompt.save(folder / "prompts" / name)
    return str(folder / "tiny"), str(folder / "prompts")


def engine_with_embeddings(model: PreTrainedModel, tokenizer: Any, asked: list[dict[str, Any]]) -> FastAPI:
    """Return what vLLM is with `--enable-prompt-embeds`: completions of ids, or of the rows that stand for them.

    Args:
        model: answers, greedily.
        tokenizer: its own.
        asked: gets the bodies of requests.
    """
    app, lock = FastAPI(), threading.Lock()

    @app.get("/v1/models")
    def models() -> Any:
        return {"object": "list", "data": [{"id": "/models/plain", "object": "model", "owned_by": "vllm"}]}

    @app.post("/v1/completions")
    def completions(body: dict[str, Any]) -> Any:
        asked.append(body)
        assert (body["model"], body["temperature"]) == ("/models/plain", 0)
        if "prompt_embeds" in body:
            inputs = {"inputs_embeds": rows_of(body)[None]}
        else:
            inputs = {"input_ids": torch.tensor([body["prompt"]])}
        (length,) = {value.shape[1] for value in inputs.values()}
        with lock:
            said = model.generate(  # type: ignore[operator]
                **inputs,
                attention_mask=torch.ones(1, length, dtype=torch.long),
                max_new_tokens=body["max_tokens"],
                do_sample=False,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
            )
        ids = said.sequences[0, -len(said.logits) :]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        logprobs = [float(logits[0].log_softmax(-1)[id_]) for logits, id_ in zip(said.logits, ids, strict=True)]
        told = {"tokens": [f"{id_}" for id_ in ids.tolist()], "token_logprobs": logprobs, "text_offset": []}
        choice = {"index": 0, "text": text, "finish_reason": "length", "logprobs": told if "logprobs" in body else None}
        usage = {"prompt_tokens": length, "completion_tokens": len(ids), "total_tokens": length + len(ids)}
        head = {"id": "cmpl-x", "object": "text_completion", "created": 1, "model": "/models/plain"}
        if not body.get("stream"):
            return {**head, "choices": [choice], "usage": usage}

        def events() -> Iterator[str]:
            for part in (text[:4], text[4:]):
                yield f"data: {json.dumps({**head, 'choices': [choice | {'text': part}]})}\n\n"
            yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage})}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    return app


def rows_of(body: dict[str, Any]) -> torch.Tensor:
    """Return the embeddings of a request, as vLLM reads them."""
    rows: torch.Tensor = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)
    return rows
