"""Texts of many callers written together, a token a turn, in the engine's thread.

Each turn is an ordinary call in that thread's queue: it lets new texts join, writes a token of each, and queues the
next turn while any text grows. So callers share passes, and other calls come in between.

Knows neither soft prompts nor templates.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from threading import RLock
from typing import Any, cast

from ptune.engine.thread import EngineThread
from ptune.generation.generate import Writer
from ptune.generation.growing_text import GrowingText, Listener
from ptune.generation.sampling import Generated, GenerationOptions
from ptune.models.backbone import Backbone

_MOST_TEXTS = 32
"""More at once wait until one has ended."""


@dataclass(eq=False)
class _Text:
    begin: Callable[[], tuple[list[int], GenerationOptions]]
    end: Callable[[], None]
    on_text: Callable[[str], Any] | None
    answer: GrowingText | None = None
    future: Future[Generated] = field(default_factory=Future)

    @property
    def writing(self) -> GrowingText:
        """What is written, once it has begun."""
        assert self.answer is not None
        return self.answer


class SharedWriting:
    """Texts that grow together in one thread, whoever asked for them."""

    def __init__(self, backbone: Backbone, thread: EngineThread, lock: RLock) -> None:
        """Begin with none.

        Args:
            backbone: that writes.
            thread: in which it does.
            lock: held while it does.
        """
        self._backbone, self._thread, self._lock = backbone, thread, lock
        self._writer = Writer(backbone)
        self._waiting: deque[_Text] = deque()
        self._growing: list[_Text] = []
        self._turns = False  # whether one stands in the queue

    async def write(
        self,
        begin: Callable[[], tuple[list[int], GenerationOptions]],
        end: Callable[[], None],
        on_text: Callable[[str], Any] | None = None,
    ) -> Generated:
        """Return a continuation; where the task that awaits it is cancelled, it ends at the next token.

        Args:
            begin: returns the ids to continue and how, in the thread.
            end: called there when the text has ended, if it began.
            on_text: gets each piece of text, in the event loop.
        """
        loop = asyncio.get_running_loop()

        def tell(piece: str) -> None:
            if on_text is not None:
                with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody listens
                    loop.call_soon_threadsafe(on_text, piece)

        text = _Text(begin, end, tell if on_text else None)
        taken = self._thread.submit(lambda: self._take(text))
        taken.add_done_callback(lambda done: done.cancelled() and text.future.cancel())  # nobody will take it
        return await asyncio.wrap_future(text.future)

    def close(self) -> None:
        """Write to their ends the texts that grow; call off those that wait. The thread must have ended."""
        for text in self._waiting:
            text.future.cancel()
        while self._growing or self._waiting:
            self._turn()

    def _take(self, text: _Text) -> None:
        if text.future.cancelled():
            return
        begun = False
        try:
            with self._lock:
                context, options = text.begin()
                begun = True
                listener = Listener(text.on_text, go_on=lambda _length: not text.future.cancelled())
                text.answer = GrowingText(self._backbone, context, options, listener)
        except BaseException as error:
            if begun:
                text.end()
            self._fail([text], error)
            return
        self._waiting.append(text)
        self._next_turn()

    def _next_turn(self) -> None:
        if not self._turns:
            self._turns = True
            self._thread.submit(self._queued_turn)

    def _queued_turn(self) -> None:
        self._turns = False
        self._turn()
        if self._growing or self._waiting:
            self._next_turn()

    def _turn(self) -> None:
        """Let texts join, write a token of each, and let those go that have ended."""
        joining: list[_Text] = []
        while self._waiting and len(self._growing) + len(joining) < _MOST_TEXTS:
            text = self._waiting.popleft()
            if text.future.cancelled():
                text.end()
            else:
                joining.append(text)
        with self._lock:
            try:
                if joining:
                    self._writer.join([text.writing for text in joining])
                self._growing += joining
            except BaseException as error:  # the others go on
                self._break_off(joining, error)
            try:
                self._writer.step()
            except BaseException as error:
                self._break_off(self._growing, error)
                self._growing, self._writer = [], Writer(self._backbone)
        ended = [text for text in self._growing if text.writing.ended]
        self._growing = [text for text in self._growing if not text.writing.ended]
        for text in ended:
            if text.writing.result is None:
                self._break_off([text], cast(Exception, text.writing.error))
                continue
            text.end()
            with contextlib.suppress(InvalidStateError):
                text.future.set_result(text.writing.result)

    def _break_off(self, texts: list[_Text], error: BaseException) -> None:
        for text in texts:
            text.end()
        self._fail(texts, error)

    def _fail(self, texts: list[_Text], error: BaseException) -> None:
        for text in texts:
            with contextlib.suppress(InvalidStateError):
                text.future.set_exception(error)
