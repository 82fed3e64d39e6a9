"""What a request is refused with: an HTTP status and an error in OpenAI's shape. Knows no engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptune.errors import PtuneError, did_you_mean
from ptune.serve.paths import CHATS, CLASSIFY, COMPLETIONS, TAG

_PATHS: dict[str | None, tuple[str, ...]] = {
    None: (CHATS, COMPLETIONS),
    "classification": (CLASSIFY,),
    "linear_classification": (CLASSIFY,),
    "choice": (CLASSIFY,),
    "tagging": (TAG,),
    "extraction": (TAG, CHATS, COMPLETIONS),
    "generation": (CHATS, COMPLETIONS),
}
"""Where soft prompts of each task are asked; None is the bare model."""

_TYPES = {
    401: "authentication_error",
    429: "rate_limit_error",
    499: "client_gone",
    500: "server_error",
    502: "server_error",
    503: "server_error",
    504: "timeout_error",
}


class RefusedError(Exception):
    """A request is not answered; the message is for the client.

    Attributes:
        status: of HTTP.
        param: member of the body that is at fault.
        code: one word for programs.
        headers: to send with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the error as OpenAI's clients expect it."""
        return error_body(self.status, str(self), param=self.param, code=self.code)


def error_body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return an error in OpenAI's shape."""
    kind = _TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def unknown_model(name: str, known: list[str]) -> RefusedError:
    """Return the refusal of a model that is not served, with the nearest name that is."""
    return RefusedError(
        404,
        f'the model "{name}" is not served here; GET /v1/models lists those that are.{did_you_mean(name, known)}',
        param="model",
        code="model_not_found",
    )


def unusable_model(name: str, reason: str) -> RefusedError:
    """Return the refusal of a soft prompt that lies in the folder and cannot be used."""
    return RefusedError(
        404, f'the soft prompt "{name}" cannot be used: it {reason}', param="model", code="model_not_usable"
    )


def check_path(path: str, task: str | None) -> None:
    """See that a path answers for soft prompts of a task; a task of None is the bare model.

    Raises:
        RefusedError: 400, it is not; names those that are.
    """
    if path not in _PATHS[task]:
        what = "the bare model" if task is None else f"a soft prompt of type {task}"
        mend = f"ask {' or '.join(_PATHS[task])}"
        raise RefusedError(400, f"this is {what}, for which {path} has no answer; {mend}", param="model")


def check_count(param: str, texts: int, most: int) -> None:
    """See that a request has no more texts than it may.

    Raises:
        RefusedError: 400, it has, in the member ``param`` of its body.
    """
    if texts > most:
        raise RefusedError(400, f"{param} has {texts} texts, and a request {most} at most", param=param)


def refusal_of(error: RefusedError | PtuneError) -> RefusedError:
    """Return the refusal of a request whose own mistake it is."""
    return error if isinstance(error, RefusedError) else RefusedError(400, str(error))


def internal_error() -> RefusedError:
    """Return what a client is told of a mistake of the server's own."""
    return RefusedError(500, "the server failed on this request; its log says where", code="internal_error")
