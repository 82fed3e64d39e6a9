"""Requests of this server's shapes, said to an engine that serves a merged model (`ptune merge`), and its answers back.

A task is chosen by ``chat_template_kwargs``; a completion by a soft prompt is a chat of one message, whose template
does the rendering. Knows bodies, and nothing of how they travel.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptune.errors import ConfigError
from ptune.merging.chat_template import kwarg_of
from ptune.merging.folder import DESCRIPTION
from ptune.serve.contexts import question_of, with_system
from ptune.serve.paths import CHATS, COMPLETIONS
from ptune.serve.posted import Body, Posted, as_completion, refused_choosing, sampled
from ptune.serve.protocol import ChatRequest, CompletionRequest, Sampling
from ptune.serve.refusals import RefusedError, unknown_model


@dataclass(frozen=True)
class MergedTasks:
    """The tasks of a merged model.

    Attributes:
        bare: what the bare model is called.
        tasks: by name, as `ptune_merged.json` tells of them.
    """

    bare: str
    tasks: Mapping[str, Mapping[str, Any]] = field(repr=False)

    @classmethod
    def read(cls, path: Path) -> MergedTasks:
        """Read the tasks of a merged folder, or of its `ptune_merged.json` alone.

        Raises:
            ConfigError: it is neither.
        """
        file = path / DESCRIPTION if path.is_dir() else path
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            name, tasks = values["backbone"], values["tasks"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f'"{path}" is no merged model: it has no readable {DESCRIPTION}; make one by ptune merge'
            ) from error
        return cls(str(name).rstrip("/").rpartition("/")[2], tasks)

    def kinds(self) -> dict[str, str | None]:
        """Return the kind of task of each model by its name, None for the bare one."""
        return {self.bare: None, **{name: task["task"]["type"] for name, task in sorted(self.tasks.items())}}

    def chat(self, asked: ChatRequest, most: int) -> Posted:
        """Return what is posted for a conversation.

        Raises:
            RefusedError: no such model, or what a merged model has no place for.
        """
        messages = [{"role": message.role, "content": message.text} for message in asked.messages]
        fields, task = asked.fields, self._task(asked.model)
        if task is not None:
            system = messages.pop(0)["content"] if messages[0]["role"] in ("system", "developer") else None
            fields = with_system(task["fields"], fields, system)
        body = self._body(asked, asked.max_completion_tokens or asked.max_tokens, most)
        if asked.logprobs:
            body |= {"logprobs": True, "top_logprobs": asked.top_logprobs or 0}
        return Posted(CHATS, body | {"messages": messages, **self._kwargs(asked.model, task, fields)})

    def completion(self, asked: CompletionRequest, text: str, most: int) -> Posted:
        """Return what is posted for a text to continue: to the engine's chats where a soft prompt shall do it.

        Raises:
            RefusedError: as `chat` does.
        """
        task = self._task(asked.model)
        body = self._body(asked, asked.max_tokens, most)
        if task is None:
            if asked.fields:
                raise RefusedError(400, "the bare model has no template, so no fields; leave them out", param="fields")
            told = {} if asked.logprobs is None else {"logprobs": asked.logprobs}
            return Posted(COMPLETIONS, body | {"prompt": text} | told)
        if asked.logprobs is not None:
            raise RefusedError(
                400, "a merged model tells log-probabilities to /v1/chat/completions alone; ask there", param="logprobs"
            )
        messages = [{"role": "user", "content": text}]
        body |= {"messages": messages, **self._kwargs(asked.model, task, asked.fields)}
        return Posted(CHATS, body, as_completion)

    def _task(self, model: str) -> Mapping[str, Any] | None:
        if model == self.bare:
            return None
        if model not in self.tasks:
            raise unknown_model(model, [self.bare, *self.tasks])
        task = self.tasks[model]
        if task["task"]["type"] != "generation":
            raise refused_choosing(task["task"]["type"])
        return task

    def _kwargs(self, model: str, task: Mapping[str, Any] | None, fields: Mapping[str, str]) -> Body:
        if task is None:
            if fields:
                raise RefusedError(400, "the bare model has no template, so no fields; leave them out", param="fields")
            return {"chat_template_kwargs": {"task": ""}}  # not given, it is the only task of a merged model of one
        question_of(task["fields"], fields)
        kwargs: Body = {"task": model}
        for name, text in fields.items():
            if kwarg_of(name):
                kwargs[name] = text
            else:
                kwargs.setdefault("fields", {})[name] = text
        return {"chat_template_kwargs": kwargs}

    def _body(self, asked: Sampling, max_tokens: int | None, most: int) -> Body:
        task = self.tasks.get(asked.model)
        return sampled(asked, max_tokens, None if task is None else task["task"]["max_new_tokens"], most)
