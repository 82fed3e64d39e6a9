"""A conversation is one row in which every answer is learnt, and generation reads what training read."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model, tiny_tokenizer
from tokenizers import processors
from transformers import PreTrainedTokenizerBase

from ptune.config.run import RunConfig
from ptune.errors import ConfigError, DataError, TemplateError
from ptune.families import ENCODER_DECODER
from ptune.models.backbone import Backbone
from ptune.records.conversations import Exchange
from ptune.records.data import load_records
from ptune.records.record import Record
from ptune.rendering.batch import IGNORED
from ptune.rendering.chat_template import in_chat
from ptune.rendering.preview import preview
from ptune.rendering.renderer import Renderer
from ptune.template import Template
from ptune.training.assembly import assemble

V = 352
PLAIN = "[P*3]Human: {instruction}[?\n{input}]\n\nAssistant: {answer}"
MESSAGE = "[P*3]{instruction}[?\n{input}]{answer}"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{% for message in messages %}{% if message.role == 'user' %}<s>[INST] {{ message.content }} [/INST]"
    "{% else %} {{ message.content }} </s>{% endif %}{% endfor %}"
)
TURNS = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant: "


def gpt2_like(chat: str | None = None) -> PreTrainedTokenizerBase:
    """Return a tokenizer that adds nothing of its own."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = chat
    return tokenizer


def llama_like(chat: str | None = None) -> PreTrainedTokenizerBase:
    """Return a tokenizer that begins every text with <s>."""
    tokenizer = gpt2_like(chat)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def renderer_of(tokenizer: PreTrainedTokenizerBase, system: str | None = None, **settings: Any) -> Renderer:
    template = in_chat(Template.parse(MESSAGE), tokenizer, system) if tokenizer.chat_template else Template.parse(PLAIN)
    return Renderer(template, tokenizer, V, **settings)


RENDERERS = {
    f"{make.__name__} {name}": renderer_of(make(chat))
    for make in (gpt2_like, llama_like)
    for name, chat in (("plain", None), ("ChatML", CHATML), ("INST", INST), ("words", TURNS))
}
TEXTS = st.text("abc good film 苹果?\n{[", min_size=1, max_size=20)
CONVERSATIONS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5)


def record_of(exchanges: list[tuple[str, str]], **fields: str) -> Record:
    """Return a conversation up to its last question."""
    record = Record({"instruction": exchanges[-1][0], "input": "", **fields})
    record.history = tuple(Exchange({"instruction": question}, answer) for question, answer in exchanges[:-1])
    return record


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("name", RENDERERS)
@settings(max_examples=40, deadline=None)
@given(exchanges=CONVERSATIONS)
def test_every_context_of_a_row_is_the_one_at_generation(name: str, exchanges: list[tuple[str, str]]) -> None:
    renderer = RENDERERS[name]
    row = renderer.row(record_of(exchanges), exchanges[-1][1])
    assert row is not None
    supervised = []
    for last in range(1, len(exchanges) + 1):
        context = renderer.context(record_of(exchanges[:last]))
        assert list(row.ids[: len(context)]) == context
        assert row.labels[len(context) - 1] == IGNORED
        answer = renderer.answer_ids(exchanges[last - 1][1], end=False)
        end = plain_ids(renderer.tokenizer, renderer.further.end)
        supervised.append([*answer, *end])
    if supervised[-1][-1] != renderer.tokenizer.eos_token_id:
        supervised[-1].append(renderer.tokenizer.eos_token_id)
    pairs = itertools.groupby(zip(row.ids, row.labels, strict=True), key=lambda pair: pair[1] != IGNORED)
    runs = [[token for token, _ in run] for learnt, run in pairs if learnt]
    assert runs == supervised
    assert [token for token in row.ids if token in renderer.virtual_ids] == list(renderer.virtual_ids)
    assert all(label in (IGNORED, token) for token, label in zip(row.ids, row.labels, strict=True))


@pytest.mark.parametrize("name", RENDERERS)
def test_virtual_tokens_and_the_first_token_stand_once(name: str) -> None:
    renderer = dataclasses.replace(RENDERERS[name], first_virtual_id=1000)
    ids = renderer.context(record_of([("one", "two"), ("three", "four"), ("five", "")]))
    assert [token for token in ids if token >= 1000] == [1000, 1001, 1002]
    assert ids[:3] == [1000, 1001, 1002]
    if "INST" not in name:  # whose own words begin every question with one
        assert ids.count(1) == ("llama" in name)


@pytest.mark.parametrize("make", [gpt2_like, llama_like])
@pytest.mark.parametrize("system", [None, "Be {mood}."])
def test_a_conversation_in_a_chat_template_is_the_tokenizers_own(make: Any, system: str | None) -> None:
    tokenizer = make(CHATML)
    renderer = dataclasses.replace(renderer_of(tokenizer, system), first_virtual_id=1000)
    said = [("Name a fruit.", "An apple."), ("Another?", "A plum."), ("And {one} [more]?", "No.")]
    row = renderer.row(record_of(said, mood="kind"), "No.")
    assert row is not None
    messages = [] if system is None else [{"role": "system", "content": "Be kind."}]
    for question, answer in said:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n")
    assert list(row.ids) == [1000, 1001, 1002, *renderer.opening, *plain_ids(tokenizer, whole), tokenizer.eos_token_id]
    assert tokenizer.decode([label for label in row.labels if label != IGNORED]) == (
        "An apple.<|im_end|>A plum.<|im_end|>No.<|im_end|></s>"
    )


def test_a_form_without_a_chat_template_is_repeated_behind_the_end_token() -> None:
    renderer = dataclasses.replace(RENDERERS["gpt2_like plain"], first_virtual_id=1000)
    row = renderer.row(record_of([("q", "a"), ("r", "b")], input="more"), "b")
    assert row is not None
    shown = preview(renderer, row)
    assert [(segment.kind, segment.text) for segment in shown] == [
        ("virtual", "[P0][P1][P2]"),
        ("text", "Human: q\nmore\n\nAssistant: "),
        ("answer", "a</s>"),
        ("text", "\n\nHuman: r\nmore\n\nAssistant: "),
        ("answer", "b</s>"),
    ]


def test_a_system_message_stands_once_and_is_never_left_out() -> None:
    template = Template.parse("[P*2]Rules: {system}\n\nQ: {text}\nA:{answer}")
    renderer = Renderer(template, gpt2_like(), V, first_virtual_id=1000, max_length=60)
    said = [(f"question {number}", f" answer {number}") for number in range(6)]
    record = Record({"text": said[-1][0], "system": "be brief"})
    record.history = tuple(Exchange({"text": question}, answer) for question, answer in said[:-1])
    row = renderer.row(record, said[-1][1])
    assert row is not None
    text = renderer.tokenizer.decode([token for token in row.ids if token < 1000])
    assert text.startswith("Rules: be brief\n\nQ: question ")
    assert text.count("Rules") == 1
    assert "</s>\n\nQ: question 5" in text
    assert 0 < row.left_out < 5
    kept = [n for n in range(6) if f"question {n}" in text]
    assert kept == list(range(row.left_out, 6))


@pytest.mark.parametrize("name", RENDERERS)
@settings(max_examples=40, deadline=None)
@given(exchanges=CONVERSATIONS, max_length=st.integers(70, 160))
def test_what_is_too_long_loses_its_oldest_exchanges(
    name: str, exchanges: list[tuple[str, str]], max_length: int
) -> None:
    whole = RENDERERS[name]
    renderer = renderer_of(whole.tokenizer, max_length=max_length)
    record, answer = record_of(exchanges), exchanges[-1][1]
    row = renderer.row(record, answer)
    assert row is not None
    assert len(row.ids) - 3 <= max_length
    alone = whole.row(record_of(exchanges[row.left_out :]), answer)
    assert alone is not None
    if not row.cut:
        assert row.ids == alone.ids
    if row.left_out:  # with one exchange more it would not have fitted
        more = whole.row(record_of(exchanges[row.left_out - 1 :]), answer)
        assert more is not None
        assert len(more.ids) - 3 > max_length
    answered = list(itertools.takewhile(lambda label: label != IGNORED, reversed(row.labels)))
    assert list(row.ids) == renderer.context(record, reserve=len(answered)) + answered[::-1]


def test_the_rules_of_a_record_hold_for_a_single_exchange_that_is_too_long() -> None:
    renderer = renderer_of(gpt2_like(), max_length=40, overlong="error")
    with pytest.raises(DataError, match="its answer has .* tokens, and of max_length 40 only"):
        renderer.row(record_of([("q", "a"), ("r", "b " * 60)]), "b " * 60)
    cut = renderer_of(gpt2_like(), max_length=40, overlong="cut").row(record_of([("q", "a"), ("r", "")]), "b " * 60)
    assert cut is not None
    assert (cut.left_out, len(cut.ids) - 3) == (1, 40)
    assert (
        renderer_of(gpt2_like(), max_length=40, overlong="drop").row(record_of([("q", "a"), ("r", "")]), "b" * 99)
        is None
    )


def test_what_does_not_go_together_is_said() -> None:
    with pytest.raises(DataError, match="is a conversation of 2 questions, and an encoder-decoder.* single ones; keep"):
        Renderer(Template.parse(PLAIN), gpt2_like(), V, kind=ENCODER_DECODER).context(
            record_of([("q", "a"), ("r", "")])
        )
    with pytest.raises(ConfigError, match=r"and the template has a \[next\], too; leave one of the two out"):
        in_chat(Template.parse("[P]{text}{answer}[next]{text}{answer}"), gpt2_like(CHATML))
    for source in (
        "{text}{answer}[next]",
        "{text}{answer}[next][P]{text}{answer}",
        "{text}{answer}[next]{text}",
        "{text}{answer}.[next]{text}{answer}",
        "{text}{answer}[next]{answer}",
    ):
        with pytest.raises(TemplateError, match=r"\[next\] stands right behind {answer}"):
            Template.parse(source)
    with pytest.raises(TemplateError, match=r"the field more, which the first exchange does not have; name it there"):
        Template.parse("{text}{answer}[next]{more}{answer}")


def test_a_chat_template_for_one_question_alone_is_repeated() -> None:
    template = in_chat(Template.parse(MESSAGE), gpt2_like("<{{ messages[-1].content }}>"))
    assert template.source == "[P*3]<{instruction}[?\n{input}]>{answer}"
    assert Renderer(template, gpt2_like(), V).further.end == "</s>"


def run(tmp_path: Path, template: str, rows: list[dict[str, Any]], **prompt: Any) -> RunConfig:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return RunConfig.model_validate(
        {
            "data": {"train": str(path), "dev": str(path)},
            "task": {"type": "generation", "max_new_tokens": 6},
            "prompt": {"template": template, **prompt},
            "output": str(tmp_path / "prompt"),
        }
    )


def test_a_run_reports_what_is_left_out_and_system_messages_that_nobody_shows(tmp_path: Path) -> None:
    turns = [{"from": "system", "value": "Be kind."}]
    for number in range(8):
        turns += [{"from": "human", "value": f"question {number}"}, {"from": "gpt", "value": "answer"}]
    backbone = Backbone(tiny_model("gpt2"), gpt2_like(), "tiny")
    config = run(tmp_path, PLAIN, [{"conversations": turns}, {"conversations": turns[:3]}], max_length=90)
    parts = assemble(config, backbone)
    left_out = parts.train[0].rows[0].left_out
    assert left_out > 0
    assert parts.notes[0].startswith(f"{left_out} exchanges of 1 conversations, the oldest of each, are too long")
    assert parts.notes[1].startswith("2 records have a system message that the template does not show; name {system}")
    parts.prompted.close()
    shown = assemble(
        run(tmp_path, "{system}\n" + PLAIN.replace("[P*3]", "[P]"), [{"conversations": turns[:3]}]), backbone
    )
    assert shown.notes == []
    shown.prompted.close()


def test_a_conversation_that_ends_with_a_question_is_answered_and_not_learnt(tmp_path: Path) -> None:
    turns = [{"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("user", "r"))]
    backbone = Backbone(tiny_model("gpt2"), gpt2_like(), "tiny")
    config = run(tmp_path, PLAIN, [{"messages": turns}])
    with pytest.raises(DataError, match="line 1 is a conversation that ends with a question, .* write its answer, or"):
        assemble(config, backbone)
    (record,) = load_records(config.data.train or "")
    assert Renderer(Template.parse(PLAIN), gpt2_like(), V).context(record) == RENDERERS["gpt2_like plain"].context(
        record_of([("q", "a"), ("r", "")])
    )


def loaded(tmp_path: Path, *weights: Any) -> Record:
    """Return the record of as many exchanges as weights, with each answer's weight; None for none."""
    turns: list[dict[str, Any]] = [{"role": "system", "content": "Be kind."}]
    for number, weight in enumerate(weights):
        turns += [{"role": "user", "content": f"question {number}", "weight": None}]
        turns += [{"role": "assistant", "content": f"answer {number}"} | ({} if weight is None else {"weight": weight})]
    (tmp_path / "rows.jsonl").write_text("\n" + json.dumps({"messages": turns}) + "\n")
    (record,) = load_records(str(tmp_path / "rows.jsonl"))
    return record


@pytest.mark.parametrize("name", RENDERERS)
def test_an_answer_of_weight_0_is_context_and_not_learnt(name: str, tmp_path: Path) -> None:
    renderer = RENDERERS[name]
    whole, record = loaded(tmp_path, None, 1, None), loaded(tmp_path, 0, 1, 0.0)
    assert record["output"] == "answer 1"  # what follows the last that is learnt would change nothing
    row, unweighted = renderer.row(record, record["output"]), renderer.row(whole, whole["output"])
    assert row is not None
    assert unweighted is not None
    begin = renderer.context(record)
    assert list(row.ids[: len(begin)]) == begin == list(unweighted.ids[: len(begin)])
    assert set(row.labels[: len(begin)]) == {IGNORED}
    assert row.labels[len(begin) :] == row.ids[len(begin) :]
    learnt_twice = renderer.row(loaded(tmp_path, 1, 0, 1), "answer 2")
    assert learnt_twice is not None
    assert learnt_twice.ids == unweighted.ids
    spoken = plain_ids(renderer.tokenizer, "answer 1")
    labels = [label for label in unweighted.labels if label != IGNORED]
    kept = [label for label in learnt_twice.labels if label != IGNORED]
    assert len(labels) - len(kept) == len(spoken) + len(plain_ids(renderer.tokenizer, renderer.further.end))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((0.5,), r"rows.jsonl, line 2: messages, turn 3: expected a weight of 0 or 1 and found 0.5; write one of them"),
        ((1, True), r"turn 5: expected a weight of 0 or 1 and found True"),
        (("1",), r"turn 3: expected a weight of 0 or 1 and found '1'"),
        (
            (0, 0),
            r"line 2: messages has nothing to learn: expected an assistant's turn of weight 1 and found 0 at each",
        ),
    ],
)
def test_weights_that_say_nothing_are_refused(weights: tuple[Any, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        loaded(tmp_path, *weights)


def test_a_user_s_turn_is_never_learnt_whatever_its_weight(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "q", "weight": 1}, {"from": "gpt", "value": "a"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"conversations": turns}))
    with pytest.raises(
        DataError, match=r"turn 1: expected a weight of 1 at an assistant's turn and found it at one of h"
    ):
        load_records(str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (
            [("user", "q"), ("user", "r"), ("assistant", "a")],
            "turn 2: .* found user; join the two, or remove",
        ),
        ([("user", "q")], "has no answer: .* complete the record or remove it"),
        ([("user", "q"), ("tool", "a")], "turn 2: expected one of the roles .* found 'tool'; rename it"),
    ],
)
def test_broken_conversations_are_one_sentence_in_a_terminal(
    tmp_path: Path, turns: list[tuple[str, str]], message: str
) -> None:
    config = run(tmp_path, PLAIN, [{"messages": [{"role": role, "content": text} for role, text in turns]}])
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    done = subprocess.run(
        [sys.executable, "-m", "ptune", "train", str(tmp_path / "run.yaml")], capture_output=True, text=True
    )
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert re.search(rf"rows.jsonl, line 1: messages,? {message}", line)


ALPACA: dict[str, Any] = {
    "instruction": "还有呢？",
    "input": "",
    "output": "苹果。",
    "history": [["买什么？", "米。"], ["多少？", "两斤。"]],
}


@pytest.mark.parametrize(
    ("columns", "fields", "template"),
    [
        (ALPACA, {}, PLAIN),
        (
            ALPACA,
            {"question": "instruction", "more": "input"},
            PLAIN.replace("{instruction}", "{question}").replace("{input}", "{more}"),
        ),
        (
            {"prompt": "还有呢？", "response": "苹果。", "history": ALPACA["history"]},
            {"instruction": "prompt", "output": "response"},
            PLAIN,
        ),
    ],
)
def test_the_history_of_an_alpaca_record_is_learnt_as_turns_are(
    columns: dict[str, Any], fields: dict[str, str], template: str, tmp_path: Path
) -> None:
    said = [text for pair in ALPACA["history"] for text in pair] + [ALPACA["instruction"], ALPACA["output"]]
    turns = [{"from": "gpt" if number % 2 else "human", "value": text} for number, text in enumerate(said)]
    rows = []
    for record, mapping, words in ((columns, fields, template), ({"conversations": turns}, {}, PLAIN)):
        (tmp_path / "rows.jsonl").write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
        (loaded,) = load_records(tmp_path / "rows.jsonl", fields=mapping)
        rows.append(Renderer(Template.parse(words), gpt2_like(), V).row(loaded, loaded["output"]))
    assert rows[0] == rows[1]
    assert rows[0] is not None
    learnt = gpt2_like().decode([label for label in rows[0].labels if label != IGNORED])
    assert all(answer in learnt for answer in said[1::2])


def test_earlier_questions_of_alpaca_have_no_input(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([ALPACA | {"input": "kilo"}, ALPACA | {"history": []}]))
    first, second = load_records(tmp_path / "rows.json")
    row = Renderer(Template.parse(PLAIN), gpt2_like(), V).row(first, "")
    assert row is not None
    assert gpt2_like().decode([number for number in row.ids if number < V]).count("kilo") == 1
    assert second.history == ()


@pytest.mark.parametrize(
    ("history", "found"),
    [([["a"]], "1 of them"), (["a", "b"], "str"), ([["a", "b"], ["c", None]], "str and NoneType")],
)
def test_a_history_of_something_else_is_refused_with_its_place(history: list[Any], found: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ALPACA | {"history": history}) + "\n")
    with pytest.raises(
        DataError, match=f"rows.jsonl, line 1: history, item {len(history) if found != 'str' else 1}: "
    ) as caught:
        load_records(tmp_path / "rows.jsonl")
    assert f"expected a question and its answer, two texts, and found {found}; correct it" in str(caught.value)
