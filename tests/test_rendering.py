"""Records to ids: the tutorial's own ids, training = generation + answer, virtual tokens in place, limits held."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCABULARY, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from ptune.batch import IGNORED, Row
from ptune.errors import DataError, TemplateError
from ptune.readers import Record
from ptune.rendering import Overlong, Renderer
from ptune.template import Template

TUTORIAL = r"[P*10]Human: {instruction}[?\n{input}]\n\nAssistant: {answer}"
TOKENIZER = tiny_tokenizer()


def renderer(
    template: str = TUTORIAL,
    tokenizer: PreTrainedTokenizerFast = TOKENIZER,
    max_length: int | None = None,
    context_limit: int | None = None,
    overlong: Overlong = "error",
) -> Renderer:
    return Renderer(
        Template.parse(template),
        tokenizer,
        vocabulary_size=VOCABULARY,
        max_length=max_length,
        context_limit=context_limit,
        overlong=overlong,
    )


def beginning_tokenizer(ending: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer that puts bos in front by itself, and eos behind where ``ending``."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>" if ending else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def text_of(ids: Any) -> list[int]:
    return [token for token in ids if token < VOCABULARY]


def tutorials_ids(record: dict[str, str], tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """The rule of the tutorial's data preparation: a question, joined and stripped, then the answer."""
    question = f"Human: {record['instruction']}\n{record['input']}".strip() + "\n\nAssistant: "
    asked = tokenizer(question)["input_ids"]
    answered = tokenizer(record["output"] + tokenizer.eos_token)["input_ids"]
    return asked + answered, [IGNORED] * len(asked) + answered


def test_alpaca_rows_are_the_tutorials_to_the_last_id(real_data: Path) -> None:
    own = renderer()
    compared = 0
    for split in ("train", "dev", "test"):
        for line in (real_data / "alpaca_zh" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            row = own.row(record, record["output"])
            assert row is not None
            ids, labels = tutorials_ids(record, TOKENIZER)
            assert list(row.ids[10:]) == ids
            assert list(row.labels[10:]) == labels
            compared += 1
    assert compared == 1000


def test_the_tutorials_rule_holds_without_real_data_too() -> None:
    for record in (
        {"instruction": "Give three tips.", "input": "", "output": "Sleep.\nWalk."},
        {"instruction": "译成英文", "input": "苹果很新鲜", "output": "The apple is fresh. "},
    ):
        row = renderer().row(record, record["output"])
        assert row is not None
        assert (list(row.ids[10:]), list(row.labels[10:])) == tutorials_ids(record, TOKENIZER)


def test_virtual_tokens_have_ids_from_the_first_on_in_order() -> None:
    own = renderer("[P*2]a{text}[P]b[P*2]{answer}").with_first_virtual_id(1000)
    ids = own.context({"text": "x"})
    assert [token for token in ids if token >= VOCABULARY] == [1000, 1001, 1002, 1003, 1004]


def test_text_between_virtual_tokens_is_tokenised_as_one_string() -> None:
    own = renderer("[P]The {noun} was[P]{answer}")
    assert text_of(own.context({"noun": "film"})) == TOKENIZER("The film was", add_special_tokens=False)["input_ids"]


def test_optional_pieces_leave_no_trace_and_fields_are_stripped() -> None:
    own = renderer()
    for absent in ({}, {"input": ""}, {"input": " \n "}, {"input": None}):
        ids = own.context({"instruction": " Sleep \n", **absent})
        assert TOKENIZER.decode(text_of(ids)) == "Human: Sleep\n\nAssistant: "


def test_blanks_around_label_words_are_kept_and_the_end_token_is_supervised() -> None:
    row = renderer("{text}[P] It was{answer}").row({"text": "Soup"}, " great")
    assert row is not None
    answer = TOKENIZER(" great", add_special_tokens=False)["input_ids"]
    assert list(row.ids[-len(answer) - 1 :]) == [*answer, TOKENIZER.eos_token_id]
    assert [label for label in row.labels if label != IGNORED] == [*answer, TOKENIZER.eos_token_id]


@pytest.mark.parametrize("ending", [False, True])
@pytest.mark.parametrize(
    ("template", "place"),
    [("[P*2]{text}{answer}", 2), ("{text}[P*2]{answer}", 0), ("[bos][P*2]{text}{answer}", 0)],
)
def test_bos_stands_first_or_behind_opening_virtual_tokens_or_where_it_is_named(
    template: str, place: int, ending: bool
) -> None:
    row = renderer(template, beginning_tokenizer(ending)).row({"text": "soup"}, "good")
    assert row is not None
    assert [n for n, token in enumerate(row.ids) if token == 1] == [place]
    assert row.ids.count(2) == 1  # the answer's end and no other


def test_a_tokenizer_without_bos_gets_none() -> None:
    assert 1 not in renderer("[P]{text}{answer}").context({"text": "soup"})


words = st.lists(st.sampled_from(["soup", "film", "很热情", "great!", "a\nb", "["]), max_size=12).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(
    template=st.sampled_from(
        [TUTORIAL, "{instruction}[P*4]{answer}", "[P]{instruction}[P*3][?: {input}]=[P]{answer}", "[P*2]{answer}"]
    ),
    instruction=words,
    context=words,
    answer=words,
    max_length=st.integers(24, 60),
    overlong=st.sampled_from(["cut", "drop"]),
)
def test_training_is_generation_plus_answer_and_limits_hold(
    template: str, instruction: str, context: str, answer: str, max_length: int, overlong: Overlong
) -> None:
    own = renderer(template, max_length=max_length, overlong=overlong, context_limit=max_length + 3)
    record = {"instruction": instruction, "input": context}
    row = own.row(record, answer)
    if row is None:
        assert overlong == "drop"
        return
    supervised = [label for label in row.labels if label != IGNORED]
    generation = own.context(record, reserve=len(supervised) if row.cut else 0)
    assert list(row.ids) == generation + supervised
    assert row.labels == (IGNORED,) * len(generation) + tuple(supervised)
    assert len(text_of(row.ids)) <= max_length
    assert len(row.ids) <= max_length + 3
    virtual = [token for token in row.ids if token >= VOCABULARY]
    assert virtual == list(range(VOCABULARY, VOCABULARY + own.template.num_virtual_tokens))
    assert own.row(record, answer) == row
    if not row.cut:
        assert supervised == own.answer_ids(answer)


def test_the_longest_field_is_cut_first_and_the_rest_stays() -> None:
    own = renderer("{a}|{b}[P]{answer}", max_length=24)
    row = own.row({"a": "soup " * 40, "b": "film"}, "good")
    assert row is not None
    assert row.cut > 0
    assert TOKENIZER.decode(text_of(row.ids)).endswith("|filmgood</s>")
    assert len(text_of(row.ids)) <= 24


def test_an_answer_that_is_too_long_is_cut_without_its_end_or_dropped_or_refused() -> None:
    record = Record({"text": "soup"}, "train.jsonl, line 3")
    cut = renderer("{text}[P]{answer}", max_length=12, overlong="cut").row(record, "film " * 30)
    assert isinstance(cut, Row)
    assert len(text_of(cut.ids)) == 12
    assert cut.ids[-1] != TOKENIZER.eos_token_id
    assert cut.cut > 0
    assert renderer("{text}[P]{answer}", max_length=12, overlong="drop").row(record, "film " * 30) is None
    with pytest.raises(DataError, match=r"train\.jsonl, line 3: its answer has \d+ tokens, and of max_length 12 only"):
        renderer("{text}[P]{answer}", max_length=12).row(record, "film " * 30)


def test_a_template_whose_own_words_are_too_long_says_so() -> None:
    with pytest.raises(TemplateError, match=r"the template's own words take \d+ tokens, and max_length leaves 3"):
        renderer("Human: tell me about {text} now[P]{answer}", max_length=5).context({"text": "soup"}, reserve=2)


def test_a_missing_field_is_named_with_what_is_there() -> None:
    with pytest.raises(
        DataError,
        match=r'^train\.jsonl, line 7 lacks the field "instruction" that the template names; '
        r"it has instructions, output\. "
        r'Did you mean "instructions"\?$',
    ):
        renderer().context(Record({"instructions": "x", "output": "y"}, "train.jsonl, line 7"))


def test_a_field_that_is_no_text_is_refused_and_numbers_are_written() -> None:
    own = renderer("{text}[P]{answer}")
    assert TOKENIZER.decode(text_of(own.context({"text": 12}))) == "12"
    with pytest.raises(DataError, match='the field "text" holds list, and a template takes text'):
        own.context({"text": ["a"]})


def test_rows_that_are_tokenised_already_get_virtual_tokens_in_front() -> None:
    row = renderer("[P*2]{answer}").tokenised_row({"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]})
    assert row.ids == (VOCABULARY, VOCABULARY + 1, 5, 6, 7)
    assert row.labels == (IGNORED, IGNORED, IGNORED, 6, 7)
    with pytest.raises(DataError, match="lists of one length"):
        renderer("[P*2]{answer}").tokenised_row({"input_ids": [5, 6, 7], "labels": [6]})
    with pytest.raises(TemplateError, match=r"go with the template \[P\*10\]\{answer\} and no other"):
        renderer().tokenised_row({"input_ids": [5], "labels": [5]})


def test_a_preview_decodes_back_what_the_model_reads() -> None:
    segments = renderer("[P*2]Human: {instruction}\n{answer}").preview({"instruction": "Walk"}, "Yes")
    assert [(segment.kind, segment.text) for segment in segments] == [
        ("virtual", "[P0][P1]"),
        ("text", "Human: Walk\n"),
        ("answer", "Yes"),
        ("special", "</s>"),
    ]
