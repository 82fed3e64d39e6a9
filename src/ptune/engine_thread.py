"""One thread that runs the model, for callers that live in an event loop. Knows neither engines nor models."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class EngineThread:
    """Runs calls one after another in a thread of its own, which begins with the first of them."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ptune-engine")

    async def run(self, call: Callable[[Callable[[], bool]], T]) -> T:
        """Return what a call returns.

        Args:
            call: gets a question whether its answer is still wanted. Where the task that awaits it is cancelled, a call
                that has not begun never does.
        """
        unwanted = threading.Event()
        future = self._pool.submit(call, lambda: not unwanted.is_set())
        try:
            return await asyncio.wrap_future(future)
        finally:
            unwanted.set()

    def close(self) -> None:
        """Let the call that runs end; those that wait are cancelled."""
        self._pool.shutdown(cancel_futures=True)
