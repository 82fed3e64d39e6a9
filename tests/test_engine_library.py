"""A folder of soft prompts in an engine: loaded on first use, within a budget, ids never given twice."""

from __future__ import annotations

import os
import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from soft_prompts import make
from tiny_models import tiny_model, tiny_tokenizer

from ptune import Engine
from ptune.config.task import ClassificationConfig, GenerationConfig
from ptune.engine.chat import Chat
from ptune.engine.prompt_memory import PromptMemory
from ptune.errors import ConfigError, SoftPromptError
from ptune.generation.generate import GenerationOptions
from ptune.models.backbone import Backbone

TEXTS = ["great soup", "terrible film"]


@pytest.fixture
def backbone() -> Backbone:
    return Backbone(tiny_model("llama"), tiny_tokenizer(), "tiny")


def fill(folder: Path, backbone: Backbone, count: int) -> None:
    for number in range(count):
        prompt = make(backbone, max_length=None)
        replace(prompt, rows=prompt.rows * (0.1 + number / count)).save(folder / f"p{number}")


def test_a_prompt_of_the_folder_is_loaded_when_it_is_first_used(backbone: Backbone, tmp_path: Path) -> None:
    fill(tmp_path / "team", backbone, 3)
    with Engine(backbone) as alone:
        alone.load(tmp_path / "team" / "p2")
        expected = alone.classify("p2", TEXTS)
    with Engine(backbone, prompts=tmp_path) as engine:
        assert engine.prompts == {}
        assert engine.classify("team/p2", TEXTS) == expected
        assert list(engine.prompts) == ["team/p2"]
        fill(tmp_path / "late", backbone, 1)  # saved since
        assert engine.classify("late/p0", TEXTS)
        with pytest.raises(SoftPromptError, match=r'no soft prompt "team/p22" is in .* \(there are: .*Did you mean'):
            engine.classify("team/p22", TEXTS)
        with pytest.raises(SoftPromptError, match="no soft prompt"):
            engine.classify("../" + tmp_path.name + "/team/p1", TEXTS)


def test_a_prompt_whose_folder_is_replaced_is_read_anew_after_remove(backbone: Backbone, tmp_path: Path) -> None:
    fill(tmp_path, backbone, 2)
    with Engine(backbone, prompts=tmp_path) as engine:
        before, other = (engine.classify(name, TEXTS) for name in ("p0", "p1"))
        shutil.rmtree(tmp_path / "p0")
        shutil.copytree(tmp_path / "p1", tmp_path / "p0")
        assert engine.classify("p0", TEXTS) == before != other
        engine.remove("p0")
        assert engine.classify("p0", TEXTS) == other


def test_prompts_over_the_budget_are_forgotten_and_come_back_at_other_ids(backbone: Backbone, tmp_path: Path) -> None:
    fill(tmp_path, backbone, 4)
    each = 2 * 4 * 32 * 4
    with Engine(backbone, prompts=tmp_path, prompt_memory=f"{2 * each}B") as engine:
        engine.load(tmp_path / "p3", name="pinned")
        expected = {name: engine.classify(name, TEXTS) for name in ("p0", "p1", "p2", "pinned")}
        assert set(engine.prompts) == {"p1", "p2", "pinned"}
        firsts = {loaded.first_virtual_id for loaded in engine.prompts.values()}
        assert engine.classify("p1", TEXTS) == expected["p1"]
        assert engine.classify("p0", TEXTS) == expected["p0"]
        assert set(engine.prompts) == {"p0", "p1", "pinned"}
        assert engine.prompts["p0"].first_virtual_id > max(firsts)
        mixed = engine.predict(["p0", "p1", "p2", "p0"], [{"text": TEXTS[0]}] * 4)  # what a call uses stays
        for name, answer in zip(("p0", "p1", "p2", "p0"), mixed, strict=True):
            assert answer["probabilities"] == pytest.approx(expected[name][0]["probabilities"], abs=1e-5)
        assert engine.memory.bytes <= 2 * each
        assert expected["p0"] != expected["p1"]


def test_a_prompt_whose_task_cannot_be_built_leaves_nothing_in_the_table(backbone: Backbone, tmp_path: Path) -> None:
    alike = ClassificationConfig(verbalizer={"good": " film", "great": " film and soup"})
    make(backbone, task=alike).save(tmp_path / "alike")
    with Engine(backbone, prompts=tmp_path) as engine:
        for _ in range(3):
            with pytest.raises(ConfigError, match="cannot be told apart"):
                engine.classify("alike", TEXTS)
        tokens = backbone.attach()
        following = tokens.allocate(1)
        tokens.detach()
        assert not any(tokens.meaning([number]) for number in range(backbone.vocabulary_size, following))
        assert (engine.prompts, engine.memory.bytes) == ({}, 0)


def test_a_thousand_prompts_answer_as_each_alone(backbone: Backbone, tmp_path: Path) -> None:
    fill(tmp_path, backbone, 20)
    for number in range(20, 1000):  # copied, for a save waits for the disk
        shutil.copytree(tmp_path / f"p{number % 20}", tmp_path / f"p{number}", copy_function=os.link)
    names = [f"p{number}" for number in random.Random(0).sample(range(1000), 300)]
    with Engine(backbone, prompts=tmp_path, prompt_memory="100kB") as engine:
        answers = engine.predict(names, [{"text": TEXTS[0]}] * 300, batch_size=64)
        assert len(engine.prompts) == 97  # of 1,024 bytes each
        assert len({answer["probability"] for answer in answers}) >= 15
    with Engine(backbone) as alone:
        for name, answer in list(zip(names, answers, strict=True))[::60]:
            alone.load(tmp_path / name)
            assert answer["probabilities"] == pytest.approx(
                alone.classify(name, TEXTS[:1])[0]["probabilities"], abs=1e-5
            )


def test_a_conversation_keeps_its_prompt(backbone: Backbone, tmp_path: Path) -> None:
    fill(tmp_path, backbone, 2)
    writes = make(backbone, task=GenerationConfig(max_new_tokens=4), overlong="cut", max_length=None)
    writes.save(tmp_path / "writes")
    with Engine(backbone, prompts=tmp_path, prompt_memory="0") as engine:
        chat = Chat(engine, "writes", GenerationOptions(max_new_tokens=4))
        first = chat.say({"text": "soup"})
        engine.classify("p1", TEXTS)
        assert list(engine.prompts) == ["writes"]
        assert chat.say({"text": "soup"})
        assert engine.generate("writes", "soup", GenerationOptions(max_new_tokens=4)) == first


def test_a_conversation_has_the_model_to_itself_while_it_writes(backbone: Backbone, tmp_path: Path) -> None:
    make(backbone, task=GenerationConfig(max_new_tokens=4), overlong="cut", max_length=None).save(tmp_path / "writes")
    with Engine(backbone, prompts=tmp_path) as engine, ThreadPoolExecutor(1) as pool:
        chat = Chat(engine, "writes", GenerationOptions(max_new_tokens=4))
        tokens, free = backbone.attach(), []
        tokens.detach()

        def ask_another_thread(*_: object) -> None:
            if pool.submit(tokens.lock.acquire, blocking=False).result():
                free.append(True)
                pool.submit(tokens.lock.release).result()

        backbone.model.register_forward_pre_hook(ask_another_thread)
        assert chat.say({"text": "soup"})
        assert free == []


def test_threads_that_share_an_engine_are_not_crossed(backbone: Backbone, tmp_path: Path) -> None:
    fill(tmp_path, backbone, 3)
    make(backbone, task=GenerationConfig(max_new_tokens=6), overlong="cut", max_length=None).save(tmp_path / "writes")
    with Engine(backbone, prompts=tmp_path, prompt_memory="0") as engine:
        expected = [engine.classify(f"p{number}", TEXTS) for number in range(3)]
        text = engine.generate("writes", "soup").text
        wrong: list[object] = []

        def ask(number: int) -> None:
            for _ in range(15):
                wrong.extend([] if engine.classify(f"p{number}", TEXTS) == expected[number] else [number])
                wrong.extend([] if engine.generate("writes", "soup").text == text else ["writes"])

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


def test_a_folder_that_is_not_there_and_a_size_that_is_none(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(SoftPromptError, match="there is no folder .* name one that holds soft prompts"):
        Engine(backbone, prompts=tmp_path / "nowhere")
    with pytest.raises(ValueError, match='a size is written as in "500MB"'):
        Engine(backbone, prompt_memory="much")


def test_what_is_held_stays_though_it_be_too_much() -> None:
    memory = PromptMemory(10)
    for name in ("a", "b", "c"):
        memory.add(name, 6)
    memory.hold("a")
    assert memory.leaving() == ["b", "c"]
    memory.hold("b")
    assert memory.leaving() == ["c"]
    memory.let_go("a")
    memory.remove("c")
    assert memory.leaving() == ["a"]
    assert memory.bytes == 12
