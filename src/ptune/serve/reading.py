"""``/v1/models`` and ``/v1/classify``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from ptune.engine import LoadedPrompt
from ptune.serve.contexts import check_field, record_of
from ptune.serve.jobs import Scored, Scoring
from ptune.serve.protocol import Classification, ClassifyRequest, Label, Model, ModelList
from ptune.serve.refusals import RefusedError
from ptune.serve.service import Service


def reading_routes(service: Service) -> APIRouter:
    """Return the routes of a server."""
    router = APIRouter(tags=["models"])
    bare = Model(id=service.folder.bare, created=service.started, task=None)

    @router.get("/v1/models", response_model=ModelList)
    async def models() -> Any:
        """List the bare backbone and every soft prompt."""
        prompts = [_model(served) for _, served in sorted(service.folder.served.items())]
        return ModelList(data=[bare, *prompts])

    @router.get("/v1/models/{model:path}", response_model=Model)
    async def model(model: str) -> Any:
        """Tell of one of them."""
        served = service.folder.find(model)
        return bare if served is None else _model(served)

    @router.post("/v1/classify", response_model=Classification)
    async def classify(request: Request, body: ClassifyRequest) -> Any:
        """Take the likeliest of a soft prompt's labels for each text."""
        given = [body.input] if isinstance(body.input, str) else body.input
        served, most = service.folder.find(body.model), service.settings.max_items
        if served is None:
            raise RefusedError(400, "the bare model has no labels; choose a soft prompt that classifies", param="model")
        if len(given) > most:
            raise RefusedError(400, f"input has {len(given)} texts, and a request {most} at most", param="input")
        if service.settings.log_text:
            request.state.note["input"] = body.input
        scoring = Scoring(served, lambda loaded: [_record(loaded, item) for item in given], len(given))
        answers: list[Scored] = await service.answers(request, [scoring])
        data = [Label(index=number, **answer) for number, answer in enumerate(answers[0].answers)]
        return Classification(model=body.model, data=data, usage=service.count(request, body.model, answers))

    return router


def _model(served: Any) -> Model:
    return Model(id=served.name, created=served.created, task=served.task)


def _record(loaded: LoadedPrompt, item: str | dict[str, str]) -> dict[str, str]:
    task = loaded.task
    if isinstance(item, str):
        return record_of(task.renderer, item, {})
    choices = getattr(task.config, "choices", ())  # fields of the record as well, which the template does not name
    for name in item:
        if name not in choices:
            check_field(task.renderer, name)
    return item
