"""Free text as a task: its loss, its answers, its metrics."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer

from ptune.config.task import GenerationConfig
from ptune.errors import DataError, TemplateError
from ptune.models.backbone import Backbone
from ptune.records.record import Record
from ptune.rendering.renderer import Renderer
from ptune.tasks.generation import Generation, rouge_l, score_texts
from ptune.tasks.registry import build_task, task_for
from ptune.template import Template

RECORDS = [
    {"instruction": "Give three tips", "input": "", "output": "Sleep, walk."},
    {"instruction": "Name it", "input": "苹果很新鲜", "output": "苹果"},
    {"instruction": "Say nothing much", "input": "", "output": "The film was a quiet wonder, and the waiter."},
]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone(tiny_model("llama", dtype=torch.float64), tiny_tokenizer(), "tiny")


def build(
    backbone: Backbone, template: str = "Human: {instruction}[?\n{input}]\nAssistant: {answer}", **config: str
) -> Generation:
    renderer = Renderer(Template.parse(template), backbone.tokenizer, vocabulary_size=backbone.vocabulary_size)
    task = build_task(GenerationConfig.model_validate(config | {"max_new_tokens": 6}), renderer)
    assert isinstance(task, Generation)
    return task


def test_the_loss_is_transformers_own_over_the_answer_and_its_end(backbone: Backbone) -> None:
    task = build(backbone)
    examples = [task.example(record) for record in RECORDS]
    assert all(example is not None for example in examples)
    total = float(task.loss(backbone, [example for example in examples if example], 0))
    expected, weight = 0.0, 0
    for example in examples:
        assert example is not None
        row = example.rows[0]
        output = backbone.model(input_ids=torch.tensor([row.ids]), labels=torch.tensor([row.labels]))
        supervised = sum(label >= 0 for label in row.labels)
        expected += float(output.loss) * supervised
        weight += supervised
        assert example.weight == supervised
    assert total == pytest.approx(expected, rel=1e-6)
    metrics = task.evaluate(backbone, RECORDS, batch_size=2)
    assert metrics["loss"] == pytest.approx(total / weight, rel=1e-9)
    assert metrics["perplexity"] == pytest.approx(math.exp(total / weight), rel=1e-9)


def test_answers_keep_the_records_order_whatever_the_batch(backbone: Backbone) -> None:
    task = build(backbone)
    texts = [answer["text"] for answer in task.predict(backbone, RECORDS, batch_size=8)]
    assert texts == [task.predict(backbone, [record], batch_size=1)[0]["text"] for record in RECORDS]
    assert len(set(texts)) > 1


def test_a_metric_that_needs_answers_is_reported_beside_the_loss(backbone: Backbone) -> None:
    metrics = build(backbone, metric="rouge_l").evaluate(backbone, RECORDS, batch_size=8)
    said = {"loss", "perplexity", "rouge_1", "rouge_2", "rouge_l", "exact_match", "prediction_share"}
    assert set(metrics) == said
    assert 0 <= metrics["rouge_l"] < 1


def test_records_that_are_tokenised_already_are_taken_as_they_are(backbone: Backbone) -> None:
    task = build(backbone, "[P*2]{answer}")
    example = task.example({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]})
    assert example is not None
    assert (example.rows[0].ids[2:], example.weight) == ((5, 6, 7), 2)
    assert task.shown({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}) == example.rows[0]
    with pytest.raises(TemplateError, match="tokenised already"):
        build(backbone).example({"input_ids": [5], "labels": [5]})


@pytest.mark.parametrize("ids", [[], [5, 6, 7]], ids=["empty", "nothing-supervised"])
def test_a_record_that_teaches_nothing_is_named(backbone: Backbone, ids: list[int]) -> None:
    record = Record({"input_ids": ids, "labels": [-100] * len(ids)}, "a.jsonl, line 2")
    with pytest.raises(DataError, match=r"^a\.jsonl, line 2 supervises no token, .*; leave the record out$"):
        build(backbone, "[P*2]{answer}").example(record)


def test_what_is_too_long_for_anything_to_be_learnt_is_left_out_and_all_of_it_cannot_be_scored(
    backbone: Backbone,
) -> None:
    template = Template.parse("[P*2]{answer}")
    for overlong in ("cut", "drop"):
        task = task_for(backbone, GenerationConfig(), template, max_length=2, overlong=overlong)
        long = {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}
        assert task.example(long) is None
        with pytest.raises(DataError, match=r"^all 2 records are left out as longer than 2 tokens .*; shorten them"):
            task.evaluate(backbone, [long, long], batch_size=2)


@pytest.mark.parametrize(("value", "found"), [(5, "a number"), (0.5, "a number"), (True, "bool"), (["y"], "list")])
def test_an_answer_that_is_no_text_is_named_as_that(backbone: Backbone, value: object, found: str) -> None:
    said = f'^a.jsonl, line 2: its answer in the field "output" is {found}, not a text; put quotes around it'
    with pytest.raises(DataError, match=said):
        build(backbone).example(Record({"instruction": "x", "output": value}, "a.jsonl, line 2"))


def test_a_record_without_its_answer_names_the_field_and_the_near_one(backbone: Backbone) -> None:
    with pytest.raises(
        DataError,
        match=r'^a\.jsonl, line 2 has no answer: it lacks text in the field "output" and has instruction, outputs; '
        r'name the right one as task\.answer_field\. Did you mean "outputs"\?$',
    ):
        build(backbone).example(Record({"instruction": "x", "outputs": "y"}, "a.jsonl, line 2"))


def test_rouge_l_counts_words_and_han_characters() -> None:
    assert rouge_l("the cat sat", "the cat sat") == 1.0
    assert rouge_l("police killed the gunman", "police kill the gunman") == pytest.approx(2 * 3 / 8)
    assert rouge_l("苹果很新鲜", "苹果新鲜") == pytest.approx(2 * 4 / 9)
    assert rouge_l("", "苹果") == 0.0
    assert rouge_l("?!", "") == 1.0


def test_bleu_and_exact_match() -> None:
    references = ["the waiter brought the wrong soup twice", "这家店的苹果很新鲜"]
    assert score_texts("bleu", references, references) == pytest.approx(100.0)
    assert score_texts("bleu", ["a", "b"], references) < 1
    assert score_texts("exact_match", [" " + references[0], "x"], references) == 0.5
