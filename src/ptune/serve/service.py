"""What the routes share: engine, folder, scheduler, metrics; asking the scheduler and waiting for what it answers."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeAlias

from starlette.requests import Request

from ptune.engine.engine import Engine
from ptune.serve.jobs import Job, Piece, Scored, Written
from ptune.serve.metrics import Metrics
from ptune.serve.prompts import PromptFolder, watch
from ptune.serve.protocol import Usage
from ptune.serve.scheduler import Scheduler
from ptune.serve.settings import ServeSettings
from ptune.serve.waiting import too_late, while_there

Event: TypeAlias = "tuple[int, Piece | Written]"
"""A job's number, and a piece of its text or, at its end, its whole answer."""

Heard: TypeAlias = "tuple[int, Piece | Future[Any]]"
"""What the engine's thread hands over: a job's number, and a piece of its text or, at its end, its future."""


class Service:
    """A server's parts. Belongs to the event loop; the scheduler's thread owns the engine."""

    def __init__(self, engine: Engine, folder: PromptFolder, settings: ServeSettings) -> None:
        self.engine, self.folder, self.settings = engine, folder, settings
        self.metrics = Metrics()
        self.scheduler = Scheduler(engine, settings, self.metrics)
        self.changing = asyncio.Lock()  # held while the folder is changed or looked at
        self.started = int(time.time())

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Answer requests and watch the folder while the block runs; then finish what was taken."""
        self.scheduler.start()
        watching = asyncio.create_task(watch(self._scan, self.settings.watch_seconds))
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.to_thread(self.scheduler.close)

    async def _scan(self) -> None:
        async with self.changing:
            await asyncio.to_thread(self.folder.scan)

    async def answers(self, request: Request, jobs: Sequence[Job]) -> list[Any]:
        """Submit jobs and return their answers.

        Raises:
            RefusedError: what the scheduler or a job refuses; 504 past the deadline; 499 when the client went away.
            PtuneError: what is wrong with the request.
        """
        self.scheduler.submit(jobs)
        together = asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs))
        try:
            return await while_there(request, asyncio.wait_for(together, self.settings.deadline_seconds))
        except asyncio.TimeoutError:
            raise too_late(self.settings.deadline_seconds) from None
        finally:
            for job in jobs:
                job.future.cancel()

    async def events(self, jobs: Sequence[Job], queue: asyncio.Queue[Heard]) -> AsyncIterator[Event]:
        """Submit jobs that put their text into ``queue``, and yield it until all have ended. Closed, it calls them off.

        Raises:
            RefusedError, PtuneError: as `answers`.
        """
        loop, until = asyncio.get_running_loop(), time.monotonic() + self.settings.deadline_seconds
        self.scheduler.submit(jobs)
        for number, job in enumerate(jobs):
            job.future.add_done_callback(functools.partial(_hand_over_future, loop, queue, number))
        left = len(jobs)
        try:
            while left:
                try:
                    number, what = await asyncio.wait_for(queue.get(), until - time.monotonic())
                except asyncio.TimeoutError:
                    raise too_late(self.settings.deadline_seconds) from None
                if isinstance(what, Piece):
                    yield number, what
                else:
                    left -= 1
                    yield number, what.result()
        finally:
            for job in jobs:
                job.future.cancel()

    def count(self, request: Request, model: str, answers: Sequence[Scored | Written]) -> Usage:
        """Return the usage of a request, counted and noted for the log."""
        read = sum(answer.prompt_tokens for answer in answers)
        wrote = sum(answer.completion_tokens for answer in answers if isinstance(answer, Written))
        self.metrics.tokens.labels("prompt").inc(read)
        self.metrics.tokens.labels("completion").inc(wrote)
        request.state.note |= {"model": model, "prompt_tokens": read, "completion_tokens": wrote}
        return Usage(prompt_tokens=read, completion_tokens=wrote, total_tokens=read + wrote)


def hand_over(loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[Any], event: Any) -> None:
    """Put an event into a queue of the loop from another thread; do nothing once the loop is closed."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(queue.put_nowait, event)


def _hand_over_future(
    loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[Heard], number: int, future: Future[Any]
) -> None:
    hand_over(loop, queue, (number, future))
