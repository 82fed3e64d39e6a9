"""What those ask who look after a server: is it alive, is it ready, what has it done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from ptune.serve.metrics import CONTENT_TYPE, RequestMetrics
from ptune.serve.paths import ALIVE, METRICS, READY
from ptune.serve.protocol import Health


def health_routes(ready: Callable[[], bool], metrics: RequestMetrics) -> APIRouter:
    """Return the routes of a server that tells whether it is ready, and of what it counts."""
    router = APIRouter(tags=["operation"])

    @router.get(ALIVE, response_model=Health)
    async def healthz() -> Any:
        """Tell that the process answers."""
        return Health(status="ok")

    @router.get(READY, response_model=Health, responses={503: {"model": Health}})
    async def readyz() -> Any:
        """Tell whether requests will be answered."""
        if ready():
            return Health(status="ready")
        return JSONResponse(Health(status="not ready").model_dump(), 503)

    @router.get(METRICS, response_class=PlainTextResponse)
    async def counted() -> Response:
        """Show what was counted, for Prometheus."""
        return Response(metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    return router
