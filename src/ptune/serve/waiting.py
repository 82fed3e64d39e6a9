"""Waiting for an answer as long as the client does. Knows no engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.requests import Request

from ptune.serve.refusals import RefusedError

T = TypeVar("T")


async def while_there(request: Request, answer: Awaitable[T]) -> T:
    """Wait for an answer as long as the client does.

    Raises:
        RefusedError: 499, the client went away.
    """
    gone, waiting = asyncio.ensure_future(_gone(request)), asyncio.ensure_future(answer)
    try:
        await asyncio.wait({gone, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise RefusedError(499, "the client went away")
        return waiting.result()
    finally:
        gone.cancel()
        waiting.cancel()


def too_late(seconds: float) -> RefusedError:
    """Return the refusal of a request whose deadline has passed."""
    return RefusedError(504, f"no answer within {seconds:g} s; ask for less, or later", code="deadline_exceeded")


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
