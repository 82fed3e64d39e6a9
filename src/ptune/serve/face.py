"""What stands around the routes of any server: limits, tokens, the log, and how mistakes are told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from ptune import __version__
from ptune.errors import PtuneError, did_you_mean
from ptune.serve.body_limit import BodyLimit
from ptune.serve.health_routes import health_routes
from ptune.serve.logs import Observed
from ptune.serve.metrics import RequestMetrics
from ptune.serve.protocol import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    ErrorBody,
    StreamOptions,
    TextPart,
    Upload,
)
from ptune.serve.reading_protocol import ClassifyRequest, TagRequest
from ptune.serve.refusals import RefusedError, error_body, refusal_of
from ptune.serve.security import BearerTokens

_BODIES = (ChatRequest, ChatMessage, TextPart, CompletionRequest, StreamOptions, ClassifyRequest, TagRequest, Upload)
_MEMBERS = sorted({name for body in _BODIES for name in body.model_fields})

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request cannot be answered as it is."},
    "5XX": {"model": ErrorBody, "description": "The server cannot answer, now or in time."},
}
"""What routes answer besides, for the description."""


def application(
    description: str,
    routers: Sequence[APIRouter],
    *,
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]],
    ready: Callable[[], bool],
    max_body: int,
    tokens: Sequence[str],
    metrics: RequestMetrics,
) -> FastAPI:
    """Return an application: its routes, health and metrics, with limits, tokens and the log around them.

    Args:
        description: of what it serves.
        routers: its own routes.
        lifespan: what runs while it does.
        ready: whether requests will be answered.
        max_body: bytes of a request's body.
        tokens: one of them must come with each request; none asks for none.
        metrics: what it counts.
    """
    app = FastAPI(
        title="ptune",
        version=__version__,
        description=description,
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    bearer = [Security(HTTPBearer(auto_error=False))] if tokens else []  # for the description; BearerTokens asks
    app.include_router(health_routes(ready, metrics))
    for router in routers:
        app.include_router(router, responses=ERRORS, dependencies=bearer)
    app.add_exception_handler(RefusedError, _refused)
    app.add_exception_handler(PtuneError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_middleware(BodyLimit, limit=max_body)
    app.add_middleware(BearerTokens, tokens=tokens)
    app.add_middleware(Observed, metrics=metrics)  # the outermost
    return app


async def _refused(_request: Request, error: Exception) -> JSONResponse:
    refused = refusal_of(error)  # type: ignore[arg-type]
    return JSONResponse(refused.body(), refused.status, refused.headers)


async def _invalid(_request: Request, error: Exception) -> JSONResponse:
    """Name the first thing that is wrong with a body, without repeating what it holds."""
    assert isinstance(error, RequestValidationError)
    # Where a member may be of several types there is an error for each; the one that got furthest tells the most.
    entry = min(error.errors(), key=lambda entry: entry["type"].endswith("_type"))
    kind, place = entry["type"], entry["loc"][1:]
    named = [str(part) for part in place if isinstance(part, int) or part in _MEMBERS]  # the others name types
    if kind == "extra_forbidden" and place[-1] not in _MEMBERS:
        named.append(str(place[-1]))
    if kind == "json_invalid":
        return JSONResponse(error_body(400, "the body is no JSON; send one object", code="invalid_json"), 400)
    param = ".".join(named)[:200] or None
    if kind == "extra_forbidden":
        message = f"{param} is not offered here; leave it out.{did_you_mean(str(place[-1])[:100], _MEMBERS)}"
    else:
        message = f"{param or 'the body'}: {_lower(entry['msg'].removeprefix('Value error, '))}"
    return JSONResponse(error_body(400, message, param=param, code="invalid_request"), 400)


async def _http(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = {
        400: "the body is no JSON; send one object",
        404: "there is no such path here; GET /openapi.json lists those that are",
        405: "this path does not take this method; GET /openapi.json lists what each takes",
    }.get(error.status_code, str(error.detail))
    return JSONResponse(error_body(error.status_code, message), error.status_code, error.headers)


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
