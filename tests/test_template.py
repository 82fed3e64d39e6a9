"""The grammar: what parses, what it means, and the sentence for what does not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptune.config.task import GenerationConfig, TaggingConfig, check_task_template
from ptune.errors import TemplateError
from ptune.template import Answer, Bos, Field, Optional, Template, Text, Virtual, escape

TUTORIAL = r"[P*10]Human: {instruction}[?\n{input}]\n\nAssistant: {answer}"


def test_the_tutorials_template() -> None:
    template = Template.parse(TUTORIAL)
    assert template.pieces == (
        Virtual(10),
        Text("Human: "),
        Field("instruction"),
        Optional((Text("\n"), Field("input"))),
        Text("\n\nAssistant: "),
        Answer(),
    )
    assert template.num_virtual_tokens == 10
    assert template.fields == ("instruction", "input")
    assert template.optional_fields == ("input",)


def test_virtual_tokens_stand_anywhere_and_count_together() -> None:
    template = Template.parse("{text}[P*3] It was[P][bos] {answer}")
    assert template.num_virtual_tokens == 4
    assert Bos() in template.pieces


def test_real_and_written_line_breaks_mean_the_same() -> None:
    assert Template.parse("a\\n\\tb{answer}").pieces == Template.parse("a\n\tb{answer}").pieces


def test_a_field_in_and_out_of_optional_pieces_is_needed() -> None:
    assert Template.parse("{a}[?{a}{b}]{answer}").optional_fields == ("b",)


def test_without_virtual_tokens_the_words_stay() -> None:
    bare = Template.parse(TUTORIAL).without_virtual_tokens()
    assert bare.pieces == Template.parse(TUTORIAL.replace("[P*10]", "")).pieces
    assert bare.num_virtual_tokens == 0


def test_escaped_brackets_are_themselves_when_virtual_tokens_are_taken_out() -> None:
    bare = Template.parse("[P]x[[P]]\\\\n{answer}").without_virtual_tokens()
    assert bare == Template.parse(bare.source)
    assert bare.pieces == (Text("x[P]\\n"), Answer())


@given(st.text(max_size=30))
def test_escaped_text_is_that_text(text: str) -> None:
    pieces = Template.parse(escape(text) + "{answer}").pieces
    assert pieces == ((Text(text), Answer()) if text else (Answer(),))


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (
            "{answer}{answer}",
            "a template has one {answer}, and there are 2 of them in '{answer}{answer}'; put it at the end",
        ),
        ("[bos][bos]{answer}", "[bos] stands once in a template, and twice in '[bos][bos]{answer}'; leave one out"),
        (
            "a[P*3 {answer}",
            "template, character 2: this [ is no part of [P*10], [bos], [next] or [?...{field}]; "
            "write [[ for the bracket itself",
        ),
        ("a]{answer}", "template, character 2: a lone ] closes nothing; write ]] for the bracket itself"),
        ("a} {answer}", "template, character 2: this } is no part of a {field}; write }} for the bracket itself"),
        (
            "[P*0]{answer}",
            "template, character 1: a run of virtual tokens has at least one; write [P*1] or leave it out",
        ),
        ("{}{answer}", "template, character 1: this field has no name; write the record's field between the braces"),
        ("[?x]{answer}", "template, character 1: an optional piece needs a field, whose emptiness makes it disappear"),
        ("[?{a}", "template, character 1: this [? is never closed; put ] where the optional piece ends"),
        ("[?{answer}]", "template, character 3: {answer} cannot stand in an optional piece"),
        (
            "[?{a}[P]]{answer}",
            "template, character 6: [P] cannot stand in an optional piece; only words and fields can",
        ),
    ],
)
def test_what_cannot_be_read_is_shown_with_its_place_and_mend(source: str, sentence: str) -> None:
    with pytest.raises(TemplateError) as caught:
        Template.parse(source)
    assert str(caught.value).split("\n")[0] == sentence


@pytest.mark.parametrize(("source", "columns"), [("ab[p]{answer}", 2), ("人类：[p]{answer}", 6), ("a\n[p]{answer}", 2)])
def test_the_pointer_stands_under_the_place_also_after_wide_characters(source: str, columns: int) -> None:
    with pytest.raises(TemplateError) as caught:
        Template.parse(source)
    assert str(caught.value).split("\n")[2] == f"  {' ' * columns}^"


def test_an_answer_is_missed_by_the_tasks_that_have_one() -> None:
    template = Template.parse("[P*3]{tokens}{b}")
    assert not template.has_answer
    assert not Template.parse("").ends_with_answer
    with pytest.raises(TemplateError) as caught:
        check_task_template(GenerationConfig(), template)
    sentence = "a template has one {answer}, and there is none in '[P*3]{tokens}{b}'; put it at the end"
    assert str(caught.value) == sentence
    check_task_template(TaggingConfig(), template)
    assert template.with_answer_for("tokens").pieces == Template.parse("[P*3]{answer}{b}").pieces
