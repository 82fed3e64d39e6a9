"""A gateway: the face of `ptune serve` over servers that run elsewhere, a soft prompt a model.

Behind it stand servers of ptune, or engines such as vLLM that all serve one merged model, or one backbone and take the
soft prompts as embeddings. Knows no engine of ptune's own, and loads no model.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import httpx
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from ptune.serve.embedded_tasks import EmbeddedTasks
from ptune.serve.face import application
from ptune.serve.merged_tasks import MergedTasks
from ptune.serve.metrics import GatewayMetrics
from ptune.serve.paths import CHATS, CLASSIFY, COMPLETIONS, MODELS, TAG
from ptune.serve.posted import Body, Posted
from ptune.serve.protocol import (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    Model,
    ModelList,
    Sampling,
)
from ptune.serve.reading_protocol import ClassifyRequest, ClassifyResponse, TagRequest, TagResponse
from ptune.serve.refusals import RefusedError, check_count, unknown_model
from ptune.serve.settings import GatewaySettings
from ptune.serve.upstreams import Upstream, Upstreams
from ptune.serve.waiting import too_late, while_there

_log = logging.getLogger(__name__)
Tasks = MergedTasks | EmbeddedTasks


def create_gateway(
    urls: Sequence[str],
    tasks: Tasks | None = None,
    settings: GatewaySettings | None = None,
    tokens: Sequence[str] = (),
    upstream_token: str | None = None,
) -> FastAPI:
    """Return the ASGI application.

    Args:
        urls: of the servers behind it.
        tasks: what they are asked for, where they are no servers of ptune.
        settings: limits.
        tokens: one of them must come with each request; none asks for none.
        upstream_token: what the servers ask for.
    """
    settings, metrics = settings or GatewaySettings(), GatewayMetrics()
    embedded = tasks if isinstance(tasks, EmbeddedTasks) else None
    upstreams = Upstreams(list(urls), metrics, upstream_token, None if embedded is None else embedded.hindrance)
    gateway = _Gateway(upstreams, tasks, settings, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(upstreams.watched(settings.watch_seconds))
            if embedded is not None:
                await stack.enter_async_context(embedded.watched(settings.watch_seconds))
            yield

    return application(
        "Soft prompts on servers behind this one, each a model, by OpenAI's interface.",
        [_routes(gateway)],
        lifespan=lifespan,
        ready=lambda: bool(upstreams.alive),
        max_body=settings.max_body,
        tokens=tokens,
        metrics=metrics,
    )


def _routes(gateway: _Gateway) -> APIRouter:
    router = APIRouter()

    @router.get(MODELS, response_model=ModelList)
    async def models() -> Any:
        """List the bare backbone and every soft prompt."""
        return ModelList(data=list(gateway.models().values()))

    @router.get(f"{MODELS}/{{model:path}}", response_model=Model)
    async def model(model: str) -> Any:
        """Tell of one of them."""
        return gateway.model(model)

    @router.post(CHATS, response_model=ChatCompletion)
    async def chat_completions(request: Request, body: ChatRequest) -> Any:
        """Answer the last message of a conversation."""
        return await gateway.chat(request, body)

    @router.post(COMPLETIONS, response_model=Completion)
    async def completions(request: Request, body: CompletionRequest) -> Any:
        """Continue a text, or several: by a soft prompt's template, or with the bare model as they stand."""
        return await gateway.complete(request, body)

    @router.post(CLASSIFY, response_model=ClassifyResponse)
    async def classify(request: Request, body: ClassifyRequest) -> Any:
        """Take the likeliest of a soft prompt's labels for each text; where servers of ptune stand behind."""
        return await gateway.read(request, CLASSIFY, body)

    @router.post(TAG, response_model=TagResponse)
    async def tag(request: Request, body: TagRequest) -> Any:
        """Find the entities of each text by a soft prompt; where servers of ptune stand behind."""
        return await gateway.read(request, TAG, body)

    return router


class _Gateway:
    """What the routes share."""

    def __init__(
        self, upstreams: Upstreams, tasks: Tasks | None, settings: GatewaySettings, metrics: GatewayMetrics
    ) -> None:
        self._upstreams, self._tasks, self._settings, self._metrics = upstreams, tasks, settings, metrics
        self._started, self._in_flight = int(time.time()), 0

    def models(self) -> dict[str, Model]:
        """Return what is served, by name."""
        if self._tasks is not None:
            kinds = self._tasks.kinds()
            return {name: Model(id=name, created=self._started, task=kind) for name, kind in kinds.items()}
        listed = [entry for upstream in self._upstreams.alive for entry in upstream.models]
        return {entry["id"]: Model.model_validate(entry) for entry in listed}

    def model(self, name: str) -> Model:
        """Return one of them.

        Raises:
            RefusedError: 404, there is none of that name; 503, no server is there to ask.
        """
        known = self.models()
        if not known:
            raise RefusedError(503, "no server behind this one answers; ask again later", code="no_upstream")
        if name not in known:
            raise unknown_model(name, list(known))
        return known[name]

    async def chat(self, request: Request, asked: ChatRequest) -> Any:
        self._check(asked)
        if self._tasks is None:
            posted = Posted(CHATS, asked.model_dump(exclude_unset=True))
        else:
            posted = await asyncio.to_thread(self._tasks.chat, asked, self._settings.max_tokens)
        if asked.stream:
            return await self._stream(request, asked, posted)
        (answer,) = await self._answers(request, [posted], asked.model)
        return JSONResponse(self._counted(request, asked.model, posted.shaped(answer)))

    async def complete(self, request: Request, asked: CompletionRequest) -> Any:
        self._check(asked)
        texts = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
        check_count("prompt", len(texts), self._settings.max_items)
        if self._tasks is None:
            posted = [Posted(COMPLETIONS, asked.model_dump(exclude_unset=True))]
        else:
            completion, most = self._tasks.completion, self._settings.max_tokens
            posted = [await asyncio.to_thread(completion, asked, text, most) for text in texts]
        if asked.stream:
            if len(posted) > 1:
                raise RefusedError(400, "this gateway streams one text at a time; send one", param="prompt")
            return await self._stream(request, asked, posted[0])
        answers = await self._answers(request, posted, asked.model)
        if self._tasks is None:
            return JSONResponse(self._counted(request, asked.model, answers[0]))
        choices = [
            each.shaped(answer)["choices"][0] | {"index": number}
            for number, (each, answer) in enumerate(zip(posted, answers, strict=True))
        ]
        usage = {
            name: sum(answer["usage"][name] for answer in answers)
            for name in ("prompt_tokens", "completion_tokens", "total_tokens")
        }
        whole = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time())}
        return JSONResponse(self._counted(request, asked.model, {**whole, "choices": choices, "usage": usage}))

    async def read(self, request: Request, path: str, asked: ClassifyRequest | TagRequest) -> Any:
        self.model(asked.model)
        if self._tasks is not None:
            raise RefusedError(
                400,
                "this gateway stands before an engine that writes text and reads no labels or tags; serve "
                "this soft prompt by ptune's own engine",
                param="model",
            )
        (answer,) = await self._answers(request, [Posted(path, asked.model_dump(exclude_unset=True))], asked.model)
        return JSONResponse(self._counted(request, asked.model, answer))

    def _check(self, asked: Sampling) -> None:
        self.model(asked.model)
        given = (asked.max_tokens, getattr(asked, "max_completion_tokens", None))
        most = self._settings.max_tokens
        if any(number is not None and number > most for number in given):
            raise RefusedError(400, f"this server writes {most} tokens at most", param="max_tokens")

    async def _answers(self, request: Request, posted: Sequence[Posted], model: str) -> list[Body]:
        """Return the servers' answers, in the order of what was posted.

        Raises:
            RefusedError: what the servers refuse; 429, 503, 504; 499 when the client went away.
        """
        together = asyncio.gather(*(self._answer(each, model) for each in posted))
        with self._place():
            try:
                return await while_there(request, asyncio.wait_for(together, self._settings.deadline_seconds))
            except asyncio.TimeoutError:
                raise too_late(self._settings.deadline_seconds) from None

    async def _answer(self, posted: Posted, model: str) -> Body:
        body = self._addressed(posted.body)
        async with self._upstreams.answer(posted.path, body, streamed=False, fit=self._fit(model)) as response:
            self._see_that_it_answers(response)
            answer: Body = response.json()
            return answer

    async def _stream(self, request: Request, asked: Sampling, posted: Posted) -> StreamingResponse:
        """Return the answer as server-sent events. What is refused before the first of them is refused by status."""
        options = {"stream": True, "stream_options": {"include_usage": True}}  # counted, whether told or not
        events = self._events(request, asked, Posted(posted.path, posted.body | options, posted.shaped))
        first = await while_there(request, anext(events))
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(_chained(first, events), media_type="text/event-stream", headers=headers)

    async def _events(self, request: Request, asked: Sampling, posted: Posted) -> AsyncIterator[str]:
        told = asked.stream_options is not None and asked.stream_options.include_usage
        until, begun = time.monotonic() + self._settings.deadline_seconds, False
        try:
            with self._place():
                while True:
                    try:
                        async for event in self._read(posted, asked.model, until):
                            begun = True
                            if "error" in event:
                                yield _line(event)
                                return
                            if not event["choices"]:
                                self._counted(request, asked.model, event)
                                if not told:
                                    continue
                            yield _line(posted.shaped(event) | {"model": asked.model})
                        break
                    except httpx.TransportError:
                        if begun:
                            raise
                        self._metrics.retries.inc()  # nobody has seen anything yet; the lost one is not asked again
            yield "data: [DONE]\n\n"
        except (httpx.TransportError, asyncio.TimeoutError, RefusedError) as error:
            refused = self._told(error)
            if not begun:
                raise refused from error
            self._metrics.broken.inc()
            yield _line(refused.body())

    async def _read(self, posted: Posted, model: str, until: float) -> AsyncIterator[Body]:
        """Yield a stream's events.

        Raises:
            httpx.TransportError: it broke off.
            RefusedError: as `_answers` does.
            asyncio.TimeoutError: past the deadline.
        """
        async with contextlib.AsyncExitStack() as stack:
            body = self._addressed(posted.body)
            sent = self._upstreams.answer(posted.path, body, streamed=True, fit=self._fit(model))
            response = await asyncio.wait_for(stack.enter_async_context(sent), until - time.monotonic())
            self._see_that_it_answers(response)
            lines = aiter(response.aiter_lines())
            while (line := await asyncio.wait_for(anext(lines, None), until - time.monotonic())) is not None:
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                if line.startswith("data:"):
                    event: Body = json.loads(data)
                    yield event
                    if "error" in event:
                        return
            raise httpx.RemoteProtocolError("the stream ended before its end")

    def _told(self, error: Exception) -> RefusedError:
        if isinstance(error, RefusedError):
            return error
        if isinstance(error, asyncio.TimeoutError):
            return too_late(self._settings.deadline_seconds)
        return RefusedError(502, "the server that wrote this answer was lost; ask again", code="upstream_lost")

    def _addressed(self, body: Body) -> Callable[[Upstream], Body]:
        if self._tasks is None:
            return lambda _upstream: body
        return lambda upstream: body | {"model": upstream.models[0]["id"]}

    def _fit(self, model: str) -> Callable[[Upstream], bool]:
        if self._tasks is not None:
            return lambda upstream: bool(upstream.models)
        return lambda upstream: any(entry["id"] == model for entry in upstream.models)

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        if self._in_flight >= self._settings.max_queue:
            message = f"{self._settings.max_queue} requests are in flight; ask again in a moment"
            raise RefusedError(429, message, code="queue_full", headers={"Retry-After": "1"})
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1

    def _see_that_it_answers(self, response: httpx.Response) -> None:
        """See that a server did what was asked.

        Raises:
            RefusedError: it did not: in its own words where the client can mend it.
        """
        if response.status_code == 200:
            return
        try:
            error = response.json()["error"]
            message, param, code = str(error["message"]), error.get("param"), error.get("code")
        except (ValueError, KeyError, TypeError, AttributeError):
            message, param, code = "the request was refused", None, None
        if response.status_code in (401, 403) or (response.status_code >= 500 and response.status_code != 504):
            # No mistake of the client's, and the words may tell of the inside.
            _log.error("a server fails", extra={"upstream": str(response.url), "status": response.status_code})
            if response.status_code != 503:
                raise RefusedError(502, "a server behind this one fails; its log says why", code="upstream_failed")
        after = response.headers.get("retry-after")
        raise RefusedError(
            response.status_code,
            message,
            param=param if isinstance(param, str) else None,
            code=code if isinstance(code, str) else None,
            headers={} if after is None else {"Retry-After": after},
        )

    def _counted(self, request: Request, model: str, answer: Body) -> Body:
        """Count the usage of an answer and note it for the log; return the answer with the model's name as asked."""
        usage = answer.get("usage") or {}
        read, wrote = usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)
        self._metrics.tokens.labels("prompt").inc(read)
        self._metrics.tokens.labels("completion").inc(wrote)
        request.state.note |= {"model": model, "prompt_tokens": read, "completion_tokens": wrote}
        return answer | {"model": model}


def _line(event: Body) -> str:
    return f"data: {json.dumps(event, ensure_ascii=False)}\n\n"


async def _chained(first: str, events: AsyncIterator[str]) -> AsyncIterator[str]:
    try:
        yield first
        async for event in events:
            yield event
    finally:
        await events.aclose()  # type: ignore[attr-defined]
