"""``/v1/models``, ``/v1/classify`` and ``/v1/tag``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from ptune.engine.engine import LoadedPrompt
from ptune.generation.generate import Generated
from ptune.serve.contexts import check_named, context_of, record_of
from ptune.serve.jobs import Scored, Scoring, Writing, Written
from ptune.serve.paths import CLASSIFY, MODELS, TAG
from ptune.serve.prompts import Served
from ptune.serve.protocol import Model, ModelList
from ptune.serve.reading_protocol import (
    ClassifyRequest,
    ClassifyResponse,
    Entities,
    Label,
    Labels,
    TagRequest,
    TagResponse,
    Tags,
)
from ptune.serve.refusals import RefusedError, check_count
from ptune.serve.service import Service
from ptune.tasks.extraction import Extraction

Item = str | list[str] | dict[str, Any]
"""What is asked about: a text, a list of words, or a record."""


def classify_routes(service: Service) -> APIRouter:
    """Return the routes of a server."""
    router = APIRouter(tags=["models"])
    bare = Model(id=service.folder.bare, created=service.started, task=None)

    @router.get(MODELS, response_model=ModelList)
    async def models() -> Any:
        """List the bare backbone and every soft prompt."""
        prompts = [_model(served) for _, served in sorted(service.folder.served.items())]
        return ModelList(data=[bare, *prompts])

    @router.get(f"{MODELS}/{{model:path}}", response_model=Model)
    async def model(model: str) -> Any:
        """Tell of one of them."""
        served = service.folder.find(model)
        return bare if served is None else _model(served)

    @router.post(CLASSIFY, response_model=ClassifyResponse)
    async def classify(request: Request, body: ClassifyRequest) -> Any:
        """Take the likeliest of a soft prompt's labels for each text, or all that are likely where it gives several."""
        served, items = service.folder.find(body.model), _items(service, request, body)
        scoring = Scoring(CLASSIFY, served, lambda loaded: [_record(loaded, item) for item in items], len(items))
        answers: list[Scored] = await service.answers(request, [scoring])
        data = [
            Label(index=index, **answer) if "label" in answer else Labels(index=index, **answer)
            for index, answer in enumerate(answers[0].answers)
        ]
        return ClassifyResponse(model=body.model, data=data, usage=service.count(request, body.model, answers))

    @router.post(TAG, response_model=TagResponse, response_model_exclude_none=True)
    async def tag(request: Request, body: TagRequest) -> Any:
        """Find the entities of each text: by a tag for every word, or written out by the model and read back."""
        served, items = service.folder.find(body.model), _items(service, request, body)
        data: list[Tags | Entities]
        if served is not None and served.task == "extraction":
            extracted = [_Extracted(item) for item in items]
            answers = await service.answers(request, [one.job(service, served) for one in extracted])
            data = [
                one.entities(index, answer) for index, (one, answer) in enumerate(zip(extracted, answers, strict=True))
            ]
        else:
            scoring = Scoring(TAG, served, lambda loaded: [_record(loaded, item) for item in items], len(items))
            answers = await service.answers(request, [scoring])
            data = [Tags(index=index, **answer) for index, answer in enumerate(answers[0].answers)]
        return TagResponse(model=body.model, data=data, usage=service.count(request, body.model, answers))

    return router


class _Extracted:
    """One text whose entities are written out: what is asked of the engine, and the answer read back."""

    def __init__(self, item: Item) -> None:
        self._item = item
        self._task: Extraction | None = None
        self._record: dict[str, Any] = {}

    def job(self, service: Service, served: Served) -> Writing:
        """Return the job whose answer `entities` takes."""
        return Writing(TAG, served, self._context, {}, most_new_tokens=service.settings.max_tokens)

    def entities(self, index: int, answer: Written) -> Entities:
        """Return the entities that were written."""
        assert self._task is not None
        generated = Generated((), answer.text, answer.finish_reason)
        return Entities(index=index, **self._task.answer_from(self._record, generated))

    def _context(self, loaded: LoadedPrompt | None, _new_tokens: int) -> list[int]:
        assert loaded is not None
        assert isinstance(loaded.task, Extraction)
        self._task, self._record = loaded.task, _record(loaded, self._item)
        self._task.passage(self._record)  # while a mistake in it is still the request's own
        return context_of(self._task.renderer, self._record)


def _items(service: Service, request: Request, body: ClassifyRequest | TagRequest) -> list[Item]:
    """Return what a request asks about.

    Raises:
        RefusedError: 400, it is more than a request may.
    """
    items: list[Item] = [body.input] if isinstance(body.input, str) else list(body.input)
    check_count("input", len(items), service.settings.max_items)
    if service.settings.log_text:
        request.state.note["input"] = body.input
    return items


def _model(served: Served) -> Model:
    return Model(id=served.name, created=served.created, task=served.task)


def _record(loaded: LoadedPrompt, item: Item) -> dict[str, Any]:
    """Return the record of an item.

    Raises:
        RefusedError: 400, it has fields that the soft prompt does not know, or words where it reads a text.
    """
    config, renderer = loaded.task.config, loaded.task.renderer
    words, text = getattr(config, "tokens_field", None), getattr(config, "text_field", None)
    if isinstance(item, dict):
        # fields of the record as well, which the template need not name
        besides = {words, text, *getattr(config, "choices", ())}
        for name in item:
            if name not in besides:
                check_named(renderer.template.fields, name)
        return item
    if words in renderer.template.fields:
        return {words: item}
    if isinstance(item, list):
        raise RefusedError(400, "this soft prompt reads a text and no list of words; send it as one", param="input")
    return record_of(renderer, item, {})
