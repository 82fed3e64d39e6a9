"""Records to ids: the tutorial's own ids, training = generation + answer, virtual tokens in place, limits held."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCABULARY, tiny_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from ptune.config.run import Overlong
from ptune.errors import DataError, TemplateError
from ptune.records.record import Record
from ptune.rendering.batch import IGNORED, Row
from ptune.rendering.preview import preview
from ptune.rendering.renderer import Renderer
from ptune.template import Bos, Optional, Template, escape

TUTORIAL = r"[P*10]Human: {instruction}[?\n{input}]\n\nAssistant: {answer}"
TOKENIZER = tiny_tokenizer()


def renderer(template: str = TUTORIAL, tokenizer: PreTrainedTokenizerFast = TOKENIZER, **limits: Any) -> Renderer:
    return Renderer(Template.parse(template), tokenizer, vocabulary_size=VOCABULARY, **limits)


def beginning_tokenizer(ending: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer that puts bos in front by itself, and eos behind where ``ending``."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>" if ending else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def bert_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with [CLS] and [SEP], without bos and eos."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "soup", "good"]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def trained_tokenizer(family: str, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE that splits words as GPT-2 or BLOOM does and adds no special tokens by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    end, special = "<|endoftext|>", ["<|endoftext|>"]
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if family == "bloom":
        end, special = "</s>", ["<unk>", "<s>", "</s>", "<pad>"]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r" ?[^(\s|[.,!?…。，、।۔،])]+"), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=special[-1])


def text_of(ids: Any) -> list[int]:
    return [token for token in ids if token < VOCABULARY]


def tutorials_ids(record: dict[str, str], tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """The rule of the tutorial's data preparation: a question, joined and stripped, then the answer."""
    question = f"Human: {record['instruction']}\n{record['input']}".strip() + "\n\nAssistant: "
    asked = tokenizer(question)["input_ids"]
    answered = tokenizer(record["output"] + tokenizer.eos_token)["input_ids"]
    return asked + answered, [IGNORED] * len(asked) + answered


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_alpaca_rows_are_the_tutorials_to_the_last_id(real_data: Path, family: str) -> None:
    files = [real_data / "alpaca_zh" / f"{split}.jsonl" for split in ("train", "dev", "test")]
    records = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(records) == 1000
    tokenizer = trained_tokenizer(family, [" ".join(record.values()) for record in records])
    whole, limited = (
        Renderer(Template.parse(TUTORIAL), tokenizer, vocabulary_size=5000, max_length=limit, overlong="cut")
        for limit in (None, 256)
    )
    within = 0
    for record in records:
        expected = tutorials_ids(record, tokenizer)
        row = whole.row(record, record["output"])
        assert row is not None
        assert row.ids[:10] == tuple(range(5000, 5010))
        assert (list(row.ids[10:]), list(row.labels[10:])) == expected
        cut = limited.row(record, record["output"])
        assert cut is not None
        if len(expected[0]) <= 256:
            assert cut == row
            within += 1
        else:  # the tutorial cuts the end whatever it is; here the question gives way first
            assert len(cut.ids) <= 266
            assert cut.cut == len(expected[0]) + 10 - len(cut.ids)
    assert 500 < within < 1000


def test_the_tutorials_rule_holds_without_real_data_too() -> None:
    for record in (
        {"instruction": "Give three tips.", "input": "", "output": "Sleep.\nWalk."},
        {"instruction": "译成英文 ", "input": "苹果很新鲜", "output": "The apple is fresh. "},
        {"instruction": "译成英文 ", "input": "", "output": ""},
        {"instruction": "Sort.\n", "input": " film\nsoup \n", "output": " great"},
    ):
        row = renderer().row(record, record["output"])
        assert row is not None
        assert (list(row.ids[10:]), list(row.labels[10:])) == tutorials_ids(record, TOKENIZER)


def test_virtual_tokens_have_ids_from_the_first_on_in_order() -> None:
    own = dataclasses.replace(renderer("[P*2]a{text}[P]b[P*2]{answer}"), first_virtual_id=1000)
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
    [
        ("[P*2]{text}{answer}", 2),
        ("[P*2][P]{text}{answer}", 3),
        ("[P*2]{answer}", 2),
        ("{text}[P*2]{answer}", 0),
        ("[bos][P*2]{text}{answer}", 0),
        ("[P]It[bos]{text}{answer}", 1 + len(TOKENIZER.tokenize("It"))),
    ],
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


def test_cls_stands_where_bos_would_and_no_sep_is_added() -> None:
    tokenizer = bert_tokenizer()
    record = {"text": "soup"}
    assert renderer("[P*2]{text}{answer}", tokenizer).context(record) == [VOCABULARY, VOCABULARY + 1, 2, 5]
    assert renderer("[bos][P]{text}{answer}", tokenizer).context(record) == [2, VOCABULARY, 5]
    row = renderer("{text}[P]{answer}", tokenizer).row(record, "good", end=False)
    assert row == Row((2, 5, VOCABULARY, 6), (IGNORED, IGNORED, IGNORED, 6))


def test_a_tokenizer_that_lacks_a_token_which_is_asked_for_is_refused() -> None:
    with pytest.raises(TemplateError, match="an answer ends with the tokenizer's end token, and this tokenizer has no"):
        renderer("[P]{text}{answer}", bert_tokenizer()).row({"text": "soup"}, "good")
    bare = tiny_tokenizer()
    bare.bos_token = None
    with pytest.raises(TemplateError, match=r"the template names \[bos\], and this tokenizer has no such token"):
        renderer("[bos]{text}{answer}", bare)


blanks = st.sampled_from(["", " ", "\n", "  "])
words = st.lists(st.sampled_from(["soup", "film", "很热情", "great!", "a\nb", "[", "{", " "]), max_size=12).map(
    " ".join
)
short = st.text("aé很 \n[]{}\\?P*", max_size=4).map(escape)
optional_pieces = st.builds("[?{}{{{}}}{}]".format, short, st.sampled_from("bc"), short)
runs = st.integers(1, 5).map("[P*{}]".format)
Limits = tuple[int | None, int | None]
TOKENIZERS = {"plain": TOKENIZER, "bos": beginning_tokenizer(), "bos and eos": beginning_tokenizer(ending=True)}


@st.composite
def templates(draw: st.DrawFn) -> str:
    pieces = draw(st.lists(st.one_of(short, st.just("{a}"), optional_pieces, runs), max_size=7))
    if draw(st.booleans()):
        pieces.insert(draw(st.integers(0, len(pieces))), "[bos]")
    return "".join(pieces) + "{answer}"


@settings(max_examples=200, deadline=None)
@given(
    source=templates(),
    tokenizer=st.sampled_from(sorted(TOKENIZERS)),
    record=st.fixed_dictionaries({"a": words}, optional={"b": words, "c": words}),
    answer=words,
    limits=st.tuples(st.none() | st.integers(1, 60), st.none() | st.integers(1, 70)),
    overlong=st.sampled_from(["cut", "drop", "error"]),
)
def test_training_is_generation_plus_answer_and_limits_hold(
    source: str, tokenizer: str, record: dict[str, str], answer: str, limits: Limits, overlong: Overlong
) -> None:
    max_length, context_limit = limits
    own = renderer(source, TOKENIZERS[tokenizer], max_length=max_length, context_limit=context_limit, overlong=overlong)
    unlimited = renderer(source, TOKENIZERS[tokenizer])
    whole, answer_ids = unlimited.context(record), unlimited.answer_ids(answer)
    virtual = own.template.num_virtual_tokens
    text_limit = min(max_length or 10**9, (context_limit or 10**9) - virtual)
    fits = len(whole) - virtual + len(answer_ids) <= text_limit
    try:
        row = own.row(record, answer)
    except TemplateError:
        assert len(unlimited.context({"a": ""})) - virtual >= text_limit  # the template's own words alone
        return
    except DataError:
        assert overlong == "error"
        assert not fits
        return
    if row is None:
        assert overlong == "drop"
        assert not fits
        return
    supervised = [label for label in row.labels if label != IGNORED]
    assert supervised
    assert supervised == answer_ids[: len(supervised)]
    assert supervised == answer_ids or overlong == "cut"
    generation = own.context(record, reserve=len(supervised))
    assert list(row.ids) == generation + supervised
    assert row.labels == (IGNORED,) * len(generation) + tuple(supervised)
    assert len(text_of(row.ids)) <= text_limit
    assert [token for token in row.ids if token >= VOCABULARY] == list(range(VOCABULARY, VOCABULARY + virtual))
    assert row.ids.count(1) == (1 if tokenizer != "plain" or Bos() in own.template.pieces else 0)
    assert own.row(record, answer) == row
    assert row.cut == len(whole) + len(answer_ids) - len(row.ids)
    if fits:
        assert generation == own.context(record) == whole


@settings(max_examples=100, deadline=None)
@given(source=templates(), a=words, emptiness=st.sampled_from([None, "", " ", " \n\t"]))
def test_an_optional_piece_that_is_not_used_leaves_no_trace(source: str, a: str, emptiness: str | None) -> None:
    pieces = Template.parse(source).pieces
    without = Template(source, tuple(piece for piece in pieces if not isinstance(piece, Optional)))
    own = Renderer(without, TOKENIZER, vocabulary_size=VOCABULARY)
    expected = own.context({"a": a})
    assert renderer(source).context({"a": a}) == expected
    assert renderer(source).context({"a": a, "b": emptiness, "c": emptiness}) == expected


@given(st.text(max_size=30), blanks)
def test_escaped_text_renders_to_itself(text: str, blank: str) -> None:
    ids = renderer(f"[P]{escape(blank + text + blank)}{{answer}}").context({})
    assert ids == [VOCABULARY, *TOKENIZER(blank + text + blank, add_special_tokens=False)["input_ids"]]
    assert TOKENIZER.decode(ids[1:]) == blank + text + blank


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


@pytest.mark.parametrize("overlong", ["cut", "drop", "error"])
def test_a_template_that_leaves_no_room_is_an_error_however_answers_are_cut(overlong: Overlong) -> None:
    with pytest.raises(TemplateError, match=r"take (\d+) tokens, the answer needs 1, and the limit is max_length \1;"):
        renderer("soup[P]{answer}", max_length=len(TOKENIZER.tokenize("soup")), overlong=overlong).row({}, "good")
    with pytest.raises(TemplateError, match="is the backbone's 50 less 50 virtual tokens; .* use fewer virtual tokens"):
        renderer("[P*50]{text}{answer}", context_limit=50, overlong=overlong).row({"text": "soup"}, "good")


def test_a_template_whose_own_words_are_too_long_says_so() -> None:
    own = renderer("Human: tell me about {text} now[P]{answer}", max_length=5)
    sentence = (
        r"^a record: the template's own words take \d+ tokens, the answer needs 2, and the limit is max_length 5; "
        "shorten the template or raise max_length$"
    )
    with pytest.raises(TemplateError, match=sentence):
        own.context({"text": "soup"}, reserve=2)


def test_a_long_text_is_cut_without_a_warning_about_its_length(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 8
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)  # transformers keeps its messages from the root
    level = logger.level
    logger.setLevel(logging.WARNING)  # the command line, had it run in this process, would have made it quieter
    try:
        tokenizer("soup " * 40)
        assert "longer than the specified maximum" in caplog.text
        caplog.clear()
        tokenizer.deprecation_warnings.clear()  # each is given once
        renderer("{text}[P]{answer}", tokenizer, max_length=20).row({"text": "soup " * 40}, "good")
    finally:
        logger.setLevel(level)
        logger.removeHandler(caplog.handler)
    assert not caplog.text


def test_neighbouring_fields_lose_the_blanks_at_their_two_ends_together() -> None:
    own = renderer("<{a}{b}>[P]{answer}")
    for a, b, text in ((" x ", "", "<x>"), ("", " y ", "<y>"), (" x ", " y ", "<x  y>"), (" ", " ", "<>")):
        assert TOKENIZER.decode(text_of(own.context({"a": a, "b": b}))) == text


def test_a_missing_field_is_named_with_what_is_there() -> None:
    with pytest.raises(
        DataError,
        match=r'^train\.jsonl, line 7 lacks the field "instruction" that the template names '
        r"and has instructions, output\. "
        r'Did you mean "instructions"\?$',
    ):
        renderer().context(Record({"instructions": "x", "output": "y"}, "train.jsonl, line 7"))


def test_a_field_that_is_no_text_is_refused_and_numbers_are_written() -> None:
    own = renderer("{text}[P]{answer}")
    assert TOKENIZER.decode(text_of(own.context({"text": 12}))) == "12"
    with pytest.raises(DataError, match='the field "text" holds list, and a template takes text'):
        own.context({"text": [1, 2]})


def test_rows_that_are_tokenised_already_get_virtual_tokens_in_front() -> None:
    row = renderer("[P*2]{answer}").tokenised_row({"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]})
    assert row is not None
    assert row.ids == (VOCABULARY, VOCABULARY + 1, 5, 6, 7)
    assert row.labels == (IGNORED, IGNORED, IGNORED, 6, 7)
    with pytest.raises(DataError, match="lists of one length"):
        renderer("[P*2]{answer}").tokenised_row({"input_ids": [5, 6, 7], "labels": [6]})
    with pytest.raises(TemplateError, match=r"go with the template \[P\*10\]\{answer\} and no other"):
        renderer().tokenised_row({"input_ids": [5], "labels": [5]})


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"input_ids": [5, VOCABULARY], "labels": [5, 6]}, f"input_ids holds {VOCABULARY}, and the model knows 0 to "),
        ({"input_ids": [5, -1], "labels": [5, 6]}, "input_ids holds -1, and the model knows"),
        (
            {"input_ids": [5, 6], "labels": [-1, 6]},
            "labels holds -1, and .*, or -100 where nothing is learnt; tokenise",
        ),
        ({"input_ids": [5, 6], "labels": [5, VOCABULARY]}, f"labels holds {VOCABULARY}, and the model knows"),
        ({"input_ids": "[5, 6]", "labels": [5, 6]}, r"expected a list of integers as input_ids, .* '\[5, 6\]'; write"),
        ({"input_ids": [5, 6], "labels": None}, "expected a list of integers as labels, .* found None; write"),
        ({"input_ids": [5, 6]}, "expected a list of integers as labels, .* found none; write"),
        ({"input_ids": [5, True], "labels": [5, 6]}, r"expected a list of integers as input_ids, .* found \[5, True\]"),
        ({"input_ids": [5.0, 6], "labels": [5, 6]}, r"expected a list of integers as input_ids, .* found \[5.0, 6\]"),
    ],
)
def test_rows_that_are_tokenised_already_hold_ids_of_the_model(values: dict[str, Any], found: str) -> None:
    with pytest.raises(DataError, match=rf"^train\.jsonl, line 2: {found}"):
        renderer("[P*2]{answer}").tokenised_row(Record(values, "train.jsonl, line 2"))


def test_rows_that_are_tokenised_already_may_be_tensors() -> None:
    record = {"input_ids": torch.tensor([5, 6]), "labels": torch.tensor([IGNORED, 6])}
    assert renderer("[P]{answer}").tokenised_row(record) == Row((VOCABULARY, 5, 6), (IGNORED, IGNORED, 6))


def test_rows_that_are_tokenised_already_get_no_second_bos() -> None:
    row = renderer("[P]{answer}", beginning_tokenizer()).tokenised_row({"input_ids": [1, 5], "labels": [IGNORED, 5]})
    assert row == Row((VOCABULARY, 1, 5), (IGNORED, IGNORED, 5))


def test_rows_that_are_tokenised_already_keep_to_the_limits() -> None:
    record = Record({"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, "train.jsonl, line 2")
    cut = renderer("[P*2]{answer}", context_limit=4, overlong="cut").tokenised_row(record)
    assert cut == Row((VOCABULARY, VOCABULARY + 1, 5, 6), (IGNORED, IGNORED, 5, 6), cut=1)
    assert renderer("[P*2]{answer}", max_length=2, overlong="drop").tokenised_row(record) is None
    with pytest.raises(DataError, match=r"train\.jsonl, line 2: its answer has 3 tokens, and of max_length 2 only 2"):
        renderer("[P*2]{answer}", max_length=2).tokenised_row(record)
    with pytest.raises(TemplateError, match="use fewer virtual tokens"):
        renderer("[P*2]{answer}", context_limit=2, overlong="drop").tokenised_row(record)


def test_a_preview_decodes_back_what_the_model_reads() -> None:
    tutorial = renderer("[P*2]Human: {instruction}\n{answer}")
    segments = preview(tutorial, tutorial.row({"instruction": "Walk"}, "Yes"))
    assert [(segment.kind, segment.text) for segment in segments] == [
        ("virtual", "[P0][P1]"),
        ("text", "Human: Walk\n"),
        ("answer", "Yes</s>"),
    ]
    review = renderer("{text}[P]{answer}")
    words_alone = preview(review, review.row({"text": "Walk"}, " great", end=False))
    assert [segment.kind for segment in words_alone] == ["text", "virtual", "answer"]
