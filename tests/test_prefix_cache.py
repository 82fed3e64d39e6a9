"""Virtual tokens that open a row are read once: the same answers as by the plain way, and never those of other rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from soft_prompts import make
from tiny_models import FAMILIES, tiny_model, tiny_tokenizer

from ptune import Engine, SoftPrompt
from ptune.config.run import EncoderConfig
from ptune.config.task import ClassificationConfig, GenerationConfig
from ptune.generation.generate import GenerationOptions, generate
from ptune.models.backbone import Backbone
from ptune.models.prompted_model import PromptedModel
from ptune.prompts.encoder import PromptEncoder, build_encoder
from ptune.prompts.prefix_cache import PrefixCache

TEXTS = ["great soup", "terrible film and a wrong waiter", "苹果", "the door and the room were as quiet as ever"]


def backbone_of(family: str = "llama") -> Backbone:
    return Backbone(tiny_model(family), tiny_tokenizer(), family)


def soft_prompt(backbone: Backbone, count: int, seed: int, **changes: Any) -> SoftPrompt:
    rows = torch.randn(count, backbone.hidden_size, generator=torch.Generator().manual_seed(seed)) * 0.3
    values = {"rows": rows, "template": f"[P*{count}]{{text}}{{answer}}", "max_length": None, "overlong": "error"}
    return make(backbone, **values | changes)


def prompts(backbone: Backbone) -> dict[str, SoftPrompt]:
    """Opening runs of several lengths, one before more virtual tokens, one that is asked at once, one behind a text."""
    words = ClassificationConfig(verbalizer={"food": " good soup", "film": " good film", "none": " bad"})
    writes = {"task": GenerationConfig(max_new_tokens=9), "overlong": "cut"}
    return {
        "short": soft_prompt(backbone, 3, 1),
        "long": soft_prompt(backbone, 9, 2, task=words),
        "parted": soft_prompt(backbone, 7, 3, template="[P*4]{text}[P*3] It was{answer}"),
        "asked at once": soft_prompt(backbone, 5, 4, template="[P*5][?{text}]{answer}"),
        "behind": soft_prompt(backbone, 4, 5, template="{text}[P*4]{answer}"),
        "writes": soft_prompt(backbone, 6, 6, **writes),
        "writes more": soft_prompt(backbone, 2, 7, template="[P*2]Human: {text}\nAssistant: {answer}", **writes),
        "writes behind": soft_prompt(backbone, 3, 8, template="{text}[P*3]{answer}", **writes),
    }


@contextmanager
def counted(backbone: Backbone) -> Iterator[list[int]]:
    """Count the virtual tokens of each forward pass."""
    read: list[int] = []

    def hook(_module: Any, _arguments: Any, named: dict[str, Any]) -> None:
        read.append(int((named["input_ids"] >= backbone.vocabulary_size).sum()))

    handle = backbone.model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield read
    finally:
        handle.remove()


def assert_same(answers: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(answers) == len(expected) > 0
    for answer, right in zip(answers, expected, strict=True):
        if "text" in right:
            assert answer == right
        else:
            assert answer["label"] == right["label"]
            assert answer["probabilities"] == pytest.approx(right["probabilities"], abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_prompts_answer_as_the_reference_alone_and_in_mixed_batches(family: str) -> None:
    backbone = backbone_of(family)
    with Engine(backbone) as engine:
        for name, prompt in prompts(backbone).items():
            engine.add(name, prompt)
        names = [name for name in prompts(backbone) for _ in TEXTS]
        records = [{"text": text} for _ in prompts(backbone) for text in TEXTS]
        records[names.index("asked at once")] = {"text": ""}
        backbone.plan = "reference"
        expected = [engine.predict(name, [record])[0] for name, record in zip(names, records, strict=True)]
        assert len({answer["text"] for answer in expected if "text" in answer}) > 3
        assert len(engine.keys) == 0
        backbone.plan = "auto"
        for _ in range(2):
            assert_same(engine.predict(names, records, batch_size=9), expected)
            assert_same(
                [engine.predict(name, [record])[0] for name, record in zip(names, records, strict=True)], expected
            )
        assert backbone.plans.last != "reference" or family == "bloom"


@pytest.mark.parametrize("family", ["gpt2", "bloom", "llama"])
def test_the_second_call_reads_no_virtual_token_of_an_opening(family: str) -> None:
    backbone = backbone_of(family)
    with Engine(backbone) as engine:
        for name in ("short", "long", "writes"):
            engine.add(name, prompts(backbone)[name])
        names = ["short", "long", "writes", "short"]
        records = [{"text": text} for text in TEXTS]
        with counted(backbone) as read:
            first = engine.predict(names, records)
            assert sum(read) == 3 + 9 + 6  # each once, whoever asks
            read.clear()
            assert engine.predict(names, records) == first
            engine.classify("short", TEXTS)
            engine.generate("writes", TEXTS[2])
            assert len(read) > 10
            assert sum(read) == 0


def test_a_replaced_prompt_and_one_that_was_forgotten_are_read_anew() -> None:
    backbone = backbone_of()
    old, new = soft_prompt(backbone, 6, 1), soft_prompt(backbone, 6, 2)
    with Engine(backbone) as engine:
        kept = engine.keys
        engine.add("one", old)
        before = engine.classify("one", TEXTS)
        assert len(kept) == 1
        engine.add("one", new)
        assert len(kept) == 0
        backbone.plan = "reference"
        expected = engine.classify("one", TEXTS)
        backbone.plan = "auto"
        assert_same(engine.classify("one", TEXTS), expected)
        assert before != expected
        engine.remove("one")
        assert (len(kept), kept.bytes) == (0, 0)
        engine.add("one", old)
        assert_same(engine.classify("one", TEXTS), before)


def test_answers_beyond_the_budget_are_the_same_and_the_longest_unused_leave() -> None:
    backbone = backbone_of()
    with Engine(backbone) as engine:
        kept = engine.keys
        for number in range(4):
            engine.add(str(number), soft_prompt(backbone, 6, number))
        expected = [engine.classify(str(number), TEXTS) for number in range(4)]
        each = kept.bytes // 4
        kept.budget = 2 * each
        assert (len(kept), kept.bytes) == (2, 2 * each)
        with counted(backbone) as read:
            assert engine.classify("3", TEXTS) == expected[3]
            assert engine.classify("0", TEXTS) == expected[0]
            assert sum(read) == 6
            assert engine.classify("3", TEXTS) == expected[3]
            assert sum(read) == 6
            assert engine.classify("2", TEXTS) == expected[2]
            assert sum(read) == 12
        kept.budget = 0
        assert [engine.classify(str(number), TEXTS) for number in range(4)] == expected
        assert kept.bytes == 0


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("encoder", ["embedding", "mlp"])
def test_a_prompt_in_training_beside_an_engine_is_never_answered_with_old_keys(encoder: str, fused: bool) -> None:
    backbone = backbone_of()
    settings = EncoderConfig(type="embedding") if encoder == "embedding" else EncoderConfig(residual=False)
    initial = backbone.embeddings(torch.arange(30, 36))
    with Engine(backbone) as engine, PromptedModel(backbone, build_encoder(settings, initial, 0)) as prompted:
        engine.add("one", soft_prompt(backbone, 5, 1))
        steady = engine.classify("one", TEXTS)
        optimizer = torch.optim.AdamW(prompted.encoder.parameters(), lr=0.05, fused=fused)
        virtual = list(range(prompted.first_virtual_id, prompted.first_virtual_id + 6))
        ids = torch.tensor([[*virtual, 40, 41, 42], [*virtual, 50, 51, 52]])
        mask, positions = torch.ones_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        positions[:, -1] = True
        said = set()
        for _ in range(4):
            prompted.train()
            prompted(ids, mask, labels=ids.masked_fill(~positions, -100)).backward()
            optimizer.step()
            optimizer.zero_grad()
            prompted.eval()
            prompted.use()
            with torch.no_grad():
                found = backbone.logits(ids, mask, positions)
                assert backbone.plans.last == "kept prefix"
                answers = generate(backbone, ids.tolist(), GenerationOptions(max_new_tokens=6))
                backbone.plan = "reference"
                assert torch.allclose(found, backbone.logits(ids, mask, positions), atol=1e-4)
                assert answers == generate(backbone, ids.tolist(), GenerationOptions(max_new_tokens=6))
                backbone.plan = "auto"
            said.add(found.sum().item())
            assert engine.classify("one", TEXTS) == steady
        assert len(said) == 4


@pytest.mark.parametrize("mode", ["no change of mode", "eval"])
def test_a_fused_optimizer_on_bare_rows_is_noticed(mode: str) -> None:
    backbone = backbone_of()
    encoder = PromptEncoder(EncoderConfig(type="embedding"), backbone.embeddings(torch.arange(30, 36)))
    with PromptedModel(backbone, encoder) as prompted:
        optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.05, fused=True)
        ids = torch.tensor([[*range(prompted.first_virtual_id, prompted.first_virtual_id + 6), 40, 41, 42]])
        mask, positions = torch.ones_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        positions[:, -1] = True
        for _ in range(2):
            prompted.train(mode != "eval")
            with torch.no_grad():
                found = prompted(ids, mask, positions=positions)
                backbone.plan = "reference"
                assert torch.allclose(found, prompted(ids, mask, positions=positions), atol=1e-4)
                backbone.plan = "auto"
            prompted.train()
            prompted(ids, mask, labels=ids.masked_fill(~positions, -100)).backward()
            optimizer.step()


@pytest.mark.parametrize("family", ["bloom", "llama"])
def test_rows_padded_on_the_left_beside_one_without_pads_are_read_right(family: str) -> None:
    backbone = backbone_of(family)
    with PromptedModel(backbone, build_encoder(EncoderConfig(), backbone.embeddings(torch.arange(30, 34)), 0)) as model:
        model.eval()
        virtual = list(range(model.first_virtual_id, model.first_virtual_id + 4))
        ids = torch.tensor([[*virtual, 40, 41, 42, 43], [0, 0, *virtual, 50, 51]])
        mask = (ids != 0).long()
        positions = torch.zeros_like(ids, dtype=torch.bool)
        positions[:, -2:] = True
        with torch.no_grad():
            found = model(ids, mask, positions=positions)
            backbone.plan = "reference"
            assert torch.allclose(found, model(ids, mask, positions=positions), atol=1e-4)


def test_rows_changed_in_place_behind_the_table_are_noticed() -> None:
    backbone = backbone_of()
    tokens = backbone.attach()
    first = tokens.allocate(4)
    rows = torch.nn.Parameter(backbone.embeddings(torch.arange(30, 34)))
    tokens.set_rows(first, rows)
    context = [[*range(first, first + 4), 40, 41]]
    options = GenerationOptions(max_new_tokens=3, logprobs=True)
    before = generate(backbone, context, options)[0].logprobs
    with torch.no_grad():
        rows.mul_(-2.0)
    after = generate(backbone, context, options)[0].logprobs
    backbone.plan = "reference"
    (expected,) = (answer.logprobs for answer in generate(backbone, context, options))
    assert before is not None
    assert after is not None
    assert expected is not None
    assert [one.logprob for one in after] == pytest.approx([one.logprob for one in expected], abs=1e-4)
    assert before[0].logprob != pytest.approx(after[0].logprob, abs=1e-3)


def test_penalties_and_stops_look_behind_what_is_kept() -> None:
    backbone = backbone_of()
    with Engine(backbone) as engine:
        for name in ("writes", "writes more"):
            engine.add(name, prompts(backbone)[name])
        contexts = [
            engine.prompts[name].task.renderer.question({"text": text}, 9)
            for name in ("writes", "writes more")
            for text in TEXTS
        ]
        options = GenerationOptions(max_new_tokens=9, repetition_penalty=1.6, no_repeat_ngram_size=2)
        kept = generate(backbone, contexts, options)
        backbone.plan = "reference"
        assert kept == generate(backbone, contexts, options)


def test_the_limit_of_the_model_is_the_same_with_a_kept_prompt() -> None:
    backbone = backbone_of("gpt2")
    with Engine(backbone) as engine:
        engine.add("one", soft_prompt(backbone, 40, 1))
        first = engine.prompts["one"].first_virtual_id
        virtual = list(range(first, first + 40))
        contexts = [[*virtual, *[7] * 210], [*virtual, 8, 9], [*[9] * 249]]
        options = GenerationOptions(max_new_tokens=5)
        kept = generate(backbone, contexts, options)
        backbone.plan = "reference"
        assert kept == generate(backbone, contexts, options)


def test_beyond_a_sliding_window_prompts_are_read_with_their_text() -> None:
    model = tiny_model("mistral")
    model.config.sliding_window = 12
    backbone = Backbone(model, tiny_tokenizer(), "mistral")
    with Engine(backbone) as engine:
        engine.add("one", replace(prompts(backbone)["writes"], task=GenerationConfig(max_new_tokens=4)))
        kept = engine.keys
        long, short = engine.generate("one", TEXTS[1]), engine.generate("one", "a")
        assert len(kept) == 1
        backbone.plan = "reference"
        assert (long, short) == (engine.generate("one", TEXTS[1]), engine.generate("one", "a"))


def test_a_cache_keeps_within_its_budget_and_to_the_meaning() -> None:
    cache, past = PrefixCache(100), torch.zeros(20, dtype=torch.uint8)
    for number in range(6):
        cache.put((number,), "a", past)
    assert (len(cache), cache.bytes) == (5, 100)
    assert cache.get((0,), "a") is None
    assert cache.get((1,), "a") is past
    assert cache.get((1,), "b") is None
    cache.put((9,), "a", past)
    assert cache.get((2,), "a") is None
    assert cache.get((1,), "a") is past
    cache.put((1,), "b", past)
    assert cache.bytes == 100
    cache.put((8,), "a", torch.zeros(101, dtype=torch.uint8))
    assert (len(cache), cache.bytes) == (0, 0)
    cache.put((5, 6), "a", past)
    cache.forget(6, 9)
    assert len(cache) == 1
    cache.forget(3, 6)
    assert len(cache) == 0
