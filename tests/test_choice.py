"""Choices among a record's own texts, and the figures that judge labels: naive sums, by hand and by scikit-learn."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from sklearn import metrics as sklearn_metrics
from tiny_models import tiny_model, tiny_tokenizer

from ptune.config.task import ChoiceConfig, ClassificationConfig
from ptune.errors import DataError, TemplateError
from ptune.models.backbone import Backbone
from ptune.records.record import Record
from ptune.tasks.calibration import calibration_error, reliability
from ptune.tasks.choice import Choice
from ptune.tasks.metrics import confusion, macro_f1, micro_f1
from ptune.tasks.registry import task_for
from ptune.template import Template

RECORDS = [
    {"premise": "The soup was cold", "one": "the waiter was slow", "two": "a door", "label": 0},
    {"premise": "苹果很新鲜", "one": "好", "two": "酒店的房间有点小", "label": "two"},
    {"premise": "A quiet film " * 5, "one": "great", "two": "terrible soup", "label": "great"},
]


def choice(family: str, dtype: torch.dtype = torch.float64, **config: Any) -> tuple[Backbone, Choice]:
    backbone = Backbone(tiny_model(family, dtype=dtype), tiny_tokenizer(family), family)
    template = "{premise} so{answer}." if family == "bert" else "{premise} so{answer}"
    task = task_for(backbone, ChoiceConfig(choices=("one", "two"), **config), Template.parse(template))
    assert isinstance(task, Choice)
    return backbone, task


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "bert", "t5"])
def test_scores_are_each_choice_s_own_log_probability(family: str, normalise: bool) -> None:
    backbone, task = choice(family, normalise=normalise)
    tokenizer = backbone.tokenizer
    answers = task.predict(backbone, RECORDS, batch_size=4)
    for record, answer in zip(RECORDS, answers, strict=True):
        scores = []
        for name in ("one", "two"):
            said = tokenizer(f" {record[name]}", add_special_tokens=False)["input_ids"]
            text = tokenizer(f"{str(record['premise']).strip()} so", add_special_tokens=False)["input_ids"]
            if family == "gpt2":
                logits = backbone.model(torch.tensor([[*text, *said]])).logits[0, len(text) - 1 : -1]
            elif family == "t5":
                ids = torch.tensor([[*text, 2]])
                logits = backbone.model(ids, decoder_input_ids=torch.tensor([[0, *said[:-1]]])).logits[0]
            else:
                end = tokenizer(".", add_special_tokens=False)["input_ids"]
                ids = torch.tensor([[1, *text, *[tokenizer.mask_token_id] * len(said), *end, 2]])
                logits = backbone.model(ids).logits[0, 1 + len(text) : 1 + len(text) + len(said)]
            chosen = logits.log_softmax(-1)[torch.arange(len(said)), torch.tensor(said)]
            scores.append(chosen.mean() if normalise else chosen.sum())
        expected = torch.stack(scores).softmax(-1).tolist()
        assert list(answer["probabilities"].values()) == pytest.approx(expected, rel=1e-4)


def test_the_right_choice_is_named_by_number_field_or_text() -> None:
    _, task = choice("gpt2")
    assert [task.target(record) for record in RECORDS] == [0, 1, 0]
    assert task.answer(RECORDS[1]) == " 酒店的房间有点小"
    for label, found in ((2, '"2"'), ("three", '"three"'), (True, '"true"')):
        with pytest.raises(DataError, match=f"rows.jsonl, line 3: {found} in the field .* is no choice"):
            task.target(Record({**RECORDS[0], "label": label}, "rows.jsonl, line 3"))
    with pytest.raises(DataError, match='lacks the field "label"'):
        task.target({"one": "a", "two": "b"})
    with pytest.raises(DataError, match='lacks the choice "two"'):
        task.rows({"premise": "x", "one": "a"})
    with pytest.raises(DataError, match='the choice "two" is empty'):
        task.rows({"premise": "x", "one": "a", "two": "  "})


def test_a_label_that_means_two_choices_is_refused_until_a_setting_says_which() -> None:
    record = Record({"premise": "1 and 1 is", "one": "1", "two": "2", "three": "0", "label": "1"}, "sums.jsonl, line 4")
    found = 'sums.jsonl, line 4: "1" in the field "label" is the choice "two" by its number and "one" by its text'
    with pytest.raises(DataError, match=f"{found}; say which it is as task.label_by"):
        choice("gpt2")[1].target(record)
    for label_by, right in (("number", 1), ("text", 0)):
        assert choice("gpt2", label_by=label_by)[1].target(record) == right
    assert choice("gpt2")[1].target(record | {"two": "1", "one": "2"}) == 1  # both ways the same choice
    with pytest.raises(DataError, match='"1" in the field "label" is no choice'):
        choice("gpt2", label_by="field")[1].target(record)
    twice = Record(record | {"one": "so", "two": "so", "label": "so"}, "sums.jsonl, line 5")
    with pytest.raises(DataError, match='line 5: "so" .* is the choice "one" by its text and "two" by its text'):
        choice("gpt2")[1].target(twice)


def test_loss_is_the_cross_entropy_of_the_scores() -> None:
    backbone, task = choice("gpt2", normalise=True)
    examples = [task.example(record) for record in RECORDS]
    loss = task.loss(backbone, examples, 0) / len(examples)
    answers = task.predict(backbone, RECORDS, batch_size=1)
    right = [list(a["probabilities"].values())[e.target] for a, e in zip(answers, examples, strict=True)]
    assert float(loss) == pytest.approx(-float(torch.tensor(right, dtype=torch.float64).log().mean()), rel=1e-5)
    evaluated = task.evaluate(backbone, RECORDS, batch_size=2)
    assert evaluated["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert evaluated["accuracy"] == pytest.approx(sum(p > 0.5 for p in right) / 3)


def test_metrics_are_scikit_learn_s() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 5, (300,), generator=generator)
    predicted = torch.where(torch.rand(300, generator=generator) < 0.6, targets, torch.randint(0, 6, (300,)))
    one, other = targets.tolist(), predicted.tolist()
    assert macro_f1(one, other) == pytest.approx(sklearn_metrics.f1_score(one, other, average="macro"))
    assert micro_f1(one, other) == pytest.approx(sklearn_metrics.accuracy_score(one, other))
    expected = sklearn_metrics.f1_score(one, other, labels=[0, 1, 3, 4, 5], average="micro")
    assert micro_f1(one, other, negative=2) == pytest.approx(expected)
    assert micro_f1([2, 2], [2, 2], negative=2) == 0.0
    assert confusion(one, other, 6) == sklearn_metrics.confusion_matrix(one, other, labels=range(6)).tolist()


def test_calibration_error_is_the_gap_between_confidence_and_accuracy() -> None:
    sure = torch.tensor([[0.9, 0.1]] * 10)
    assert calibration_error(reliability(sure, torch.tensor([0] * 9 + [1]))) == pytest.approx(0.0, abs=1e-6)
    assert calibration_error(reliability(sure, torch.tensor([0] * 5 + [1] * 5))) == pytest.approx(0.4, abs=1e-6)
    both = torch.tensor([[0.9, 0.1]] * 2 + [[0.4, 0.6]] * 2)
    assert calibration_error(reliability(both, torch.tensor([0, 1, 1, 1]))) == pytest.approx((0.4 + 0.4) / 2, abs=1e-6)


def test_label_weights_and_the_negative_label_count() -> None:
    backbone = Backbone(tiny_model("gpt2"), tiny_tokenizer(), "tiny")
    words = {"a": " good", "b": " bad", "none": " film"}
    template = Template.parse("{tokens} is{answer}")
    plain = task_for(backbone, ClassificationConfig(verbalizer=words), template)
    weighted = task_for(backbone, ClassificationConfig(verbalizer=words, label_weights={"b": 3.0}), template)
    records = [{"tokens": ["A", "quiet", "film"], "label": label} for label in words]
    for record, factor in zip(records, (1, 3, 1), strict=True):
        losses = [float(task.loss(backbone, [task.example(record)], 0)) for task in (plain, weighted)]
        assert losses[1] == pytest.approx(factor * losses[0], rel=1e-5)
    relation = ClassificationConfig(verbalizer=words, negative_label="none", metric="micro_f1")
    metrics = task_for(backbone, relation, template).evaluate(backbone, records, batch_size=3)
    assert 0 <= metrics["micro_f1"] <= 1
    with pytest.raises(ValueError, match="'c' is no label of the verbalizer"):
        ClassificationConfig(verbalizer=words, negative_label="c")
    with pytest.raises(ValueError, match="micro_f1 without a negative_label"):
        ClassificationConfig(verbalizer=words, metric="micro_f1")


def test_a_list_of_words_is_read_as_a_text() -> None:
    backbone = Backbone(tiny_model("gpt2"), tiny_tokenizer(), "tiny")
    task = task_for(backbone, ClassificationConfig(verbalizer={"a": "x", "b": "y"}), Template.parse("{tokens}{answer}"))
    for words, text in ((["A", "quiet", "film", "."], "A quiet film ."), (list("高勇：男 x"), "高勇：男   x")):
        assert backbone.tokenizer.decode(task.renderer.context({"tokens": words})) == text


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_choice_that_has_no_room_is_named(family: str) -> None:
    _, task = choice(family)
    task = task.with_renderer(dataclasses.replace(task.renderer, max_length=16))
    with pytest.raises(TemplateError, match='a record: .*or shorten the choice "two", which is the longest$'):
        task.example(Record({"premise": "cold", "one": "a door", "two": "soup " * 20, "label": 0}))
