"""A template in the tokenizer's chat template: the ids of `apply_chat_template`, and a soft prompt of plain words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import tiny_model, tiny_tokenizer
from tokenizers import processors
from transformers import PreTrainedTokenizerBase

from ptune.config.run import RunConfig
from ptune.engine.engine import Engine
from ptune.errors import ConfigError
from ptune.models.backbone import Backbone
from ptune.records.conversations import Exchange
from ptune.records.record import Record
from ptune.rendering.chat_template import in_chat
from ptune.rendering.renderer import Renderer
from ptune.soft_prompts.soft_prompt import SoftPrompt
from ptune.template import Template
from ptune.training.train import train

CHAT = (
    "{% for message in messages %}<[{{ message.role }}]>\n{{ message.content | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<[assistant]>\n{% endif %}"
)
V = 352


def chatting_tokenizer(chat: str = CHAT) -> PreTrainedTokenizerBase:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat
    return tokenizer


@pytest.mark.parametrize("system", [None, "You are terse about {topic}."])
def test_ids_are_those_of_the_chat_template(system: str | None) -> None:
    tokenizer = chatting_tokenizer()
    template = in_chat(Template.parse("[P*2]{instruction}[?\n{input}]{answer}"), tokenizer, system)
    record = {"instruction": "Name {three} [fruits].", "input": "ripe ones", "topic": "food"}
    ids = Renderer(template, tokenizer, vocabulary_size=V).context(record)
    messages = [{"role": "user", "content": "Name {three} [fruits].\nripe ones"}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": "You are terse about food."})
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert ids[:2] == [V, V + 1]
    assert ids[2:] == tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert template.num_virtual_tokens == 2


def test_virtual_tokens_within_the_message_stay_there() -> None:
    template = in_chat(Template.parse("[P*2]Say: {text}[P*3]{answer}"), chatting_tokenizer())
    assert template.source == (
        "[P*2]<[[user]]>\nSay: {text}[P*3]</s>\n<[[assistant]]>\n{answer}"
        "[next]</s>\n<[[user]]>\nSay: {text}</s>\n<[[assistant]]>\n{answer}"
    )


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{% for message in messages %}{% if message.role == 'user' %}{{ bos_token }}[INST] {{ message.content }} [/INST]"
    "{% else %}{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% else %}{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize(
    ("chat", "bos"),
    [("{{ bos_token }}" + CHATML, "<s>"), (CHATML, "<|im_start|>"), (LLAMA, "<s>"), (MISTRAL, "<s>")],
    ids=["ChatML", "ChatML that begins with bos", "Llama 2", "Mistral"],
)
def test_a_beginning_token_stands_there_once(chat: str, bos: str, adds_bos: bool) -> None:
    tokenizer = chatting_tokenizer(chat)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "bos_token": bos})
    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    template = in_chat(Template.parse("[P*2]{instruction}{answer}"), tokenizer)
    renderer = Renderer(template, tokenizer, vocabulary_size=V)
    record = Record({"instruction": "Name one."})
    for turns in range(3):
        record.history = (Exchange({"instruction": "Say a."}, "a"),) * turns
        said = [{"role": "user", "content": "Say a."}, {"role": "assistant", "content": "a"}] * turns
        messages = [*said, {"role": "user", "content": "Name one."}]
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert renderer.context(record) == [V, V + 1, *expected]
    assert expected[0] == tokenizer.bos_token_id


@pytest.mark.parametrize(
    ("chat", "system", "message"),
    [
        (None, None, "asks for the tokenizer's chat template, and this tokenizer has none"),
        ("{{ messages[0].content }}{{ messages[0].content }}", None, "shows a message 2 times instead of once"),
        ("{{ messages[-1].content | upper }}", None, "shows a message 0 times"),
        ("{{ raise_exception('only users speak here') }}", "Be kind.", "does not take system and user: .*only users"),
    ],
)
def test_what_cannot_be_had_is_said(chat: str | None, system: str | None, message: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat
    with pytest.raises(ConfigError, match=message):
        in_chat(Template.parse("[P]{text}{answer}"), tokenizer, system)
    with pytest.raises(ConfigError, match="the answer ends the template"):
        in_chat(Template.parse("[P]{text}{answer}."), chatting_tokenizer())


def test_a_run_in_a_chat_template_saves_what_it_read(tmp_path: Path) -> None:
    tiny_model("qwen2").save_pretrained(tmp_path / "model")
    chatting_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"instruction": f"Say {n}", "output": str(n)} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = RunConfig.model_validate(
        {
            "model": str(tmp_path / "model"),
            "data": str(tmp_path / "rows.jsonl"),
            "task": {"type": "generation", "max_new_tokens": 4},
            "prompt": {"template": "[P*3]{instruction}{answer}", "chat": True},
            "training": {"max_steps": 2, "evaluations": 1, "samples": 0},
            "output": str(tmp_path / "prompt"),
        }
    )
    train(config)
    assert SoftPrompt.load(tmp_path / "prompt").template.startswith("[P*3]<[[user]]>\n{instruction}</s>")
    with Engine.for_prompt(tmp_path / "prompt") as engine:
        backbone: Backbone = engine.backbone
        context = engine.prompts["prompt"].task.renderer.context({"instruction": "Say 3"})
        words = backbone.tokenizer.apply_chat_template(
            [{"role": "user", "content": "Say 3"}], add_generation_prompt=True, tokenize=False
        )
        assert context[3:] == backbone.tokenizer(words, add_special_tokens=False)["input_ids"]
        assert engine.generate("prompt", "Say 3").ids
