"""The server gives the engine's answers, by OpenAI's own client: whole, streamed, mixed, counted."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from pydantic import ValidationError
from serving import Served, serving, soft_prompts, tiny_backbone

from ptune.engine.chat import Chat
from ptune.engine.engine import Engine
from ptune.generation.generate import GenerationOptions
from ptune.serve.protocol import CompletionRequest

TEXTS = ["great soup", "terrible film and a wrong waiter", "苹果", "the door"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    backbone, folder = tiny_backbone(), tmp_path_factory.mktemp("prompts")
    for name, prompt in soft_prompts(backbone).items():
        prompt.save(folder / name)
    with serving(backbone, folder, gather_seconds=0.3) as server:
        yield server


@pytest.fixture(scope="module")
def alone() -> Iterator[Engine]:
    """An engine of its own with the same model and soft prompts."""
    backbone = tiny_backbone()
    with Engine(backbone) as engine:
        for name, prompt in soft_prompts(backbone).items():
            engine.add(name, prompt)
        yield engine


def test_every_soft_prompt_is_a_model_and_so_is_the_bare_backbone(served: Served) -> None:
    models = {model.id: model.task for model in served.openai.models.list()}  # type: ignore[attr-defined]
    assert models == {
        "tiny": None,
        "mood": "classification",
        "team/topic": "classification",
        "chooser": "choice",
        "answer": "generation",
        "brief": "generation",
    }
    assert served.openai.models.retrieve("mood").owned_by == "ptune"
    assert served.http.get("/v1/models/team/topic").json()["id"] == "team/topic"


def test_labels_are_those_of_the_engine(served: Served, alone: Engine) -> None:
    answer = served.http.post("/v1/classify", json={"model": "mood", "input": TEXTS}).json()
    expected = alone.classify("mood", TEXTS)
    assert [label["label"] for label in answer["data"]] == [label["label"] for label in expected]
    for label, right in zip(answer["data"], expected, strict=True):
        assert label["probabilities"] == pytest.approx(right["probabilities"], abs=1e-5)
    one = served.http.post("/v1/classify", json={"model": "mood", "input": TEXTS[0]}).json()
    record = {"model": "mood", "input": [{"text": TEXTS[0]}]}
    assert served.http.post("/v1/classify", json=record).json() == one
    task = alone.prompts["mood"].task
    read = sum(len(row.ids) for row in task.rows({"text": TEXTS[0]}))  # type: ignore[attr-defined]
    assert one["usage"] == {"prompt_tokens": read, "completion_tokens": 0, "total_tokens": read}


def test_choices_stand_in_the_record(served: Served, alone: Engine) -> None:
    record = {"text": TEXTS[0], "one": " good", "two": " very bad soup"}
    answer = served.http.post("/v1/classify", json={"model": "chooser", "input": [record]}).json()
    assert answer["data"][0]["label"] == alone.predict("chooser", [record])[0]["label"]


@pytest.mark.parametrize("name", ["answer", "tiny"])
def test_a_completion_is_that_of_the_engine(served: Served, alone: Engine, name: str) -> None:
    options = GenerationOptions(max_new_tokens=9)
    expected = alone.generate(None if name == "tiny" else name, TEXTS[0], options)
    answer = served.openai.completions.create(model=name, prompt=TEXTS[0], max_tokens=9)
    assert answer.choices[0].text == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(expected.ids)
    task = alone.prompts["answer"].task
    context = task.renderer.context({"instruction": TEXTS[0]})
    if name == "answer":
        assert answer.usage.prompt_tokens == len(context)
        assert answer.usage.total_tokens == len(context) + len(expected.ids)


def test_a_completion_of_several_texts_and_further_fields(served: Served, alone: Engine) -> None:
    answer = served.openai.completions.create(model="answer", prompt=TEXTS, extra_body={"fields": {"input": "soup"}})
    for choice, text in zip(answer.choices, TEXTS, strict=True):
        assert choice.text == alone.generate("answer", {"instruction": text, "input": "soup"}).text


def test_a_conversation_follows_the_rule_of_chat(served: Served, alone: Engine) -> None:
    chat = Chat(alone, "answer", GenerationOptions(max_new_tokens=12))
    messages: list[Any] = []
    for text in TEXTS[:3]:
        messages.append({"role": "user", "content": text})
        answer = served.openai.chat.completions.create(model="answer", messages=messages)
        expected = chat.say({"instruction": text})
        assert answer.choices[0].message.content == expected.text
        messages.append({"role": "assistant", "content": expected.text})
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_pieces_of_a_stream_join_to_the_whole(served: Served) -> None:
    ask = {"model": "answer", "messages": [{"role": "user", "content": TEXTS[1]}], "max_completion_tokens": 20}
    whole = served.openai.chat.completions.create(**ask)
    chunks = list(served.openai.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    assert len(chunks) > 5
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].choices == []


def test_a_stream_of_several_completions_tells_them_apart(served: Served) -> None:
    whole = served.openai.completions.create(model="answer", prompt=TEXTS)
    texts, reasons = [""] * len(TEXTS), [""] * len(TEXTS)
    for chunk in served.openai.completions.create(model="answer", prompt=TEXTS, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]


def test_requests_that_arrive_together_share_batches_and_are_not_crossed(served: Served, alone: Engine) -> None:
    asked = [(name, text) for name in ("mood", "team/topic", "answer", "brief", "tiny") for text in TEXTS]
    random.Random(0).shuffle(asked)

    def ask(name: str, text: str) -> str:
        if name in ("mood", "team/topic"):
            body = {"model": name, "input": text}
            return str(served.http.post("/v1/classify", json=body).json()["data"][0]["label"])
        return str(served.openai.completions.create(model=name, prompt=text, max_tokens=6).choices[0].text)

    def expected(name: str, text: str) -> str:
        if name in ("mood", "team/topic"):
            return str(alone.classify(name, [text])[0]["label"])
        return alone.generate(None if name == "tiny" else name, text, GenerationOptions(max_new_tokens=6)).text

    served.forwards.clear()
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda one: ask(*one), asked))
    assert answers == [expected(*one) for one in asked]
    # Alone: 8 forwards to classify and 12 times 6 to write.
    assert len(served.forwards) < 40
    assert max(served.forwards) > 4


def test_a_seed_gives_the_engine_s_sample_again(served: Served, alone: Engine) -> None:
    options = GenerationOptions(max_new_tokens=12, do_sample=True, temperature=1.5, top_p=0.9, seed=1)
    expected = alone.generate("answer", TEXTS[0], options).text  # while the server's thread, of one generator, rests
    ask = {"model": "answer", "prompt": TEXTS[0], "max_tokens": 12, "temperature": 1.5, "top_p": 0.9}
    samples = [served.openai.completions.create(**ask, seed=seed).choices[0].text for seed in (1, 1, 2)]
    assert samples[:2] == [expected, expected]
    assert samples[2] != samples[0]


def test_penalties_and_stop_texts_are_the_engine_s(served: Served, alone: Engine) -> None:
    whole = alone.generate("answer", TEXTS[0], GenerationOptions(max_new_tokens=12)).text
    stop = whole[4:6]
    answer = served.openai.completions.create(model="answer", prompt=TEXTS[0], max_tokens=12, stop=[stop])
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    options = GenerationOptions(max_new_tokens=12, repetition_penalty=5.0)
    extra = {"repetition_penalty": 5.0}
    answer = served.openai.completions.create(model="answer", prompt=TEXTS[0], max_tokens=12, extra_body=extra)
    assert answer.choices[0].text == alone.generate("answer", TEXTS[0], options).text


@pytest.mark.parametrize("length", [4, 7])
def test_a_stream_tells_nothing_of_a_stop_text_at_the_start(served: Served, alone: Engine, length: int) -> None:
    stop = alone.generate("answer", TEXTS[0], GenerationOptions(max_new_tokens=12)).text[:length]
    ask = {"model": "answer", "prompt": TEXTS[0], "max_tokens": 12, "stop": [stop]}
    choices = [chunk.choices[0] for chunk in served.openai.completions.create(**ask, stream=True)]
    assert "".join(choice.text for choice in choices) == ""
    assert choices[-1].finish_reason == "stop"


def test_the_bare_model_s_chat_needs_a_chat_template(served: Served, alone: Engine) -> None:
    ask: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": TEXTS[0]}], "max_tokens": 6}
    with pytest.raises(openai.BadRequestError, match="has no chat template"):
        served.openai.chat.completions.create(**ask)
    served.backbone.tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    try:
        answer = served.openai.chat.completions.create(**ask)
    finally:
        served.backbone.tokenizer.chat_template = None
    expected = alone.generate(None, f"user: {TEXTS[0]}\n", GenerationOptions(max_new_tokens=6))
    assert answer.choices[0].message.content == expected.text


def test_what_was_done_is_counted(served: Served) -> None:
    before = served.metric("ptune_tokens_total{")
    answer = served.openai.completions.create(model="brief", prompt="soup")
    assert answer.usage is not None
    assert served.metric("ptune_tokens_total{") - before == answer.usage.total_tokens
    assert served.metric('ptune_requests_total{endpoint="/v1/completions",status="200"}') > 0
    assert served.metric('ptune_request_seconds_count{endpoint="/v1/completions"}') > 0
    assert served.metric("ptune_batch_rows_count") > 0
    assert served.metric("ptune_prompts_in_memory") >= 1
    assert served.metric("ptune_key_bytes_in_memory") > 0
    assert served.metric("ptune_waiting_texts") == 0


def test_liveness_and_readiness(served: Served, tmp_path: Path) -> None:
    assert served.http.get("/healthz").json() == {"status": "ok"}
    assert served.http.get("/readyz").json() == {"status": "ready"}


@pytest.mark.parametrize("sampled", [{}, {"temperature": 1.6, "seed": 4}])
def test_log_probabilities_of_a_chat_are_the_engine_s_whole_and_streamed(
    served: Served, alone: Engine, sampled: dict[str, Any]
) -> None:
    options = GenerationOptions(
        max_new_tokens=14, logprobs=True, top_logprobs=2, **({"do_sample": True, **sampled} if sampled else {})
    )
    expected = alone.generate("answer", TEXTS[2], options)
    assert expected.logprobs is not None
    ask: dict[str, Any] = {
        "model": "answer",
        "messages": [{"role": "user", "content": TEXTS[2]}],
        "max_tokens": 14,
        "logprobs": True,
        "top_logprobs": 2,
        **sampled,
    }
    choice = served.openai.chat.completions.create(**ask).choices[0]
    assert choice.message.content == expected.text
    assert choice.logprobs is not None
    whole = choice.logprobs.content or []
    assert [one.logprob for one in whole] == pytest.approx([one.logprob for one in expected.logprobs], abs=1e-4)
    assert "".join(one.token for one in whole) == expected.text.rstrip("\ufffd")
    assert all(len(one.top_logprobs) == 2 for one in whole)
    assert b"".join(bytes(one.bytes or ()) for one in whole).decode() == "".join(one.token for one in whole)
    streamed: list[Any] = []
    for chunk in served.openai.chat.completions.create(**ask, stream=True):
        for one in chunk.choices:
            streamed += (one.logprobs.content or []) if one.logprobs else []
    assert [(one.token, one.top_logprobs) for one in streamed] == [(one.token, one.top_logprobs) for one in whole]
    assert (
        served.openai.chat.completions.create(**(ask | {"logprobs": False, "top_logprobs": None})).choices[0].logprobs
        is None
    )


def test_log_probabilities_of_completions_whole_and_streamed(served: Served, alone: Engine) -> None:
    ask: dict[str, Any] = {"model": "answer", "prompt": TEXTS[:2], "max_tokens": 9, "logprobs": 3}
    whole = served.openai.completions.create(**ask).choices
    streamed: list[list[str]] = [[], []]
    for chunk in served.openai.completions.create(**ask, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += (choice.logprobs.tokens or []) if choice.logprobs else []
    for choice, text, tokens in zip(whole, TEXTS, streamed, strict=False):
        expected = alone.generate("answer", text, GenerationOptions(max_new_tokens=9, logprobs=True))
        told = choice.logprobs
        assert told is not None
        assert expected.logprobs is not None
        assert told.token_logprobs == pytest.approx([one.logprob for one in expected.logprobs], abs=1e-4)
        assert tokens == told.tokens
        assert told.text_offset == [len("".join(told.tokens[:n])) for n in range(len(told.tokens))]
        assert all(1 <= len(best) <= 3 for best in told.top_logprobs or [])
        assert "".join(told.tokens) == choice.text.rstrip("\ufffd")


def test_a_body_that_is_nested_too_deeply_is_refused() -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(ValidationError, match="it is nested too deeply"):
        CompletionRequest(model="answer", prompt=nested)
