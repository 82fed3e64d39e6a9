"""Draws by generators of their own, and log-probabilities that are the model's."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny_models import tiny_model, tiny_tokenizer

from ptune.generation.generate import Generated, GenerationOptions, generate
from ptune.generation.sampling import TokenLogprob
from ptune.models.backbone import Backbone

TEXTS = ["The film", "这家店的苹果", "Human: Give three tips\n\nAssistant:"]
SAMPLED = {"do_sample": True, "temperature": 1.7, "top_p": 0.95}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone(tiny_model("qwen2"), tiny_tokenizer(), "qwen2")


def contexts(backbone: Backbone) -> list[list[int]]:
    return [list(backbone.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in TEXTS]


def test_a_text_with_a_seed_says_the_same_in_any_company(backbone: Backbone) -> None:
    each = contexts(backbone)
    together = generate(backbone, each, GenerationOptions(max_new_tokens=12, seed=7, **SAMPLED))
    for size in (1, 2):
        options = GenerationOptions(max_new_tokens=12, seed=7, **SAMPLED)
        assert generate(backbone, each, options, batch_size=size) == together
    for number, context in enumerate(each):
        options = GenerationOptions(max_new_tokens=12, seed=7 + number, **SAMPLED)
        assert generate(backbone, [context], options) == [together[number]]
    assert len({answer.ids for answer in together}) == 3


def test_threads_with_seeds_do_not_disturb_each_other_nor_torch_s_generator() -> None:
    models = [Backbone(tiny_model("llama", seed=seed), tiny_tokenizer(), "tiny") for seed in (0, 1)]
    options = GenerationOptions(max_new_tokens=16, seed=3, **SAMPLED)
    expected = [generate(model, contexts(model), options) for model in models]
    before, found = torch.get_rng_state(), {}
    threads = [
        threading.Thread(
            target=lambda n=n: found.update({n: [generate(models[n], contexts(models[n]), options) for _ in range(4)]})
        )
        for n in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: [expected[0]] * 4, 1: [expected[1]] * 4}
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("cold", [1e-5, 1e-6, 1e-20, 1e-38, 1e-60])
def test_the_colder_the_likelier_down_to_greedy(backbone: Backbone, cold: float) -> None:
    greedy = generate(backbone, contexts(backbone), GenerationOptions(max_new_tokens=12))
    options = GenerationOptions(max_new_tokens=12, do_sample=True, temperature=cold, seed=1)
    assert generate(backbone, contexts(backbone), options) == greedy


def test_a_penalty_that_pushes_scores_over_the_edge_still_draws(backbone: Backbone) -> None:
    options = GenerationOptions(max_new_tokens=12, do_sample=True, repetition_penalty=1e-38, seed=1)
    assert all(len(answer.ids) == 12 for answer in generate(backbone, contexts(backbone), options))


def test_the_ends_of_the_range_of_seeds_draw(backbone: Backbone) -> None:
    for seed in (-(2**63), -1, 2**63 - 1):
        generate(backbone, contexts(backbone), GenerationOptions(max_new_tokens=2, seed=seed, **SAMPLED))
    with pytest.raises(ValidationError):
        GenerationOptions(seed=2**63)


@pytest.mark.parametrize("options", [{}, {"seed": 5, **SAMPLED}, {"repetition_penalty": 1.8}])
def test_log_probabilities_are_those_of_a_plain_forward(backbone: Backbone, options: dict[str, Any]) -> None:
    asked = GenerationOptions(max_new_tokens=10, logprobs=True, top_logprobs=3, **options)
    silent = asked.model_copy(update={"logprobs": False, "top_logprobs": 0})
    answers = generate(backbone, contexts(backbone), asked)
    assert [answer.ids for answer in answers] == [one.ids for one in generate(backbone, contexts(backbone), silent)]
    for context, answer in zip(contexts(backbone), answers, strict=True):
        assert answer.logprobs is not None
        ids = torch.tensor([[*context, *answer.ids]])
        with torch.no_grad():
            expected = backbone.model(ids).logits[0, len(context) - 1 :].log_softmax(-1)
        assert [one.id for one in answer.logprobs] == list(answer.ids)
        for place, one in enumerate(answer.logprobs):
            assert one.logprob == pytest.approx(float(expected[place, one.id]), abs=1e-4)
            best = expected[place].topk(3)
            assert [token for token, _ in one.top] == best.indices.tolist()
            assert [value for _, value in one.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_none_are_told_unless_asked_for(backbone: Backbone) -> None:
    (answer,) = generate(backbone, contexts(backbone)[:1], GenerationOptions(max_new_tokens=3))
    assert answer.logprobs is None
    with pytest.raises(ValidationError, match="top_logprobs go with logprobs, which are off"):
        GenerationOptions(top_logprobs=2)
    with pytest.raises(ValidationError):
        GenerationOptions(logprobs=True, top_logprobs=21)


def test_a_stream_tells_them_with_the_text_that_they_say(backbone: Backbone) -> None:
    events: list[tuple[int, Any]] = []
    whole = generate(backbone, contexts(backbone), GenerationOptions(max_new_tokens=20, seed=1, **SAMPLED))
    stop = whole[0].text[6:8]
    answers = generate(
        backbone,
        contexts(backbone),
        GenerationOptions(max_new_tokens=20, seed=1, logprobs=True, stop=(stop,), **SAMPLED),
        on_text=lambda number, text: events.append((number, text)),
        on_logprobs=lambda number, told: events.append((number, told)),
        on_done=lambda number, answer: events.append((number, answer)),
    )
    assert answers[0].finish_reason == "stop"
    for number, answer in enumerate(answers):
        own = [what for n, what in events if n == number]
        assert own[-1] == answer
        told: list[TokenLogprob] = [one for what in own if isinstance(what, tuple) for one in what]
        assert tuple(told) == answer.logprobs
        assert "".join(what for what in own if isinstance(what, str)) == answer.text
        said, ids = "", []
        for what in own:
            if isinstance(what, str):
                said += what
            elif not isinstance(what, Generated):
                ids += [one.id for one in what]
                later = answer.text[: len(backbone.tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd"))]
                assert answer.text.startswith(later)
        assert sum(isinstance(what, tuple) for what in own) > 1
