"""One thread owns the engine; what arrives together shares batches.

Jobs wait in the order of their coming. In each round the thread reads a batch of those that are read at once, lets as
many texts join those that are being written as there is room for, and writes a token of each: so neither a long text
nor a crowd of one kind holds up the others. Knows no HTTP but refusals.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import traceback
from collections.abc import Sequence

from ptune.engine.engine import Engine
from ptune.errors import PtuneError
from ptune.generation.generate import Writer
from ptune.serve.jobs import Job, Reading, Writing
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
        self._writing: list[Writing] = []  # texts that grow
        self._writer = Writer(engine.backbone)
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
        spent = 0.0  # since an answer was last given
        while True:
            for job in self._newly_arrived():
                self._prepare(job)
            begin = time.monotonic()
            reading, joining = self._next_batches()
            if reading:
                self._read(reading)
            self._write(joining)
            answered = sum(job.rows for job in reading) + self._let_written_go()
            spent += time.monotonic() - begin
            if answered:
                self._seconds_a_text, spent = spent / answered, 0.0
            self._versions.sweep()
            with self._condition:  # nothing can arrive once it is closing
                if self._closing and not self._writing and not self._prepared and not self._arrived:
                    return

    def _newly_arrived(self) -> list[Job]:
        """Wait for work, and then a moment for more of it, unless some waits already."""
        with self._condition:
            if not self._prepared and not self._writing:
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
        try:
            if not job.called_off:
                job.held = None if job.served is None else self._versions.hold(job.served)
                job.prepare(self._engine, job.held)
                self._prepared.append(job)
                return
        except (RefusedError, PtuneError) as error:
            job.fail(error)
        except Exception as error:
            self._fail([job], error)
        self._let_go(job)
        with self._condition:
            self._count(-job.rows)

    def _next_batches(self) -> tuple[list[Reading], list[Writing]]:
        """Take the oldest job that is read at once with others of its kind, and the texts that there is room for."""
        reading: list[Reading] = []
        joining: list[Writing] = []
        rest: list[Job] = []
        rows, most = 0, self._settings.max_batch
        for job in self._prepared:
            if job.called_off:
                self._end(job)
            elif isinstance(job, Writing) and len(self._writing) + len(joining) < most:
                joining.append(job)
            elif isinstance(job, Reading) and (
                not reading or (type(job) is type(reading[0]) and rows + job.rows <= most)
            ):
                reading.append(job)
                rows += job.rows
            else:
                rest.append(job)
        self._prepared = rest
        with self._condition:
            self._count(-rows - len(joining))
        return reading, joining

    def _read(self, batch: list[Reading]) -> None:
        # Counted first: who has an answer finds its batch among the counts.
        self._metrics.batch_rows.labels(batch[0].kind).observe(sum(job.rows for job in batch))
        self._answer(batch)
        for job in batch:
            self._let_go(job)

    def _write(self, joining: list[Writing]) -> None:
        """Let texts join those that are being written, and write a token of each."""
        if joining:
            self._metrics.batch_rows.labels(Writing.kind).observe(len(self._writing) + len(joining))
            try:
                self._writer.join([job.text for job in joining])
                self._writing += joining
            except Exception as error:  # the others go on
                self._break_off(joining, error)
        try:
            self._writer.step()
        except Exception as error:
            self._break_off(self._writing, error)
            self._writing, self._writer = [], Writer(self._engine.backbone)

    def _break_off(self, jobs: Sequence[Job], error: Exception) -> None:
        if isinstance(error, PtuneError):
            for job in jobs:
                job.fail(error)
        else:
            self._fail(jobs, error)
        for job in jobs:
            self._let_go(job)

    def _let_written_go(self) -> int:
        """Let texts go that have ended, and return how many."""
        ended = [job for job in self._writing if job.text.ended]
        self._writing = [job for job in self._writing if not job.text.ended]
        for job in ended:
            if job.text.error is not None:
                self._break_off([job], job.text.error)
            else:
                self._let_go(job)
        return len(ended)

    def _answer(self, batch: list[Reading]) -> None:
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
        if job.held is not None:
            self._versions.let_go(job.held)
            job.held = None

    def _fail(self, jobs: Sequence[Job], error: Exception) -> None:
        # The message may quote a user's text, so the log gets the kind of error and where it happened.
        place = "".join(traceback.format_tb(error.__traceback__))
        _log.error("the engine failed", extra={"error": type(error).__name__, "traceback": place})
        for job in jobs:
            job.fail(internal_error())
