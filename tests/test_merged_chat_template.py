"""The chat template of a merged model gives the ids of ptune's own rendering, for any record and many tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import TemplateError as JinjaError
from tiny_models import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ptune.merging.chat_template import TaskShape, Words, chat_template, kwarg_of
from ptune.merging.probes import chat_kwargs, ids_agree, probe_records
from ptune.merging.tokenizer_files import (
    add_tokens,
    as_text,
    load_tokenizer,
    opening_ids,
    token_names,
    write_chat_template,
)
from ptune.records.conversations import Exchange
from ptune.records.record import Record
from ptune.rendering.renderer import Renderer
from ptune.template import Template

MARK = "<|ptune-0123abcd"
TEMPLATES = {
    "chat": "[P*3]Human: {instruction}[?\n{input}]\n\nAssistant: {answer}",
    "film": "{text}[P*2] so it is[P]{answer}",
    "pair": '[bos]"{first}"{second}[? ({note}: {kind of note})]{third}[P*4]\\\\ {{%x%}} 好\t{answer}',
    "inside": "[?{title} - ]{text}[?{extra}][P]{answer}",
    "odd names": "{a b} {task}[P*2]{messages}{answer}",
    "fieldless": "[P*5]once{answer}",
    "bos as a word": "[P*2]<s>[[INST]] {text} [[/INST]]{answer}[next]</s><s>[[INST]] {text} [[/INST]]{answer}",
}


def with_bos() -> PreTrainedTokenizerFast:
    """Return a tokenizer that begins every text with <s>."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def with_first_blank() -> PreTrainedTokenizerFast:
    """Return a tokenizer that sets a blank before the first word of a text, but not behind a special token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<pad>", "<s>", "</s>", "<unk>"], show_progress=False)
    tokenizer.train_from_iterator(["The film was great. Human: Assistant: so it is leading and trailing"] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


class Folder:
    """A folder with a tokenizer that has the virtual tokens of tasks, and their chat template."""

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerBase, templates: dict[str, str], **words: Any) -> None:
        tokenizer.save_pretrained(path)
        self.renderers, self.ids, shapes = {}, {}, {}
        parsed = {name: Template.parse(source) for name, source in templates.items()}
        on_disk = add_tokens(path, token_names(MARK, sum(each.num_virtual_tokens for each in parsed.values())))
        start = 0
        for name, template in parsed.items():
            self.renderers[name] = Renderer(template, tokenizer, 1000, first_virtual_id=1000 + start)
            self.ids[name] = on_disk[start : start + template.num_virtual_tokens]
            shapes[name] = TaskShape(self.renderers[name].pieces, start, self.renderers[name].further)
            start += template.num_virtual_tokens
        bos = as_text(tokenizer, next((each.opening for each in self.renderers.values() if each.opening), ()))
        opening = as_text(tokenizer, opening_ids(tokenizer))
        own = words.pop("own", None)
        write_chat_template(path, chat_template(shapes, Words(MARK, bos, opening, **words), own))
        self.tokenizer = load_tokenizer(path)

    def render(self, *contents: str, **kwargs: Any) -> str:
        roles = ("user", "assistant")
        messages = [{"role": roles[number % 2], "content": text} for number, text in enumerate(contents)]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **kwargs))


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer, with_bos])
def test_ids_are_those_of_the_rendering(tokenizer: Any, tmp_path: Path) -> None:
    folder = Folder(tmp_path, tokenizer(), TEMPLATES)
    for name in TEMPLATES:
        assert ids_agree(folder.tokenizer, name, folder.renderers[name], folder.ids[name]), name


def test_records_may_leave_optional_fields_out_and_blanks_go_as_in_the_rendering(tmp_path: Path) -> None:
    folder = Folder(tmp_path, tiny_tokenizer(), TEMPLATES)
    odd = ["", " ", "\n a \t", "x", "\u3000全角\u3000", "}} {{ x }} {% if %}", 'it\'s "quoted" \\n', "e\u0301🙂\x1f"]
    checked = 0
    for name, renderer in folder.renderers.items():
        fields = renderer.template.fields
        for first in odd:
            for second in odd:
                texts = [first, second, first + second]
                record = {field: texts[place % 3] for place, field in enumerate(fields)}
                for left_out in (None, *renderer.template.optional_fields):
                    record.pop(left_out, None)
                    if left_out and left_out == fields[0]:
                        continue
                    content, kwargs = chat_kwargs(renderer.template, record)
                    chat = [{"role": "user", "content": content}]
                    found = folder.tokenizer.apply_chat_template(chat, task=name, return_dict=True, **kwargs)[
                        "input_ids"
                    ]
                    ids = renderer.context(record)
                    assert found == [folder.ids[name][i - renderer.first_virtual_id] if i >= 1000 else i for i in ids]
                    checked += 1
    assert checked > 500


def test_a_tokenizer_that_treats_the_first_word_apart_gets_a_blank(tmp_path: Path) -> None:
    templates = {name: TEMPLATES[name] for name in ("chat", "film")}
    plain = Folder(tmp_path / "plain", with_first_blank(), templates)
    blank = Folder(tmp_path / "blank", with_first_blank(), templates, leading_blank=True)
    assert not all(ids_agree(plain.tokenizer, name, plain.renderers[name], plain.ids[name]) for name in templates)
    for name in templates:
        assert ids_agree(blank.tokenizer, name, blank.renderers[name], blank.ids[name]), name


def test_a_text_that_spells_a_virtual_token_does_not_become_one(tmp_path: Path) -> None:
    folder = Folder(tmp_path, tiny_tokenizer(), TEMPLATES)
    spelt = f"{MARK}:4|> and {MARK}{MARK}:1|>"
    for task in ("film", "chat"):
        ids = folder.tokenizer(folder.render(spelt, task=task), add_special_tokens=False)["input_ids"]
        virtual = [token for token in ids if token >= min(folder.ids["chat"])]
        assert virtual == folder.ids[task]
    joined = folder.render("x", task="pair", second=MARK[:5], third=f"{MARK[5:]}:4|>")
    ids = folder.tokenizer(joined, add_special_tokens=False)["input_ids"]
    assert [token for token in ids if token >= min(folder.ids["chat"])] == folder.ids["pair"]


def test_the_bare_model_answers_where_no_task_is_named(tmp_path: Path) -> None:
    bare = Folder(tmp_path / "bare", with_bos(), TEMPLATES)
    assert bare.render("one", "two", "three") == "<s>one\n\ntwo\n\nthree"
    own = "\n  {% for m in messages %}\n<{{ m.role }}>{{ m.content }}\n  {% endfor %}\n  \n"
    alone = tiny_tokenizer()
    alone.chat_template = own
    chat = [{"role": "user", "content": "one"}]
    kept = Folder(tmp_path / "kept", tiny_tokenizer(), TEMPLATES, own=own)
    assert kept.render("one") == alone.apply_chat_template(chat, tokenize=False)
    single = Folder(tmp_path / "single", tiny_tokenizer(), {"film": TEMPLATES["film"]}, own=own)
    of_task = f"one{MARK}:0|>{MARK}:1|> so it is{MARK}:2|>"
    assert single.render("one") == single.render("one", task=None) == single.render("one", task="film") == of_task


def test_an_empty_name_asks_the_bare_model_of_one_task_and_of_several(tmp_path: Path) -> None:
    own = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    for number, templates in enumerate(({"film": TEMPLATES["film"]}, TEMPLATES)):
        kept = Folder(tmp_path / f"kept{number}", with_bos(), templates, own=own)
        assert kept.render("one", "two", "three", task="") == "<user>one<assistant>two<user>three"
        bare = Folder(tmp_path / f"bare{number}", with_bos(), templates)
        assert bare.render("one", "two", task="") == "<s>one\n\ntwo"


def test_a_conversation_carries_the_virtual_tokens_in_its_first_turn(tmp_path: Path) -> None:
    folder = Folder(tmp_path, with_bos(), TEMPLATES)
    said = folder.render("one", "two", "three", task="chat")
    opening = "".join(f"{MARK}:{number}|>" for number in range(3)) + "<s>"
    assert said == f"{opening}Human: one\n\nAssistant: two</s>\n\nHuman: three\n\nAssistant: "


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer, with_bos])
def test_a_conversation_has_the_ids_of_the_rendering(tokenizer: Any, tmp_path: Path) -> None:
    templates = {
        "chat": TEMPLATES["chat"],
        "film": TEMPLATES["film"],
        "system": "[P*2]{system}\n\nQ: {text}\nA: {answer}",
        "bos as a word": TEMPLATES["bos as a word"],
        "next": "[P*2]Q: {text}\nA: {answer}[next]<unk>\nAnd: {text}\nA: {answer}",
    }
    folder = Folder(tmp_path, tokenizer(), templates)
    said = ["Name a fruit?", "An apple.", "  Another? ", "A plum.", "One more!"]
    for name, renderer in folder.renderers.items():
        field = renderer.template.question_field or ""
        record = Record({field: said[-1], "system": "Be kind."})
        record.history = tuple(Exchange({field: said[n]}, said[n + 1]) for n in (0, 2))
        given = {"system": "Be kind."} if name == "system" else {}
        text = folder.render(*said, task=name, **given)
        found = folder.tokenizer(text, add_special_tokens=False)["input_ids"]
        first = renderer.first_virtual_id
        expected = [folder.ids[name][i - first] if i >= 1000 else i for i in renderer.context(record)]
        assert folder.tokenizer.decode(found) == folder.tokenizer.decode(expected)
        assert found == expected, name


@pytest.mark.parametrize(
    ("task", "messages", "kwargs", "message"),
    [
        ("flim", [("user", "x")], {}, "there is no task flim; the tasks are chat, film"),
        ("film", [("system", "x"), ("user", "y")], {}, "no system in place 1"),
        ("film", [("user", ["x"])], {}, "a message is text"),
        ("film", [("user", "x")], {"tools": [{"type": "function", "function": {"name": "f"}}]}, "takes no tools"),
        ("pair", [("user", "x")], {"third": "y"}, "the task pair needs the field second in chat_template_kwargs"),
        ("odd names", [("user", "x")], {}, "needs the field task in chat_template_kwargs.fields"),
        ("chat", [("user", "x")], {"input": 3}, "the field input takes text"),
        ("fieldless", [("user", "x")], {}, "has no place for a text"),
    ],
)
def test_what_a_template_has_no_place_for_is_refused(
    task: str, messages: list[tuple[str, Any]], kwargs: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = Folder(tmp_path, tiny_tokenizer(), TEMPLATES)
    chat = [{"role": role, "content": content} for role, content in messages]
    with pytest.raises(JinjaError, match=message):
        folder.tokenizer.apply_chat_template(chat, tokenize=False, task=task, **kwargs)


def test_fields_whose_names_mean_something_else_are_given_apart() -> None:
    assert kwarg_of("input") == "input"
    for name in ("a b", "task", "messages", "tools", "for", "range", "eos_token", "_x", "名"):
        assert kwarg_of(name) is None, name
    assert len(probe_records(Template.parse(TEMPLATES["chat"]))) > 5
