"""The application over an engine: its routes."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from fastapi import FastAPI, Security
from fastapi.security import HTTPBearer

from ptune import __version__
from ptune.engine.engine import Engine
from ptune.serve.administration import administration_routes
from ptune.serve.face import ERRORS, surround
from ptune.serve.operation import operation_routes
from ptune.serve.prompts import PromptFolder
from ptune.serve.reading import reading_routes
from ptune.serve.service import Service
from ptune.serve.settings import ServeSettings
from ptune.serve.writing import writing_routes


def create_app(
    engine: Engine, prompts: Path | None, settings: ServeSettings | None = None, tokens: Sequence[str] = ()
) -> FastAPI:
    """Return the ASGI application that serves an engine, which it has to itself while it runs.

    Args:
        engine: with the backbone.
        prompts: folder of soft prompts; None for the bare backbone alone.
        settings: limits.
        tokens: one of them must come with each request; none asks for none.

    Raises:
        ConfigError: there is no such folder.
    """
    settings = settings or ServeSettings()
    engine.memory.budget, engine.keys.budget = settings.prompt_memory, settings.key_memory
    service = Service(engine, PromptFolder(prompts, engine.backbone), settings)

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = FastAPI(
        title="ptune",
        version=__version__,
        description="Soft prompts on one backbone, each a model, by OpenAI's interface.",
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    bearer = [Security(HTTPBearer(auto_error=False))] if tokens else []  # for the description; BearerTokens asks
    app.include_router(operation_routes(lambda: service.scheduler.alive, service.metrics))
    administration = [administration_routes(service, prompts)] if tokens and prompts is not None else []
    for router in (reading_routes(service), writing_routes(service), *administration):
        app.include_router(router, responses=ERRORS, dependencies=bearer)
    surround(app, max_body=settings.max_body, tokens=tokens, metrics=service.metrics)
    return app
