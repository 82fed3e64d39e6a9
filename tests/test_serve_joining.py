"""Requests that come while others are written join them: none waits for a long text, and no answer is another."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from serving import Served, serving, soft_prompts, tiny_backbone

LONG = {"model": "answer", "prompt": "great soup", "max_tokens": 200}
SHORT = {"model": "brief", "prompt": "the door", "max_tokens": 4}
SAMPLED = {"model": "tiny", "prompt": "the door", "max_tokens": 6, "temperature": 1.5, "seed": 3}
CLASSIFY = {"model": "mood", "input": "great soup"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    backbone, folder = tiny_backbone(), tmp_path_factory.mktemp("prompts")
    for name, prompt in soft_prompts(backbone).items():
        prompt.save(folder / name)
    with serving(backbone, folder) as server:
        yield server


@pytest.fixture(autouse=True)
def slowly(served: Served) -> Iterator[None]:
    """Let a pass take a moment, so that others come in between."""
    served.before_forward.append(lambda: time.sleep(0.01))
    yield
    served.before_forward.clear()


def text_of(served: Served, ask: dict[str, Any]) -> str:
    return str(served.openai.completions.create(**ask).choices[0].text)


def wait_until(holds: Any) -> None:
    until = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_short_requests_end_while_a_long_text_is_written_and_all_answers_are_as_alone(served: Served) -> None:
    alone = [text_of(served, ask) for ask in (LONG, SHORT, SAMPLED)]
    label = served.http.post("/v1/classify", json=CLASSIFY).json()["data"]
    ended: list[str] = []
    served.forwards.clear()

    def read_long() -> str:
        text = "".join(chunk.choices[0].text for chunk in served.openai.completions.create(**LONG, stream=True))
        ended.append("long")
        return text

    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(read_long)
        wait_until(lambda: len(served.forwards) > 5)
        for name, ask in (("short", SHORT), ("sampled", SAMPLED)):
            assert text_of(served, ask) == alone[1 + len(ended)]
            ended.append(name)
        assert served.http.post("/v1/classify", json=CLASSIFY).json()["data"] == label
        ended.append("label")
        assert long.result() == alone[0]
    assert ended == ["short", "sampled", "label", "long"]
    assert max(served.forwards) == 2  # the short ones shared its passes


def test_one_whose_client_went_away_leaves_and_its_neighbour_goes_on(served: Served) -> None:
    alone = text_of(served, LONG)
    served.forwards.clear()
    gone = served.openai.completions.create(**{**LONG, "model": "tiny", "max_tokens": 250}, stream=True)
    next(iter(gone))
    with ThreadPoolExecutor(1) as pool:
        staying = pool.submit(text_of, served, LONG)
        wait_until(lambda: 2 in served.forwards)
        gone.close()
        wait_until(lambda: served.forwards[-1] == 1)
        assert not staying.done()
        assert staying.result() == alone


def test_a_newcomer_whose_reading_fails_breaks_off_alone(served: Served) -> None:
    alone = text_of(served, LONG)
    served.forwards.clear()
    fails = threading.Event()

    def fail_reading(_module: Any, _arguments: Any, named: dict[str, Any]) -> None:
        if fails.is_set() and named["input_ids"].shape[1] > 1:
            fails.clear()
            raise RuntimeError("no memory")

    handle = served.backbone.model.register_forward_pre_hook(fail_reading, with_kwargs=True)
    try:
        with ThreadPoolExecutor(1) as pool:
            long = pool.submit(text_of, served, LONG)
            wait_until(lambda: len(served.forwards) > 5)
            fails.set()
            with pytest.raises(openai.InternalServerError):
                text_of(served, SHORT)
            assert not long.done()
            assert long.result() == alone
    finally:
        handle.remove()
    assert text_of(served, SHORT)


def test_a_pass_that_fails_ends_those_in_it_and_the_next_are_answered(served: Served) -> None:
    alone = text_of(served, SHORT)
    broken = threading.Event()

    def fail_once() -> None:
        if not broken.is_set() and len(served.forwards) > 5:
            broken.set()
            raise RuntimeError("no memory")

    served.forwards.clear()
    served.before_forward.append(fail_once)
    with pytest.raises(openai.InternalServerError):
        text_of(served, LONG)
    assert broken.is_set()
    assert text_of(served, SHORT) == alone
