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

from ptune.errors import ConfigError, did_you_mean
from ptune.merging.chat_template import kwarg_of
from ptune.merging.folder import DESCRIPTION
from ptune.sampling import GenerationOptions
from ptune.serve.protocol import ChatRequest, CompletionRequest, Sampling
from ptune.serve.refusals import RefusedError, unknown_model

_PASSED_ON = ("top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop")
Body = dict[str, Any]


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

    def chat(self, asked: ChatRequest, most: int) -> Body:
        """Return the body for the engine's chats.

        Raises:
            RefusedError: no such model, or what a merged model has no place for.
        """
        messages = [{"role": message.role, "content": message.text} for message in asked.messages]
        fields, task = dict(asked.fields), self._task(asked.model)
        if task is not None and messages[0]["role"] in ("system", "developer"):
            if "system" not in task["fields"]:
                raise RefusedError(
                    400,
                    "the template of this soft prompt has no field system for a system message; write it into the "
                    "user's",
                    param="messages",
                )
            fields["system"] = messages.pop(0)["content"]
        body = self._body(asked, asked.max_completion_tokens or asked.max_tokens, most)
        if asked.logprobs:
            body |= {"logprobs": True, "top_logprobs": asked.top_logprobs or 0}
        return body | {"messages": messages, **self._kwargs(asked.model, task, fields)}

    def completion(self, asked: CompletionRequest, text: str, most: int) -> Body:
        """Return the body for the engine's completions by the bare model, or for its chats by a soft prompt.

        Raises:
            RefusedError: as `chat` does.
        """
        task = self._task(asked.model)
        body = self._body(asked, asked.max_tokens, most)
        if task is None:
            if asked.fields:
                raise RefusedError(400, "the bare model has no template, so no fields; leave them out", param="fields")
            return body | {"prompt": text} | ({} if asked.logprobs is None else {"logprobs": asked.logprobs})
        if asked.logprobs is not None:
            raise RefusedError(
                400, "a merged model tells log-probabilities to /v1/chat/completions alone; ask there", param="logprobs"
            )
        messages = [{"role": "user", "content": text}]
        return body | {"messages": messages, **self._kwargs(asked.model, task, asked.fields)}

    def is_bare(self, model: str) -> bool:
        """Whether a model is the bare one."""
        return model == self.bare

    def _task(self, model: str) -> Mapping[str, Any] | None:
        if model == self.bare:
            return None
        if model not in self.tasks:
            raise unknown_model(model, [self.bare, *self.tasks])
        task = self.tasks[model]
        if task["task"]["type"] != "generation":
            raise RefusedError(
                400,
                f"this soft prompt chooses among answers ({task['task']['type']}), which this gateway cannot have from "
                "an engine that writes text; serve it by ptune's own engine",
                param="model",
            )
        return task

    def _kwargs(self, model: str, task: Mapping[str, Any] | None, fields: Mapping[str, str]) -> Body:
        if task is None:
            if fields:
                raise RefusedError(400, "the bare model has no template, so no fields; leave them out", param="fields")
            if len(self.tasks) == 1:
                raise RefusedError(
                    400,
                    "a merged model of one task always takes it, so its bare model takes no messages; continue a text "
                    "by /v1/completions",
                    param="model",
                )
            return {}
        question = next((name for name in task["fields"] if name != "system"), None)
        kwargs: Body = {"task": model}
        for name, text in fields.items():
            if name == question:
                raise RefusedError(
                    400, f'the field "{name}" is the text itself; leave it out of fields', param="fields"
                )
            if name not in task["fields"]:
                known = list(task["fields"])
                raise RefusedError(
                    400,
                    f'the template has no field "{name}"; it has {", ".join(known)}.{did_you_mean(name, known)}',
                    param="fields",
                )
            if kwarg_of(name):
                kwargs[name] = text
            else:
                kwargs.setdefault("fields", {})[name] = text
        return {"chat_template_kwargs": kwargs}

    def _body(self, asked: Sampling, max_tokens: int | None, most: int) -> Body:
        if asked.no_repeat_ngram_size:
            raise RefusedError(
                400, "no_repeat_ngram_size is not offered by this engine; leave it out", param="no_repeat_ngram_size"
            )
        task = self.tasks.get(asked.model)
        usual = GenerationOptions().max_new_tokens if task is None else task["task"]["max_new_tokens"]
        body: Body = {"max_tokens": max_tokens or min(usual, most)}
        body |= {name: value for name in _PASSED_ON if (value := getattr(asked, name)) is not None}
        drawn = [name for name in ("top_p", "top_k", "min_p") if name in body]
        # Greedy unless something says otherwise, whatever the engine's own default is.
        body["temperature"] = asked.temperature if asked.temperature is not None else 1.0 if drawn else 0.0
        return body


def as_completion(chat: Body, index: int) -> Body:
    """Return the choice of a completion for an answer, or an event of one, of the engine's chats."""
    (choice,) = chat["choices"]
    told = choice.get("message") or choice.get("delta") or {}
    return {
        "index": index,
        "text": told.get("content") or "",
        "finish_reason": choice.get("finish_reason"),
        "logprobs": None,
    }
