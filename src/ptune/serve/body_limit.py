"""The limit on a request's body: refused as soon as it is known to be too long, announced or not."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ptune.serve.refusals import error_body


class BodyLimit:
    """ASGI middleware that answers 413 to a body of more than ``limit`` bytes."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body up to the limit, then let the application answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        messages: list[Message] = []
        size, more = int(announced) if announced.isdigit() else 0, True
        if size <= self._limit:
            size = 0
            while more and size <= self._limit:
                messages.append(message := await receive())
                more = bool(message.get("more_body"))
                size += len(message.get("body", b""))
        if size > self._limit:
            text = f"the body has more than the {self._limit} bytes that this server takes; send less at once"
            body = error_body(413, text, code="body_too_large")
            await JSONResponse(body, 413, {"Connection": "close"})(scope, receive, send)
            return

        async def replayed() -> Message:
            return messages.pop(0) if messages else await receive()

        await self._app(scope, replayed, send)
