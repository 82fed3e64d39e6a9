"""One thread owns the engine; what arrives together shares batches.

Jobs wait in the order of their coming. The thread takes the oldest and all others that can be answered with it, up to a
batch; a batch of texts grows until its last has ended, each handed over when it has. Knows no HTTP but refusals.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import traceback
from collections.abc import Sequence

from ptune.engine import Engine
from ptune.errors import PtuneError
from ptune.serve.jobs import Job
from ptune.serve.metrics import Metrics
from ptune.serve.prompts import VersionsInMemory
from ptune.serve.refusals import RefusedError, internal_error
from ptune.serve.settings import ServeSettings

_log = logging.getLogger(__name__)


class Scheduler:
    """The engine's thread and the queue before it."""

    def __init__(self, engine: Engine, settings: ServeSettings, metrics: Metrics) -> None:
        self._engine, self._settings, self._metrics = engine, settings, metrics
        self._versions = VersionsInMemory(engine, metrics)
        self._condition = threading.Condition()
        self._arrived: list[Job] = []  # not looked at yet
        self._prepared: list[Job] = []  # their soft prompts held; the thread's own
        self._waiting = 0  # texts of both
        self._closing = False
        self._seconds_a_text = 0.0
        self._thread = threading.Thread(target=self._work, name="ptune-engine", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether requests will be answered."""
        return self._thread.is_alive() and not self._closing

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def close(self) -> None:
        """Finish what waits and end the thread; nothing more is taken."""
        with self._condition:
            self._closing = True
            self._condition.notify()
        self._thread.join()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take the jobs of a request, all or none.

        Raises:
            RefusedError: 429, too many wait already; 503, the server is going down.
        """
        rows = sum(job.rows for job in jobs)
        with self._condition:
            if not self.alive:
                raise RefusedError(503, "this server is going down; ask another", code="shutting_down")
            if self._waiting + rows > self._settings.max_queue:
                seconds = max(1, min(60, math.ceil(self._waiting * self._seconds_a_text)))
                raise RefusedError(
                    429,
                    f"{self._waiting} texts wait already and {self._settings.max_queue} may; try again in {seconds} s",
                    code="queue_full",
                    headers={"Retry-After": str(seconds)},
                )
            self._arrived += jobs
            self._count(rows)
            self._condition.notify()

    def _count(self, rows: int) -> None:
        self._waiting += rows
        self._metrics.waiting.set(self._waiting)

    def _work(self) -> None:
        while True:
            for job in self._newly_arrived():
                self._prepare(job)
            if batch := self._next_batch():
                self._run(batch)
            elif self._closing:
                return
            self._versions.sweep()

    def _newly_arrived(self) -> list[Job]:
        """Wait for work, and then a moment for more of it, unless some waits already."""
        with self._condition:
            if not self._prepared:
                while not self._arrived and not self._closing:
                    self._condition.wait()
                until = time.monotonic() + self._settings.gather_seconds
                while not self._closing and sum(job.rows for job in self._arrived) < self._settings.max_batch:
                    left = until - time.monotonic()
                    if left <= 0:
                        break
                    self._condition.wait(left)
            arrived, self._arrived = self._arrived, []
            return arrived

    def _prepare(self, job: Job) -> None:
        held = False
        try:
            if not job.called_off:
                loaded = None if job.served is None else self._versions.hold(job.served)
                held = loaded is not None
                job.prepare(self._engine, loaded)
                self._prepared.append(job)
                return
        except (RefusedError, PtuneError) as error:
            job.fail(error)
        except Exception as error:
            self._fail([job], error)
        if held and job.served is not None:
            self._versions.let_go(job.served)
        with self._condition:
            self._count(-job.rows)

    def _next_batch(self) -> list[Job]:
        """Take the oldest job, and those that can be answered with it."""
        batch: list[Job] = []
        rest: list[Job] = []
        rows = 0
        for job in self._prepared:
            if job.called_off:
                self._end(job)
            elif not batch or (
                type(job) is type(batch[0])
                and rows + job.rows <= self._settings.max_batch
                and job.joins(batch, self._engine)
            ):
                batch.append(job)
                rows += job.rows
            else:
                rest.append(job)
        self._prepared = rest
        with self._condition:
            self._count(-rows)
        return batch

    def _run(self, batch: list[Job]) -> None:
        rows, begin = sum(job.rows for job in batch), time.monotonic()
        # Counted first: who has an answer finds its batch among the counts.
        self._metrics.batch_rows.labels(batch[0].kind).observe(rows)
        self._answer(batch)
        for job in batch:
            self._let_go(job)
        self._seconds_a_text = (time.monotonic() - begin) / rows

    def _answer(self, batch: list[Job]) -> None:
        try:
            type(batch[0]).run(self._engine, batch, self._settings.max_batch)
        except PtuneError as error:  # one request's own mistake, met before it has said a word: the others go on
            if len(batch) == 1:
                batch[0].fail(error)
            for job in batch if len(batch) > 1 else []:
                if not job.future.done():
                    self._answer([job])
        except Exception as error:
            self._fail(batch, error)

    def _end(self, job: Job) -> None:
        """Forget a job that was called off while it waited."""
        self._let_go(job)
        with self._condition:
            self._count(-job.rows)

    def _let_go(self, job: Job) -> None:
        if job.served is not None:
            self._versions.let_go(job.served)

    def _fail(self, jobs: Sequence[Job], error: Exception) -> None:
        # The message may quote a user's text, so the log gets the kind of error and where it happened.
        place = "".join(traceback.format_tb(error.__traceback__))
        _log.error("the engine failed", extra={"error": type(error).__name__, "traceback": place})
        for job in jobs:
            job.fail(internal_error())
