"""The engine: many soft prompts on one backbone, each as if alone, and the bare model always among the choices."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer

from ptune import Engine, SoftPrompt
from ptune.config.task import ChoiceConfig, ClassificationConfig, GenerationConfig
from ptune.errors import BackboneError, DataError, SoftPromptError
from ptune.generation.generate import GenerationOptions
from ptune.models.backbone import Backbone

TEXTS = ["great soup", "terrible film and a wrong waiter", "苹果"]


@pytest.fixture
def backbone() -> Backbone:
    return Backbone(tiny_model("llama"), tiny_tokenizer(), "tiny")


def sentiment(backbone: Backbone, seed: int = 0, count: int = 4) -> SoftPrompt:
    rows = torch.randn(count, backbone.hidden_size, generator=torch.Generator().manual_seed(seed)) * 0.3
    return SoftPrompt(
        rows=rows,
        template=f"{{text}}[P*{count}]{{answer}}",
        task=ClassificationConfig(verbalizer={"positive": " good", "negative": " bad"}),
        overlong="error",
        backbone_name="tiny",
        fingerprint=backbone.fingerprint(),
    )


def chat(backbone: Backbone, seed: int = 5) -> SoftPrompt:
    rows = torch.randn(3, backbone.hidden_size, generator=torch.Generator().manual_seed(seed)) * 0.3
    return SoftPrompt(
        rows=rows,
        template="[P*3]Human: {instruction}[?\n{input}]\nAssistant: {answer}",
        task=GenerationConfig(max_new_tokens=8),
        overlong="cut",
        backbone_name="tiny",
        fingerprint=backbone.fingerprint(),
    )


def test_prompts_side_by_side_answer_as_each_alone(backbone: Backbone) -> None:
    alone = []
    for prompt in (sentiment(backbone), sentiment(backbone, 1, 7)):
        with Engine(backbone) as engine:
            engine.add("one", prompt)
            alone.append(engine.classify("one", TEXTS))
    with Engine(backbone) as engine:
        engine.add("first", sentiment(backbone))
        engine.add("second", sentiment(backbone, 1, 7))
        engine.add("chat", chat(backbone))
        assert engine.classify("first", TEXTS) == alone[0]
        assert engine.classify("second", TEXTS) == alone[1]
        assert alone[0] != alone[1]


def test_a_batch_mixes_prompts_of_all_kinds_and_answers_each_as_if_alone(backbone: Backbone) -> None:
    several_rows = replace(
        sentiment(backbone, 2, 5),
        template="[P*2]{text}[P*3] It was{answer}",
        task=ClassificationConfig(verbalizer={"a": " good film", "b": " good food", "c": " bad"}, calibration="prior"),
    )
    chooser = replace(
        sentiment(backbone, 3, 6),
        template="[P*6]{text}{answer}",
        task=ChoiceConfig(choices=("one", "two"), normalise=True),
    )
    prompts = {
        "first": sentiment(backbone),
        "several": several_rows,
        "chooser": chooser,
        "chat": chat(backbone),
        "brief": replace(chat(backbone, 8), task=GenerationConfig(max_new_tokens=3)),
    }
    records = [
        {"text": text, "one": "a cat", "two": "a very old dog", "instruction": text}
        for text in (*TEXTS, "the door", "room and board")
    ]
    names = [name for name in prompts for _ in records]
    with Engine(backbone) as engine:
        for name, prompt in prompts.items():
            engine.add(name, prompt)
        alone = [engine.predict(name, [record])[0] for name in prompts for record in records]
        shuffled = random.Random(0).sample(range(len(names)), len(names))
        everything = [record for _ in prompts for record in records]
        together = engine.predict([names[n] for n in shuffled], [everything[n] for n in shuffled], batch_size=7)
    for number, answer in zip(shuffled, together, strict=True):
        expected = alone[number]
        if "text" in expected:
            assert answer == expected
        else:
            assert answer["label"] == expected["label"]
            assert answer["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-5)


def test_an_empty_record_is_read_once_for_all_records_that_it_calibrates(backbone: Backbone) -> None:
    words = {"positive": " good", "negative": " bad"}
    tasks = [ClassificationConfig(verbalizer=words, calibration=how) for how in ("prior", "prior", "none")]
    with Engine(backbone) as engine:
        for number, task in enumerate(tasks):
            engine.add(str(number), replace(sentiment(backbone, number), task=task))
        names, records = [str(n % 3) for n in range(12)], [{"text": "soup " * n} for n in range(1, 13)]
        alone = [engine.predict(name, [record])[0] for name, record in zip(names, records, strict=True)]
        backbone.plan = "reference"  # a pass a batch
        passes: list[int] = []
        backbone.model.register_forward_pre_hook(lambda *_: passes.append(1))
        together = engine.predict(names, records, batch_size=8)  # of two rows a record
    assert len(passes) == 3 + 2
    for answer, expected in zip(together, alone, strict=True):
        assert answer["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-5)


def test_a_name_for_each_record(backbone: Backbone) -> None:
    with Engine(backbone) as engine:
        engine.add("one", sentiment(backbone))
        assert engine.predict([], []) == []
        with pytest.raises(DataError, match="there are 1 names for 2 records; give one for each"):
            engine.predict(["one"], [{"text": "a"}, {"text": "b"}])


def test_a_replaced_prompt_answers_anew_at_ids_of_its_own(backbone: Backbone) -> None:
    with Engine(backbone) as engine:
        engine.add("one", sentiment(backbone))
        before, first = engine.classify("one", TEXTS), engine.prompts["one"].first_virtual_id
        engine.add("one", sentiment(backbone, 9))
        assert engine.classify("one", TEXTS) != before
        assert engine.prompts["one"].first_virtual_id > first
        engine.add("one", sentiment(backbone))
        assert engine.classify("one", TEXTS) == before


def test_the_bare_model_is_always_one_of_the_choices(backbone: Backbone) -> None:
    text = "The film was"
    ids = torch.tensor([tiny_tokenizer()(text)["input_ids"]])
    plain = backbone.model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
    with Engine(backbone) as engine:
        engine.add("chat", chat(backbone))
        answer = engine.generate(None, text, GenerationOptions(max_new_tokens=8))
        assert list(answer.ids) == (plain[: plain.index(2)] if 2 in plain else plain)
        pieces: list[str] = []
        tuned = engine.generate("chat", text, on_text=pieces.append)
        assert "".join(pieces) == tuned.text
        assert tuned.ids != answer.ids


@pytest.mark.parametrize("family", ["llama", "bloom", "t5", "bart"])
def test_answers_have_the_log_probabilities_that_the_model_gives_their_tokens(family: str) -> None:
    backbone = Backbone(tiny_model(family), tiny_tokenizer(), "tiny")
    records = [{"instruction": "Which soup?"}, {"instruction": "Why", "input": "a wrong waiter"}, "Say it"]
    answers = [" good soup", " bad", " the room was quiet"]
    with Engine(backbone) as engine:
        engine.add("chat", chat(backbone))
        found = engine.log_probabilities("chat", records, answers, end=True)
        with engine._prompts.using("chat") as (loaded,):
            renderer = loaded.task.renderer
            for record, answer, one in zip(records, answers, found, strict=True):
                fields = engine.record_for("chat", record) if isinstance(record, str) else record
                row = renderer.row(fields, answer)
                assert row is not None
                ids, labels = torch.tensor([row.ids]), torch.tensor([row.labels])
                backbone.plan = "reference"
                assert one == pytest.approx(-float(backbone(ids, torch.ones_like(ids), labels=labels)), abs=1e-3)
                backbone.plan = "auto"
        if family == "llama":
            texts = ["a great", "soup and"]
            bare = engine.log_probabilities(None, texts, [" soup", " film"])
            (said,) = (engine.generate(None, texts[0], GenerationOptions(max_new_tokens=1, logprobs=True)),)
            assert said.logprobs is not None
            assert bare[0] <= said.logprobs[0].logprob + 1e-4  # greedy says the likeliest
            assert engine.log_probabilities(None, texts[::-1], [" film", " soup"]) == pytest.approx(
                bare[::-1], abs=1e-4
            )


def test_answers_without_probability_are_refused(backbone: Backbone) -> None:
    with Engine(backbone) as engine:
        engine.add("chat", chat(backbone))
        with pytest.raises(DataError, match="there are 1 answers for 2 records"):
            engine.log_probabilities("chat", ["a", "b"], [" good"])
        with pytest.raises(DataError, match="an answer is of no token"):
            engine.log_probabilities(None, ["a"], [""])
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<unk>"})
    masked = Backbone(tiny_model("bert"), tokenizer, "tiny")
    with Engine(masked) as engine, pytest.raises(BackboneError, match="no probability from left to right"):
        engine.log_probabilities(None, ["a"], [" good"])


def test_a_saved_prompt_is_loaded_by_its_folders_name(backbone: Backbone, tmp_path: Path) -> None:
    backbone.model.save_pretrained(tmp_path / "model")
    backbone.tokenizer.save_pretrained(tmp_path / "model")
    prompt = sentiment(backbone)
    prompt.save(tmp_path / "mood")
    with Engine.for_prompt(tmp_path / "mood", str(tmp_path / "model")) as engine:
        assert list(engine.prompts) == ["mood"]
        again = engine.classify("mood", TEXTS)
    with Engine(backbone) as engine:
        engine.add("mood", prompt)
        assert again == engine.classify("mood", TEXTS)


def test_closing_leaves_the_backbone_as_it_was(backbone: Backbone) -> None:
    embedding = backbone.model.get_input_embeddings()
    with Engine(backbone) as engine:
        engine.add("one", sentiment(backbone))
        assert "forward" in vars(embedding)
    assert "forward" not in vars(embedding)


def test_unknown_prompts_and_templates_of_several_fields_are_named(backbone: Backbone) -> None:
    with Engine(backbone) as engine:
        engine.add("sentiment", sentiment(backbone))
        engine.add("chat", chat(backbone))
        with pytest.raises(
            SoftPromptError,
            match=r'no soft prompt "sentimet" is loaded \(loaded: sentiment, chat\)\. Did you mean "sentiment"\?',
        ):
            engine.classify("sentimet", TEXTS)
        with pytest.raises(SoftPromptError, match='task of "chat" is generation, and classify.* takes one with labels'):
            engine.classify("chat", TEXTS)


def test_the_bare_model_has_no_task_and_says_what_to_call(backbone: Backbone) -> None:
    with Engine(backbone) as engine:
        engine.add("sentiment", sentiment(backbone))
        asked: list[Callable[[], Any]] = [
            lambda: engine.predict(None, [{"text": "a"}]),  # type: ignore[arg-type]
            lambda: engine.predict(["sentiment", None], [{"text": "a"}] * 2),  # type: ignore[list-item]
            lambda: engine.classify(None, ["a"]),  # type: ignore[arg-type]
            lambda: engine.tag(None, ["a"]),  # type: ignore[arg-type]
            lambda: engine.evaluate(None, [{"text": "a"}]),  # type: ignore[arg-type]
            lambda: asyncio.run(engine.apredict(None, [{"text": "a"}])),  # type: ignore[arg-type]
        ]
        for ask in asked:
            with pytest.raises(SoftPromptError, match=r"bare model has no task to answer with.*generate\(None, text\)"):
                ask()


def test_a_prompt_of_another_backbone_is_refused(backbone: Backbone) -> None:
    other = Backbone(tiny_model("llama", seed=3), tiny_tokenizer(), "other")
    with Engine(other) as engine, pytest.raises(SoftPromptError, match="other"):
        engine.add("one", sentiment(backbone))


def test_a_record_longer_than_the_model_is_cut_and_answered(backbone: Backbone) -> None:
    long = {"instruction": "soup and film " * 200, "input": ""}
    with Engine(backbone) as engine:
        engine.add("chat", chat(backbone))
        (answer,) = engine.predict("chat", [long])
        assert answer["text"]
        assert engine.generate("chat", long).text == answer["text"]
        assert engine.predict(["chat"], [long]) == [answer]
        renderer = engine.prompts["chat"].task.renderer
        assert len(renderer.question(long, 8)) == (backbone.context_limit or 0) - 8
        row = renderer.row(long, "soup")
        assert row is not None
        cut_for_training = [token for token, label in zip(row.ids, row.labels, strict=True) if label < 0]
        assert len(cut_for_training) > len(renderer.question(long, 10**6))


def test_inputs_that_mean_something_else_are_refused(backbone: Backbone) -> None:
    pair = replace(sentiment(backbone), template="{first}[P*4]{second}{answer}")
    with Engine(backbone) as engine:
        engine.add("pair", pair)
        engine.add("chat", chat(backbone))
        with pytest.raises(DataError, match="needs second beside its first field; it has first, second"):
            engine.record_for("pair", "a soup")
        assert engine.record_for("pair", "a", {"second": "b"}) == {"first": "a", "second": "b"}
        with pytest.raises(DataError, match=r'has no field "inptu"; it has instruction, input\. Did you mean "input"'):
            engine.record_for("chat", "a", {"inptu": "b"})
        with pytest.raises(DataError, match=r"takes a list of texts, and got a single one; write \[text\]"):
            engine.classify("pair", "abc")
        with pytest.raises(DataError, match="the bare model continues a text"):
            engine.generate(None, {"text": "x"})
        assert engine.predict("pair", []) == []
        with pytest.raises(DataError, match="there are no records to score"):
            engine.evaluate("pair", [])
