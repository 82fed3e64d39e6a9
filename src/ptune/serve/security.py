"""Bearer tokens: read from the environment or a file, compared in constant time, before a body is read."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Sequence
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ptune.errors import ConfigError
from ptune.serve.paths import ALIVE, DESCRIPTION, READY
from ptune.serve.refusals import error_body

TOKENS_VARIABLE = "PTUNE_SERVE_TOKENS"
OPEN_PATHS = frozenset({ALIVE, READY, DESCRIPTION})
"""What answers without a token: what a load balancer and a reader of the description need."""


def read_tokens(path: Path | None) -> tuple[str, ...]:
    """Return the tokens in a file, one a line, or else in the environment, with commas or blanks between them.

    Raises:
        ConfigError: the file cannot be read or holds none, or a token cannot stand in a header.
    """
    if path is None:
        source, text = TOKENS_VARIABLE, os.environ.get(TOKENS_VARIABLE, "").replace(",", " ")
    else:
        source = f'"{path}"'
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the tokens in {source}: {error}; write one token a line") from error
    tokens = tuple(word for line in text.splitlines() if not line.startswith("#") for word in line.split())
    if path is not None and not tokens:
        raise ConfigError(f"{source} holds no token; write one a line, or leave --tokens-file out")
    if any(not token.isascii() for token in tokens):
        raise ConfigError(f"a token in {source} holds more than ASCII, which a header cannot carry; choose another")
    return tokens


class BearerTokens:
    """ASGI middleware: lets a request through that names one of the tokens; all, where there are none."""

    def __init__(self, app: ASGIApp, tokens: Sequence[str]) -> None:
        self._app = app
        self._digests = [_digest(token.encode()) for token in tokens]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401, or let the application answer."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._knows(scope):
            await self._app(scope, receive, send)
            return
        message = "this server asks for a token: send the header Authorization: Bearer TOKEN with one that it knows"
        body = error_body(401, message, code="invalid_api_key")
        await JSONResponse(body, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        if not self._digests:
            return True
        scheme, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
        given = _digest(token.strip().encode("latin-1", "replace"))
        # Every token is compared, each in constant time, so that how long it takes tells nothing.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return scheme.lower() == "bearer" and any(matches)


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
