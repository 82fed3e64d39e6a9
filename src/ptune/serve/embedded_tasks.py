"""Requests for engines that take embeddings in place of ids: soft prompts come and go while the engine runs.

A text is rendered here, as ptune's own server renders it; its words become rows of the backbone's input matrix, its
virtual tokens rows of the soft prompt, and the engine continues those. What has no virtual tokens is sent as ids.

The rows travel as vLLM wants them, saved by torch: the one place in ptune where such bytes are written; none is ever
read. Shapes: T tokens, P virtual tokens, H width, V rows of the input matrix.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import logging
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch
from torch import Tensor

from ptune.errors import SoftPromptError
from ptune.rendering.renderer import Renderer
from ptune.serve.contexts import chat_context, completion_context
from ptune.serve.paths import COMPLETIONS
from ptune.serve.posted import AsChatEvents, Body, Posted, as_chat, refused_choosing, sampled
from ptune.serve.prompts import PromptFolder, Served, watch
from ptune.serve.protocol import ChatRequest, CompletionRequest, Sampling
from ptune.serve.refusals import RefusedError, unusable_model
from ptune.serve.stored_backbone import StoredBackbone
from ptune.soft_prompts.soft_prompt import SoftPrompt
from ptune.template import Template

_log = logging.getLogger(__name__)
_PROBE_TOKENS = 12
_TOLERANCE = 0.05
"""Of a log-probability: the same rows give the same number, another scale or model gives another."""


@dataclass(frozen=True)
class _Loaded:
    """A soft prompt in memory: its rendering, its rows ``[P, H]``, and how many tokens it writes."""

    renderer: Renderer
    rows: Tensor
    usual: int


class EmbeddedTasks:
    """The soft prompts of a folder, for engines that run their backbone and take embeddings."""

    def __init__(self, folder: Path | None, backbone: StoredBackbone) -> None:
        """Read the folder.

        Raises:
            ConfigError: there is no such folder.
        """
        self._backbone = backbone
        self._folder = PromptFolder(folder, backbone)
        self._loaded: dict[Served, _Loaded] = {}
        self._lock = threading.Lock()  # a tokenizer serves one thread at a time

    def kinds(self) -> dict[str, str | None]:
        """Return the kind of task of each model by its name, None for the bare one."""
        return {self._folder.bare: None, **{name: one.task for name, one in sorted(self._folder.served.items())}}

    def scan(self) -> None:
        """Take up what was added to the folder, replaced in it and removed since."""
        self._folder.scan()
        with self._lock:
            self._loaded = {served: loaded for served, loaded in self._loaded.items() if not served.retired}

    @contextlib.asynccontextmanager
    async def watched(self, seconds: float) -> AsyncIterator[None]:
        """Look at the folder now and again while the block runs."""
        watching = asyncio.create_task(watch(lambda: asyncio.to_thread(self.scan), seconds))
        try:
            yield
        finally:
            watching.cancel()

    def chat(self, asked: ChatRequest, most: int) -> Posted:
        """Return what is posted for a conversation.

        Raises:
            RefusedError: no such model, a text that is too long, or what such an engine has no place for.
            DataError: a field of the template is missing.
        """
        if asked.logprobs:
            raise RefusedError(
                400,
                "an engine that takes embeddings tells log-probabilities to /v1/completions alone; ask there",
                param="logprobs",
            )
        messages = [(message.role, message.text) for message in asked.messages]
        with self._lock:
            loaded = self._find(asked.model)
            body = self._body(asked, loaded, asked.max_completion_tokens or asked.max_tokens, most)
            renderer = None if loaded is None else loaded.renderer
            ids = chat_context(self._backbone, renderer, messages, asked.fields, body["max_tokens"])
        return Posted(COMPLETIONS, self._with_prompt(body, ids, loaded), AsChatEvents() if asked.stream else as_chat)

    def completion(self, asked: CompletionRequest, text: str, most: int) -> Posted:
        """Return what is posted for a text to continue.

        Raises:
            RefusedError, DataError: as `chat`.
        """
        with self._lock:
            loaded = self._find(asked.model)
            body = self._body(asked, loaded, asked.max_tokens, most)
            renderer = None if loaded is None else loaded.renderer
            ids = completion_context(self._backbone, renderer, text, asked.fields)
        if asked.logprobs is not None:
            body["logprobs"] = asked.logprobs
        return Posted(COMPLETIONS, self._with_prompt(body, ids, loaded))

    async def hindrance(self, client: httpx.AsyncClient, url: str, model: str) -> str | None:
        """Return why a server gets no requests; None where the same words, as ids and as rows, have one answer."""
        ids = torch.linspace(0, self._backbone.vocabulary_size - 1, _PROBE_TOKENS + 2).long()[1:-1].tolist()
        told = []
        for prompt in ({"prompt": ids}, {"prompt_embeds": as_embeds(self._backbone.rows(ids))}):
            body = {"model": model, "max_tokens": 1, "temperature": 0, "logprobs": 1, **prompt}
            answer = await client.post(f"{url}{COMPLETIONS}", json=body)
            if answer.status_code != 200:
                return (
                    f"refuses embeddings ({' '.join(answer.text.split())[:200]}); start it with --enable-prompt-embeds"
                )
            logprobs = answer.json()["choices"][0]["logprobs"]
            told.append((logprobs["tokens"][0], logprobs["token_logprobs"][0]))
        (by_id, one), (by_row, other) = told
        if by_id != by_row or abs(one - other) > _TOLERANCE:
            name = self._backbone.name
            return f'reads the rows of "{name}" otherwise than its own ids: another model, or one that scales them'
        return None

    def _find(self, model: str) -> _Loaded | None:
        served = self._folder.find(model)
        if served is None:
            return None
        if served.task != "generation":
            raise refused_choosing(served.task)
        if served not in self._loaded:
            self._loaded[served] = self._load(served)
        return self._loaded[served]

    def _load(self, served: Served) -> _Loaded:
        try:
            prompt = SoftPrompt.load(served.folder)
        except SoftPromptError as error:
            _log.warning("a soft prompt cannot be loaded", extra={"prompt": served.name, "reason": str(error)})
            raise unusable_model(served.name, "cannot be loaded; the server's log says more") from error
        if prompt.deep is not None:
            raise unusable_model(
                served.name, "is a deep prompt, keys and values, which no engine takes; serve it by ptune's own engine"
            )
        if prompt.task.type != "generation" or not self._backbone.matches(prompt.fingerprint):
            raise unusable_model(served.name, "is being replaced by one of another task; ask again in a moment")
        renderer = Renderer(
            Template.parse(prompt.template),
            self._backbone.tokenizer,
            vocabulary_size=self._backbone.vocabulary_size,
            max_length=prompt.max_length,
            context_limit=self._backbone.context_limit,
            overlong=prompt.overlong,
            kind=self._backbone.kind,
        )
        return _Loaded(renderer, prompt.rows.to(self._backbone.dtype), prompt.task.max_new_tokens)

    def _body(self, asked: Sampling, loaded: _Loaded | None, max_tokens: int | None, most: int) -> Body:
        if loaded is not None and asked.repetition_penalty is not None:
            raise RefusedError(
                400,
                "an engine that reads embeddings does not know which words it has read, so repetition_penalty is not "
                "offered for soft prompts; leave it out",
                param="repetition_penalty",
            )
        return sampled(asked, max_tokens, None if loaded is None else loaded.usual, most)

    def _with_prompt(self, body: Body, ids: Sequence[int], loaded: _Loaded | None) -> Body:
        """Return a body with what is to be continued; no more is asked for than the context leaves room for."""
        limit = self._backbone.context_limit
        if limit is not None:
            body |= {"max_tokens": min(body["max_tokens"], limit - len(ids))}
        if loaded is None:
            return body | {"prompt": list(ids)}
        return body | {"prompt_embeds": as_embeds(embedded(self._backbone, ids, loaded.rows))}


def embedded(backbone: StoredBackbone, ids: Sequence[int], rows: Tensor) -> Tensor:
    """Return the embeddings of ids, ``[T, H]`` in the dtype that the backbone is stored in.

    Args:
        backbone: whose rows ids below V take.
        ids: of T tokens; V + k is virtual token k.
        rows: of the virtual tokens, ``[P, H]``.
    """
    every = torch.tensor(ids)
    virtual = every >= backbone.vocabulary_size
    embeddings = backbone.rows(every.masked_fill(virtual, 0).tolist())
    embeddings[virtual] = rows[every[virtual] - backbone.vocabulary_size].to(embeddings.dtype)
    return embeddings


def as_embeds(rows: Tensor) -> str:
    """Return embeddings ``[T, H]`` as a request has them."""
    buffer = io.BytesIO()
    torch.save(rows, buffer)
    return base64.b64encode(buffer.getvalue()).decode()
