"""What a request asks of the engine, in pieces that can share batches: records to read, a context to continue.

A job is prepared alone, so that its mistakes are its own; then what is read is run together with others of its kind,
and what is written grows beside others that began earlier or later. Its future is how it answers, and cancelling the
future is how it is called off. Knows no HTTP and no queue.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from typing_extensions import Self

from ptune.engine.engine import Engine, LoadedPrompt
from ptune.generation.growing_text import GrowingText, Listener
from ptune.generation.sampling import Generated, GenerationOptions, TokenLogprob
from ptune.serve.contexts import context_of
from ptune.serve.prompts import Served
from ptune.serve.refusals import check_path
from ptune.tasks.generation import Generation
from ptune.tasks.reading import ReadingTask


@dataclass(frozen=True)
class Scored:
    """The answers to records, as `Engine.predict` gives them, and how many tokens the model read for them."""

    answers: list[dict[str, Any]]
    prompt_tokens: int


@dataclass(frozen=True)
class Written:
    """A continuation with its tokens counted."""

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    logprobs: tuple[TokenLogprob, ...] | None = None
    untold: tuple[TokenLogprob, ...] | None = None  # those of them that no piece has told


@dataclass(frozen=True)
class Piece:
    """What came since of a continuation, and the log-probabilities of its tokens where they were asked for."""

    text: str
    logprobs: tuple[TokenLogprob, ...] | None = None


class Job(ABC):
    """A piece of work for the engine.

    Attributes:
        kind: for metrics.
        path: of the request, which says what answers are wanted.
        served: the soft prompt; None for the bare model.
        rows: how much of a batch it takes.
        held: the soft prompt in memory, from when it is prepared until it has ended.
        future: of its answer.
    """

    kind: ClassVar[str]

    def __init__(self, path: str, served: Served | None, rows: int) -> None:
        self.path, self.served, self.rows = path, served, rows
        self.held: LoadedPrompt | None = None
        self.future: Future[Any] = Future()

    @property
    def called_off(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return self.future.cancelled()

    def answer(self, result: Any) -> None:
        """Hand the answer over, if somebody still waits."""
        with contextlib.suppress(InvalidStateError):
            self.future.set_result(result)

    def fail(self, error: BaseException) -> None:
        """Tell that there is none."""
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)

    @abstractmethod
    def prepare(self, engine: Engine, loaded: LoadedPrompt | None) -> None:
        """Check the request and render it.

        Raises:
            RefusedError, PtuneError: the request cannot be answered.
        """


class Reading(Job):
    """A piece of work that is done at once, together with others of its kind."""

    @classmethod
    @abstractmethod
    def run(cls, engine: Engine, jobs: Sequence[Self], batch_size: int) -> None:
        """Answer prepared jobs together."""


class Scoring(Reading):
    """Records for one soft prompt that takes the likeliest answers, labels or tags."""

    kind = "scored"

    def __init__(
        self, path: str, served: Served | None, records: Callable[[LoadedPrompt], list[dict[str, Any]]], rows: int
    ) -> None:
        """Take the function that makes the records once the soft prompt is loaded, and their number."""
        super().__init__(path, served, rows)
        self._make_records = records
        self._records: list[dict[str, Any]] = []
        self._tokens = 0

    def prepare(self, engine: Engine, loaded: LoadedPrompt | None) -> None:
        """Render the records."""
        check_path(self.path, None if loaded is None else loaded.prompt.task.type)
        assert loaded is not None
        task = loaded.task
        assert isinstance(task, ReadingTask)
        self._records = self._make_records(loaded)
        for record in self._records:
            context_of(task.renderer, record)
            self._tokens += sum(len(row.ids) for row in task.rows(record))

    @classmethod
    def run(cls, engine: Engine, jobs: Sequence[Scoring], batch_size: int) -> None:
        """Answer all records in common batches."""
        keys = [job.served.key for job in jobs if job.served for _ in job._records]
        answers = engine.predict(keys, [record for job in jobs for record in job._records], batch_size=batch_size)
        start = 0
        for job in jobs:
            end = start + len(job._records)
            job.answer(Scored(answers[start:end], job._tokens))
            start = end


class Writing(Job):
    """One context to continue."""

    kind = "written"

    def __init__(
        self,
        path: str,
        served: Served | None,
        context: Callable[[LoadedPrompt | None, int], list[int]],
        options: Mapping[str, Any],
        *,
        max_new_tokens: int | None = None,
        most_new_tokens: int,
        on_piece: Callable[[Piece], None] | None = None,
    ) -> None:
        """Take the function that makes the context once the soft prompt is loaded.

        Args:
            path: of the request.
            served: the soft prompt; None for the bare model.
            context: makes it, given the loaded soft prompt and how many tokens the answer may have.
            options: of `GenerationOptions`, but for the length.
            max_new_tokens: as the soft prompt's task says, where absent.
            most_new_tokens: upper limit on the task's own length.
            on_piece: gets each piece of text, in the engine's thread.
        """
        super().__init__(path, served, 1)
        self._make_context, self._options = context, GenerationOptions(**options)
        self._max_new_tokens, self._most_new_tokens = max_new_tokens, most_new_tokens
        self._on_piece = on_piece
        self._untold: list[TokenLogprob] = []
        self._answer: GrowingText | None = None

    def prepare(self, engine: Engine, loaded: LoadedPrompt | None) -> None:
        """Render the context, and see how much room it leaves."""
        check_path(self.path, None if loaded is None else loaded.prompt.task.type)
        task = None if loaded is None else loaded.task
        assert task is None or isinstance(task, Generation)
        usual = GenerationOptions().max_new_tokens if task is None else task.config.max_new_tokens
        length = self._max_new_tokens or min(usual, self._most_new_tokens)
        context = self._make_context(loaded, length)
        listener = Listener(
            on_text=self._say if self._on_piece else None,
            on_done=self._finish,
            go_on=lambda _length: not self.called_off,
            on_logprobs=self._keep if self._on_piece else None,
        )
        options = self._options.model_copy(update={"max_new_tokens": length})
        self._answer = GrowingText(engine.backbone, context, options, listener)

    @property
    def text(self) -> GrowingText:
        """What is written; once it is prepared."""
        assert self._answer is not None
        return self._answer

    def _say(self, text: str) -> None:
        if self._on_piece is not None and not self.called_off:
            self._on_piece(Piece(text, self._told()))

    def _keep(self, logprobs: tuple[TokenLogprob, ...]) -> None:
        self._untold += logprobs

    def _finish(self, generated: Generated) -> None:
        read, wrote = len(self.text.context), len(generated.ids)
        self.answer(Written(generated.text, generated.finish_reason, read, wrote, generated.logprobs, self._told()))

    def _told(self) -> tuple[TokenLogprob, ...] | None:
        """Return the log-probabilities that came since, and forget them."""
        told, self._untold = tuple(self._untold), []
        return told if self._options.logprobs else None
