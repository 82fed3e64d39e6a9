"""``/v1/prompts/NAME``: soft prompts added, replaced and removed while the server runs. Only where tokens are set.

A name is one plain word, so that it can never lead out of the folder.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import APIRouter

from ptune.engine.loaded_prompts import task_of_prompt
from ptune.errors import OutputError, PtuneError
from ptune.serve.paths import PROMPTS
from ptune.serve.protocol import Model, Removed, Upload
from ptune.serve.refusals import RefusedError, internal_error, unknown_model
from ptune.serve.service import Service
from ptune.soft_prompts.files import DESCRIPTION, TENSORS, remove_soft_prompt
from ptune.soft_prompts.soft_prompt import SoftPrompt

_log = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def administration_routes(service: Service, folder: Path) -> APIRouter:
    """Return the routes of a server whose soft prompts stand in ``folder``."""
    router = APIRouter(tags=["administration"])

    @router.put(f"{PROMPTS}/{{name}}", response_model=Model)
    async def put(name: str, body: Upload) -> Any:
        """Add a soft prompt, or put it in place of another; requests in flight finish on the one before."""
        if not _NAME.fullmatch(name):
            raise RefusedError(400, "a name is 1 to 64 letters, digits, - and _, no sign first", param="name")
        if name == service.folder.bare:
            raise RefusedError(409, f'"{name}" is the bare model; choose another name', param="name")
        prompt = await asyncio.to_thread(_read, service, body)
        async with service.changing:
            await asyncio.to_thread(_changed, prompt.save, folder / name)
            await asyncio.to_thread(service.folder.scan)
        served = service.folder.find(name)
        assert served is not None
        return Model(id=name, created=served.created, task=served.task)

    @router.delete(f"{PROMPTS}/{{name}}", response_model=Removed)
    async def delete(name: str) -> Any:
        """Remove a soft prompt, its own files alone; requests in flight finish on it."""
        async with service.changing:
            served = service.folder.served.get(name)
            if served is None or served.folder != folder / name:
                raise unknown_model(name, list(service.folder.served))
            await asyncio.to_thread(_changed, remove_soft_prompt, served.folder)
            await asyncio.to_thread(service.folder.scan)
        return Removed(id=name)

    return router


def _read(service: Service, body: Upload) -> SoftPrompt:
    """Return the soft prompt in a body, checked as one that is loaded from its folder.

    Raises:
        RefusedError: it is damaged, or belongs to another backbone, or its task cannot be built.
    """
    try:
        tensors = base64.b64decode(body.tensors, validate=True)
    except (binascii.Error, ValueError):
        raise RefusedError(400, f"tensors is no base64; send {TENSORS} in base64", param="tensors") from None
    with tempfile.TemporaryDirectory() as temporary:
        (Path(temporary) / TENSORS).write_bytes(tensors)
        (Path(temporary) / DESCRIPTION).write_text(body.description, encoding="utf-8")
        try:
            prompt = SoftPrompt.load(temporary)
            prompt.check(service.engine.backbone)
            task_of_prompt(prompt, service.engine.backbone)  # what cannot be asked is not taken
        except PtuneError as error:
            message = str(error).replace(f"{temporary}/", "").replace(temporary, "the soft prompt")
            raise RefusedError(400, message, param="description") from error
    return prompt


def _changed(change: Callable[[Path], None], folder: Path) -> None:
    """Change a folder.

    Raises:
        RefusedError: 500, it cannot be written; the log says why, for it may name paths.
    """
    try:
        change(folder)
    except OutputError as error:
        _log.error("a soft prompt cannot be written", extra={"prompt": folder.name, "reason": str(error)})
        raise internal_error() from error
