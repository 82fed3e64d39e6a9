"""``/v1/completions`` and ``/v1/chat/completions``, whole and streamed."""

from __future__ import annotations

import asyncio
import functools
import json
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase

from ptune.errors import PtuneError
from ptune.serve.contexts import chat_context, completion_context
from ptune.serve.jobs import Piece, Writing, Written
from ptune.serve.logprobs import Spelling
from ptune.serve.paths import CHATS, COMPLETIONS
from ptune.serve.protocol import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatRequest,
    Completion,
    CompletionChoice,
    CompletionRequest,
    Delta,
    Sampling,
    Usage,
)
from ptune.serve.refusals import RefusedError, check_count, refusal_of
from ptune.serve.service import Event, Heard, Service, hand_over
from ptune.serve.waiting import while_there

Context = Callable[..., list[int]]
"""Makes ids of the loaded soft prompt, or None for the bare model, and of how many tokens the answer may have."""


def completion_routes(service: Service) -> APIRouter:
    """Return the routes of a server."""
    router = APIRouter(tags=["text"])

    @router.post(COMPLETIONS, response_model=Completion)
    async def completions(request: Request, body: CompletionRequest) -> Any:
        """Continue a text, or several: by a soft prompt's template, or with the bare model as they stand."""
        texts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        check_count("prompt", len(texts), service.settings.max_items)

        def context(text: str, loaded: Any, _new_tokens: int) -> list[int]:
            return completion_context(service.engine.backbone, loaded and loaded.task.renderer, text, body.fields)

        contexts = [functools.partial(context, text) for text in texts]
        asked = _Asked(service, request, body, COMPLETIONS, body.max_tokens, contexts)
        asked.log_input(body.prompt)
        if body.stream:
            return await asked.stream(_CompletionEvents(service.engine.backbone.tokenizer))
        answers = await asked.answers()
        choices = [
            CompletionChoice(
                index=number,
                text=answer.text,
                finish_reason=answer.finish_reason,
                logprobs=Spelling(service.engine.backbone.tokenizer).for_completion(answer.logprobs),
            )
            for number, answer in enumerate(answers)
        ]
        return Completion(**asked.head, choices=choices, usage=asked.usage(answers))

    @router.post(CHATS, response_model=ChatCompletion)
    async def chat_completions(request: Request, body: ChatRequest) -> Any:
        """Answer the last message of a conversation."""
        messages = [(message.role, message.text) for message in body.messages]

        def context(loaded: Any, new_tokens: int) -> list[int]:
            renderer = loaded and loaded.task.renderer
            return chat_context(service.engine.backbone, renderer, messages, body.fields, new_tokens)

        max_tokens = body.max_completion_tokens or body.max_tokens
        asked = _Asked(service, request, body, CHATS, max_tokens, [context])
        asked.log_input(messages)
        if body.stream:
            return await asked.stream(_ChatEvents(service.engine.backbone.tokenizer))
        answers = await asked.answers()
        message = AnswerMessage(content=answers[0].text)
        logprobs = Spelling(service.engine.backbone.tokenizer).for_chat(answers[0].logprobs)
        choice = ChatChoice(index=0, message=message, finish_reason=answers[0].finish_reason, logprobs=logprobs)
        return ChatCompletion(**asked.head, choices=[choice], usage=asked.usage(answers))

    return router


class _CompletionEvents:
    """The events of a streamed completion."""

    shape = Completion

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._spellings: defaultdict[int, Spelling] = defaultdict(lambda: Spelling(tokenizer))

    def piece(self, index: int, piece: Piece) -> list[BaseModel]:
        logprobs = self._spellings[index].for_completion(piece.logprobs)
        return [CompletionChoice(index=index, text=piece.text, finish_reason=None, logprobs=logprobs)]

    def end(self, index: int, answer: Written) -> list[BaseModel]:
        logprobs = self._spellings[index].for_completion(answer.untold)
        return [CompletionChoice(index=index, text="", finish_reason=answer.finish_reason, logprobs=logprobs)]

    def begin(self) -> list[BaseModel]:
        return []


class _ChatEvents:
    """The events of a streamed chat."""

    shape = ChatCompletionChunk

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._spelling = Spelling(tokenizer)

    def piece(self, index: int, piece: Piece) -> list[BaseModel]:
        logprobs = self._spelling.for_chat(piece.logprobs)
        return [ChatDelta(index=index, delta=Delta(content=piece.text), logprobs=logprobs)]

    def end(self, index: int, answer: Written) -> list[BaseModel]:
        logprobs = self._spelling.for_chat(answer.untold)
        return [ChatDelta(index=index, delta=Delta(), finish_reason=answer.finish_reason, logprobs=logprobs)]

    def begin(self) -> list[BaseModel]:
        return [ChatDelta(index=0, delta=Delta(role="assistant", content=""))]


class _Asked:
    """One request to write: its jobs, and its answer in either form."""

    def __init__(
        self,
        service: Service,
        request: Request,
        body: Sampling,
        path: str,
        max_tokens: int | None,
        contexts: Sequence[Context],
    ) -> None:
        """Find the soft prompt and make a job of each context.

        Raises:
            RefusedError: no such model, or more tokens than this server writes.
        """
        self._service, self._request, self._body = service, request, body
        served, most = service.folder.find(body.model), service.settings.max_tokens
        if max_tokens is not None and max_tokens > most:
            raise RefusedError(400, f"this server writes {most} tokens at most, not {max_tokens}", param="max_tokens")
        prefix = "chatcmpl" if path == CHATS else "cmpl"
        self.head: dict[str, Any] = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time())}
        self.head["model"] = body.model
        self._queue: asyncio.Queue[Heard] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        self._jobs = [
            Writing(
                path,
                served,
                context,
                body.options(),
                max_new_tokens=max_tokens,
                most_new_tokens=most,
                on_piece=functools.partial(_tell, loop, self._queue, number) if body.stream else None,
            )
            for number, context in enumerate(contexts)
        ]

    def log_input(self, text: Any) -> None:
        if self._service.settings.log_text:
            self._request.state.note["input"] = text

    def usage(self, answers: Sequence[Written]) -> Usage:
        if self._service.settings.log_text:
            self._request.state.note["output"] = [answer.text for answer in answers]
        return self._service.count(self._request, self._body.model, answers)

    async def answers(self) -> list[Written]:
        return await self._service.answers(self._request, self._jobs)

    async def stream(self, shapes: _CompletionEvents | _ChatEvents) -> StreamingResponse:
        """Return the answer as server-sent events. What is refused before the first of them is refused by status."""
        events = self._service.events(self._jobs, self._queue)
        first = await while_there(self._request, anext(events))
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(self._lines(shapes, first, events), media_type="text/event-stream", headers=headers)

    async def _lines(
        self, shapes: _CompletionEvents | _ChatEvents, first: Event, events: AsyncIterator[Event]
    ) -> AsyncIterator[str]:
        answers: list[Written] = []
        try:
            if begin := shapes.begin():
                yield self._line(shapes, begin)
            event: Event | None = first
            while event is not None:
                index, what = event
                if isinstance(what, Piece):
                    yield self._line(shapes, shapes.piece(index, what))
                else:
                    answers.append(what)
                    yield self._line(shapes, shapes.end(index, what))
                event = await anext(events, None)
            usage = self.usage(answers)
            if self._body.stream_options is not None and self._body.stream_options.include_usage:
                yield self._line(shapes, [], usage)
            yield "data: [DONE]\n\n"
        except (RefusedError, PtuneError) as error:
            yield f"data: {json.dumps(refusal_of(error).body(), ensure_ascii=False)}\n\n"
        finally:
            await events.aclose()  # type: ignore[attr-defined]

    def _line(self, shapes: Any, choices: list[BaseModel], usage: Usage | None = None) -> str:
        chunk = shapes.shape(**self.head, choices=choices, usage=usage)
        return f"data: {chunk.model_dump_json()}\n\n"


def _tell(loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[Heard], number: int, piece: Piece) -> None:
    hand_over(loop, queue, (number, piece))
