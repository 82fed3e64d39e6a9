"""One thread that runs the model, for callers that live in an event loop. Knows neither engines nor models."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class EngineThread:
    """Runs calls one after another in a thread of its own, which begins with the first of them."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ptune-engine")

    async def run(self, call: Callable[[], T]) -> T:
        """Run a call and return its result. It never runs if the task that awaits it is cancelled before its turn."""
        return await asyncio.wrap_future(self._pool.submit(call))

    def submit(self, call: Callable[[], None]) -> Future[None]:
        """Queue a call; its future is cancelled if the thread is closed before its turn comes."""
        return self._pool.submit(call)

    def close(self) -> None:
        """Let the call that runs end; those that wait are cancelled."""
        self._pool.shutdown(cancel_futures=True)
