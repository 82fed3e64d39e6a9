"""What a gateway posts to an engine behind it, and how the engine's answer becomes the one that was asked for.

Knows bodies, and nothing of how they travel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ptune.generation.sampling import GenerationOptions
from ptune.serve.protocol import Sampling
from ptune.serve.refusals import RefusedError

Body = dict[str, Any]
_PASSED_ON = ("top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop")


def as_it_is(answer: Body) -> Body:
    """Return an answer, or an event of one, unchanged."""
    return answer


@dataclass(frozen=True)
class Posted:
    """A request for an engine.

    Attributes:
        path: where it is posted.
        body: without the model, which each engine calls as it likes.
        shaped: makes what was asked for of the engine's answer, and of each event where it is streamed.
    """

    path: str
    body: Body
    shaped: Callable[[Body], Body] = as_it_is


def sampled(asked: Sampling, max_tokens: int | None, usual: int | None, most: int) -> Body:
    """Return how an engine shall write, as its body says it.

    Args:
        asked: the request.
        max_tokens: new tokens that it asks for.
        usual: those of the soft prompt; None for the bare model.
        most: that this server writes.

    Raises:
        RefusedError: something that such engines do not have.
    """
    if asked.no_repeat_ngram_size:
        raise RefusedError(
            400, "no_repeat_ngram_size is not offered by this engine; leave it out", param="no_repeat_ngram_size"
        )
    body: Body = {"max_tokens": max_tokens or min(usual or GenerationOptions().max_new_tokens, most)}
    body |= {name: value for name in _PASSED_ON if (value := getattr(asked, name)) is not None}
    drawn = [name for name in ("top_p", "top_k", "min_p") if name in body]
    # Greedy unless something says otherwise, whatever the engine's own default is.
    body["temperature"] = asked.temperature if asked.temperature is not None else 1.0 if drawn else 0.0
    return body


def refused_choosing(kind: str) -> RefusedError:
    """Return the refusal of a soft prompt whose task is not to write."""
    return RefusedError(
        400,
        f"this soft prompt chooses among answers ({kind}), which this gateway cannot have from an engine that writes "
        "text; serve it by ptune's own engine",
        param="model",
    )


def as_completion(chat: Body) -> Body:
    """Return a completion, or an event of one, for an answer, or an event of one, of the engine's chats."""
    choices = []
    for choice in chat["choices"]:
        told = choice.get("message") or choice.get("delta") or {}
        text, finished = told.get("content") or "", choice.get("finish_reason")
        choices.append({"index": 0, "text": text, "finish_reason": finished, "logprobs": None})
    return {**chat, "object": "text_completion", "choices": choices}


def as_chat(completion: Body) -> Body:
    """Return the answer to a conversation for the engine's completion."""
    (choice,) = completion["choices"]
    message = {"role": "assistant", "content": choice["text"]}
    told = {"index": 0, "message": message, "finish_reason": choice["finish_reason"], "logprobs": None}
    return {**_chat_head(completion), "object": "chat.completion", "choices": [told]}


class AsChatEvents:
    """Makes the events of a streamed chat of those of the engine's completion; one object a stream."""

    def __init__(self) -> None:
        self._begun = False

    def __call__(self, event: Body) -> Body:
        """Return an event of a chat; the first that has words says whose they are."""
        choices = []
        for choice in event["choices"]:
            delta = {"content": choice["text"]} if self._begun else {"role": "assistant", "content": choice["text"]}
            self._begun = True
            finished = choice.get("finish_reason")
            choices.append({"index": 0, "delta": delta, "finish_reason": finished, "logprobs": None})
        return {**_chat_head(event), "object": "chat.completion.chunk", "choices": choices}


def _chat_head(completion: Body) -> Body:
    head: Body = {"id": f"chatcmpl-{str(completion['id']).removeprefix('cmpl-')}"}
    return head | {name: completion[name] for name in ("created", "model", "usage") if name in completion}
