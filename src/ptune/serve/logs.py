"""One line of JSON a request, without anybody's text unless asked; latencies counted; no mistake of ours leaks out."""

from __future__ import annotations

import json
import logging
import time
import traceback
import uuid
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ptune.serve.metrics import RequestMetrics
from ptune.serve.paths import ALL
from ptune.serve.refusals import internal_error

_log = logging.getLogger(__name__)
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}


class JsonLines(logging.Formatter):
    """A log record as a line of JSON, what was passed as ``extra`` among its members."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        values: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        values |= {name: value for name, value in vars(record).items() if name not in _STANDARD}
        if record.exc_info:
            values["traceback"] = self.formatException(record.exc_info)
        return json.dumps(values, ensure_ascii=False, default=str)


class Observed:
    """ASGI middleware around everything: counts and logs each request, and answers 500 where nothing else did."""

    def __init__(self, app: ASGIApp, metrics: RequestMetrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the application answer, and say how it went."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        note: dict[str, Any] = {}
        scope.setdefault("state", {})["note"] = note
        name, begin, status = uuid.uuid4().hex, time.monotonic(), 0

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = name
            await send(message)

        try:
            await self._app(scope, receive, observed)
        except Exception as error:
            # The message may quote a user's text, so the log gets the kind of error and where it happened.
            place = "".join(traceback.format_tb(error.__traceback__))
            _log.error("a request failed", extra={"id": name, "error": type(error).__name__, "traceback": place})
            if not status:
                await JSONResponse(internal_error().body(), 500)(scope, receive, observed)
        finally:
            seconds = time.monotonic() - begin
            path = next((path for path in ALL if scope["path"].startswith(path)), "other")
            self._metrics.requests.labels(path, str(status or 499)).inc()
            self._metrics.seconds.labels(path).observe(seconds)
            values = {"id": name, "method": scope["method"], "path": path, "status": status or 499}
            _log.info("request", extra={**values, "seconds": round(seconds, 4), **note})
