"""The application over an engine: its routes."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from fastapi import FastAPI

from ptune.engine.engine import Engine
from ptune.serve.administration import administration_routes
from ptune.serve.classify_routes import classify_routes
from ptune.serve.completion_routes import completion_routes
from ptune.serve.face import application
from ptune.serve.prompts import PromptFolder
from ptune.serve.service import Service
from ptune.serve.settings import ServeSettings


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

    administration = [administration_routes(service, prompts)] if tokens and prompts is not None else []
    return application(
        "Soft prompts on one backbone, each a model, by OpenAI's interface.",
        [classify_routes(service), completion_routes(service), *administration],
        lifespan=lifespan,
        ready=lambda: service.scheduler.alive,
        max_body=settings.max_body,
        tokens=tokens,
        metrics=service.metrics,
    )
