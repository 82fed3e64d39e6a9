"""The engine in an event loop: the same answers, one at a time, and none for those who no longer wait."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
from serving import soft_prompts, tiny_backbone

from ptune import Engine
from ptune.errors import DataError
from ptune.generation.generate import GenerationOptions

TEXTS = ["great soup", "terrible film and a wrong waiter", "苹果"]


@pytest.fixture
def engine() -> Any:
    backbone = tiny_backbone()
    with Engine(backbone) as engine:
        for name, prompt in soft_prompts(backbone).items():
            engine.add(name, prompt)
        yield engine


def test_what_is_awaited_is_what_the_engine_says(engine: Engine) -> None:
    records = [{"text": text} for text in TEXTS]
    expected = [engine.predict("mood", records), *(engine.generate("answer", text) for text in TEXTS)]
    threads, pieces = set(), []
    engine.backbone.model.register_forward_pre_hook(lambda *_: threads.add(threading.current_thread().name))

    async def ask() -> list[Any]:
        loop = threading.current_thread()

        def hear(piece: str) -> None:
            assert threading.current_thread() is loop
            pieces.append(piece)

        writing = [engine.agenerate("answer", text, on_text=hear if text is TEXTS[0] else None) for text in TEXTS]
        return await asyncio.gather(engine.apredict("mood", records), *writing)

    assert asyncio.run(ask()) == expected
    assert "".join(pieces) == expected[1].text
    assert len(threads) == 1
    assert threading.current_thread().name not in threads


def test_a_task_that_is_cancelled_ends_at_the_next_token_or_never_begins(engine: Engine) -> None:
    engine.classify("mood", TEXTS)  # what is tried or read but once
    forwards: list[int] = []
    begun = threading.Event()

    def hook(*_: Any) -> None:
        forwards.append(1)
        begun.set()
        time.sleep(0.01)

    engine.backbone.model.register_forward_pre_hook(hook)

    async def ask() -> None:
        long = asyncio.create_task(engine.agenerate("answer", TEXTS[0], GenerationOptions(max_new_tokens=200)))
        waiting = asyncio.create_task(engine.apredict("mood", [{"text": TEXTS[0]}]))
        await asyncio.to_thread(begun.wait, 20)
        for task in (long, waiting):
            task.cancel()
        for task in (long, waiting):
            with pytest.raises(asyncio.CancelledError):
                await task
        so_far = len(forwards)
        await engine.apredict("mood", [{"text": TEXTS[1]}])  # waits for its turn
        assert len(forwards) <= so_far + 4

    asyncio.run(ask())


def test_texts_that_are_awaited_together_share_passes_and_others_join_them(engine: Engine) -> None:
    lengths = [12, 5, 9, 7]
    options = [GenerationOptions(max_new_tokens=length, do_sample=True, seed=length) for length in lengths]
    names = ["answer", None, "answer", "answer"]
    questions = [*TEXTS, "soup"]
    asked = list(zip(names, questions, options, strict=True))
    expected = [engine.generate(*each) for each in asked]
    passes: list[int] = []
    engine.backbone.model.register_forward_pre_hook(lambda *_: passes.append(1))
    begun = asyncio.Event()

    async def ask() -> list[Any]:
        first = asyncio.create_task(engine.agenerate(*asked[0], on_text=lambda _text: begun.set()))
        await begun.wait()
        return await asyncio.gather(first, *(engine.agenerate(*each) for each in asked[1:]))

    alone = sum(len(one.ids) for one in expected)
    assert asyncio.run(ask()) == expected
    assert len(passes) < alone / 2, "each text was written alone"


@pytest.mark.parametrize("replaced", [False, True])
def test_a_prompt_that_is_removed_while_a_text_waits_stays_until_that_has_ended(engine: Engine, replaced: bool) -> None:
    prompt, first = engine.prompts["answer"].prompt, engine.prompts["answer"].first_virtual_id
    other = replace(prompt, rows=-prompt.rows)
    long = GenerationOptions(max_new_tokens=60, repetition_penalty=1.2)
    expected = engine.generate("answer", TEXTS[0])
    tokens = engine.backbone.attach()
    tokens.detach()

    async def ask() -> None:
        crowd = [asyncio.create_task(engine.agenerate(None, "soup", long)) for _ in range(32)]  # as many as may grow
        waiting = asyncio.create_task(engine.agenerate("answer", TEXTS[0]))
        await asyncio.sleep(0)
        await engine.apredict("mood", [{"text": TEXTS[0]}])  # queued behind it, so by now it has begun
        engine.remove("answer")
        if replaced:
            engine.add("answer", other)
        assert not any(text.done() for text in crowd)
        assert tokens.meaning([first]) is not None
        assert await waiting == expected
        await asyncio.gather(*crowd)

    asyncio.run(ask())
    assert tokens.meaning([first]) is None
    assert ("answer" in engine.prompts) == replaced
    if replaced:
        assert engine.generate("answer", TEXTS[0]) != expected


def test_closing_the_engine_lets_texts_end_and_calls_off_those_that_wait(engine: Engine) -> None:
    expected = engine.generate("answer", TEXTS[0], GenerationOptions(max_new_tokens=40))

    async def ask() -> None:
        begun = asyncio.Event()
        growing = asyncio.create_task(
            engine.agenerate(
                "answer", TEXTS[0], GenerationOptions(max_new_tokens=40), on_text=lambda _text: begun.set()
            )
        )
        await begun.wait()
        engine.close()
        assert await growing == expected

    asyncio.run(ask())


def test_closing_the_engine_calls_off_a_text_that_was_not_yet_looked_at(engine: Engine) -> None:
    begun, closing = threading.Event(), threading.Event()

    def hook(*_: Any) -> None:
        begun.set()
        closing.wait(20)

    engine.backbone.model.register_forward_pre_hook(hook)

    async def ask() -> None:
        reading = asyncio.create_task(engine.apredict("mood", [{"text": TEXTS[0]}]))
        await asyncio.to_thread(begun.wait, 20)
        queued = [
            asyncio.create_task(engine.agenerate("answer", TEXTS[0])),
            asyncio.create_task(engine.apredict("mood", [{"text": TEXTS[1]}])),
        ]
        await asyncio.sleep(0)
        closed = asyncio.create_task(asyncio.to_thread(engine.close))
        done, _ = await asyncio.wait(queued, timeout=5)
        closing.set()
        await closed
        assert len(done) == 2
        assert all(task.cancelled() for task in queued)
        assert (await reading)[0]["label"]

    asyncio.run(ask())


def test_a_mistake_comes_to_the_one_who_waits(engine: Engine) -> None:
    with pytest.raises(DataError, match="the bare model continues a text"):
        asyncio.run(engine.agenerate(None, {"text": "a"}))


def test_a_loop_that_is_closed_takes_no_other_text_with_it(engine: Engine) -> None:
    options = GenerationOptions(max_new_tokens=60)
    expected = engine.generate("answer", TEXTS[0], options)
    found: list[Any] = []

    def ask() -> None:
        found.append(asyncio.run(engine.agenerate("answer", TEXTS[0], options)))

    async def leave_at_once() -> None:
        task = asyncio.ensure_future(engine.agenerate("answer", TEXTS[1], options, on_text=lambda text: None))
        await asyncio.sleep(0.01)
        tasks.append(task)

    tasks: list[Any] = []
    for _ in range(5):
        thread = threading.Thread(target=ask)
        thread.start()
        loop = asyncio.new_event_loop()
        loop.run_until_complete(leave_at_once())
        loop.close()
        thread.join()
    assert found == [expected] * 5
